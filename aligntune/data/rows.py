"""Rows as they were read, each with the place that it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be trained, shown as `where: field: why`.

    Args:
        where: `file:line`, lines counted from 1; for sources without lines `name: row N`, rows counted from 0; where
            rows of a JSON array share a line `file:line, row N`.
        field: the column, or the format ("JSON") where the row could not be read.
        why: what is wrong with it.
        row: the row itself.
    """

    where: str
    field: str
    why: str
    row: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.why}" if self.field else f"{self.where}: {self.why}"


class RowFault(Exception):  # noqa: N818 - caught in this package; it becomes a BadRow, not an error that users see
    """Why one row cannot be used; the caller knows where the row came from."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


LONE_SURROGATE = "has a lone surrogate (half a character), which no tokenizer reads"


def lone_surrogate(value: Any, path: str = "") -> str | None:
    """Where a lone surrogate stands in text, or in lists and objects of it (`path[0].content`), or None."""
    left = [(path, value)]
    while left:
        at, part = left.pop()
        if isinstance(part, str):
            if not _encodes(part):
                return at
        elif isinstance(part, Mapping):
            odd = next((key for key in part if isinstance(key, str) and not _encodes(key)), None)
            if odd is not None:
                return f"{at}[{odd!r}]"
            left += [(f"{at}.{key}" if at else str(key), item) for key, item in part.items()][::-1]
        elif isinstance(part, list | tuple):
            left += [(f"{at}[{i}]", item) for i, item in enumerate(part)][::-1]
    return None


def _encodes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


Fetch = Callable[[Sequence[int]], list["Row | BadRow"]]


@dataclass(frozen=True)
class Rows:
    """A dataset that is read piece by piece. A row that could not be read stands as a `BadRow` in its place.

    Args:
        name: what to call it in messages.
        fetch: the rows at these source positions.
        where: the place of a source position, for messages.
        index: the source positions that are in use, in order.
        columns: the names of all columns, in order of first appearance.
        renamed: {column in the source: name in use}.
        notes: what was decided on the way, a sentence each.
    """

    name: str
    fetch: Fetch
    where: Callable[[int], str]
    index: Sequence[int]
    columns: tuple[str, ...]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def chunks(self, size: int) -> Iterator[list[tuple[str, Row | BadRow]]]:
        """Pieces of up to `size` rows, each row with its place."""
        for start in range(0, len(self.index), size):
            positions = self.index[start : start + size]
            rows = self.fetch(positions)
            yield [(self.where(at), self._named(row)) for at, row in zip(positions, rows, strict=True)]

    def sample(self, count: int) -> list[Row]:
        """The first `count` readable rows."""
        found: list[Row] = []
        for chunk in self.chunks(max(count, 64)):
            found.extend(row for _, row in chunk if isinstance(row, dict))
            if len(found) >= count:
                break
        return found[:count]

    def _named(self, row: Row | BadRow) -> Row | BadRow:
        if isinstance(row, BadRow) or not self.renamed:
            return row
        return {self.renamed.get(name, name): value for name, value in row.items()}


def from_list(
    name: str, rows: Sequence[Row | BadRow], where: Callable[[int], str], *, columns: Sequence[str] | None = None
) -> Rows:
    """Rows held in memory; rows may differ in columns."""
    if columns is None:
        # Rows of one file mostly share their keys: one look-up per row instead of one per value.
        shapes = dict.fromkeys(tuple(row) for row in rows if isinstance(row, dict))
        columns = list(dict.fromkeys(key for shape in shapes for key in shape))
    return Rows(name, lambda at: [rows[i] for i in at], where, range(len(rows)), tuple(columns))


def from_table(name: str, table: pa.Table, where: Callable[[int], str]) -> Rows:
    """Rows of an Arrow table; a missing value is None."""

    def fetch(at: Sequence[int]) -> list[Row | BadRow]:
        part = table.slice(at[0], len(at)) if _contiguous(at) else table.take(list(at))
        return part.to_pylist()

    return Rows(name, fetch, where, range(table.num_rows), tuple(table.column_names))


def from_dataset(name: str, dataset: datasets.Dataset) -> Rows:
    """Rows of a `datasets.Dataset`, read in its own order."""
    plain = dataset.with_format(None)  # torch or numpy formats would hand out tensors in place of text and lists

    def fetch(at: Sequence[int]) -> list[Row | BadRow]:
        columns = plain[at[0] : at[-1] + 1] if _contiguous(at) else plain[list(at)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    return Rows(name, fetch, lambda i: f"{name}: row {i}", range(len(plain)), tuple(plain.column_names))


def concatenate(name: str, parts: Sequence[Rows]) -> Rows:
    """Several files as one dataset; a column that a file lacks is missing in its rows."""
    owner = [(part, at) for part in parts for at in part.index]

    def fetch(at: Sequence[int]) -> list[Row | BadRow]:
        found: list[Row | BadRow] = []
        start = 0
        while start < len(at):  # runs of one file are fetched in one go
            part = owner[at[start]][0]
            stop = start
            while stop < len(at) and owner[at[stop]][0] is part:
                stop += 1
            found.extend(part.fetch([owner[i][1] for i in at[start:stop]]))
            start = stop
        return found

    columns = dict.fromkeys(column for part in parts for column in part.columns)
    return Rows(name, fetch, lambda i: owner[i][0].where(owner[i][1]), range(len(owner)), tuple(columns))


def _contiguous(at: Sequence[int]) -> bool:
    return len(at) > 0 and list(at) == [*range(at[0], at[0] + len(at))]
