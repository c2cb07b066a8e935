"""From encoded replies to the columns that the collators of TRL's trainers take, cut to length and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aligntune.data.convert import Example
from aligntune.data.request import DataRequest
from aligntune.data.rows import Row, RowFault
from aligntune.data.tokens import Encoded, Encoder

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

IGNORED = -100  # the label that a loss leaves out


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of one sequence that are all learnt, or all not; `title` names the sequence."""

    title: str
    ids: list[int]
    learnt: bool


@dataclass(slots=True)
class Built:
    """One row of the dataset that is trained on.

    Args:
        columns: what the collator takes.
        lengths: tokens of each sequence, before anything is cut.
        tokens: tokens that are kept, all sequences together.
        learnt: how many of them are learnt; None where the shape has no mask.
        cut: something was cut off.
        closed: the last learnt turn still ends in its end of turn; None where the shape has no mask.
        pieces: makes the parts to show.
    """

    columns: Row
    lengths: list[int]
    tokens: int
    learnt: int | None
    cut: bool
    closed: bool | None
    pieces: Callable[[], list[Piece]] = field(repr=False)


Builder = Callable[[Example, Sequence[Encoded], Encoder, DataRequest], Built]


def _sft(example: Example, encoded: Sequence[Encoded], encoder: Encoder, request: DataRequest) -> Built:
    """`input_ids` and `labels`."""
    (one,) = encoded
    spans = [(0, len(one.ids))] if request.completion_only is False else one.spans
    ids = _fit(one.ids, request)
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]  # a slice beyond the cut is empty
    learnt = len(ids) - labels.count(IGNORED)
    if learnt == 0:
        raise _nothing_left(one, request)
    cut = len(ids) < len(one.ids)
    return Built(
        {"input_ids": ids, "labels": labels}, [len(one.ids)], len(ids), learnt, cut, encoder.closed(ids, spans),
        lambda: _masked(ids, spans),
    )  # fmt: skip


def _preference(example: Example, encoded: Sequence[Encoded], encoder: Encoder, request: DataRequest) -> Built:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`."""
    starts = [one.spans[0][0] for one in encoded]
    # One prompt for both: where a token spans its end, the replies may part earlier (as in TRL).
    shared = _common(encoded[0].ids[: starts[0]], encoded[1].ids[: starts[1]])
    prompt = encoded[0].ids[:shared]
    kept = [_fit(one.ids, request) for one in encoded]
    replies = [ids[shared:] for ids in kept]
    for one, reply in zip(encoded, replies, strict=True):
        if not reply:
            raise _nothing_left(one, request)
    whole = [len(ids) == len(one.ids) for ids, one in zip(kept, encoded, strict=True)]
    closed = all(fits and encoder.closed(one.ids, one.spans) for fits, one in zip(whole, encoded, strict=True))
    return Built(
        {"prompt_ids": prompt, "chosen_ids": replies[0], "rejected_ids": replies[1]},
        [len(one.ids) for one in encoded], sum(map(len, kept)), sum(map(len, replies)), not all(whole), closed,
        lambda: [Piece("prompt", prompt, False), *map(Piece, ("chosen", "rejected"), replies, (True, True))],
    )  # fmt: skip


def _unpaired(example: Example, encoded: Sequence[Encoded], encoder: Encoder, request: DataRequest) -> Built:
    """`prompt_ids`, `completion_ids`, `label`; `with_kl_completions` adds the column that depends on the batch size."""
    (one,) = encoded
    start = one.spans[0][0]
    ids = _fit(one.ids, request)
    if not ids[start:]:
        raise _nothing_left(one, request)
    cut = len(ids) < len(one.ids)
    title = f"completion (label {str(example.extra['label']).lower()})"
    return Built(
        {"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": example.extra["label"]},
        [len(one.ids)], len(ids), len(ids) - start, cut, not cut and encoder.closed(one.ids, one.spans),
        lambda: [Piece("prompt", ids[:start], False), Piece(title, ids[start:], True)],
    )  # fmt: skip


def _reward(example: Example, encoded: Sequence[Encoded], encoder: Encoder, request: DataRequest) -> Built:
    """`chosen_ids`, `rejected_ids` and `margin` where the row has one; the last token is scored, so nothing is cut."""
    for name, one in zip(("chosen", "rejected"), encoded, strict=True):
        if len(one.ids) > request.max_seq_length:
            raise RowFault(name, f"{len(one.ids)} tokens, max_seq_length is {request.max_seq_length}")
    chosen, rejected = (one.ids for one in encoded)
    total = len(chosen) + len(rejected)
    return Built(
        {"chosen_ids": chosen, "rejected_ids": rejected, **example.extra}, [len(chosen), len(rejected)], total, None,
        False, None, lambda: [Piece("chosen", chosen, False), Piece("rejected", rejected, False)],
    )  # fmt: skip


def _prompts(example: Example, encoded: Sequence[Encoded], encoder: Encoder, request: DataRequest) -> Built:
    """`prompt` and every other column, which rewards read. A prompt that is too long is a bad row, never cut."""
    (one,) = encoded
    if len(one.ids) > request.prompt_limit:
        room = f"max_seq_length {request.max_seq_length}"
        if request.max_completion_length:
            room += f" - max_completion_length {request.max_completion_length}"
        raise RowFault("prompt", f"{len(one.ids)} tokens, at most {request.prompt_limit} fit ({room})")
    return Built(
        {"prompt": example.context, **example.extra}, [len(one.ids)], len(one.ids), None, False, None,
        lambda: [Piece("prompt", one.ids, False)],
    )  # fmt: skip


BUILDERS: Mapping[str, Builder] = {
    "sft": _sft, "preference": _preference, "unpaired": _unpaired, "reward": _reward, "prompts": _prompts,
}  # fmt: skip
TOKEN_COLUMNS = ("input_ids", "labels", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")


def _fit(ids: list[int], request: DataRequest) -> list[int]:
    if len(ids) > request.max_seq_length and request.truncation == "error":
        raise RowFault("length", f"{len(ids)} tokens, max_seq_length is {request.max_seq_length} (truncation='error')")
    return ids[: request.max_seq_length]


def _nothing_left(one: Encoded, request: DataRequest) -> RowFault:
    start = one.spans[0][0] if one.spans else len(one.ids)
    if start < request.max_seq_length:
        return RowFault("length", "holds no token that is trained")
    return RowFault("length", f"the prompt alone has {start} tokens, so nothing that is trained is left within "
                              f"max_seq_length {request.max_seq_length}")  # fmt: skip


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    if left == right:
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _masked(ids: list[int], spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces, at = [], 0
    for start, end in spans:
        pieces += [Piece("row", ids[at:start], False), Piece("row", ids[start:end], True)]
        at = end
    return [piece for piece in [*pieces, Piece("row", ids[at:], False)] if piece.ids]


class Columns:
    """Prepared rows on their way to a dataset; tokens become Arrow arrays at once, a tenth of the size of lists."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[pa.Array]] = {}
        self.others: dict[str, list[Any]] = {}
        self.rows = 0

    def extend(self, rows: Sequence[Row]) -> None:
        """Add rows, all with the token columns of one shape; other columns may differ."""
        import pyarrow as pa

        for name in TOKEN_COLUMNS:
            if rows and name in rows[0]:
                # int32 halves the memory; collators make int64 tensors of the lists they are given.
                part = pa.array([row[name] for row in rows], type=pa.list_(pa.int32()))
                self.tokens.setdefault(name, []).append(part)
        for i, row in enumerate(rows, self.rows):
            for name, value in row.items():
                if name not in self.tokens:
                    column = self.others.setdefault(name, [])
                    column.extend([None] * (i - len(column)))  # rows before it had no such column
                    column.append(value)
        self.rows += len(rows)

    def dataset(self, warnings: list[str]) -> datasets.Dataset:
        """All rows, in memory, the same in every process: no cache file, a fingerprint made from the content.

        Args:
            warnings: gets a sentence for each column that had to be written as JSON text.
        """
        import pyarrow as pa
        from datasets import Dataset, concatenate_datasets
        from datasets.table import InMemoryTable

        parts = []
        if self.tokens:
            table = pa.table({name: pa.chunked_array(arrays) for name, arrays in self.tokens.items()})
            parts.append(Dataset(InMemoryTable(table)))
        for name, values in self.others.items():
            values.extend([None] * (self.rows - len(values)))
            parts.append(Dataset.from_dict(*_plain_column(name, values, warnings)))
        return parts[0] if len(parts) == 1 else concatenate_datasets(parts, axis=1)


def _plain_column(name: str, values: list[Any], warnings: list[str]) -> tuple[dict[str, list[Any]], Any]:
    """A column that is not tokens, and its features where Arrow must not infer them."""
    import json

    import pyarrow as pa
    from datasets import Features, Json, List

    if name == "prompt" and isinstance(values[0], list) and _uneven(values):
        # As a struct, every turn would get the keys of all turns, with None; templates ask whether a key is there.
        return {name: values}, Features({name: List(Json())})
    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        warnings.append(f"column {name!r} holds values of different types; rewards get them as JSON text")
        values = [json.dumps(value, default=str) for value in values]
    return {name: values}, None


def _uneven(prompts: list[list[Row]]) -> bool:
    shapes = {tuple(sorted(message)) for prompt in prompts for message in prompt}
    return shapes != {("content", "role")}


def with_kl_completions(dataset: datasets.Dataset, batch_size: int) -> datasets.Dataset:
    """`dataset` (unpaired) with `KL_completion_ids`: each batch's completions moved on by one row, for KTO's KL term.

    Args:
        dataset: rows with `completion_ids`, in the order in which they are trained.
        batch_size: rows per device and step.
    """

    def rotate(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        completions = batch["completion_ids"]
        return {"KL_completion_ids": [completions[-1], *completions[:-1]]}

    return dataset.map(rotate, batched=True, batch_size=batch_size, load_from_cache_file=False, keep_in_memory=True)
