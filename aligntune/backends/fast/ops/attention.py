"""Causal attention over rows that lie end to end: no row sees another.

    out_i = softmax(scale * q_i k_j^T over j <= i in the same row, j > i - window) v

A row may have more keys than queries, which are then its last: query i of m sees the first n - m + i + 1 of n keys.

Torch has the kernels; this op picks by shape. Rows of one length are a dense batch, which cuDNN runs at 375 / 290
TFLOP/s forward / backward (head_dim 64, H100); ragged rows go through FlashAttention-2's variable-length launch at
206 / 200. fp32 has no such launch: there each row is a call of its own, which waits for the lengths.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from aligntune.errors import ConfigError

_HEAD_MULTIPLE = 8
"""What FlashAttention-2 wants a head dimension to be a multiple of."""


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, max_seqlen: int, scale: float,
    window: int | None = None, cu_seqlens_k: torch.Tensor | None = None, max_seqlen_k: int | None = None,
) -> torch.Tensor:
    """Causal attention within each row.

    Args:
        q: (1, query heads, T, head_dim), any strides but the last, which is 1.
        k, v: (1, key heads, T, head_dim); query heads are a multiple of key heads.
        cu_seqlens: (rows + 1,) int32, first 0 and last T; equal neighbours are empty rows.
        max_seqlen: the longest row. Where rows x max_seqlen is T, every row has that length.
        scale: what the scores are multiplied with.
        window: a token sees itself and the `window` - 1 before it; None sees all.
        cu_seqlens_k, max_seqlen_k: the same of the keys, where rows have more keys than queries: k and v then have as
            many tokens as `cu_seqlens_k` ends with. No row has fewer keys than queries.

    Returns:
        (1, T, query heads, head_dim), contiguous.

    Raises:
        ConfigError: more tokens than `cu_seqlens` counts rows of `max_seqlen` for, told by shapes alone.
    """
    tokens, rows = q.shape[2], cu_seqlens.shape[0] - 1
    if rows * max_seqlen < tokens:
        raise ConfigError(f"{rows} rows of at most {max_seqlen} tokens cannot hold {tokens} tokens")
    longest = max_seqlen if cu_seqlens_k is None else max_seqlen_k
    assert longest is not None, "max_seqlen_k goes with cu_seqlens_k"
    if window is not None and window >= longest:
        window = None
    if rows * max_seqlen == tokens and window is None and cu_seqlens_k is None:
        return _dense(q, k, v, rows, max_seqlen, scale)
    if not q.is_cuda or q.dtype == torch.float32:
        return attention_reference(q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window,
                                   cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k)
    ends = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return _varlen(q, k, v, (cu_seqlens, ends), (max_seqlen, longest), scale, window)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, length: int, scale: float
) -> torch.Tensor:
    def batch(x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(0).unflatten(1, (rows, length)).transpose(0, 1)

    out = scaled_dot_product_attention(batch(q), batch(k), batch(v), is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(1, rows * length, q.shape[1], v.shape[3])


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int], scale: float, window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they are; later versions want to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    # Zeros add nothing to a score, and what they make of v is cut off again.
    head_dim = v.shape[3]
    if short := -head_dim % _HEAD_MULTIPLE:
        q, k, v = (pad(x, (0, short)) for x in (q, k, v))
    q_THD, k_THD, v_THD = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    back = -1 if window is None else window - 1
    # Of queries that are fewer than the keys, the last sees all: the mask is aligned at the bottom right.
    out = varlen_attn(q_THD, k_THD, v_THD, *ends, *longest, scale=scale, window_size=(back, 0), **grouped)
    # torch lays the output as q lies (2.11), or end to end.
    return (out[..., :head_dim] if short else out).contiguous().unsqueeze(0)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, max_seqlen: int, scale: float,
    window: int | None = None, cu_seqlens_k: torch.Tensor | None = None, max_seqlen_k: int | None = None,
) -> torch.Tensor:
    """`attention`, a row at a time; the arguments are the same."""
    outs = []
    of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    for (start, stop), (first, last) in zip(pairwise(cu_seqlens.tolist()), pairwise(of_keys.tolist()), strict=True):
        if start == stop:
            continue
        more, mask = (last - first) - (stop - start), None
        if more or (window is not None and stop - start > window):
            at = torch.arange(more, last - first, device=q.device)[:, None]
            key = torch.arange(last - first, device=q.device)
            mask = at >= key if window is None else (at >= key) & (at - key < window)
        q_row, k_row, v_row = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        outs.append(scaled_dot_product_attention(q_row, k_row, v_row, attn_mask=mask, is_causal=mask is None,
                                                 scale=scale, enable_gqa=True))
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()
