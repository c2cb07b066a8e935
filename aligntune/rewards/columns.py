"""What a reward reads: the text of a prompt or completion, and the reference in a dataset column."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aligntune.errors import DataError, nearest

REFERENCE_COLUMNS = ("answer", "solution", "target")

# What TRL's trainers pass beside the dataset's columns; never offered as a column in a message.
TRAINER_ARGUMENTS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


def _content(content: object) -> str:
    if content is None:  # a message that only calls a tool
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):  # content parts; images have no text
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    raise DataError(f"the content of a message is a {type(content).__name__}, not text")


def message_text(value: object, role: str) -> str:
    """The text of a prompt or completion in either of TRL's forms.

    A string is its own text. Of a list of messages, it is the content of the last one with that `role`; "" if none.

    Raises:
        DataError: `value` is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value):
        contents = (_content(message.get("content")) for message in reversed(value) if message.get("role") == role)
        return next(contents, "")
    raise DataError(f"expected a string or a list of messages, got a {type(value).__name__}")


def completion_text(completion: object) -> str:
    """The text that the model wrote: the string, or the content of the last assistant message."""
    return message_text(completion, "assistant")


def prompt_text(prompt: object) -> str:
    """The text that was asked: the string, or the content of the last user message."""
    return message_text(prompt, "user")


def shown(text: str, limit: int = 80) -> str:
    """`text` on one line and shortened in the middle, in quotes, for messages."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 4 :]}"
    return repr(text)


def reference_column(
    columns: Collection[str], *, column: str | None, reward: str, where: str = "the dataset"
) -> str:
    """The column that holds the references, as `references` takes it; `where` is whose columns they are, in words.

    Raises:
        DataError: it is not there.
    """
    present = [name for name in columns if name not in TRAINER_ARGUMENTS]
    wanted = [column] if column else list(REFERENCE_COLUMNS)
    name = next((name for name in wanted if name in present), None)
    if name is None:
        close = nearest(wanted[0], present) if present else None
        raise DataError(
            f"reward {reward!r} reads the reference from the column {' or '.join(map(repr, wanted))}, which "
            f"{where} does not have; its columns: {', '.join(sorted(present)) or 'none beside the prompt'}. "
            f"Name the column: {{'name': {reward!r}, 'options': {{'column': {close or 'COLUMN'!r}}}}}"
        )
    return name


def references(
    columns: Mapping[str, Any], count: int, *, column: str | None, reward: str
) -> list[tuple[str, ...] | None]:
    """The acceptable references of each row, as text.

    Args:
        columns: what the trainer passed beside prompts and completions: one list a dataset column.
        count: how many completions there are.
        column: the column to read; None: the first of `answer`, `solution`, `target` that exists.
        reward: the reward's name, for messages.

    Returns:
        For each row the references of which any one will do (a cell may be a list), or None where the cell is null:
        such a row has nothing to be compared with.

    Raises:
        DataError: no such column, or a cell that is blank or neither text nor a number.
    """
    name = reference_column(columns, column=column, reward=reward)
    cells = columns[name]
    if isinstance(cells, str) or not isinstance(cells, Sequence) or len(cells) != count:
        raise DataError(f"reward {reward!r}: column {name!r} does not hold one value for each of {count} completions")
    return [_cell(cell, f"reward {reward!r}: column {name!r}, row {row}") for row, cell in enumerate(cells)]


def _cell(cell: object, where: str) -> tuple[str, ...] | None:
    if cell is None:
        return None
    if isinstance(cell, (list, tuple)):
        if not cell:
            raise DataError(f"{where}: an empty list of references")
        return tuple(text for item in cell for text in _cell(item, where) or ())
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
        raise DataError(f"{where}: a reference is text or a number, not a {type(cell).__name__} ({shown(str(cell))})")
    if isinstance(cell, float) and not math.isfinite(cell):
        raise DataError(f"{where}: the reference is {cell}")
    text = str(cell).strip()
    if not text:  # an empty completion would earn full marks
        raise DataError(f"{where}: the reference is blank")
    return (text,)
