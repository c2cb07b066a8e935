"""Causal attention over rows that lie end to end: no row sees another.

    out_i = softmax(scale * q_i k_j^T over j <= i in the same row, j > i - window) v

A row may go on from the beginning of another one, a prompt, whose keys it then sees before its own.

This op picks by shape. Rows of one length are a dense batch, which cuDNN runs at 375 / 290 TFLOP/s forward / backward
(head_dim 64, H100). Ragged rows, and those that share prompts, go through `segment_attention`: of a few hundred tokens
in half the time that FlashAttention-2's variable-length launch takes, of 8,192 and more in about the same. That one has
the heads that are wider than `TILED_HEAD_DIM`. fp32 takes neither: there each row is a call of its own, which waits for
the lengths.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from aligntune.backends.fast.ops.segment_attention import SharedPrompts, segment_attention
from aligntune.errors import ConfigError

TILED_HEAD_DIM = 128
"""Wider heads are FlashAttention's, where rows share nothing: accumulators of our tiles would not stay in registers."""
_HEAD_MULTIPLE = 8
"""What FlashAttention-2 wants a head dimension to be a multiple of."""


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, max_seqlen: int, scale: float,
    window: int | None = None, shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """Causal attention within each row.

    Args:
        q: (1, query heads, T, head_dim), any strides but the last, which is 1.
        k, v: (1, key heads, T, head_dim); query heads are a multiple of key heads.
        cu_seqlens: (rows + 1,) int32, first 0 and last T; equal neighbours are empty rows.
        max_seqlen: the longest row. Where rows x max_seqlen is T, every row has that length.
        scale: what the scores are multiplied with.
        window: a token sees itself and the `window` - 1 before it; None sees all.
        shared: which rows go on from which.

    Returns:
        (1, T, query heads, head_dim), contiguous.

    Raises:
        ConfigError: more tokens than `cu_seqlens` counts rows of `max_seqlen` for, told by shapes alone.
    """
    tokens, rows = q.shape[2], cu_seqlens.shape[0] - 1
    if rows * max_seqlen < tokens:
        raise ConfigError(f"{rows} rows of at most {max_seqlen} tokens cannot hold {tokens} tokens")
    if window is not None and window >= max_seqlen and shared is None:
        window = None
    if rows * max_seqlen == tokens and window is None and shared is None:
        return _dense(q, k, v, rows, max_seqlen, scale)
    if not q.is_cuda or q.dtype == torch.float32:
        return attention_reference(q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window,
                                   shared=shared)
    if shared is not None or q.shape[3] <= TILED_HEAD_DIM:
        return segment_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window, shared=shared)
    return _varlen(q, k, v, cu_seqlens, max_seqlen, scale, window)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, length: int, scale: float
) -> torch.Tensor:
    def batch(x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(0).unflatten(1, (rows, length)).transpose(0, 1)

    out = scaled_dot_product_attention(batch(q), batch(k), batch(v), is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(1, rows * length, q.shape[1], v.shape[3])


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float,
    window: int | None,
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
    out = varlen_attn(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale,
                      window_size=(back, 0), **grouped)
    # torch lays the output as q lies (2.11), or end to end.
    return (out[..., :head_dim] if short else out).contiguous().unsqueeze(0)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *, max_seqlen: int, scale: float,
    window: int | None = None, shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """`attention`, a row at a time; the arguments are the same."""
    outs, starts = [], cu_seqlens.tolist()
    befores, groups = ([0] * len(starts),) * 2 if shared is None else (shared.before.tolist(), shared.group.tolist())
    for (start, stop), before, group in zip(pairwise(starts), befores, groups, strict=False):
        if start == stop:
            continue
        q_row, k_row, v_row, mask = q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], None
        if before:
            prompt = slice(starts[group], starts[group] + before)
            k_row, v_row = (torch.cat((x[:, :, prompt], row), dim=2) for x, row in ((k, k_row), (v, v_row)))
        if before or (window is not None and stop - start > window):
            key = torch.arange(before + stop - start, device=q.device)
            at = key[before:, None]
            mask = at >= key if window is None else (at >= key) & (at - key < window)
        outs.append(scaled_dot_product_attention(q_row, k_row, v_row, attn_mask=mask, is_causal=mask is None,
                                                 scale=scale, enable_gqa=True))
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()
