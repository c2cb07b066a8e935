"""Runs every test that needs no GPU, the long ones too, and writes the report: `make test-full`."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

REPORT = Path(__file__).with_name("reports") / "full.txt"
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "pytest")


def main(arguments: list[str]) -> int:
    """pytest's exit status; the report holds date, versions and pytest's own summary."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not gpu and not mutation",
               "--durations=20", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    head = f"date: {datetime.date.today()}\ncommit: {commit}\npython {platform.python_version()}, {versions}\n"
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(head + "\n" + "\n".join(done.stdout.splitlines()[-60:]) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
