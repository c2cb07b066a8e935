"""One micro-batch of both backends on the same prepared rows: loss, gradients and metrics side by side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset

from aligntune.backends.base import Prepared
from aligntune.backends.fast.build import build as build_fast
from aligntune.backends.trl.build import build as build_trl
from aligntune.core.resolve import resolve
from tests.core import tiny

LENGTHS = ((3, 4, 2), (1, 1, 6), (5, 7, 1), (2, 3, 3), (4, 2, 5), (6, 1, 1), (1, 8, 2), (3, 5, 9))
"""Tokens of prompt, chosen and rejected answer; answers of one token among them."""


def ids(index: int, length: int) -> list[int]:
    return [3 + (37 * index + 11 * j + 5 * j * j) % 250 for j in range(length)]


def pairs(lengths: Any = LENGTHS) -> Dataset:
    return Dataset.from_list([
        {"prompt_ids": ids(i, prompt), "chosen_ids": ids(i + 50, chosen), "rejected_ids": ids(i + 90, rejected)}
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ])  # fmt: skip


def moved(model: Any, size: float = 0.05) -> Any:
    """The model off where it was, in place."""
    with torch.no_grad():
        for index, (name, value) in enumerate(model.named_parameters()):
            if value.requires_grad and "lora_A" not in name:
                drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
                value.add_(size * drawn.to(value.device, value.dtype))
    return model


def small(**overrides: Any) -> Any:
    return tiny.llama(num_hidden_layers=1, intermediate_size=48, **overrides)


def built_of(backend: str, algorithm: str, path: Any, rows: Any = None, held_out: Any = None, **options: Any) -> Any:
    """Under LoRA the adapters are moved; whole, the policy is another model than the reference."""
    adapters, size = options.get("use_peft", False), options.pop("size", 0.05)
    model = options.pop("model_name", None) or small()
    if algorithm in ("dpo", "ipo", "kto") and not adapters and not options.get("precompute_ref_log_probs"):
        options.setdefault("ref_model_name", small())
        model = moved(model, size)
    job = resolve({
        "model_name": model, "dataset_name": "in memory", "algorithm": algorithm, "backend": backend,
        "output_dir": str(path / backend), "max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "tokenizer_name": tiny.tokenizer(), "optimizer": "sgd", **options,
    })  # fmt: skip
    build = {"trl": build_trl, "fast": build_fast}[backend]
    built = build(job, Prepared(tiny.tokenizer(), pairs() if rows is None else rows, held_out))
    if adapters:
        moved(built.trainer.model, size)
    return built


def step(trainer: Any, batch: Any = None) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients and metrics of the first micro-batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())) if batch is None else batch)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    lists = trainer._metrics["train"]
    return loss.item(), gradients, {name: float(values[-1]) for name, values in lists.items()}


def assert_same_step(ours: Any, theirs: Any, *, loss: float = 1e-6, without: tuple[str, ...] = ()) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=loss, abs=loss)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(value.norm() for value in theirs[1].values())
    assert largest > 1e-4
    for name, value in theirs[1].items():
        assert (ours[1][name] - value).norm() < 1e-5 * value.norm() + 1e-7 * largest, name
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        if name not in without:
            # An answer of 50 nats is known to 4e-6 in fp32.
            assert ours[2][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
            assert not math.isnan(value)


def both_steps(algorithm: str, path: Any, **options: Any) -> tuple[Any, Any, Any]:
    """(our step, TRL's step, what our build says of its layout)."""
    ours = built_of("fast", algorithm, path, **options)
    theirs = built_of("trl", algorithm, path, **options)
    return step(ours.trainer), step(theirs.trainer), ours.attestation()["layout"]
