"""Tiles of rows on a card: the peak falls by what they do not hold, and captured steps are launched ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from aligntune.backends.fast import recompute, tiles
from aligntune.backends.fast.attachment import base_model
from tests.backends.fast import minis
from tests.backends.fast.test_tiles import ends, recomputed

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def mid(*, layers: int = 4) -> Any:
    """1,024 hidden and 4,096 intermediate features: of 8,192 rows, tiles of 4,096."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            base = LlamaForCausalLM(LlamaConfig(
                vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
                num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=65_536))
    finally:
        torch.set_default_dtype(torch.float32)
    model = get_peft_model(base.train(), LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return recomputed(model, offload=True)


def on_card(lengths: list[int]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in ends(lengths).items()}


def card_step(model: Any, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and the bytes at the peak above what stood before."""
    base = base_model(model)
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    hidden = base.base_model(**batch, use_cache=False).last_hidden_state
    hidden.float().square().mean().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del hidden
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, peak


@pytest.mark.parametrize(("lengths", "saved"), [
    # Of 8,192 rows: gate, up and the product's gradient are 192 MiB as a whole, 96 in tiles of 4,096.
    ([8192], 80), ([4096, 4096], 80), ([5000, 3192], 80),
    # Of 32,768: 768 against 96; and of four sequences what attention keeps is in memory for one at a time.
    ([32_768], 500), ([8192] * 4, 700),
])
def test_the_peak_falls_by_what_is_not_held(
    lengths: list[int], saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = mid(), on_card(lengths)
    card_step(model, batch)
    tiled, peak = card_step(model, batch)
    monkeypatch.setattr(tiles, "plan", lambda *_: None)
    card_step(model, batch)
    whole, most = card_step(model, batch)
    assert most - peak > saved * MIB, (most / MIB, peak / MIB)
    assert tiled.keys() == whole.keys() and len(tiled) == 4 * 14
    for name, expected in whole.items():
        error = (tiled[name] - expected).norm() / expected.norm()
        assert expected.norm() > 0 and error < 2e-2, (name, error.item())


@pytest.mark.parametrize("lengths", [[8192], [2048] * 4])
def test_a_captured_step_by_tiles_is_the_launched_one(lengths: list[int]) -> None:
    model, batch = mid(), on_card(lengths)
    base = base_model(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[torch.Tensor, ...]:
        hidden = base.base_model(**batch, use_cache=False).last_hidden_state
        return torch.autograd.grad(hidden.float().square().mean(), parameters)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    ours = recompute.recompute_of(base)
    assert ours is not None
    for seed in (1, 2):
        torch.manual_seed(seed)
        batch["input_ids"].copy_(torch.randint(3, minis.VOCAB, batch["input_ids"].shape))
        graph.replay()
        replayed = [gradient.clone() for gradient in captured]
        for expected, gradient in zip(run(), replayed, strict=True):
            assert expected.norm() > 0
            torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-4 * expected.abs().max().item())


def test_long_rows_fetch_behind_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 65,536 rows: one input less at the peak, of 128 MiB, and the same gradients."""
    model, batch = mid(layers=3), on_card([65_536])
    card_step(model, batch)
    late, peak = card_step(model, batch)
    monkeypatch.setattr(tiles, "LATE_ROWS", 1 << 30)
    card_step(model, batch)
    early, most = card_step(model, batch)
    assert most - peak > 100 * MIB, (most / MIB, peak / MIB)
    assert all((late[name] - early[name]).norm() <= 1e-2 * early[name].norm() for name in early)
