"""What a step trained on, whatever its layout: padded, end to end, pairs or rollouts become the same documents.

Two arms saw the same data if their steps hold the same documents in the same order; padding and flat rows are layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORED = -100
KEYS = (
    "input_ids", "labels", "attention_mask", "completion_mask", "position_ids", "num_tokens", "prompt_ids",
    "prompt_mask", "completion_ids", "seq_lengths",
)
"""The entries of a prepared batch that say what is trained."""


@dataclass(frozen=True)
class Document:
    """One row as the model sees it.

    Args:
        ids: (tokens,) int32, without padding.
        labels: (tokens,) int32, -100 where nothing is learnt; the first token is never learnt.
        prompt: number of leading tokens that come from the dataset, for rollouts; else all of them.
        row: index of the batch row (of all micro-batches of the step) that it lies in.
    """

    ids: np.ndarray
    labels: np.ndarray
    prompt: int
    row: int


def keep(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """References to what `documents` reads: a trainer takes entries out of the batch it is given.

    TRL's ORPO and CPO hold the two sides of their pairs apart; here they are rows of one batch, the chosen ones first.
    """
    if "chosen_input_ids" in inputs:
        return {name: _both_sides(inputs, name, fill) for name, fill in
                (("input_ids", 0), ("labels", IGNORED), ("attention_mask", 0))}
    return {name: inputs[name] for name in KEYS if name in inputs}


def _both_sides(inputs: Mapping[str, Any], name: str, fill: int) -> Any:
    import torch

    sides = [inputs[f"{side}_{name}"] for side in ("chosen", "rejected")]
    width = max(side.shape[1] for side in sides)
    return torch.cat([torch.nn.functional.pad(side, (0, width - side.shape[1]), value=fill) for side in sides])


def documents(batch: Mapping[str, Any], first_row: int = 0) -> list[Document]:
    """The documents of one prepared micro-batch, in order."""
    arrays = {name: value.detach().cpu().numpy() for name, value in batch.items() if hasattr(value, "detach")}
    if "prompt_ids" in arrays:
        return _rollouts(arrays, first_row)
    ids = arrays["input_ids"]
    if "completion_mask" in arrays:
        labels = np.where(arrays["completion_mask"] != 0, ids, IGNORED)
    else:
        labels = arrays.get("labels", ids)
    mask = arrays.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        mask = None
    found = []
    for row in range(len(ids)):
        kept = mask[row] != 0 if mask is not None else np.ones(ids.shape[1], bool)
        row_ids, row_labels = ids[row][kept], labels[row][kept]
        ends = [len(row_ids)]
        if mask is None and "position_ids" in arrays:
            real = batch.get("num_tokens", len(row_ids))
            starts = np.flatnonzero(arrays["position_ids"][row][:real] == 0)
            ends = [*starts[1:].tolist(), real]
        start = 0
        for end in ends:
            found.append(_document(row_ids[start:end], row_labels[start:end], end - start, first_row + row))
            start = end
    return found


def _rollouts(arrays: dict[str, np.ndarray], first_row: int) -> list[Document]:
    found = []
    for row in range(len(arrays["prompt_ids"])):
        prompt = arrays["prompt_ids"][row][arrays["prompt_mask"][row] != 0]
        completion = arrays["completion_ids"][row][arrays["completion_mask"][row] != 0]
        labels = np.concatenate([np.full(len(prompt), IGNORED), completion])
        found.append(_document(np.concatenate([prompt, completion]), labels, len(prompt), first_row + row))
    return found


def _document(ids: np.ndarray, labels: np.ndarray, prompt: int, row: int) -> Document:
    labels = labels.astype(np.int32).copy()
    # Padded batches may carry a label on the first token, flat ones cannot: nothing predicts it in either.
    labels[:1] = IGNORED
    return Document(ids.astype(np.int32), labels, prompt, row)


def rows_of(batch: Mapping[str, Any]) -> int:
    """Rows of the batch as tensors have them; a flat batch is one row."""
    return len(batch["prompt_ids"] if "prompt_ids" in batch else batch["input_ids"])


def digest(values: np.ndarray) -> str:
    """16 hexadecimal digits that name an array of int32."""
    return hashlib.blake2b(np.ascontiguousarray(values, dtype=np.int32).tobytes(), digest_size=8).hexdigest()


def fingerprint(found: list[Document]) -> dict[str, list[str]]:
    """Digests a document: its tokens, which of them are learnt, and the part that comes from the dataset."""
    return {
        "ids": [digest(one.ids) for one in found],
        "labels": [digest(one.labels) for one in found],
        "prompts": [digest(one.ids[: one.prompt]) for one in found],
    }


def shifted(found: list[Document]) -> dict[str, list[str]]:
    """Digests of the labels as they would be with the mask moved by one token, to name that mistake in another arm."""
    moved: dict[str, list[str]] = {"mask+1": [], "mask-1": []}
    for one in found:
        for name, mask in masks(one).items():
            if name in moved:
                labels = np.where(mask, one.ids, IGNORED)
                labels[:1] = IGNORED
                moved[name].append(digest(labels))
    return moved


def masks(one: Document) -> dict[str, np.ndarray]:
    """Which tokens are learnt: `right`, moved by one token later or earlier, or `all` of them; (tokens,) bool each."""
    right = one.labels != IGNORED
    later, earlier = np.zeros_like(right), np.zeros_like(right)
    later[1:], earlier[:-1] = right[:-1], right[1:]
    return {"right": right, "mask+1": later, "mask-1": earlier, "all": np.ones_like(right)}


def sizes(found: list[Document]) -> dict[str, int]:
    """Tokens, learnt tokens, documents, and the sum of squared lengths (the attention's work) of a step."""
    lengths = np.array([len(one.ids) for one in found], dtype=np.int64)
    return {
        "tokens": int(lengths.sum()), "documents": len(found), "squared": int((lengths**2).sum()),
        "learnt": int(sum((one.labels != IGNORED).sum() for one in found)),
    }


MOST_ROWS = 10_000
_TRAINED = ("prompt", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")


def rows_digest(dataset: Any, *, packed: bool = False) -> str | None:
    """A digest of a dataset's documents that depends neither on their order nor on how rows are packed of them.

    None for streams, beyond `MOST_ROWS`, and for packed rows that do not say where a document ends.
    """
    if dataset is None or not hasattr(dataset, "__len__") or len(dataset) > MOST_ROWS:
        return None
    total = count = 0
    for row in dataset:
        if packed and "seq_lengths" not in row:
            return None
        for text in _texts(row):
            total += int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
            count += 1
    return f"{count}:{total % 2**64:016x}"


def _texts(row: Mapping[str, Any]) -> list[str]:
    """What is trained of a row, a text for each document in it."""
    if "input_ids" not in row:
        return [repr([(name, row[name]) for name in _TRAINED if name in row] or sorted(row.items()))]
    ids = list(row["input_ids"])
    labels = list(row.get("labels") or ids)  # rows without labels are learnt whole
    found, start = [], 0
    for length in row.get("seq_lengths") or [len(ids)]:
        end = start + length
        found.append(repr((ids[start:end], labels[start + 1:end])))  # nothing predicts the first token
        start = end
    return found
