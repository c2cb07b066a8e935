"""Rows that begin with one prompt: it is computed once for all of them.

G completions of a prompt lie end to end as segments

    [prompt without its last token] [last token, completion 1] ... [last token, completion G]

The last token stays with each completion, because what it predicts differs. A completion's queries see the prompt's
keys and then its own: what they saw in a row of their own. A prompt's hidden states depend on nothing behind it:
numbers and gradients are those of whole rows but for the order of sums.

With P tokens of prompt, and C of all completions, linear layers see P + C + G tokens instead of G P + C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from aligntune.backends.fast.ops.segment_attention import SharedPrompts

LEAST_SAVED = 0.1
"""Of a batch's tokens, what sharing must spare: attention's work stays, and a batch laid so has more segments."""
KEYS = ("shared_before", "shared_group", "shared_users")


def shared_in(inputs: Mapping[str, Any]) -> SharedPrompts | None:
    """Of what a model is called with, by the names `KEYS`; None where no prompt is shared."""
    return SharedPrompts(*(inputs[name] for name in KEYS)) if KEYS[0] in inputs else None


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


def shared_of(segments: Segments) -> SharedPrompts:
    """What attention is told of segments: int32, `users` (prompts, most)."""
    users = torch.full((segments.prompts * segments.most + 1,), -1, dtype=torch.int32, device=segments.before.device)
    number = torch.arange(len(segments.before), dtype=torch.int32, device=users.device)
    # One place more than there are, for segments that go on from none.
    users[torch.where(segments.before > 0, segments.group * segments.most + segments.rank, len(users) - 1)] = number
    return SharedPrompts(segments.before.to(torch.int32), segments.group.to(torch.int32),
                         users[:-1].view(segments.prompts, segments.most))
