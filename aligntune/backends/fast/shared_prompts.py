"""Rows that begin with one prompt: it is computed once for all of them.

G completions of a prompt lie end to end as segments

    [prompt without its last token] [last token, completion 1] ... [last token, completion G]

The last token stays with each completion, because what it predicts differs. Queries of a segment are its own; the keys
of a completion's are the prompt's and then its own, so that each token sees what it saw in a row of its own. A prompt's
hidden states depend on nothing behind it: numbers and gradients are those of whole rows but for the order of sums.

With P tokens of prompt, and C of all completions, linear layers see P + C + G tokens instead of G P + C. In every layer
keys and values are copied, 2 (G P + C) rows of them; the gradients of a prompt's are added up in fp32, in one order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

LEAST_SAVED = 0.1
"""Of a batch's tokens, what sharing must spare: copying keys and values in every layer is not for nothing."""


NOWHERE = 1 << 62
"""A place that is none: no batch is filled up to so many."""


class SharedKeys(NamedTuple):
    """Whose key stands where, with T tokens, K places and S tokens of shared prompts, which come first.

    `index` (K,): the token at each place. `own` (T,): each token's place in its own segment, `NOWHERE` of filling.
    `uses` (M, S): the places of a prompt's token in other segments, `NOWHERE` where there are fewer than M. All int64.
    """

    index: torch.Tensor
    own: torch.Tensor
    uses: torch.Tensor


    @classmethod
    def among(cls, inputs: Mapping[str, Any]) -> SharedKeys | None:
        """What a model is called with, by the names `KEYS`; None where no prompt is shared."""
        return cls(*(inputs[name] for name in KEYS)) if KEYS[0] in inputs else None


KEYS = ("shared_index", "shared_own", "shared_uses")


def keys_in(inputs: Mapping[str, Any]) -> int:
    """How many keys what a model is called with has: its tokens, and of each shared one the copies."""
    return int(inputs[KEYS[0] if KEYS[0] in inputs else "input_ids"].numel())


class Segments(NamedTuple):
    """A batch cut into segments: ids and mask (N, L) of them, the first `prompts` of which are prompts.

    A row whose prompt is no other's is one segment. `before` (N,): tokens of the prompt that a segment goes on from.
    `group` (N,): the number of that prompt's segment. `rank` (N,): how many segments before it go on from the same.
    `most`: the most segments that one prompt has.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    prompts: int
    before: torch.Tensor
    group: torch.Tensor
    rank: torch.Tensor
    most: int


def segments_of(input_ids: torch.Tensor, attention_mask: torch.Tensor, columns: int) -> Segments | None:
    """Segments of (rows, L) ids, prompts ending before the last `columns`; None where sharing spares too little."""
    rows, width = input_ids.shape
    edge = width - columns
    if rows < 2 or edge < 2:
        return None
    prompts = input_ids[:, :edge].masked_fill(attention_mask[:, :edge] == 0, -1)
    _, group = torch.unique(prompts, dim=0, return_inverse=True)
    number = torch.arange(rows, device=group.device)
    same = group[:, None] == group[None]
    sharing, first = same.sum(1), torch.where(same, number, rows).amin(1)  # of each row, the first with its prompt
    lengths = attention_mask[:, : edge - 1].sum(1).masked_fill(sharing < 2, 0)
    leads = (first == number) & (sharing > 1)
    leaders = leads.cumsum(0) - 1
    saved, total, count, most = torch.stack((
        lengths.masked_fill(leads, 0).sum(), attention_mask.sum(), leaders[-1] + 1, sharing.amax())).tolist()
    if saved < LEAST_SAVED * total:
        return None
    heads = torch.nonzero_static(leads, size=count).view(-1)
    ids = torch.cat((input_ids[heads], input_ids))
    mask = torch.cat((attention_mask[heads], attention_mask))
    mask[:count, edge - 1 :] = 0
    mask[count:, : edge - 1].masked_fill_(sharing[:, None] > 1, 0)
    nothing = torch.zeros(count, dtype=torch.long, device=ids.device)
    group = torch.cat((nothing, leaders[first].clamp(min=0)))
    rank = torch.cat((nothing, (same & (number[:, None] > number)).sum(1)))
    return Segments(ids, mask, count, torch.cat((nothing, lengths)), group, rank, most)


def keys_of(segments: Segments, ends: torch.Tensor) -> tuple[SharedKeys, torch.Tensor, int]:
    """Where keys stand, the ends of each segment's (N + 1,) int32, and the most that a segment has.

    Args:
        ends: (N + 1,) of the segments' own tokens.
    """
    starts, own_lengths = ends[:-1].long(), ends.diff().long()
    key_lengths = segments.before + own_lengths
    key_ends = torch.cat((key_lengths.new_zeros(1), key_lengths.cumsum(0)))
    places, most, tokens, shared = torch.stack((
        key_ends[-1], key_lengths.amax(), ends[-1].long(), ends[segments.prompts].long())).tolist()
    number = torch.arange(len(own_lengths), device=ends.device)

    segment = torch.repeat_interleave(number, key_lengths, output_size=places)
    offset = torch.arange(places, device=ends.device) - key_ends[segment]
    before = segments.before[segment]
    of_prompt = offset < before
    index = torch.where(of_prompt, starts[segments.group[segment]] + offset, starts[segment] + offset - before)

    segment_of_token = torch.repeat_interleave(number, own_lengths, output_size=tokens)
    own = key_ends[segment_of_token] + segments.before[segment_of_token] + (
        torch.arange(tokens, device=ends.device) - starts[segment_of_token])

    # One place more than there are, for keys that are no prompt's in another segment.
    nowhere = shared * segments.most
    target = torch.where(of_prompt, index * segments.most + segments.rank[segment], nowhere)
    uses = torch.full((nowhere + 1,), NOWHERE, device=ends.device)
    uses[target] = torch.arange(places, device=ends.device)
    keys = SharedKeys(index, own, uses[:-1].view(shared, segments.most).T)
    return keys, key_ends.to(torch.int32), most


def copied(x: torch.Tensor, keys: SharedKeys) -> torch.Tensor:
    """Keys or values (1, heads, T, head_dim) at their places, (1, heads, K, head_dim)."""
    return _Copied.apply(x, *keys)  # type: ignore[no-any-return]


class _Copied(torch.autograd.Function):
    """Copies; the gradients of what was copied are added up in one order, in fp32 where they have 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, own: torch.Tensor, uses: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(own, uses)
        return x.index_select(2, index)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        own, uses = ctx.saved_tensors
        dx, parts = _at(dout, own), _at(dout, uses)
        shared = uses.shape[1]
        wide = torch.float32 if dout.dtype in (torch.bfloat16, torch.float16) else dout.dtype
        sums = dx[:, :, :shared].to(wide) + parts.sum(2, dtype=wide)
        dx[:, :, :shared] = sums.to(dx.dtype)
        return dx, None, None, None


def _at(dout: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The gradients (1, heads, *places, head_dim) of what stands at places, 0 at `NOWHERE`."""
    last = dout.shape[2] - 1
    found = dout.index_select(2, places.flatten().clamp(max=last)).unflatten(2, places.shape)
    return found.masked_fill_((places > last)[..., None], 0)
