"""Five seeds of every fault in real processes, and twenty comparisons of an arm with itself without an alarm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aligntune
from aligntune.compare.protocol import in_a_fresh_process
from tests import small_jobs
from tests.compare.cases import FAULTS, SFT, Once, kinds

pytestmark = pytest.mark.slow
# A group is what one process of tests runs: the arms that a seed's faults share are trained once.
SEEDS = [pytest.param(seed, marks=pytest.mark.xdist_group(f"seed-{seed}")) for seed in range(5)]
SAME = [pytest.param(number, marks=pytest.mark.xdist_group(f"same-{number}")) for number in range(20)]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    return Once(tmp_path_factory.mktemp("arms"), in_a_fresh_process)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("recipe", "fault", "kind", "words", "valid"), FAULTS, ids=[row[1] for row in FAULTS])
def test_each_fault_with_each_seed(
    recipe: Any, fault: str, kind: str, words: str, valid: bool, seed: int, once: Once, tmp_path: Path
) -> None:
    report = aligntune.compare(
        recipe, a="trl", b="trl", setup_b=f"tests.compare.faults:{fault}", repeats=1, warmup=1, runner=once, keep=True,
        overrides={"seed": seed}, output_dir=tmp_path / "out")
    assert words in kinds(report)[kind] and report.valid is valid, report.verdict


@pytest.mark.parametrize("seed", SEEDS)
def test_an_eager_arm_with_each_seed(seed: int, tmp_path: Path) -> None:
    recipe = {"algorithm": "sft", "model": {"model_name": small_jobs.model_folder(tmp_path / "model")},
              "data": {"dataset_name": small_jobs.alpaca(tmp_path / "rows.jsonl"), "max_seq_length": 64},
              "train": {"max_steps": 2, "batch_size": 1}}
    report = aligntune.compare(
        recipe, a="trl", b="fast,padding_free=false", setup_b="tests.compare.faults:eager", repeats=1, warmup=1,
        oracle=False, overrides={"seed": seed}, output_dir=tmp_path / "out")
    assert "fell back" in kinds(report)["eager"] and report.exit_code == 10


@pytest.mark.parametrize("number", SAME)
def test_an_arm_against_itself_raises_no_alarm(number: int, tmp_path: Path) -> None:
    report = aligntune.compare(
        SFT, a="trl", b="trl", steps=24, warmup=4, overrides={"seed": number}, output_dir=tmp_path / "out",
        oracle=number % 4 == 0, asserts=["parity", "data", "attestation"])
    assert kinds(report) == {} and report.exit_code == 0, report.verdict
    assert report.data["speed"]["significant"] is False and "no significant difference in speed" in report.verdict
