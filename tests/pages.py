"""Runs pages of the documentation, each in a process of its own that is forked once the heavy imports are done.

Alone a page takes seven seconds before its first line of training; a process that has imported what they all import
takes one. What a page sees is what a reader's process sees: nothing has run in it yet but imports.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 240


class Runner:
    """A process that forks one for each page; `with Runner() as run: run(folder)` runs `folder/page.py` in `folder`."""

    def __enter__(self) -> Runner:
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        env["CUDA_VISIBLE_DEVICES"] = ""  # what the imports initialise on a GPU does not outlive a fork
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pages"], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def __call__(self, folder: Path) -> tuple[int, str, str]:
        """The exit status of the page, and what it wrote to stdout and stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(folder, file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], LIMIT_S + 60)
        assert ready, "the process that forks does not answer"
        return int(self._process.stdout.readline()), (folder / "out").read_text(), (folder / "err").read_text()


def run_page(folder: str) -> None:
    """Become the page: its folder, its output, its end."""
    signal.alarm(LIMIT_S)
    os.chdir(folder)
    for number, name in enumerate(("out", "err"), start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    runpy.run_path("page.py", run_name="__main__")
    sys.exit()


def main() -> None:
    for name in ("trl.experimental.cpo", "trl.experimental.orpo", "aligntune.backends.trl.build",
                 "aligntune.core.run_dir", "aligntune.core.trainer", "matplotlib.pyplot",
                 "torch.utils.tensorboard"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported stays shared with the children
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            run_page(line.rstrip("\n"))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
