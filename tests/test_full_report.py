"""A part that is run again takes the place of its own section, and of no other."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from aligntune.backends._compat import TESTED
from tests import full_report


def test_a_part_takes_the_place_of_its_own_section() -> None:
    report = full_report.merged("", "rest", "date: 1\n\n3 passed in 2s")
    report = full_report.merged(report, "compare", "date: 1\n\n=== failures ===\n1 failed")
    assert report == ("=== part compare ===\ndate: 1\n\n=== failures ===\n1 failed\n\n"
                      "=== part rest ===\ndate: 1\n\n3 passed in 2s\n")
    again = full_report.merged(report, "compare", "date: 2\n\n4 passed")
    assert again == "=== part compare ===\ndate: 2\n\n4 passed\n\n=== part rest ===\ndate: 1\n\n3 passed in 2s\n"


def test_every_test_is_in_one_part() -> None:
    root = Path(full_report.__file__).parents[1]
    named = [path for each in full_report.PARTS.values() for path in each]
    assert all((root / path).is_dir() for path in named) and len(set(named)) == len(named)
    assert full_report.paths("rest") == ["tests", *(f"--ignore={path}" for path in named)]


@pytest.mark.parametrize("status", [0, 1])
def test_what_a_run_leaves(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_report, "REPORT", tmp_path / "reports" / "full.txt")
    monkeypatch.setattr(full_report, "PARTS", {"compare": ("tests/test_full_report.py",)})
    wanted = "test_every_test_is_in_one_part" if status == 0 else "no_such_test"
    given = ["--part", "compare", "--workers", "1", "--commit", "abc123", "--", "-k", wanted, "-p", "no:cacheprovider"]
    assert full_report.main(given) == status
    text = (tmp_path / "reports" / "full.txt").read_text()
    assert text.startswith("=== part compare ===\ndate: 20") and "cores, 1 processes" in text and "torch 2." in text
    assert "\ncommit: abc123\n" in text and ("1 passed" in text.splitlines()[-1]) is (status == 0)


def test_the_part_for_a_card_is_every_test_that_wants_one(monkeypatch):
    seen = []

    def ran(command, **_):
        seen.append(command)
        text = f"/opt/env/lib/python3.12/site-packages/peft/a.py:3: UserWarning\n{Path.cwd()}/tests/a.py\n"
        return subprocess.CompletedProcess(command, 0, stdout=text + "2 passed in 1s\n")

    monkeypatch.setattr(full_report.subprocess, "run", ran)
    monkeypatch.setattr(full_report, "_card", lambda part: ", a card" if part == full_report.GPU else "")
    _, section = full_report.run("gpu", [], 2, commit="abc")
    assert seen[0][seen[0].index("-m", 3) + 1] == "gpu" and seen[0][-1] == "tests" and "processes, a card" in section
    assert section.endswith("\npeft/a.py:3: UserWarning\ntests/a.py\n2 passed in 1s")
    _, section = full_report.run("compare", [], 2, commit="abc")
    assert "not gpu" in seen[-1][seen[-1].index("-m", 3) + 1] and "a card" not in section
    full_report.run("two_gpus", [], 2, commit="abc")
    assert seen[-1][-3:] == ["-k", "two_gpus", "tests"] and seen[-1][seen[-1].index("-m", 3) + 1] == "gpu"
    merged = full_report.merged(full_report.merged("", "two_gpus", "cards"), "gpu", "card")
    merged = full_report.merged(merged, "rest", "none")
    assert merged.index("part rest") < merged.index("part gpu") < merged.index("part two_gpus")


def test_versions_are_parts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="2 passed in 1s\n")

    monkeypatch.setattr(full_report.subprocess, "run", ran)
    full_report.run("oldest", [], 2, commit="abc")
    assert seen[0][seen[0].index("-m", 3) + 1] == "not gpu and not mutation and not slow" and seen[0][-1] == "tests"
    assert "oldest" not in (*full_report.PARTS, full_report.REST), "it needs packages of its own"
    merged = full_report.merged(full_report.merged("", "newest", "new"), "rest", "none")
    assert merged.index("part rest") < merged.index("part newest")


def test_the_oldest_versions_are_the_least_that_are_allowed() -> None:
    root = Path(full_report.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [line for line in (root / "constraints-oldest.txt").read_text().splitlines() if "==" in line]
    pinned = {name: Version(version) for name, version in (line.split("==") for line in lines)}
    least = {}
    for one in map(Requirement, project["dependencies"]):
        least[one.name] = next(Version(bound.version) for bound in one.specifier if bound.operator == ">=")
    assert pinned == least
    # What `aligntune doctor` calls too old is what pip would not install.
    assert all(Version(low).release == pinned[name].release[:2] for name, (low, _) in TESTED.items())
