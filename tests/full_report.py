"""Runs every test that needs no GPU, the long ones too, and writes the report: `make test-full`.

    python -m tests.full_report                      # every part, one after the other
    python -m tests.full_report --part compare       # one; the report keeps the other parts' sections
    python -m tests.full_report --part fast -- -x    # what follows goes to pytest
    python -m tests.full_report --part gpu           # on a card: the tests that need one, only where it is named
    python -m tests.full_report --part two_gpus      # on two: those that need two, likewise
    python -m tests.full_report --part oldest        # what `make test` runs, by `make test-oldest`; newest likewise

Tests of one file run in one process, those that name an `xdist_group` in that group's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

REPORT = Path(__file__).with_name("reports") / "full.txt"
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "pytest")
PARTS: dict[str, tuple[str, ...]] = {
    "compare": ("tests/compare",),
    "recipes": ("tests/backends/trl", "tests/cli"),
    "fast": ("tests/backends/fast",),
}
REST, GPU, TWO_GPUS = "rest", "gpu", "two_gpus"
ON_CARDS = {GPU: [], TWO_GPUS: ["-k", TWO_GPUS]}
"""What chooses the tests that need one card, or two."""
VERSIONS = ("oldest", "newest")
"""What `make test` runs, with the least versions that pyproject.toml allows and with the newest ones that there are."""
ASIDE = (*ON_CARDS, *VERSIONS)
"""Run only where they are named."""
_SHOWN = 60


def paths(part: str) -> list[str]:
    """What pytest is given for a part; `rest` is all that no other part holds."""
    if part in ASIDE:
        return ["tests"]
    if part != REST:
        return list(PARTS[part])
    return ["tests", *(f"--ignore={path}" for each in PARTS.values() for path in each)]


def run(part: str, arguments: list[str], workers: int, commit: str | None = None) -> tuple[int, str]:
    """pytest's exit status, and the part's section of the report."""
    marks = "gpu" if part in ON_CARDS else "not gpu and not mutation"
    marks += " and not slow" if part in VERSIONS else ""
    spread = "load" if part in ON_CARDS else "loadgroup"  # on a card one file's tests are a third of all the time
    command = ["-m", "pytest", "-q", "-n", str(workers), "--dist", spread, "-m", marks,
               "--durations=20", *ON_CARDS.get(part, []), *paths(part), *arguments]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = commit or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return done.returncode, "\n".join([
        f"date: {datetime.date.today()}", f"commit: {commit}",
        f"machine: {platform.machine()}, {os.cpu_count()} cores, {workers} processes{_card(part)}",
        f"python {platform.python_version()}, {versions}", f"command: python {' '.join(command)}", "",
        *re.sub(r"(/[^/\s]+)+/site-packages/", "", done.stdout).replace(f"{Path.cwd()}/", "").splitlines()[-_SHOWN:],
    ])


def _card(part: str) -> str:
    if part not in ON_CARDS:
        return ""
    import torch

    return f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def merged(report: str, part: str, section: str) -> str:
    """The report with this part's section new and the others' as they were, in the order of the parts."""
    found = re.split(r"^=== part (\w+) ===\n", report, flags=re.M)
    sections = {**dict(zip(found[1::2], found[2::2], strict=True)), part: section}
    order = [name for name in (*PARTS, REST, *ASIDE) if name in sections]
    return "\n".join(f"=== part {name} ===\n{sections[name].strip()}\n" for name in order)


def main(argv: list[str]) -> int:
    """1 if a test of any part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[*PARTS, REST, *ASIDE],
                        help="this part only; may be repeated")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 2, 16), help="processes of tests")
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    parser.add_argument("pytest", nargs="*", help="after --: arguments for pytest")
    given = parser.parse_args(argv)
    failed = 0
    for part in given.part or (*PARTS, REST):
        status, section = run(part, given.pytest, given.workers, given.commit)
        failed |= status != 0
        REPORT.parent.mkdir(exist_ok=True)
        before = REPORT.read_text(encoding="utf-8") if REPORT.is_file() else ""
        REPORT.write_text(merged(before, part, section), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
