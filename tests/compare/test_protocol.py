"""Order of the runs, what each is told, and how a process that fails is told of."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import aligntune
from aligntune.compare.arm import ArmSpec, attribute
from aligntune.compare.protocol import in_a_fresh_process, order, plan, spec_of, write_spec
from aligntune.compare.run import one_stage, read_baseline
from aligntune.compare.settings import Arm, Settings, read_arm
from aligntune.core.recipes import read_recipe
from aligntune.errors import ComparisonError, ConfigError
from tests import small_jobs


def settings(**options: Any) -> Settings:
    return Settings("x", {"algorithm": "sft"}, {"learning_rate": 1e-3}, **{
        "a": read_arm("trl"), "b": read_arm("fast,train.learning_rate=2e-3"), **options})


def test_a_b_b_a() -> None:
    assert order(1) == [("a", 0), ("b", 0)]
    assert order(2) == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert order(3)[4:] == [("a", 2), ("b", 2)]


def test_the_oracle_comes_first_and_the_yardstick_last() -> None:
    roles = [(run.role, run.arm.options.get("model.attn_implementation")) for run in plan(settings(), attention=None)]
    assert roles == [("oracle", "eager"), ("a", None), ("b", None), ("b", None), ("a", None), ("yardstick", "eager")]
    other = plan(settings(a=read_arm("fast")), attention=None)
    assert [run.arm.options["model.attn_implementation"] for run in other if run.role == "yardstick"] == ["eager",
                                                                                                         "sdpa"]
    assert plan(settings(), attention="eager")[-1].arm.options["model.attn_implementation"] == "sdpa"
    assert {run.role for run in plan(settings(oracle=False), attention=None)} == {"a", "b"}


def test_an_arms_own_option_wins_whichever_way_it_is_written(tmp_path: Path) -> None:
    runs = plan(settings(steps=9), attention=None)
    specs = {(run.role, run.repeat): spec_of(settings(steps=9), run, tmp_path, seed=7, online=False, peft=True)
             for run in runs}
    a, b, oracle = specs["a", 0], specs["b", 1], specs["oracle", 0]
    assert a.overrides["learning_rate"] == 1e-3 and "train.learning_rate" not in a.overrides
    assert b.overrides["train.learning_rate"] == 2e-3 and "learning_rate" not in b.overrides
    assert a.overrides["max_steps"] == 9 and a.overrides["backend"] == "trl" and b.overrides["backend"] == "fast"
    assert a.gradient_steps == [1, 3] and b.gradient_steps == [] and oracle.stop_after == 3 and oracle.hypotheses
    assert (a.seed, b.seed) == (7, 7) and a.folder != b.folder
    online = spec_of(settings(), runs[3], tmp_path, seed=7, online=True, peft=False)
    assert online.seed == 8 == online.overrides["seed"]


def test_a_process_without_a_result_is_told_with_its_last_words(tmp_path: Path) -> None:
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\necho the last words\nexit 3\n")
    dead.chmod(0o755)
    spec = ArmSpec("b", "b", 0, {}, {}, str(tmp_path / "arm"), 0)
    with pytest.raises(ComparisonError, match=r"exit code 3(.|\n)*the last words"):
        in_a_fresh_process(spec, Arm("b", "trl", python=str(dead)))
    with pytest.raises(ConfigError, match="cannot be started"):
        in_a_fresh_process(spec, Arm("b", "trl", python=str(tmp_path / "nowhere")))


def test_setup_names() -> None:
    assert attribute("os:path.join") is os.path.join
    for name, words in (("os", "not module:function"), ("nowhere_at_all:f", "No module"), ("os:nope", "nope")):
        with pytest.raises(ConfigError, match=words):
            attribute(name)


def test_one_stage_of_several(tmp_path: Path) -> None:
    shared = {"defaults": {"train": {"batch_size": 4}}, "stages": [
        {"algorithm": "sft", "model": {"model_name": "builtin:tiny"}},
        {"algorithm": "dpo", "model": {"model_name": "previous"}}]}
    recipe = read_recipe(shared)
    assert one_stage(recipe, 1, {})["algorithm"] == "sft"
    assert one_stage(recipe, 2, {"model.model_name": "builtin:tiny"})["train.batch_size"] == 4
    for stage, words in ((None, r"1 \(sft\), 2 \(dpo\)"), (3, "stage=N"), (2, "model_name")):
        with pytest.raises(ConfigError, match=words):
            one_stage(recipe, stage, {})
    with pytest.raises(ConfigError, match="no stages"):
        one_stage(read_recipe({"algorithm": "sft"}), 1, {})


@pytest.mark.parametrize(("given", "words"), [
    ({"overrides": {"lerning_rate": 1}}, "learning_rate"), ({"b": "fast,packin=true"}, "packing"),
    ({"b": "fastt"}, "fast"), ({"asserts": ["speed>=1"]}, "speedup"), ({"baseline": "nowhere.json"}, "no file"),
    ({"repeats": 0}, "repeats"), ({"steps": 3}, "warmup"),
])
def test_faults_are_told_before_anything_runs(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("an arm was started")

    with pytest.raises(ConfigError, match=words):
        aligntune.compare("sft-builtin", runner=never, output_dir=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not a comparison"):
        aligntune.compare("sft-builtin", b="trl", output_dir=tmp_path)


def test_a_baseline_that_is_none(tmp_path: Path) -> None:
    for text, words in (("{", "not JSON"), ("{}", "schema")):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_baseline(tmp_path)


FAKE_UNSLOTH = '''
import sys

FIRST = "torch" not in sys.modules


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, load_in_4bit, full_finetuning):
        from transformers import AutoModelForCausalLM
        import torch

        assert FIRST and max_seq_length == 64 and not load_in_4bit and full_finetuning
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
        model.config.fake_peer = True
        return model, None
'''


@pytest.mark.slow
def test_a_peer_in_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is this one behind a script, the package a stand-in that loads through transformers."""
    (tmp_path / "site" / "unsloth").mkdir(parents=True)
    (tmp_path / "site" / "unsloth" / "__init__.py").write_text(FAKE_UNSLOTH)
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    recipe = {"algorithm": "sft", "model": {"model_name": small_jobs.model_folder(tmp_path / "model")},
              "data": {"dataset_name": small_jobs.alpaca(tmp_path / "rows.jsonl"), "max_seq_length": 64},
              "train": {"max_steps": 4, "batch_size": 2}}
    report = aligntune.compare(recipe, a="trl", b="unsloth", python_b=str(other), repeats=1, warmup=1, oracle=False,
                               output_dir=tmp_path / "out", asserts=["parity", "data"])
    assert report.exit_code == 0, report.verdict
    assert "aligntune.compare.arm" in (tmp_path / "calls").read_text()
    arm = report.data["arms"]["b"]
    assert arm["peer"] == "unsloth" and arm["python"] == str(other)
    assert "fake_peer" not in str(report.data["arms"]["a"]["config"])


@pytest.mark.slow
def test_a_missing_peer_is_told_with_the_way_to_get_it(tmp_path: Path) -> None:
    spec = ArmSpec("liger", "b", 0, {}, {}, str(tmp_path), 0, peer="liger")
    write_spec(spec)
    found = in_a_fresh_process(spec, Arm("liger", "trl", peer="liger"))
    assert found["status"] == "error" and found["exit_code"] == 4 and "pip install liger-kernel" in found["message"]
