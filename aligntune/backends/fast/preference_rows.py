"""Micro-batches of preference data as rows end to end, and per-token numbers put back a row at a time.

All rows of a micro-batch (of pairs: the chosen ones, then the rejected ones, as TRL stacks them) are one flat row of
T tokens, so that a pass is one forward. What the loss needs to know of the rows is made here, on the CPU.

Shapes: R rows, C the most tokens that a row has scored, T flat tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aligntune.backends.fast.packing import IGNORED, Array, RowsEndToEnd
from aligntune.backends.fast.shared_prompts import KEYS, LEAST_SAVED

MODEL_INPUTS = ("input_ids", "shift_labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
                "max_length_k", "kept", *KEYS)
"""The entries of a flat batch that the model is called with."""


@dataclass(frozen=True)
class Row:
    """One sequence. `answer`: index of the answer's first token; `learnt`: of the first token that is scored."""

    ids: list[int]
    answer: int
    learnt: int

    @property
    def scored(self) -> range:
        """Indices of the tokens that are scored: nothing predicts a row's first one."""
        return range(max(self.learnt, 1), len(self.ids))


def answer_row(prompt: Sequence[int], answer: Sequence[int], max_length: int | None, *, keep_end: bool = False) -> Row:
    """Prompt and answer, cut to `max_length` tokens as TRL's collators cut them; the answer is scored."""
    ids, start = [*prompt, *answer], len(prompt)
    if max_length is not None and len(ids) > max_length:
        cut = len(ids) - max_length if keep_end else 0
        ids, start = ids[cut : cut + max_length], max(start - cut, 0)
    start = min(start, len(ids))
    return Row(ids, start, start)


def columns_of(rows: Sequence[Row]) -> int:
    """C, the most tokens that a row has scored, at least 1."""
    return max(1, *(len(row.scored) for row in rows))


def lay_end_to_end(rows: Sequence[Row], flat: RowsEndToEnd) -> dict[str, Any]:
    """The rows as one flat batch.

    Args:
        flat: lays them; it remembers what earlier batches of this kind needed, so that shapes become few.

    Returns:
        What `RowsEndToEnd` makes, without `labels`, and
        places: (T,) int64, where in (R x C) the output of a position belongs; R x C where nobody asked for it.
        completion_mask: (1, T) int64, 1 on tokens of answers.
        scored: (R,) int64, tokens of a row that are scored.
        prompt_scored: (R,) int64, how many of them come before the answer.
        lengths: (R,) int64, tokens of the answers.
        columns: int, C, at least 1.
        num_tokens: int, tokens of all rows.
    """
    examples = [
        # A row without tokens keeps its place with a token that nothing is learnt from.
        {"input_ids": row.ids or [flat.pad_token_id],
         "labels": [IGNORED] * row.learnt + row.ids[row.learnt :] or [IGNORED]}
        for row in rows
    ]
    batch = flat(examples)
    del batch["labels"]  # transformers would count them, for a loss that is a mean over tokens
    # Not 0, by which rows are counted: the filling is none of the batch's.
    batch["position_ids"][0, batch["num_tokens"] :] = 1
    columns = columns_of(rows)
    total = batch["input_ids"].shape[1]
    places, completion_mask = np.full(total, len(rows) * columns), np.zeros((1, total), dtype=np.int64)
    start = 0
    for index, row in enumerate(rows):
        if row.scored:  # the position before a token scores it
            first = start + row.scored.start - 1
            places[first : first + len(row.scored)] = index * columns + np.arange(len(row.scored))
        completion_mask[0, start + row.answer : start + len(row.ids)] = 1
        start += max(len(row.ids), 1)
    return batch | {
        "places": torch.from_numpy(places), "completion_mask": torch.from_numpy(completion_mask), "columns": columns,
        "scored": torch.tensor([len(row.scored) for row in rows]),
        "prompt_scored": torch.tensor([max(0, min(row.answer, len(row.ids)) - row.scored.start) for row in rows]),
        "lengths": torch.tensor([len(row.ids) - row.answer for row in rows]),
        "num_tokens": sum(len(row.ids) for row in rows),
    }


@dataclass
class PromptsOnce:
    """Lays pairs of rows (all first ones, then all second ones) with what both begin with computed once.

    Segments, as `shared_prompts` has them: first what pairs share, then what is each row's own. A position that both
    rows of a pair score is each row's own. What it makes is what the model is called with instead of the whole rows.

    From the first batch on that sharing spares enough in, all are laid so: shapes stay few.
    """

    pad_token_id: int
    begun: bool = False

    def __post_init__(self) -> None:
        self.flat = RowsEndToEnd(self.pad_token_id, packed=False, joined=True)

    def __call__(self, rows: Sequence[Row], lasts: Sequence[int] | None = None) -> dict[str, Any] | None:
        """None where it would spare too little, or a batch with

        input_ids, shift_labels, position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, kept: as
            `RowsEndToEnd` has them, of N segments.
        shared_before (N,), shared_group (N,), shared_users (R / 2, 2): `SharedPrompts`, int32.
        places: (T,) int64, as `lay_end_to_end` has them.
        last_tokens: (R,) int64, where the tokens stand whose indices are `lasts`.
        """
        half = len(rows) // 2
        shared = [_shared(*pair) for pair in zip(rows[:half], rows[half:], strict=True)]
        if not self.begun and sum(shared) < LEAST_SAVED * sum(len(row.ids) for row in rows):
            return None
        self.begun = True
        heads = [_head(rows[pair], rows[pair + half], length) for pair, length in enumerate(shared)]
        tails = [_tail(row, before, self.pad_token_id) for row, before in zip(rows, shared * 2, strict=True)]
        batch = self.flat(_joined([*(head for head in heads if len(head[0])), *tails]))
        del batch["labels"], batch["num_tokens"]
        own = [len(ids) for ids, _ in tails]
        begins, starts = np.cumsum([0, *shared[:-1]]).tolist() * 2, (sum(shared) + np.cumsum([0, *own[:-1]])).tolist()
        parts = list(zip(begins, shared * 2, starts, own, strict=True))
        self._add_shared(batch, parts)
        batch["places"] = torch.from_numpy(_places(batch["input_ids"].shape[1], rows, parts))
        if lasts is not None:
            batch["last_tokens"] = torch.tensor([
                begin + last if last < before else start + last - before
                for last, (begin, before, start, _) in zip(lasts, parts, strict=True)])
        return batch

    @staticmethod
    def _add_shared(batch: dict[str, Any], parts: Sequence[tuple[int, int, int, int]]) -> None:
        """Positions, and who goes on from what. `parts`: of each row, where what it shares begins, how long that is,
        and the same of what is its own."""
        half = len(parts) // 2
        heads = np.cumsum([0, *(before > 0 for _, before, *_ in parts[:half])])  # heads before a pair's
        prompts = int(heads[-1])
        before, group = np.zeros((2, batch["cu_seq_lens_q"].numel() - 1), dtype=np.int32)
        users = np.full((half, 2), -1, dtype=np.int32)
        for number, (_, shared, start, length) in enumerate(parts):
            if shared:
                segment, head = prompts + number, heads[number % half]
                before[segment], group[segment], users[head, number // half] = shared, head, segment
                batch["position_ids"][0, start : start + length] += shared
        batch |= dict(zip(KEYS, map(torch.from_numpy, (before, group, users)), strict=True))


def _places(total: int, rows: Sequence[Row], parts: Sequence[tuple[int, int, int, int]]) -> Array:
    columns = columns_of(rows)
    places = np.full(total, len(rows) * columns)
    for number, (row, (begin, before, start, _)) in enumerate(zip(rows, parts, strict=True)):
        at = np.array(row.scored, dtype=np.int64) - 1  # the position before a token scores it
        places[np.where(at < before, begin + at, start + at - before)] = number * columns + np.arange(len(at))
    return places


def _shared(one: Row, other: Row) -> int:
    """How many tokens two rows begin with that can be computed once: no position that both score is among them."""
    most = min(max(one.learnt, other.learnt), len(one.ids), len(other.ids)) - 1
    if most < 1:
        return 0
    differ = np.flatnonzero(np.array(one.ids[:most]) != np.array(other.ids[:most]))
    return int(differ[0]) if len(differ) else most


def _next_labels(row: Row) -> Array:
    """What each position of a row predicts."""
    found, scored = np.full(len(row.ids), IGNORED), row.scored
    if scored:
        found[scored.start - 1 : -1] = row.ids[scored.start :]
    return found


def _head(one: Row, other: Row, length: int) -> tuple[Array, Array]:
    """Ids and next labels of what two rows share: those of the row that scores there."""
    ours, theirs = _next_labels(one)[:length], _next_labels(other)[:length]
    return np.array(one.ids[:length], dtype=np.int64), np.where(ours == IGNORED, theirs, ours)


def _tail(row: Row, before: int, pad_token_id: int) -> tuple[Array, Array]:
    """The same of what is a row's own; a row without tokens has one that nothing is learnt from."""
    if not row.ids:
        return np.array([pad_token_id]), np.array([IGNORED])
    return np.array(row.ids[before:], dtype=np.int64), _next_labels(row)[before:]


def _joined(parts: Sequence[tuple[Array, Array]]) -> list[dict[str, Array]]:
    """Parts of rows with their next labels, as `RowsEndToEnd` joins them: each label a position further on."""
    befores = [IGNORED, *(following[-1] for _, following in parts)]
    return [{"input_ids": ids, "labels": np.concatenate([[before], following[:-1]])}
            for (ids, following), before in zip(parts, befores, strict=False)]


def model_inputs(flat: dict[str, Any]) -> dict[str, Any]:
    """The keywords that a flat batch calls a model with: of the rows whose prompts are computed once, if it has them.

    A mask of width 0: transformers hands a 4-dimensional mask on as it is, and our attention reads the sign.
    """
    flat = flat.get("once", flat)
    inputs = {name: flat[name] for name in MODEL_INPUTS if name in flat}
    mask = flat["input_ids"].new_empty((1, 1, 1, 0), dtype=torch.bool)
    return inputs | {"attention_mask": mask, "use_cache": False}


@dataclass(frozen=True)
class Scores:
    """What a pass says of the scored tokens, a row each; (R, C), 0 where a row has none.

    Args:
        log_probs: in nats; the only one with a gradient.
        others: without a gradient, as the head names them (`entropy`, `mean_logits`, `is_top1`, ...).
        mask: whether there is a token; bool.
    """

    log_probs: torch.Tensor
    others: dict[str, torch.Tensor]
    mask: torch.Tensor

    @classmethod
    def of(cls, flat: dict[str, Any], log_probs: torch.Tensor, others: dict[str, torch.Tensor]) -> Scores:
        """Of a flat batch's outputs, (1, T) each."""
        places, columns, scored = flat.get("once", flat)["places"], flat["columns"], flat["scored"]
        rows = len(scored)

        def back(values: torch.Tensor) -> torch.Tensor:
            """(K, T) as (K, R, C); its backward reads, and adds nothing up: the same bits every time."""
            whole = values.new_zeros(len(values), rows * columns + 1)
            return whole.scatter(1, places.expand(len(values), -1), values)[:, :-1].view(-1, rows, columns)

        put = {}
        if others:
            stacked = back(torch.cat([value.detach().float() for value in others.values()]))
            put = dict(zip(others, stacked, strict=True))
        mask = torch.arange(columns, device=scored.device) < scored[:, None]
        return cls(back(log_probs)[0], put, mask)


class _Collator:
    """What the collators share: one `RowsEndToEnd` for each kind of flat batch that they make.

    `share`: whether what both rows of a pair begin with may be computed once.
    """

    pad_token_id: int
    share = True

    def lay(self, rows: Sequence[Row], kind: str = "rows") -> dict[str, Any]:
        kinds = vars(self).setdefault("kinds", {})
        return lay_end_to_end(rows, kinds.setdefault(kind, RowsEndToEnd(self.pad_token_id)))

    def lay_pairs(self, rows: Sequence[Row], lasts: Sequence[int] | None = None, kind: str = "rows") -> dict[str, Any]:
        """A row of each pair, then the other ones; `once`: the same, their prompts computed once, where that pays."""
        batch = self.lay(rows, kind)
        once = vars(self).setdefault("once", PromptsOnce(self.pad_token_id))(rows, lasts) if self.share else None
        if once is not None:
            batch["once"] = once
        return batch


@dataclass
class PairsEndToEnd(_Collator):
    """Collates `prompt_ids`, `chosen_ids`, `rejected_ids` (and `ref_chosen_logps`, `ref_rejected_logps`)."""

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        keep_end = self.truncation_mode == "keep_end"
        rows = [answer_row(one["prompt_ids"], one[f"{side}_ids"], self.max_length, keep_end=keep_end)
                for side in ("chosen", "rejected") for one in examples]
        batch = self.lay_pairs(rows)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([one[name] for one in examples])
        return batch


@dataclass
class LabelledPairsEndToEnd(_Collator):
    """Collates `chosen_input_ids`, `chosen_labels` and the same of the rejected side; -100 on the prompt.

    Args:
        prompts_too: the prompts of chosen rows are scored as well.
    """

    pad_token_id: int
    prompts_too: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for side in ("chosen", "rejected"):
            for one in examples:
                ids, labels = list(one[f"{side}_input_ids"]), one[f"{side}_labels"]
                start = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
                rows.append(Row(ids, start, 0 if self.prompts_too and side == "chosen" else start))
        return self.lay_pairs(rows)


@dataclass
class UnpairedEndToEnd(_Collator):
    """Collates `prompt_ids`, `completion_ids`, `label` (and `KL_completion_ids`, `ref_logps`, `ref_KL_logps`).

    Beside the rows: `KL`, the flat batch of the mismatched completions; `both`, of the rows and those after them, which
    a reference scores in one pass, prompts once; `tallies`, good and bad rows, and how many tokens of each are scored.
    """

    pad_token_id: int
    max_length: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows, mismatched = (
            [answer_row(one["prompt_ids"], one[name], self.max_length) for one in examples if name in one]
            for name in ("completion_ids", "KL_completion_ids")
        )
        batch = self.lay(rows)
        if mismatched:
            batch["KL"] = self.lay(mismatched, "KL")
            if "ref_logps" not in examples[0]:
                batch["both"] = self.lay_pairs(rows + mismatched, kind="both")
        for name in ("ref_logps", "ref_KL_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([one[name] for one in examples])
        labels = [bool(one["label"]) for one in examples]
        scored = [sum(len(row.scored) for row, label in zip(rows, labels, strict=True) if label is side)
                  for side in (True, False)]
        return batch | {"label": torch.tensor(labels), "tallies": [sum(labels), len(labels) - sum(labels), *scored]}


@dataclass
class ScoredPairsEndToEnd(_Collator):
    """Collates `chosen_ids`, `rejected_ids` (and `margin`) for a model that scores whole rows.

    Beside the rows: `last_tokens`, (R,) int64, the flat position whose score is the row's. transformers reads it at a
    row's last token that is not `pad_token_id`, wherever that id came from.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [list(one[f"{side}_ids"]) for side in ("chosen", "rejected") for one in examples]
        lasts = [max((i for i, token in enumerate(ids) if token != self.pad_token_id), default=0) for ids in rows]
        batch = self.lay_pairs([Row(ids, len(ids), len(ids)) for ids in rows], lasts)
        lengths = [max(len(ids), 1) for ids in rows]
        batch["last_tokens"] = torch.tensor(np.cumsum([0, *lengths[:-1]]) + lasts)
        kept = {*MODEL_INPUTS, "num_tokens", "last_tokens", "once"} - {"shift_labels", "kept"}
        batch = {name: value for name, value in batch.items() if name in kept}
        if "once" in batch:
            batch["once"] = {name: value for name, value in batch["once"].items() if name in kept}
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([one["margin"] for one in examples], dtype=torch.float)
        return batch
