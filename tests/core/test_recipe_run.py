"""Recipes that run: stages hand models on, the probe scores them, and a stopped recipe goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import aligntune
from aligntune.core.recipe_run import StageResult, run_recipe
from aligntune.errors import (
    AlignTuneError,
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    DataError,
    RewardError,
    UnsupportedAlgorithmError,
)
from tests import small_jobs
from tests.core import tiny

NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
REWARDS = """
import pathlib

def checksum(completions, **columns):
    return [sum(ord(letter) % 97 for letter in text(c)) for c in completions]

def even(prompts, completions, answer, **columns):
    return [float(int(value) % 2 == 0) for value in answer]

def fails_until_allowed(completions, **columns):
    if not pathlib.Path({flag!r}).exists():
        raise ZeroDivisionError("not yet")
    return [1.0] * len(completions)

def text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, data files and rewards on disk."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "rewards.py").write_text(REWARDS.format(flag=str(folder / "allowed")))
    return {
        "model": small_jobs.model_folder(folder / "model"), "chat": small_jobs.alpaca(folder / "chat.jsonl"),
        "graded": small_jobs.graded(folder / "graded.jsonl"), "rewards": str(folder / "rewards.py"),
        "flag": str(folder / "allowed"),
        "bad": small_jobs.rows_file(folder / "bad.jsonl", [{"question": "a", "answer": "#### 1"}, {"question": "b"}]),
    }


def recipe(
    shop: dict[str, str], *, reward: str = "checksum", probe: str | None = "checksum", **first: Any
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "defaults": {
            "backend": "trl", "model": {"model_name": shop["model"], "device": "cpu"},
            "data": {"max_seq_length": 64}, "logging": {"report_to": "none", "logging_steps": 1},
            "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
            "rollout": {"num_generations": 4, "max_completion_length": 6},
        },
        "stages": [
            {"algorithm": "sft", "data": {"dataset_name": shop["chat"]}, **first},
            {"algorithm": "grpo", "model": {"model_name": "previous"}, "data": {"dataset_name": shop["graded"]},
             "rewards": {"reward_functions": [f"{shop['rewards']}:{reward}"]}},
        ],
    }
    if probe:
        made["probe"] = {"dataset_name": shop["graded"], "reward": f"{shop['rewards']}:{probe}", "max_samples": 10,
                         "max_new_tokens": 5, "batch_size": 4}
    return made


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_stages_hand_their_model_on_and_are_probed(shop: dict[str, str], tmp_path: Path) -> None:
    one = recipe(shop, lora={"use_peft": True, "lora_r": 2})
    results = aligntune.run_recipe(one, output_dir=tmp_path / "r")
    first, second = results
    assert [result.name for result in results] == ["1-sft", "2-grpo"]
    assert [(result.global_step, result.summary["status"]) for result in results] == [(2, "finished"), (2, "finished")]
    assert first.model == str(tmp_path / "r" / "1-sft" / "model")
    assert second.model == str(tmp_path / "r" / "2-grpo" / "checkpoint-2")
    config = (tmp_path / "r" / "2-grpo" / "config.yaml").read_text()
    assert f"model_name: {first.model}" in config
    base, merged, trained = weights(shop["model"]), weights(first.model), weights(second.model)
    projection = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(base[projection], merged[projection])
    assert torch.equal(base["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])  # LoRA leaves it
    assert not torch.equal(merged["model.embed_tokens.weight"], trained["model.embed_tokens.weight"])
    assert first.probe_after == second.probe_before
    # The scores are those of the models on disk.
    assert first.probe_before == pytest.approx(score(shop, shop["model"]), abs=1e-9)
    assert first.probe_after == pytest.approx(score(shop, first.model), abs=1e-9)
    assert second.probe_after == pytest.approx(score(shop, second.model), abs=1e-9)
    assert len({first.probe_before, first.probe_after}) == 2, "the probe cannot tell the models apart"


def score(shop: dict[str, str], model: str) -> float:
    """The mean checksum of greedy answers of the model in a folder, by code of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    sums = []
    for line in Path(shop["graded"]).read_text().splitlines()[:10]:
        turns = [{"role": "user", "content": json.loads(line)["question"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = loaded.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
        sums.append(sum(ord(letter) % 97 for letter in text))
    return sum(sums) / len(sums)


def test_the_probe_reads_the_columns_of_its_rows(shop: dict[str, str], tmp_path: Path) -> None:
    one = recipe(shop, probe="even")
    config = {**one["defaults"], "algorithm": "sft", "data": {"dataset_name": shop["chat"], "max_seq_length": 64},
              "probe": one["probe"]}
    del config["rollout"]
    (result,) = run_recipe(config, {"output_dir": str(tmp_path / "r"), "max_steps": 1, "probe.max_samples": 7})
    assert (result.name, result.probe_before, result.probe_after) == ("sft", 3 / 7, 3 / 7)  # answers 1 to 7
    assert result.output_dir == str(tmp_path / "r")
    state = json.loads((tmp_path / "r" / "recipe.json").read_text())
    assert state["stages"][0]["result"]["probe_after"] == 3 / 7


def test_a_job_without_stages_or_probe_is_the_job_alone(shop: dict[str, str], tmp_path: Path) -> None:
    one = recipe(shop)["defaults"]
    del one["rollout"]
    (result,) = run_recipe({**one, "algorithm": "sft", "dataset_name": shop["chat"]}, output_dir=str(tmp_path / "r"),
                           max_steps=1)
    assert (result.global_step, result.probe_before, result.algorithm) == (1, None, "sft")
    assert not (tmp_path / "r" / "recipe.json").exists()
    assert result.model == str(tmp_path / "r" / "checkpoint-1")


def test_a_stopped_recipe_goes_on_where_it_stopped(shop: dict[str, str], tmp_path: Path) -> None:
    flag, root = Path(shop["flag"]), tmp_path / "r"
    flag.unlink(missing_ok=True)
    one = recipe(shop, reward="fails_until_allowed")
    options = {"output_dir": str(root), "save_steps": 1}
    with pytest.raises(RewardError, match="not yet"):
        run_recipe(one, options)
    assert [entry["result"]["name"] for entry in json.loads((root / "recipe.json").read_text())["stages"]] == ["1-sft"]
    before = (root / "1-sft" / "metrics.jsonl").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="holds another run of a recipe; resume=true continues"):
        run_recipe(one, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", lambda **_: os.open(root / "none" / "file", os.O_RDONLY))
        with pytest.raises(ConfigError, match=f"output_dir: '{root}' cannot be written: No such file"):
            run_recipe(one, {**options, "overwrite": True})
    assert (root / "recipe.json").is_file(), "nothing is removed from a folder that cannot be filled"
    with pytest.raises(CheckpointError, match=r"1-sft is done, with other options: train.max_steps: 2 then, 3"):
        run_recipe(one, {**options, "resume": True, "stages.1.max_steps": 3})
    moved = root.rename(tmp_path / "elsewhere")
    flag.touch()
    first, second = run_recipe(one, {**options, "output_dir": str(moved), "resume": True})
    assert isinstance(first, StageResult) and first.global_step == 2 and first.model is not None
    assert Path(first.model).parent == moved / "1-sft" and Path(first.model).is_dir()
    assert (moved / "1-sft" / "metrics.jsonl").stat().st_mtime_ns == before, "the finished stage was trained again"
    assert second.summary["status"] == "finished" and second.probe_before == first.probe_after
    flag.unlink()


def test_a_stage_stopped_at_a_checkpoint_is_resumed_from_it(shop: dict[str, str], tmp_path: Path) -> None:
    root, flag = tmp_path / "r", Path(shop["flag"])
    flag.touch()
    one = recipe(shop, reward="fails_until_allowed", probe=None)
    straight = run_recipe(one, {"output_dir": str(tmp_path / "straight"), "stages.2.max_steps": 4})
    run_recipe(one, {"output_dir": str(root), "stages.2.max_steps": 2})
    # As if it had been stopped at step 2 of 4.
    state = json.loads((root / "recipe.json").read_text())
    state["stages"].pop()
    (root / "recipe.json").write_text(json.dumps(state))
    _, second = run_recipe(one, {"output_dir": str(root), "stages.2.max_steps": 4, "resume": True})
    assert second.summary["resumed_from"] == str(root / "2-grpo" / "checkpoint-2")
    assert second.global_step == straight[1].global_step == 4
    flag.unlink()


def test_overwrite_removes_the_earlier_run_and_nothing_else(shop: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "r"
    one = recipe(shop, probe=None, lora={"use_peft": True, "lora_r": 2})
    options = {"output_dir": str(root), "max_steps": 1}
    run_recipe(one, options)
    (root / "notes.txt").write_text("mine")
    (root / "1-sft" / "notes.txt").write_text("mine")
    first, _ = run_recipe(one, {**options, "overwrite": True, "max_steps": 3})
    assert first.global_step == 3
    assert not (root / "1-sft" / "checkpoint-1").exists()
    assert (root / "notes.txt").exists() and (root / "1-sft" / "notes.txt").exists()


@pytest.mark.parametrize(("change", "error", "told"), [
    ({"stages.2.dataset_name": "bad"}, DataError, r"stage 2-grpo: .*1 of 2 rows"),
    ({"stages.2.dataset_name": "/no/such.jsonl"}, DataError, r"stage 2-grpo: .*no/such"),
    ({"stages.2.reward_functions": ["exact_mach"]}, ConfigError,
     r"stages\.2\.rewards\.reward_functions: unknown reward 'exact_mach'"),
    ({"stages.2.trainer_options": {"vlm": 1}}, ConfigError, "stage 2-grpo: .*trainer_options.vlm: GRPOConfig has no"),
    ({"stages.2.rollout_engine": "fast"}, UnsupportedAlgorithmError, "stage 2-grpo: .*rollout_engine"),
    ({"stages.2.backend": "fast", "stages.2.trainer_options": {"importance_sampling_level": "sequence"}},
     UnsupportedAlgorithmError, "stage 2-grpo: .*importance_sampling_level='sequence'"),
    pytest.param({"stages.2.rollout_engine": "vllm"}, BackendUnavailableError, r"stage 2-grpo: .*aligntune\[vllm\]",
                 marks=NO_VLLM),
    ({"stages.2.reward_functions": [{"name": "exact_match", "options": {"column": "no"}}]}, DataError,
     "stage 2-grpo: reward 'exact_match' reads the reference from the column 'no', which the dataset does not have"),
    ({"probe.dataset_name": "/no/such.jsonl"}, DataError, "probe: .*no/such"),
])
def test_a_later_stage_is_checked_before_the_first_trains(
    shop: dict[str, str], tmp_path: Path, change: dict[str, Any], error: type[AlignTuneError], told: str
) -> None:
    change = {key: shop.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(error, match=f"(?s){told}"):
        run_recipe(recipe(shop), {"output_dir": str(tmp_path / "r"), **change})
    assert not (tmp_path / "r").exists()


def test_libraries_are_quiet_before_the_checks_import_them(
    shop: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class ChecksBegin(Exception):
        pass

    def check(job: Any) -> None:
        raise ChecksBegin(*called)

    called: list[str] = []
    monkeypatch.setattr("aligntune.core.notices.quiet_libraries", lambda: called.append("quiet"))
    monkeypatch.setattr("aligntune.core.backend_factory.check_names", check)
    with pytest.raises(ChecksBegin, match="quiet"):
        run_recipe(recipe(shop))


def test_a_model_object_of_a_later_stage_is_checked_before_the_first_trains(
    shop: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="stage 2-grpo: .*model_dtype = 'bf16', but the model object has 'fp32'"):
        run_recipe(recipe(shop), {"output_dir": str(tmp_path / "r"), "stages.2.model_name": tiny.llama(),
                                  "stages.2.model_dtype": "bf16"})
    assert not (tmp_path / "r").exists()


def test_faults_of_several_stages_come_together(shop: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)stage 2-grpo: .*probe: "):
        run_recipe(recipe(shop), {"output_dir": str(tmp_path / "r"), "stages.2.dataset_name": shop["bad"],
                                  "probe.dataset_name": "/no/such.jsonl"})


def test_resume_without_a_run_is_a_checkpoint_error(
    shop: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds no run of a recipe with stages"):
        run_recipe(recipe(shop), {"output_dir": str(tmp_path / "r"), "resume": True})
    with pytest.raises(CheckpointError, match="no run of the recipe 'recipe' in runs/"):
        run_recipe(recipe(shop), {"resume": True})


def test_without_output_dir_a_run_has_a_folder_of_its_own_and_is_found_again(
    shop: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = recipe(shop, probe=None)
    one["stages"].pop()
    del one["defaults"]["rollout"]
    (first,) = run_recipe(one, max_steps=1)
    assert Path(first.output_dir).parent.parent == tmp_path / "runs"
    (again,) = run_recipe(one, max_steps=1, resume=True)
    assert again.output_dir == first.output_dir and len(list((tmp_path / "runs").iterdir())) == 1
