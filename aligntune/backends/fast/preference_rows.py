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

from aligntune.backends.fast.packing import IGNORED, RowsEndToEnd

MODEL_INPUTS = ("input_ids", "shift_labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
                "max_length_k", "kept")
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
    columns = max(1, *(len(row.scored) for row in rows))
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


def model_inputs(flat: dict[str, Any]) -> dict[str, Any]:
    """The keywords that a flat batch calls a model with.

    A mask of width 0: transformers hands a 4-dimensional mask on as it is, and our attention reads the sign.
    """
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
        places, columns, scored = flat["places"], flat["columns"], flat["scored"]
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
    """What the collators share: one `RowsEndToEnd` for each kind of flat batch that they make."""

    pad_token_id: int

    def lay(self, rows: Sequence[Row], kind: str = "rows") -> dict[str, Any]:
        kinds = vars(self).setdefault("kinds", {})
        return lay_end_to_end(rows, kinds.setdefault(kind, RowsEndToEnd(self.pad_token_id)))


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
        batch = self.lay(rows)
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
        return self.lay(rows)


@dataclass
class UnpairedEndToEnd(_Collator):
    """Collates `prompt_ids`, `completion_ids`, `label` (and `KL_completion_ids`, `ref_logps`, `ref_KL_logps`).

    Beside the rows: `KL`, the flat batch of the mismatched completions; `both`, of the rows and those after them, which
    a reference scores in one pass; `tallies`, good rows, bad rows, and how many tokens of each are scored.
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
                batch["both"] = self.lay(rows + mismatched, "both")
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
        batch = self.lay([Row(ids, 0, len(ids)) for ids in rows])
        lasts, start = [], 0
        for ids in rows:
            lasts.append(start + max((i for i, token in enumerate(ids) if token != self.pad_token_id), default=0))
            start += max(len(ids), 1)
        batch = {name: batch[name] for name in (*MODEL_INPUTS, "num_tokens")
                 if name in batch and name not in ("shift_labels", "kept")}
        batch["last_tokens"] = torch.tensor(lasts)
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([one["margin"] for one in examples], dtype=torch.float)
        return batch
