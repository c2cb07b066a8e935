"""Strings in a script's `gradient_checkpointing` are honoured as the factories do, and transformers sees a bool."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import HfArgumentParser, TrainingArguments

from aligntune.backends.fast import (
    FastSFTTrainer,
    FastTrainingArguments,
    accelerate_trl,
    attach_trainer,
    attachment_of,
    fast_train,
)
from aligntune.backends.fast.memory import GIB, MemoryPlan
from aligntune.backends.fast.recompute import recompute_of
from aligntune.errors import ConfigError
from tests.core import tiny

EVERY = "; activations: recomputed in every layer"
HOST = f"{EVERY}, their inputs in host memory"


def arguments(path: Path, kind: Any = FastTrainingArguments, **options: Any) -> Any:
    return kind(str(path), **({"bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no",
                               "per_device_train_batch_size": 2, "logging_steps": 1} | options))  # fmt: skip


def build(args: Any, kind: Any = FastSFTTrainer, **options: Any) -> Any:
    model = tiny.llama(num_hidden_layers=2)  # the last layer's input stays where it is
    return kind(model=model, args=args, train_dataset=tiny.text_rows(4), processing_class=tiny.tokenizer(), **options)


def sees_bools(args: Any) -> bool:
    both = [getattr(args, name, None) for name in ("gradient_checkpointing", "activation_checkpointing")]
    return all(value is True or value is None for value in both) and True in both


@pytest.mark.parametrize(("said", "kept", "layout"), [
    ("offload", "offload", HOST), ("unsloth", "offload", HOST), ("auto", "auto", EVERY)])  # a plan needs a GPU
@pytest.mark.slow
@pytest.mark.parametrize("kind", [FastTrainingArguments, trl.SFTConfig, TrainingArguments])
def test_a_string_in_the_arguments(kind: Any, said: str, kept: str, layout: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, kind, gradient_checkpointing=said)
    trainer = build(args)
    assert trainer.layout.startswith("rows: end to end") and f"{trainer.layout};".count(f"{layout};") == 1
    assert sees_bools(trainer.args) and trainer.args.recompute == kept
    assert recompute_of(trainer.model).offload == (kept == "offload") and trainer.memory is None
    assert args.gradient_checkpointing == (True if kind is FastTrainingArguments else said)  # the script's own object
    if said != "offload" or kind is not FastTrainingArguments:
        return
    trainer.train()
    assert trainer.model.model.layers[0]._gradient_checkpointing_func.func == recompute_of(trainer.model).run
    assert sum(map(len, recompute_of(trainer.model).buffers.free.values())) > 0


@pytest.mark.slow
def test_the_run_is_that_of_one_that_keeps_its_activations(tmp_path: Path) -> None:
    losses = []
    for said in ("offload", False):
        trainer = build(arguments(tmp_path, gradient_checkpointing=said, max_steps=2, learning_rate=1e-2))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and losses[0][0] > 4 and losses[0][0] != losses[0][1]


@pytest.mark.parametrize(("options", "offloads"), [
    pytest.param({}, True, marks=pytest.mark.slow),
    pytest.param({"gradient_checkpointing": True}, False, marks=pytest.mark.slow),
    ({"trainer_options": {"gradient_checkpointing_kwargs": {"use_reentrant": False}}}, False)])
def test_a_factory_keeps_to_how_the_model_was_made(options: dict[str, Any], offloads: bool, tmp_path: Path) -> None:
    from aligntune import create_sft_trainer
    from aligntune.backends.fast import FastLanguageModel

    model = FastLanguageModel.get_peft_model(tiny.llama(), r=2, use_gradient_checkpointing="unsloth")
    run = create_sft_trainer(
        model, list(tiny.text_rows(4)), backend="fast", tokenizer_name=tiny.tokenizer(), max_steps=1, batch_size=2,
        report_to="none", output_dir=str(tmp_path), progress=False, **options)  # fmt: skip
    held = recompute_of(model.get_base_model())
    assert (held is not None and held.offload) == offloads == (HOST in run.attestation()["layout"])
    assert (run.config.train.gradient_checkpointing == "offload") == offloads
    run.train()
    assert not offloads or sum(map(len, held.buffers.free.values())) > 0


def test_what_the_model_was_made_with_gives_way(tmp_path: Path) -> None:
    from aligntune.backends.fast import FastLanguageModel

    model = FastLanguageModel.get_peft_model(tiny.llama(), r=2, use_gradient_checkpointing="unsloth")
    trainer = FastSFTTrainer(model, arguments(tmp_path, gradient_checkpointing="auto"), None, tiny.text_rows(4),
                             processing_class=tiny.tokenizer())
    assert f"{EVERY};" in f"{trainer.layout};" and not recompute_of(model.get_base_model()).offload


def test_auto_on_a_gpu_plans_with_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, gradient_checkpointing="auto", memory_budget_gib=1.5)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="memory_budget_gib = 1.5: gradient_checkpointing='auto' on a GPU plans"):
            build(args)
        monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    trainer = build(args)
    assert "; activations: recomputed as memory asks" in trainer.layout
    assert isinstance(trainer.memory, MemoryPlan) and trainer.memory.budget == int(1.5 * GIB)
    with pytest.raises(ConfigError, match="memory_budget_gib = 1.5"):
        build(arguments(tmp_path, gradient_checkpointing="offload", memory_budget_gib=1.5))


def test_a_budget_is_for_our_trainers(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_checkpointing="auto", memory_budget_gib=4)
    words = "^memory_budget_gib = 4: nothing plans SFTTrainer's steps by memory; FastSFTTrainer's are planned; leave it"
    with accelerate_trl(), pytest.raises(ConfigError, match=words):
        build(args, trl.SFTTrainer)


@pytest.mark.parametrize("kind", [trl.SFTConfig, FastTrainingArguments])
def test_a_plain_trl_trainer(kind: Any, tmp_path: Path) -> None:
    """Made fast by each of the three ways."""
    def plain(said: Any = "offload") -> Any:
        return build(arguments(tmp_path, kind, gradient_checkpointing=said), trl.SFTTrainer)

    trained, attached = plain(), plain()
    fast_train(trained)
    attach_trainer(attached)
    with accelerate_trl():
        built = plain()
    for trainer in (trained, attached, built):
        assert sees_bools(trainer.args) and recompute_of(trainer.model).offload
    assert sum(map(len, recompute_of(trained.model).buffers.free.values())) > 0
    silent = plain(True)
    attach_trainer(silent)
    assert recompute_of(silent.model) is None  # torch's function, as ever


def test_preferences_too(tmp_path: Path) -> None:
    args = arguments(tmp_path, trl.DPOConfig, gradient_checkpointing="offload")
    trainer = trl.DPOTrainer(model=tiny.llama(num_hidden_layers=1), ref_model=tiny.llama(num_hidden_layers=1, seed=1),
                             args=args, train_dataset=tiny.pairs(), processing_class=tiny.tokenizer())
    attach_trainer(trainer)
    assert sees_bools(trainer.args) and recompute_of(trainer.model).offload


def test_a_trainer_that_cannot_is_left_as_it_was(tmp_path: Path) -> None:
    args = arguments(tmp_path, trl.SFTConfig, gradient_checkpointing="offload",
                     gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = build(args, trl.SFTTrainer)
    with pytest.raises(ConfigError, match="'offload': gradient_checkpointing_kwargs are given"):
        fast_train(trainer)
    assert attachment_of(trainer.model) is None and trainer.state.global_step == 0


@pytest.mark.parametrize("said", ["offlaod", "offloaded", "Offload"])
def test_typos(said: str, tmp_path: Path) -> None:
    message = f"gradient_checkpointing: unknown value '{said}'; did you mean 'offload'"
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, gradient_checkpointing=said)
    with pytest.raises(ConfigError, match=message):
        build(arguments(tmp_path, trl.SFTConfig, gradient_checkpointing=said))
    plain = build(arguments(tmp_path, trl.SFTConfig, gradient_checkpointing=said), trl.SFTTrainer)
    with pytest.raises(ConfigError, match=message):
        fast_train(plain)
    assert attachment_of(plain.model) is None
    with pytest.raises(ConfigError, match=f"recompute: unknown value '{said}'"):
        arguments(tmp_path, recompute=said)
    with pytest.raises(ConfigError, match="did you mean 'True'"):
        arguments(tmp_path, gradient_checkpointing="true")


def test_contradictions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing=False, recompute='offload': these contradict"):
        arguments(tmp_path, gradient_checkpointing=False, recompute="offload")
    with pytest.raises(ConfigError, match="gradient_checkpointing='auto', recompute='offload': these contradict"):
        arguments(tmp_path, gradient_checkpointing="auto", recompute="offload")
    assert arguments(tmp_path, gradient_checkpointing="unsloth", recompute="offload").recompute == "offload"
    for budget in (0, -1.0, float("nan"), float("inf"), "8"):
        with pytest.raises(ConfigError, match="memory_budget_gib = .*: must be a finite number > 0"):
            arguments(tmp_path, gradient_checkpointing="auto", memory_budget_gib=budget)
    for rate in (-1.0, float("nan"), float("inf"), "1e-5", True):
        with pytest.raises(ConfigError, match="embedding_learning_rate = .*: must be a finite number >= 0"):
            arguments(tmp_path, embedding_learning_rate=rate)
    assert arguments(tmp_path, embedding_learning_rate=0).embedding_learning_rate == 0


def test_copies_and_parsers_keep_it(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_checkpointing="auto", memory_budget_gib=4)
    rebuilt = FastTrainingArguments(**json.loads(json.dumps(args.to_dict())))
    replaced = dataclasses.replace(args, learning_rate=1e-5)
    given = ["--output_dir", str(tmp_path), "--recompute", "auto", "--memory_budget_gib", "4", "--bf16", "False"]
    parsed, = HfArgumentParser(FastTrainingArguments).parse_args_into_dataclasses(given)
    for other in (args, rebuilt, replaced, parsed):
        assert sees_bools(other) and (other.recompute, other.memory_budget_gib) == ("auto", 4)
    assert arguments(tmp_path).recompute is None and arguments(tmp_path).gradient_checkpointing is True
