"""Users' scripts as a card runs them: in bf16, steps replayed, recompute as memory asks, cut and resumed.

Without a card the same code runs in fp32 on a smaller model, launched one by one.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments

from aligntune.backends.fast import (
    FastLanguageModel,
    FastSFTTrainer,
    FastTrainingArguments,
    accelerate_trl,
    attachment_of,
)
from aligntune.backends.fast.build import Witness
from aligntune.backends.fast.ops import _runtime
from tests.backends.fast.test_user_scripts import (
    FLAT,
    HOST,
    LINEARS,
    assert_logged_and_resumed,
    eight_bits_script,
    losses,
)
from tests.core import tiny

WHERE = [pytest.param("here", marks=pytest.mark.slow), pytest.param("card", marks=pytest.mark.gpu)]
CARD = not _runtime.interpreting()
DTYPE = torch.bfloat16 if CARD else torch.float32
SHAPE = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1} if CARD else {
    "num_hidden_layers": 1}
LENGTH, RANK, STEPS = (60, 16, 6) if CARD else (8, 4, 4)
FIRST, SAME = (1e-3, 5e-3) if CARD else (2e-6, 2e-5)
"""Of losses, relative: of the first step, and of all.

bf16 rounds by 2^-9. Some twenty roundings in a row leave the log p of one token about 2^-9 x sqrt(20) x 1.6, the spread
of the logits, = 0.014 off; they are of either sign, so the mean of 220 tokens and more is off by a fifteenth of that,
1e-4 of a loss of 6.8. Steps of Adam enlarge it: TRL's own run in bf16 is 2e-4 from its run in fp32 on the first step,
and up to 2e-3 on the sixth. Two runs in bf16 may differ by twice that. The losses fall by a third and more.
"""
FALLS = 0.25 if CARD else 2e-3
REPLAYED = "forward and backward replayed as CUDA graphs"
HERE = "launched one by one, the model is not on a GPU"
COMMON: dict[str, Any] = {
    "max_steps": STEPS, "learning_rate": 3e-3 if CARD else 1e-2, "lr_scheduler_type": "constant", "seed": 3407,
    "per_device_train_batch_size": 8, "bf16": CARD, "optim": "adamw_torch", "logging_steps": 1, "report_to": "none",
    "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


@dataclass(frozen=True)
class Script:
    """What one script says. `captured`: on a card its steps are replayed.

    Args:
        older: keywords of its trainer, in older names; `today` is the same in TRL's config.
        arguments: training arguments beside `COMMON`; `ours` are those that TRL's do not know.
        layout: how the layout begins and ends, on a card; None for TRL's own class, inside `accelerate_trl`.
    """

    older: dict[str, Any]
    today: dict[str, Any]
    lengths: tuple[int, ...] = (LENGTH,) * 16
    arguments: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    layout: tuple[str, str] | None = (FLAT + REPLAYED, "; activations: kept")
    captured: bool = True


PLAIN = {"dataset_text_field": "story", "max_seq_length": 64}, {"dataset_text_field": "story", "max_length": 64}
# Rows are cut; one batch holds them all, so that every batch has one shape.
CUT = {"dataset_text_field": "story", "max_seq_length": LENGTH - 4}, {
    "dataset_text_field": "story", "max_length": LENGTH - 4}
RAGGED = (LENGTH // 3, LENGTH) * 4
SCRIPTS = {
    "rates of embeddings": Script(
        *PLAIN, arguments={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        ours={"embedding_learning_rate": 1e-3},
        adapters={"target_modules": [*LINEARS, "embed_tokens", "lm_head"], "use_gradient_checkpointing": "unsloth",
                  "use_rslora": True},
        layout=(FLAT + "launched one by one, more than an eighth of the parameters train", HOST), captured=False),
    "older names": Script(*CUT, lengths=RAGGED),
    "older names, TRL's class": Script(*CUT, lengths=RAGGED, layout=None, captured=False),
    "packing": Script(PLAIN[0] | {"packing": True}, PLAIN[1] | {"packing": True},
                      lengths=tuple(LENGTH * part // 6 for part in (1, 3, 2, 4, 3, 5, 1, 2))),
    "8 bits": Script(*PLAIN, arguments={"optim": "adamw_8bit", "weight_decay": 0.01},
                     ours={"gradient_checkpointing": "auto"},
                     layout=(FLAT + REPLAYED, "; activations: recomputed as memory asks")),
}  # fmt: skip


def rows(lengths: tuple[int, ...]) -> Dataset:
    """Letters at random: errors of tokens that are all alike would not cancel out in a mean."""
    draw = random.Random(0)
    return Dataset.from_list([{"story": "".join(draw.choices(ascii_lowercase, k=length))} for length in lengths])


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A model whose weights are numbers of bf16, and its tokenizer."""
    model, path = tiny.llama(**SHAPE), tmp_path / "model"
    model.bfloat16().float().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def build(script: Script, saved: str, out: Path, **more: Any) -> Any:
    """The script up to `train()`."""
    model, tokenizer = FastLanguageModel.from_pretrained(model_name=saved, max_seq_length=64, dtype=None)
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=2 * RANK, **script.adapters)
    kind = FastTrainingArguments if script.ours else TrainingArguments
    arguments = {"gradient_checkpointing": False, **COMMON, **script.arguments, **script.ours, **more}
    given = {"model": model, "tokenizer": tokenizer, "train_dataset": rows(script.lengths), **script.older,
             "args": kind(str(out), **arguments)}  # fmt: skip
    if script.layout is not None:
        return FastSFTTrainer(**given)
    with accelerate_trl():
        return trl.SFTTrainer(**given)


def plain(script: Script, saved: str, adapters: Path, out: Path) -> Any:
    """TRL as it is, from the same adapters."""
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=DTYPE)
    model = PeftModel.from_pretrained(model, str(adapters), is_trainable=True).to("cuda" if CARD else "cpu")
    arguments = {"gradient_checkpointing": False, **COMMON, **script.arguments, **script.today}
    optimizer = None
    if rate := script.ours.get("embedding_learning_rate"):
        groups: dict[bool, list[Any]] = {False: [], True: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups["modules_to_save" in name].append(parameter)
        assert len(groups[True]) == 2
        optimizer = torch.optim.AdamW([{"params": groups[False]}, {"params": groups[True], "lr": rate}],
                                      lr=arguments["learning_rate"], weight_decay=0.0)
    trainer = trl.SFTTrainer(model=model, args=trl.SFTConfig(str(out), **arguments), optimizers=(optimizer, None),
                             train_dataset=rows(script.lengths), processing_class=tiny.tokenizer())  # fmt: skip
    assert attachment_of(trainer.model) is None
    trainer.train()
    assert next(trainer.model.parameters()).is_cuda == CARD
    return trainer


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_what_plain_trl_trains(name: str, where: str, saved: str, tmp_path: Path) -> None:
    script = SCRIPTS[name]
    trainer = build(script, saved, tmp_path / "ours")
    base = trainer.model.get_base_model()
    assert base.dtype == DTYPE and base.lm_head.weight.is_cuda == CARD
    trainer.model.save_pretrained(tmp_path / "adapters")
    attachment = attachment_of(trainer.model)
    assert attachment is not None
    witness = Witness(trainer, attachment, getattr(trainer, "layout", ""))
    trainer.train()
    found, true = losses(trainer), losses(plain(script, saved, tmp_path / "adapters", tmp_path / "theirs"))
    assert len(found) == STEPS and all(map(math.isfinite, found)) and found[-1] < found[0] * (1 - FALLS)
    assert found[0] == pytest.approx(true[0], rel=FIRST) and found == pytest.approx(true, rel=SAME)
    report = witness.report()
    step = report["step"]
    assert report["eager"] == [] and step["problems"] == () and step["interpreter"] != CARD
    assert {"rms_norm_forward", "rope_forward", "rope_backward", "glu_forward", "logits_loss"} <= step["kernels"].keys()
    assert step["replayed"] == (script.captured and CARD)
    if script.layout is None:
        assert type(trainer) is trl.SFTTrainer
        return
    assert "cu_seq_lens_q" in next(iter(trainer.get_train_dataloader()))
    if CARD:
        assert trainer.layout.startswith(script.layout[0]) and f"{script.layout[1]}; optimizer: " in trainer.layout
    else:
        assert trainer.layout.startswith(FLAT + HERE)
    if script.captured and CARD:
        # Launched on its first sight, captured on its second: after that every step was a replay of the one pair.
        graphed = trainer.graphed
        assert graphed.captures == len(graphed.pairs) == len(graphed.launched) == 1
    if CARD and script.ours.get("gradient_checkpointing") == "auto":
        assert trainer.memory.costs.layer > 0 and trainer.memory.most == 0  # memory asks for nothing


@pytest.mark.parametrize("where", WHERE)
def test_a_script_that_logs_prints_goes_on_and_answers(
    where: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut = eight_bits_script(
        saved, tmp_path, rows((LENGTH,) * 16), dtype=None, max_seq_length=64, r=RANK, max_steps=STEPS,
        per_device_train_batch_size=8, learning_rate=1e-2, bf16=CARD)
    assert_logged_and_resumed(whole, cut, steps=STEPS, near=SAME)
    assert losses(whole)[-1] < losses(whole)[0] * (1 - FALLS)
    printed = capsys.readouterr().out
    assert re.search(r"^[\d.]+ seconds used for training\.$", printed, re.MULTILINE)
    memory = [re.search(pattern, printed, re.MULTILINE) for pattern in (
        r"Max memory = ([\d.]+) GiB\.$", r"^Peak reserved memory = ([\d.]+) GiB\.$",
        r"^([\d.]+) GiB of memory reserved\.$")]
    if CARD:
        most, *reserved = (float(one[1]) for one in memory if one is not None)
        assert len(reserved) == 2 and all(0 < size < most for size in reserved)
    else:
        assert memory == [None] * 3
    for one in (whole, cut):
        states = one.optimizer.state.values()
        # bitsandbytes keeps those below 4,096 numbers in 32 bits
        assert any(held.get("state1", torch.empty(0)).dtype == torch.uint8 for held in states) == CARD
        if CARD:
            assert one.graphed.captures == 1

    tokenizer = whole.processing_class
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora_model"), max_seq_length=64, dtype=None)
    base, _ = FastLanguageModel.from_pretrained(saved, max_seq_length=64, dtype=None)
    ids = tokenizer(["00aa"], return_tensors="pt").to(whole.model.device)
    with torch.no_grad():
        logits = [model(**ids).logits.float() for model in (whole.model, again.eval(), base.eval())]
    near = 0.15 if CARD else 1e-4  # logits of 4 to 8 lie 1/32 apart in bf16
    assert torch.allclose(logits[0], logits[1], atol=near) and (logits[0] - logits[2]).abs().max() > 3 * near
