"""The command: what it prints, in which order, and how it exits; the runs themselves are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aligntune.cli.app import app
from aligntune.compare import outputs
from aligntune.compare.report import Report, build
from aligntune.compare.settings import Settings, read_arm, read_assertion
from tests.compare import made_up


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asked for; the answer is a made-up report."""
    seen: dict[str, Any] = {}

    def answer(recipe: Any, **given: Any) -> Report:
        seen.update(given, recipe=recipe)
        settings = Settings("x", {}, {}, read_arm(given["a"]), read_arm(given["b"]),
                            asserts=[read_assertion(text) for text in given["asserts"]])
        results = made_up.results(tmp_path)
        if given["steps"] == 99:
            results["b"][0]["attestation"]["step"] = None
        report = Report(build(settings, results, command=[]), tmp_path)
        outputs.write(report)
        return report

    monkeypatch.setattr("aligntune.compare.compare", answer)
    return seen


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["compare", *arguments])


def test_the_verdict_comes_first(asked: dict[str, Any]) -> None:
    result = run("sft-builtin", "--a", "trl", "--b", "fast", "--repeats", "3", "learning_rate=1e-4")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("fast: 1.8") and "parity PASS" in lines[0]
    assert "real tokens/s" in result.stdout and "report.html" in lines[-1]
    assert asked["overrides"] == {"learning_rate": 1e-4} and asked["repeats"] == 3 and asked["recipe"] == "sft-builtin"
    assert asked["oracle"] is True and asked["steps"] is None


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("--assert", "speedup>=1.5", "--assert", "parity"), 0, "assertion parity: holds"),
    (("--assert", "speedup>=9"), 9, "assertion speedup>=9: FAILED (speedup is 1."),
    (("--steps", "99"), 10, "NOT COMPARABLE"),
])
def test_exit_codes(arguments: tuple[str, ...], code: int, words: str, asked: dict[str, Any]) -> None:
    result = run("sft-builtin", *arguments)
    assert result.exit_code == code and words in result.stdout


def test_a_typo_is_an_error_with_code_2() -> None:
    result = run("sft-builtin", "--b", "fsat")
    assert result.exit_code == 2 and "did you mean 'fast'" in result.output
