"""The plan against what steps take: our code on tensors without storage, their bytes counted, kernels left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction
from trl.trainer.utils import add_fused_lm_head

from aligntune.backends.fast import attach, forwards, memory, recompute
from aligntune.backends.fast.attachment import base_model
from aligntune.backends.fast.build import _head_bytes
from aligntune.backends.fast.memory import MemoryPlan
from aligntune.backends.fast.ops import _lora_core, _projection, _runtime, segment_attention
from aligntune.backends.fast.packing import RowsEndToEnd

MIB = 1 << 20
LAYERS, VOCABULARY = 6, 128_256
LEFT = memory.WORKSPACES
"""What the plan sets aside for what is not counted here."""


class Counted(TorchDispatchMode):
    """Counts the bytes of what is on the meta device; each storage once, from when an operator made it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._seen = 0, dict[int, tuple[StorageWeakRef, int]]()

    @property
    def live(self) -> int:
        self._seen = {key: held for key, held in self._seen.items() if not held[0].expired()}
        return sum(size for _, size in self._seen.values())

    def note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        held = self._seen.get(storage._cdata)
        if held is None or held[0].expired():
            self._seen[storage._cdata] = StorageWeakRef(storage), -(-storage.nbytes() // 512) * 512
            self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding_dense_backward.default:
            out = torch.empty(args[2], args[0].shape[-1], dtype=args[0].dtype, device="meta")
        elif func is torch.ops.aten.add.Tensor and args[0].shape[:1] == (VOCABULARY,):
            out = args[0]  # two gradients of one weight: autograd adds in place where it holds the last reference
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return out


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """torch.cuda's counters, of the meta device; launches do nothing, and cuBLAS writes where it is told to."""
    counts = Counted()
    for name, value in (("memory_allocated", lambda *_: counts.live), ("max_memory_allocated", lambda *_: counts.peak),
                        ("reset_peak_memory_stats", lambda *_: setattr(counts, "peak", counts.live)),
                        ("empty_cache", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for call in ("run", "__call__"):
        monkeypatch.setattr(InterpretedFunction, call, lambda *_, **__: None)
    monkeypatch.setattr(_runtime, "_shared_memory", lambda _: 227 * 1024)
    monkeypatch.setattr(_projection, "add_product", lambda *_, **__: None)
    monkeypatch.setattr(_lora_core, "_mm_as", lambda a, b, dtype: torch.empty(
        a.shape[0], b.shape[1], dtype=dtype, device=a.device))
    monkeypatch.setattr(forwards, "attention", segment_attention.segment_attention)
    monkeypatch.setattr(recompute, "_autocast", lambda _: contextlib.nullcontext)
    monkeypatch.setattr(recompute, "_random_state", lambda _: None)

    def kept_bytes(function: Any, args: tuple[Any, ...]) -> tuple[int, int]:
        args = tuple(arg.detach().requires_grad_(arg.is_floating_point()) if isinstance(arg, torch.Tensor) else arg
                     for arg in args)
        before = counts.live
        result = function(*args)
        kept = counts.live - before
        return kept - (result[0] if isinstance(result, tuple) else result).nbytes, counts.peak - before - kept

    monkeypatch.setattr(recompute, "kept_bytes", kept_bytes)
    with counts:
        yield counts


def model(counts: Counted, *, lora: bool, small: bool) -> Any:
    """Six layers of a Llama 1B shape, or half as wide with few words, attached, every layer recomputed."""
    config = LlamaConfig(
        vocab_size=4096 if small else VOCABULARY, hidden_size=1024 if small else 2048, num_hidden_layers=LAYERS,
        intermediate_size=4096 if small else 8192, num_attention_heads=16 if small else 32, head_dim=64,
        num_key_value_heads=8, tie_word_embeddings=not small)
    with torch.device("meta"):
        made: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        if lora:
            from peft import LoraConfig, get_peft_model

            made = get_peft_model(made, LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0))
    add_fused_lm_head(base_model(made), outputs=("log_probs", "entropy", "is_top1"))
    attach(made.train())
    for tensor in (*made.parameters(), *made.buffers()):
        counts.note(tensor)
    return made


def batch(lengths: list[int]) -> dict[str, Any]:
    rows = [{"input_ids": np.ones(length, dtype=np.int64), "labels": np.ones(length, dtype=np.int64)}
            for length in lengths]
    laid = {name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in RowsEndToEnd(0, packed=False)(rows).items() if name != "num_tokens"}
    return laid | {"attention_mask": torch.empty((1, 1, 1, 0), dtype=torch.bool, device="meta"), "use_cache": False}


def micro_step(made: Any, inputs: dict[str, Any], *, lora: bool) -> None:
    over = {} if lora else {"loss_over": torch.empty((), device="meta")}
    out = made(**inputs, fused_lm_head=True, **over)
    (-out.log_probs.sum() if lora else out.loss).backward()


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize(("train", "lengths"), [
    ("lora", [2048] * 4), ("lora", [16_384]), ("lora", [400] * 16), ("all", [2048] * 4), ("small", [700] * 16)])
def test_the_plan_is_what_a_step_takes(train: str, lengths: list[int], accumulates: bool, counted: Counted) -> None:
    """Of the measured length less than a quarter of a layer more; never less, of batches no longer than that."""
    lora = train == "lora"
    made = model(counted, lora=lora, small=train == "small")
    ours = recompute.install(base_model(made))
    assert ours is not None
    base_model(made).gradient_checkpointing_enable()
    gradients = sum(p.nbytes for p in made.parameters() if p.requires_grad)
    plan = MemoryPlan(ours, 1 << 50, gradients, _head_bytes(base_model(made)), accumulates)
    measured, length = batch(lengths), sum(lengths)
    with plan.step(length, number=0):
        micro_step(made, measured, lora=lora)
    made.zero_grad(set_to_none=True)
    plan._settle()
    costs = plan.costs
    assert costs is not None and costs.head is not None
    assert costs.forward >= costs.standing > 0 and costs.backward > 0 and costs.passing > 0
    assert counted.live == costs.base
    for rows in (lengths, lengths[:2], [200, 300, 900, 57]):
        inputs = measured if rows is lengths else batch(rows)
        tokens = inputs["input_ids"].numel()
        for kept in (0, 1, 3, LAYERS):
            ours.choose(LAYERS - kept)
            for _ in range(1 + accumulates):  # the second finds the gradients of the first
                counted.peak = counted.live
                micro_step(made, inputs, lora=lora)
            more = costs.of(tokens, kept) - LEFT - counted.peak
            made.zero_grad(set_to_none=True)
            assert more > -LEFT / 2, (tokens, kept, more / MIB)
            if tokens == length and kept:  # in the step that was measured one layer was run to see what it keeps
                assert more < tokens * costs.layer / 4, (tokens, kept, more / MIB)
