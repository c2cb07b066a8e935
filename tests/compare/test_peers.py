"""A peer with a trainer of its own trains with that, not with ours around its model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trl

import aligntune
from aligntune.backends.trl import options as trl_options
from aligntune.backends.trl import trainers as _  # noqa: F401  its classes' bases are trl's, not the stand-in's
from aligntune.compare import peers
from aligntune.compare.arm import RESULT, ArmSpec, run_arm
from aligntune.compare.probes import probe_rows
from aligntune.errors import BackendUnavailableError, ConfigError
from tests import small_jobs

# Replaces trl's classes as unsloth does: padding_free unset is its own choice, which the environment overrules, and
# rows that skip its preparation lose it.
STAND_IN = """
import os
import trl
from dataclasses import dataclass

Config, Trainer = trl.SFTConfig, trl.SFTTrainer
SEEN = []


@dataclass
class UnslothSFTConfig(Config):
    padding_free: bool | None = None
    gradient_accumulation_steps: int = 2


class UnslothSFTTrainer(Trainer):
    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None, **others):
        assert type(args) is UnslothSFTConfig
        skips = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        SEEN.append({"class": type(self).__name__, "collator": data_collator, "skips": skips,
                     "columns": train_dataset.column_names, "padding_free": args.padding_free,
                     "max_length": args.max_length, "seed": args.data_seed})
        if args.padding_free is None:
            args.padding_free = os.environ.get("UNSLOTH_PADDING_CHOICE") != "padded" and not args.packing
        if args.padding_free:
            if skips:
                args.padding_free = False
            else:
                args.max_length = None
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, **others)


trl.SFTConfig, trl.SFTTrainer = UnslothSFTConfig, UnslothSFTTrainer


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, load_in_4bit, full_finetuning, use_gradient_checkpointing, dtype):
        from transformers import AutoModelForCausalLM

        SEEN.append({"dtype": str(dtype)})
        if not os.path.isdir(model_name):
            raise RuntimeError("Both AutoConfig and PeftConfig loading failed: " + model_name)
        return AutoModelForCausalLM.from_pretrained(model_name, dtype="float32"), None

    @staticmethod
    def get_peft_model(model, r, lora_alpha, lora_dropout, target_modules, random_state, use_gradient_checkpointing,
                       **others):
        from peft import LoraConfig, get_peft_model

        SEEN.append(others)
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                                                target_modules=target_modules, task_type="CAUSAL_LM", **others))
"""
COLLATOR = "trl.trainer.sft_trainer.DataCollatorForLanguageModeling"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, imported, with what it replaces in trl; all of it is undone after the test."""
    for name in ("SFTConfig", "SFTTrainer"):
        monkeypatch.setattr(trl, name, getattr(trl, name))
    site(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    package = importlib.import_module("unsloth")
    # In an arm's process unsloth is imported before trl is anywhere.
    monkeypatch.setitem(trl_options.CONFIGS, "sft", package.UnslothSFTConfig)
    yield package
    sys.modules.pop("unsloth")


def site(folder: Path) -> Path:
    (folder / "site" / "unsloth").mkdir(parents=True)
    (folder / "site" / "unsloth" / "__init__.py").write_text(STAND_IN)
    return folder / "site"


def job(folder: Path, *, chat: bool = False, **train: Any) -> dict[str, Any]:
    words = ["the", "value", "of", "one", "list", "and", "the", "error", "of", "two", "python"]
    texts = [{"text": " ".join(words[: 2 + number % 9])} for number in range(16)]
    rows = small_jobs.alpaca(folder / "rows.jsonl") if chat else small_jobs.rows_file(folder / "rows.jsonl", texts)
    return {"algorithm": "sft", "model": {"model_name": small_jobs.model_folder(folder / "model")},
            "data": {"dataset_name": rows, "max_seq_length": 64},
            "train": {"max_steps": 3, "batch_size": 4, **train}}


def arm(folder: Path, config: dict[str, Any], package: Any, peer: str | None = "unsloth", draw: bool = False,
        **options: Any) -> dict[str, Any]:
    label = f"{peer}{len(list(folder.iterdir()))}"
    of_peer = peers.PEERS[peer].options | peers.PEERS[peer].sft_options if peer else {}
    overrides = {**of_peer, "backend": "trl", "output_dir": str(folder / label / "run"), "report_to": "none",
                 "progress": False, "seed": 7, **options}
    (folder / label).mkdir()
    return run_arm(ArmSpec(label, "b", 0, config, overrides, str(folder / label), 7, peer=peer, probe=False,
                           draw_adapters=draw), package)


@pytest.mark.parametrize(("choice", "packing"), [("padding_free", False), ("padded", False), ("padding_free", True)])
def test_its_own_trainer_on_the_same_batches(
    choice: str, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Any,
) -> None:
    monkeypatch.setenv("UNSLOTH_PADDING_CHOICE", choice)
    config = job(tmp_path)
    config["data"]["packing"] = packing
    found = arm(tmp_path, config, stand_in)
    loaded, built = stand_in.SEEN
    assert loaded == {"dtype": "torch.float32"}  # as every arm stores what trains, where nothing else is asked
    assert built == {"class": "UnslothSFTTrainer", "collator": None, "skips": False, "columns": ["input_ids"],
                     "padding_free": None, "max_length": 64, "seed": 7}
    assert found["attestation"]["peer"] == {
        "name": "unsloth", "trainer": "unsloth.UnslothSFTTrainer", "collator": COLLATOR,
        "padding_free": choice == "padding_free", "packing": packing, "notes": []}
    assert found["attestation"]["backend"] == "trl"
    monkeypatch.setitem(trl_options.CONFIGS, "sft", stand_in.Config)
    ours = arm(tmp_path, config, None, peer=None)
    assert "peer" not in ours["attestation"] and len(ours["steps"]) == 3
    for mine, theirs in zip(ours["steps"], found["steps"], strict=True):
        assert mine["data"] == theirs["data"] and mine["tokens"] == theirs["tokens"] > 0
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and mine["loss"] > 1
    # Each process counts from its start; here that is the call.
    assert set(found["laps"]) == {"imports", "build", "train", "rest"} and min(found["laps"].values()) >= 0


def test_what_the_job_says_of_the_model_s_type_and_of_padding(tmp_path: Path, stand_in: Any) -> None:
    found = arm(tmp_path, job(tmp_path), stand_in, padding_free=False, model_dtype="bf16", precision="fp32",
                trainer_options={"data_seed": 3})
    assert stand_in.SEEN[0] == {"dtype": "torch.bfloat16"}
    assert stand_in.SEEN[1]["padding_free"] is False and stand_in.SEEN[1]["seed"] == 3
    assert found["attestation"]["peer"]["padding_free"] is False


def test_the_probe_asks_about_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    config = job(tmp_path)
    config["evaluation"] = {"val_split_ratio": 0.25}
    found = []
    for peer in ("unsloth", None):
        if peer is None:
            monkeypatch.setitem(trl_options.CONFIGS, "sft", stand_in.Config)
        overrides = {"backend": "trl", "output_dir": str(tmp_path / str(peer)), "report_to": "none"}
        spec = ArmSpec("b", "b", 0, config, overrides, str(tmp_path), 7, peer=peer)
        found.append(probe_rows(peers.build(spec, stand_in)))
    assert found[0] == found[1] and len(found[0]) == 4


def test_rows_with_tokens_that_are_not_learnt_keep_our_trainer_and_say_so(tmp_path: Path, stand_in: Any) -> None:
    found = arm(tmp_path, job(tmp_path, chat=True), stand_in)
    paper = found["attestation"]["peer"]
    assert paper["trainer"] == "aligntune.backends.trl.trainers.SFT" and "not learnt" in paper["notes"][0]


def test_trl_imported_first_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    monkeypatch.setitem(trl_options.CONFIGS, "sft", stand_in.Config)
    with pytest.raises(BackendUnavailableError, match="before trl"):
        arm(tmp_path, job(tmp_path), stand_in)


def test_learnt_whole() -> None:
    assert peers.learnt_whole([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [-100, 4]}])
    assert not peers.learnt_whole([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, -100]}])


def test_a_builtin_model_reaches_it_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> None:
    config = job(tmp_path)
    config["model"] = {"model_name": "builtin:tiny"}
    config["lora"] = {"use_peft": True, "lora_r": 4}
    found = arm(tmp_path, config, stand_in, draw=True, use_rslora=True, modules_to_save=["norm"])
    assert stand_in.SEEN[1] == {"use_rslora": True, "modules_to_save": ["norm"]}
    monkeypatch.setitem(trl_options.CONFIGS, "sft", stand_in.Config)
    ours = arm(tmp_path, config, None, peer=None, draw=True, use_rslora=True, modules_to_save=["norm"])
    assert found["weights"] == ours["weights"] and found["weights"]["trained"] != "00000000"
    assert found["config"]["model"]["tokenizer_name"] == "builtin:tiny"
    for mine, theirs in zip(ours["steps"], found["steps"], strict=True):
        assert mine["data"] == theirs["data"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and mine["loss"] > 1


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_init": "pissa"}])
def test_adapters_that_would_not_reach_it_are_refused(options: Any, tmp_path: Path, stand_in: Any) -> None:
    with pytest.raises(ConfigError, match="would not reach it"):
        arm(tmp_path, job(tmp_path), stand_in, use_peft=True, **options)
    assert stand_in.SEEN == []


class ArmRan(Exception):
    """The comparison's options were taken, and its first arm was started."""


def taken(folder: Path, algorithm: str, **overrides: Any) -> None:
    """Start a comparison beside unsloth, as far as its first arm."""
    def runner(*given: Any, **options: Any) -> Any:
        raise ArmRan

    aligntune.compare({**job(folder), "algorithm": algorithm}, a="trl", b="unsloth", python_b=str(site(folder)),
                      runner=runner, output_dir=folder / "out", overrides=overrides)


@pytest.mark.parametrize(("words", "algorithm", "overrides"), [
    ("unsloth is not compared in reward: its model is loaded as a language model", "reward",
     {"dataset_name": "builtin:arithmetic-preference"}),
    ("unsloth is compared with plain LoRA", "sft", {"use_peft": True, "use_dora": True}),
])  # fmt: skip
def test_what_it_cannot_be_given_is_told_before_an_arm_runs(
    words: str, algorithm: str, overrides: dict[str, Any], tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=words):
        taken(tmp_path, algorithm, **overrides)


@pytest.mark.parametrize(("algorithm", "overrides"), [
    ("sft", {}),
    ("dpo", {"dataset_name": "builtin:arithmetic-preference"}),
    ("grpo", {"dataset_name": "builtin:arithmetic-prompts", "reward_functions": ["exact_match"]}),
])  # fmt: skip
def test_every_other_job_is_taken(algorithm: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArmRan):
        taken(tmp_path, algorithm, **overrides)


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    report = aligntune.compare(
        job(tmp_path, learning_rate=1e-3), a="trl", b="unsloth", python_b=str(site(tmp_path)), repeats=1, warmup=1,
        oracle=False, output_dir=tmp_path / "out", asserts=["parity", "data"])
    assert report.exit_code == 0, report.verdict
    found = json.loads((tmp_path / "out" / "arms" / "b-1" / RESULT).read_text())["attestation"]["peer"]
    assert found["trainer"] == "unsloth.UnslothSFTTrainer" and found["padding_free"] is True
