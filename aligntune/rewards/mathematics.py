r"""`math`: does the answer mean the same as the reference? Judged by math-verify, in a process of its own.

The grade comes back in bounded time from any thread: see `_math_worker` for why that takes a process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.errors import AlignTuneError, ConfigError
from aligntune.rewards.answers import HASHES, final_answer, marked_answer, without_thinking
from aligntune.rewards.columns import completion_text, reference_column, references, shown

logger = logging.getLogger(__name__)

# Words, which SymPy would take for products of letters ("no" and "on" alike). Two letters may be a product.
WORDS = re.compile(r"(?!(?:pi|inf|infinity)\b)(?:no|[^\W\d_]{3,})(?:[ '-][^\W\d_]+)*\.?", re.IGNORECASE)


class _Grader:
    """One worker process; started at the first request, and again after it was killed over a limit."""

    def __init__(self, cpu_seconds: float, memory_bytes: int) -> None:
        self.cpu_seconds = cpu_seconds
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: without it the folder of the script, this package, would come first in the worker's sys.path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("_math_worker.py"))]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(
            [*command, str(self.cpu_seconds), str(self.memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        first = self._read(process, wall_seconds=120.0)
        if first is None or "ready" not in first:
            process.kill()
            process.wait()
            why = "it did not start" if first is None else first["error"]
            raise AlignTuneError(f"the process that runs math-verify failed: {why}; pip install math-verify")
        return process

    def _read(self, process: subprocess.Popen[bytes], wall_seconds: float) -> dict[str, Any] | None:
        """The next reply; None if the process ended or said nothing for `wall_seconds`."""
        assert process.stdout is not None
        deadline = time.monotonic() + wall_seconds
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    return None
                line += chunk
        return json.loads(line)

    def same(self, gold: str, text: str, *, isolated: bool) -> bool | None:
        """Whether the two mean the same; None if `gold` is not mathematics; False if it took too long to say."""
        request = json.dumps({"gold": gold, "text": text, "isolated": isolated}) + "\n"
        with self._lock:
            for _ in range(2):  # once more if something else ended the worker
                reply, code = self._ask(request.encode())
                if reply is not None:
                    return reply["same"]
                if code == -signal.SIGPROF:
                    break
        why = f"within {self.cpu_seconds:g} s of CPU time" if code == -signal.SIGPROF else f"(the worker ended: {code})"
        logger.warning("math: no grade for %s against %s %s; it scores 0", shown(text), shown(gold), why)
        return False

    def _ask(self, request: bytes) -> tuple[dict[str, Any] | None, int | None]:
        """The reply, or None and how the worker ended."""
        if self._process is None or self._owner != os.getpid():  # after a fork the pipes belong to the parent
            self._process, self._owner = self._start(), os.getpid()
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        # The worker ends itself by CPU time. The wall clock only catches one that hangs without computing.
        reply = self._read(process, wall_seconds=60.0 + 20 * self.cpu_seconds)
        if reply is None:
            self._stop()
        return reply, process.returncode

    def _stop(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # what was not read of the last request
                    pipe.close()
        self._process = None

    def stop(self) -> None:
        """End the worker; the next request starts another."""
        with self._lock:
            self._stop()


_GRADERS: dict[tuple[float, int], _Grader] = {}


def _grader(cpu_seconds: float, memory_bytes: int) -> _Grader:
    key = (cpu_seconds, memory_bytes)
    if key not in _GRADERS:
        _GRADERS[key] = _Grader(cpu_seconds, memory_bytes)
        atexit.register(_GRADERS[key].stop)
    return _GRADERS[key]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip().rstrip(".").casefold()


@dataclass(frozen=True)
class MathVerify:
    r"""1.0 if the completion's answer equals the reference as mathematics, else 0.0; None where the reference is null.

    The answer is the completion's last `<answer>`, `\boxed{}` or `####`; without such a mark, what math-verify finds in
    the text ("the answer is ...", else the last formula or number). Thinking is not read, and thinking that was never
    closed has no answer. The reference may be a plain number, LaTeX, or a whole worked solution that marks its answer
    (GSM8K's `#### 42`, a `\boxed{}`). A reference that is a word is compared as text, without regard to case.

    | reference | completion | value |
    |---|---|---|
    | `Six sevens.\n#### 42` | `It is \boxed{42.0}` | 1.0 |
    | `1/2` | `<think>0.4?</think>The answer is $\frac{1}{2}$` | 1.0 |
    | `$x^2 - 1$` | `\boxed{(x-1)(x+1)}` | 1.0 |
    | `42` | `\boxed{41} or \boxed{42} or \boxed{43}` | 0.0 |
    | `42` | `<think>It is 42` | 0.0 |
    | `Tuesday` | `<answer>tuesday</answer>` | 1.0 |

    Args:
        column: the column with the reference; default: the first of `answer`, `solution`, `target` that exists.
        seconds: CPU time for one comparison; one that needs more scores 0.0 and is logged.
        memory_gb: memory of the process that compares, in 10^9 bytes.
    """

    column: str | None = None
    seconds: float = 5.0
    memory_gb: float = 4.0
    __name__ = "math"

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.1), ("memory_gb", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e6:
                raise ConfigError(f"math: {name} is a number of at least {least}, not {value!r}")
        if importlib.util.find_spec("math_verify") is None:
            raise AlignTuneError("reward 'math' needs the package math-verify: pip install math-verify")

    def score(self, text: str, reference: str) -> float:
        """The value of one completion's text against one reference."""
        gold = final_answer(reference) if HASHES in reference or "\\boxed{" in reference else reference.strip()
        marked = marked_answer(text)
        found = (without_thinking(text) or "").strip() if marked is None else marked
        if not gold or not found:
            return 0.0
        # The same letters mean the same; that spares most correct answers the round trip.
        if _plain(found) == _plain(gold):
            return 1.0
        if WORDS.fullmatch(gold):
            return 0.0
        same = _grader(self.seconds, int(self.memory_gb * 1e9)).same(gold, found, isolated=marked is not None)
        return float(bool(same))

    def check_columns(self, columns: Collection[str], where: str) -> None:
        """Raise DataError where the column with the reference is not among these of `where`."""
        reference_column(columns, column=self.column, reward=self.__name__, where=where)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        accepted = references(columns, len(completions), column=self.column, reward=self.__name__)
        return [
            None if texts is None else max(self.score(completion_text(completion), text) for text in texts)
            for completion, texts in zip(completions, accepted, strict=True)
        ]
