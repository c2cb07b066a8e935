"""The launch over ragged rows: what torch's kernel is given, and heads that it does not take as they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from aligntune.backends.fast.ops import attention as ops
from aligntune.backends.fast.ops.attention import attention, attention_reference

ENDS = (0, 20, 20, 64)


def factors(head_dim: int, **kind: Any) -> list[torch.Tensor]:
    torch.manual_seed(head_dim)
    return [torch.randn(1, heads, ENDS[-1], head_dim, **kind).requires_grad_() for heads in (4, 2, 2)]


def run(function: Any, tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    ends = torch.tensor(ENDS, dtype=torch.int32, device=tensors[0].device)
    out = function(*tensors, ends, max_seqlen=44, scale=0.3, **options)
    torch.manual_seed(0)
    upstream = torch.randn(out.shape).bfloat16().to(out)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int],
) -> torch.Tensor:
    """As torch's (2.11), by its definition, as particular about the heads, and with an output that lies as q does."""
    if query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]:
        raise RuntimeError("head_size must be a multiple of 8")
    outs = []
    for start, stop in pairwise(cu_seq_q.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        at = torch.arange(stop - start)
        seen = at[:, None] >= at
        if window_size[0] >= 0:
            seen &= at[:, None] - at <= window_size[0]
        scores = scale * q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).transpose(1, 2)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outs.append((weights @ v.repeat_interleave(q.shape[0] // v.shape[0], 0)).transpose(0, 1))
    return torch.empty_like(query).copy_(torch.cat(outs))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("head_dim", [16, 12, 3])
def test_heads_of_any_width_are_launched(head_dim: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)

    def launched(q: Any, k: Any, v: Any, ends: Any, *, max_seqlen: int, scale: float, window: Any) -> torch.Tensor:
        return ops._varlen(q, k, v, ends, max_seqlen, scale, window)

    tensors = factors(head_dim, dtype=torch.float64)
    found, wanted = (run(function, tensors, window=window) for function in (launched, attention_reference))
    assert found[0].shape == (1, 64, 4, head_dim) and found[0].is_contiguous()
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and other.abs().max() > 0.1
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("head_dim", [64, 12, 20])
def test_heads_of_any_width_on_the_gpu(head_dim: int, window: int | None) -> None:
    tensors = [x.detach().requires_grad_() for x in factors(head_dim, device="cuda", dtype=torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = run(attention_reference, wide, window=window)
    found = run(attention, tensors, window=window)
    assert found[0].shape == (1, 64, 4, head_dim) and found[0].is_contiguous()
    for one, other in zip(found, wanted, strict=True):
        assert 0 < float((one.double() - other).norm() / other.norm()) < 2e-2


def test_the_backward_copies_nothing():
    """Views all the way: an index would make a tensor of zeros for each gradient, and copy into it."""
    rows, length, heads, dim = 4, 8, 4, 16
    flat = [torch.randn(1, rows * length, n * dim, requires_grad=True) for n in (heads, 2, 2)]
    q, k, v = (x.view(1, rows * length, -1, dim).transpose(1, 2) for x in flat)
    cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    out = attention(q, k, v, cu_seqlens, max_seqlen=length, scale=0.1).reshape(1, rows * length, -1)
    gradient = torch.randn(out.shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as trace:
        out.backward(gradient)
    copied = [event.input_shapes for event in trace.events() if event.name == "aten::copy_" and event.input_shapes[0]]
    assert copied == [] and any("scaled_dot_product" in event.name for event in trace.events())
    assert all(float(x.grad.norm()) > 0 for x in flat)
