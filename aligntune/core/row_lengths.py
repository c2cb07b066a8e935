"""Tokens of prepared rows, and the batch of them that has the most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

DRAWS = 4096
"""Batches that are drawn at most: the longest of more is hardly longer."""
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")
Lengths = npt.NDArray[np.int64]


def lengths_of(rows: Any, column: str = "input_ids") -> Lengths | None:
    """(rows,): the length of each list in a column of a `datasets.Dataset`, read from its table; None without one."""
    from datasets import Dataset

    if not isinstance(rows, Dataset) or column not in rows.column_names or rows.format["type"] == "custom":
        return None
    import pyarrow.compute

    # Offsets of the lists: no token is read. `select` and `shuffle` leave indices over the table.
    table = rows.with_format("arrow")
    lengths = np.asarray(pyarrow.compute.list_value_length(table.data.column(column)), dtype=np.int64)
    indices = table._indices
    return lengths if indices is None else lengths[np.asarray(indices.column(0), dtype=np.int64)]


def sequences_of(rows: Any) -> Lengths | None:
    """(rows, sequences): tokens of the sequences that each row becomes, two of a pair; None where that is not known."""
    alone = lengths_of(rows)
    if alone is not None:
        return alone[:, None]
    answers = [found for name in ANSWERS if (found := lengths_of(rows, name)) is not None]
    prompts = lengths_of(rows, "prompt_ids")
    return np.stack(answers, 1) + (0 if prompts is None else prompts[:, None]) if answers else None


def longest_batch(lengths: Lengths, *, size: int, batches: int) -> Lengths:
    """Indices of the rows of the longest of so many random batches of `size` rows; torch's state is not touched.

    No row comes twice in an epoch, as in training; a batch has no more rows than there are.
    """
    draw, size, batches = np.random.default_rng(0), min(size, len(lengths)), min(batches, DRAWS)
    epoch = len(lengths) // size
    found, most = np.empty(0, dtype=np.int64), -1
    for begun in range(0, batches, epoch):
        drawn = draw.permutation(len(lengths))[: epoch * size].reshape(epoch, size)[: batches - begun]
        tokens = lengths[drawn].sum(1)
        if tokens.max() > most:
            found, most = drawn[tokens.argmax()], int(tokens.max())
    return found


@dataclass(frozen=True)
class LongestBatch:
    """The sequences of a run's longest micro-batch, as expected: `lengths` (rows, sequences of a row)."""

    lengths: Lengths
    flat: bool
    """End to end; else each is padded to the longest."""

    @classmethod
    def of(cls, rows: Any, *, size: int, flat: bool) -> LongestBatch | None:
        """None where the rows' lengths are not known."""
        lengths = sequences_of(rows)
        if lengths is None or not lengths.any():
            return None
        if flat:
            return cls(lengths[longest_batch(lengths.sum(1), size=size, batches=DRAWS)], flat)
        return cls(np.tile(lengths[lengths.max(1).argmax()], (min(size, len(lengths)), 1)), flat)

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def tokens(self, most: int | None = None) -> int:
        """Padding included; `most`: of sequences that are cut there."""
        cut = self.lengths if most is None else np.minimum(self.lengths, most)
        return int(cut.sum() if self.flat else cut.size * cut.max())
