"""The comparison can fail: each injected fault is caught and named, once in process; slow: five seeds in processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aligntune
from tests import small_jobs
from tests.compare.cases import DPO, FAULTS, GRPO, LORA, PACKED, PPO, SFT, Once, kinds


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    return Once(tmp_path_factory.mktemp("arms"))


@pytest.fixture
def run(once: Once, tmp_path: Path) -> Any:
    def compare(recipe: Any, fault: str | None, **options: Any) -> Any:
        setup = f"tests.compare.faults:{fault}" if fault else None
        given = {"a": "trl", "b": "trl", "repeats": 1, "warmup": 1, "runner": once, "keep": True, **options}
        return aligntune.compare(recipe, setup_b=setup, output_dir=tmp_path / "out", **given)

    return compare


@pytest.mark.parametrize(("recipe", "fault", "kind", "words", "valid"), FAULTS, ids=[row[1] for row in FAULTS])
def test_each_fault_is_caught_and_named(
    recipe: Any, fault: str, kind: str, words: str, valid: bool, run: Any
) -> None:
    report = run(recipe, fault, asserts=["parity"])
    found = kinds(report)
    assert kind in found, report.verdict
    assert words in found[kind]
    assert report.valid is valid
    assert ("FAIL" in report.verdict) is valid and ("NOT COMPARABLE" in report.verdict) is not valid
    assert report.exit_code == (9 if valid else 10)


@pytest.mark.parametrize("recipe", [
    pytest.param(one, id=name, marks=[pytest.mark.slow] * (name not in ("sft", "grpo"))) for name, one in
    {"sft": SFT, "packed": PACKED, "grpo": GRPO, "lora": LORA, "dpo": DPO, "ppo": PPO}.items()])
def test_without_a_fault_nothing_is_found(recipe: Any, run: Any) -> None:
    report = run(recipe, None, asserts=["parity", "data", "attestation"])
    assert kinds(report) == {}
    assert report.data["parity"]["passed"] is True and report.exit_code == 0
    checks = {one["name"]: one for one in report.data["parity"]["checks"]}
    assert {"first loss", "losses", "drift", "gradient, step 1", "final model"} <= checks.keys()
    # The judgement rests on numbers that are not 0 against 0: the yardstick differs from a.
    assert report.data["parity"]["losses"]["scale"] > 0 and checks["losses"]["limit"] > 0
    assert report.data["parity"]["gradients"][0]["error_a"] > 0
    online = recipe["algorithm"] in ("grpo", "ppo")
    assert set(report.data["parity"]["bands"]) == ({"reward", "kl", "entropy", "completions/mean_length"} if online
                                                   else set())
    if recipe is GRPO:
        phases = [report.data["speed"][arm]["phases"] for arm in ("a", "b")]
        assert all(one["rollout"] > 0 and one["reward"] > 0 for one in phases)


def test_adapters_gradients_are_looked_at_again_where_they_are_not_0(run: Any) -> None:
    report = run(LORA, None)
    first, later = report.data["parity"]["gradients"]
    assert (first["step"], later["step"]) == (1, 3)
    assert first["zero_in_both"] == first["parameters"] / 2 and later["zero_in_both"] == 0
    assert later["error_a"] > 0


def test_a_layer_without_gradient_in_adapters_too(run: Any) -> None:
    found = kinds(run(LORA, "layer_without_gradient"))
    assert "layers.1.mlp" in found["zero-gradient"]


@pytest.mark.parametrize(("option", "valid"), [("", True), (",max_samples=150", False)])
def test_arms_that_differ_in_packing(option: str, valid: bool, run: Any) -> None:
    report = run(SFT, None, b=f"trl,packing=true{option}")
    (found,) = report.data["findings"]
    assert report.valid is valid and "fill their steps differently (packing)" in found["text"]
    assert (found["kind"], found["severity"]) == (("packing", "said") if valid else ("data", "invalid"))
    assert report.data["parity"]["losses"] == {}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job of 40,000 parameters and a few dozen tokens a step, for Triton's interpreter."""
    folder = tmp_path_factory.mktemp("small")
    return {"algorithm": "sft", "model": {"model_name": small_jobs.model_folder(folder / "model")},
            "data": {"dataset_name": small_jobs.alpaca(folder / "rows.jsonl"), "max_seq_length": 64},
            "train": {"max_steps": 2, "batch_size": 1, "learning_rate": 1e-3}}


def test_fast_and_trl_train_the_same_model(small: Any, run: Any) -> None:
    report = run(small, None, b="fast", asserts=["parity", "data", "attestation"])
    assert kinds(report) == {} and report.exit_code == 0, report.verdict
    checks = {one["name"]: one for one in report.data["parity"]["checks"]}
    # Other kernels round otherwise: a difference of exactly 0 would mean that the same code ran twice.
    assert 0 < checks["losses"]["value"] <= checks["losses"]["limit"]
    assert report.data["arms"]["b"]["attestation"]["step"]["kernels"]
    assert "interpreter" in {one["kind"] for one in report.data["findings"]}


def test_an_arm_that_ran_eager_is_no_comparison(small: Any, run: Any) -> None:
    report = run(small, "eager", b="fast,padding_free=false", asserts=["attestation"])
    assert "fell back" in kinds(report)["eager"] and report.exit_code == 10
    assert report.failed == ["attestation: something fell back"]
