"""On a card that refuses: what the error predicts comes true, and what does not fit shows before the first step."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from aligntune import create_sft_trainer
from aligntune.backends.fast.memory import Costs, MemoryPlan
from aligntune.errors import GpuMemoryError
from tests.backends.fast.test_graphs import standing
from tests.core import tiny
from tests.core.test_out_of_memory import changes

pytestmark = pytest.mark.gpu
UNITS = {"GiB": 1 << 30, "MiB": 1 << 20}
LAYERS = 8


def model() -> Any:
    """60 MiB of weights; a layer keeps 15 KiB a token for its backward, which is all that is large here."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(
                vocab_size=259, hidden_size=512, intermediate_size=2048, num_hidden_layers=LAYERS,
                num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32_768, pad_token_id=0,
                bos_token_id=1, eos_token_id=2))  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)


def trainer_of(path: Path, lengths: tuple[int, ...], **options: Any) -> Any:
    """Of rows of so many tokens, in this order."""
    data = [{"text": "abcdefgh"[i % 8] * (length - 1)} for i, length in enumerate(lengths)]  # and an end
    trainer = create_sft_trainer(
        model(), data, backend="fast", tokenizer_name=tiny.tokenizer(), use_peft=True, lora_r=8, lora_dropout=0.0,
        learning_rate=1e-3, output_dir=str(path), overwrite=True, report_to="none", progress=False, logging_steps=1,
        **options)  # fmt: skip
    trainer.trainer.args.train_sampling_strategy = "sequential"
    return trainer


def peak(path: Path, lengths: tuple[int, ...], **options: Any) -> int:
    """Bytes that a run took, above what others held when it began."""
    before = standing()
    trainer_of(path, lengths, **options).train()
    return torch.cuda.max_memory_allocated() - before


def refused(path: Path, lengths: tuple[int, ...], **options: Any) -> str:
    """What the error of a run says that ends before its first optimizer step; all that it held goes with the error."""
    standing()
    trainer = trainer_of(path, lengths, **options)
    with pytest.raises(GpuMemoryError) as caught:
        trainer.train()
    assert trainer.trainer.state.global_step == 0 and trainer.trainer.optimizer.state_dict()["state"] == {}
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return str(caught.value)


@contextmanager
def held_to(share: float, whole: int) -> Iterator[float]:
    """All that torch may have of the card within: this share of `whole` bytes more than it has."""
    standing()
    most = torch.cuda.memory_reserved() + share * whole
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info()[1])
    try:
        yield most
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        standing()


def test_what_the_error_predicts_comes_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three changes trains where the run did not, and takes as much less as was said, within a factor of 2.

    The peak that is predicted from is that of the refused run, which is a tenth or two short of what it would take.
    """
    # Steps are launched: a graph's pool would stand beside the launched step that it was captured after.
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    lengths = (2048,) * 16
    settings = {"batch_size": 8, "gradient_accumulation_steps": 1, "max_seq_length": 2048,
                "gradient_checkpointing": False, "max_steps": 2}
    whole = peak(tmp_path / "whole", lengths, **settings)
    with held_to(0.85, whole):
        text = refused(tmp_path / "refused", lengths, **settings)
        said, now, where = text.splitlines()[:3]
        assert said == "the GPU ran out of memory in step 1: CUDA out of memory."
        assert now.split("now: ")[1].startswith(
            "batch_size=8, gradient_accumulation_steps=1, max_seq_length=2048, packing=False, "
            "gradient_checkpointing=False, ") and now.endswith("use_peft=True, lora_r=8")
        assert "weights 0.1, optimizer state 0.0, gradients and activations " in where
        predicted = {change: float(number) * UNITS[unit]
                     for change, (number, unit) in ((change, size.split()) for change, size in changes(text).items())}
        # All are of activations, which shrink with each; no weight, gradient or state is as large here.
        assert predicted.keys() == {"gradient_checkpointing=True", "batch_size=4, gradient_accumulation_steps=2",
                                    "max_seq_length=1024"}, text
        for change, saved in predicted.items():
            given = {name: ast.literal_eval(value) for name, value in (one.split("=") for one in change.split(", "))}
            found = whole - peak(tmp_path / "changed", lengths, **settings | given)
            assert saved / 2 <= found <= 2 * saved, f"{change}: {found / 2**20:.0f} MiB less\n{text}"


class Planned(TrainerCallback):
    """What every step was planned with, and how many layers it recomputed; None: all. Ends after `last` steps."""

    def __init__(self, *, last: int | None = None) -> None:
        self.last = last
        self.plan: Any = None
        self.steps: list[tuple[Costs | None, int | None]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.plan is not None:
            self.steps.append((self.plan.costs, self.plan.recompute.first))
        control.should_training_stop |= state.global_step == self.last


def test_a_long_batch_far_behind_shows_before_the_first_step_and_is_what_is_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    long, late = 32_768, (10, 13)
    lengths = tuple(long - 1024 * late.index(i) if i in late else 64 for i in range(16))
    settings = {"batch_size": 1, "max_seq_length": long, "max_steps": len(lengths)}
    keeping = {**settings, "gradient_checkpointing": False}
    whole = peak(tmp_path / "whole", lengths, callbacks=[Planned(last=1)], **keeping)
    with held_to(0.8, whole) as most:
        peak(tmp_path / "short", (64,) * 16, **keeping)
        with caplog.at_level("INFO"):
            text = refused(tmp_path / "refused", lengths, **keeping)
        assert f"the longest batch first: 1 rows, {long} tokens" in caplog.text
        assert text.startswith("the GPU ran out of memory in step 1: CUDA out of memory.\n")
        assert len(changes(text)) == 3

        settled, settle = [], MemoryPlan._settle
        monkeypatch.setattr(MemoryPlan, "_settle", lambda self: (settled.append(1), settle(self))[1])
        standing()
        seen = Planned()
        trainer = trainer_of(tmp_path / "auto", lengths, gradient_checkpointing="auto", callbacks=[seen], **settings)
        seen.plan = trainer.trainer.memory
        assert trainer.train().global_step == len(lengths) == len(seen.steps)
        assert torch.cuda.max_memory_allocated() <= torch.cuda.max_memory_reserved() <= most
    costs = seen.plan.costs
    # Measured once, by the pass over the longest batch; the first step is over before the optimizer's state is there.
    assert settled == [1] and costs.tokens == long and seen.steps[0] == (None, None)
    assert all(planned is costs for planned, _ in seen.steps[1:])
    recomputed = [first for _, first in seen.steps[1:]]
    assert all((first > 0) == (step in late) for step, first in enumerate(recomputed, start=1)), recomputed
    assert seen.plan.most == max(recomputed) <= LAYERS
    losses = [entry["loss"] for entry in trainer.trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(lengths) and all(map(math.isfinite, losses))
