"""Which kind of dataset this is, and why: decided from the columns and the first rows, whatever the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligntune.data.request import DataRequest, Takes
from aligntune.data.rows import Row, Rows
from aligntune.data.turns import is_transcript, is_turns
from aligntune.errors import DataError, unknown

TEXT, MESSAGES, ALPACA, PROMPT_COMPLETION = "text", "messages", "alpaca", "prompt-completion"
PREFERENCE, IMPLICIT = "preference", "preference without prompt"
PROMPT_ANSWER, PROMPT, UNPAIRED = "prompt + reference answer", "prompts", "unpaired"

# The columns of each kind, as an error shows them.
KINDS: Mapping[str, str] = {
    TEXT: "text",
    MESSAGES: "messages, or conversations (a list of turns: role/content or from/value)",
    ALPACA: "instruction, input (may be absent), output",
    PROMPT_COMPLETION: "prompt, completion",
    PREFERENCE: "prompt, chosen, rejected",
    IMPLICIT: "chosen, rejected (whole conversations that share their beginning)",
    PROMPT_ANSWER: "prompt or question or problem, answer or solution",
    PROMPT: "prompt",
    UNPAIRED: "prompt, completion, label (true or false)",
}
# Names in use for one meaning, the most specific first.
CONVERSATION = ("messages", "conversations", "conversation", "dialogue")
QUESTION = ("prompt", "question", "problem", "query")
REFERENCE = ("answer", "reference", "reference_answer", "ground_truth", "final_answer", "solution", "target")
COMPLETION = ("completion", "response")

FORMS = {"strings": "", "turns": " (lists of turns)", "transcripts": ' (dialogues "Human: ... Assistant: ...")'}

SAMPLE = 32


@dataclass(frozen=True)
class Recognised:
    """A dataset's kind.

    Args:
        kind: a key of `KINDS`.
        why: the columns and forms that decided it.
        roles: {"prompt", "completion", ...: the column that plays that part}.
        form: "turns", "transcripts" (hh-rlhf) or "strings": how prompts and completions are written.
        columns: all columns of the dataset.
    """

    kind: str
    why: str
    roles: Mapping[str, str]
    form: str = "strings"
    columns: tuple[str, ...] = ()


Rule = Callable[[Sequence[str], Sequence[Row]], dict[str, str] | None]


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _pair(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    if not {"chosen", "rejected"} <= set(columns):
        return None
    # ShareGPT's pairs: the conversation so far, and two turns that could follow it.
    prompt = _first(columns, (*QUESTION, "conversations"))
    if prompt:
        return {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"}
    return None


def _implicit(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    return {"chosen": "chosen", "rejected": "rejected"} if {"chosen", "rejected"} <= set(columns) else None


def _unpaired(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    prompt, completion = _first(columns, QUESTION), _first(columns, COMPLETION)
    if not (prompt and completion and "label" in columns):
        return None
    # Labels that are mostly something else are classes, and the rows are prompt-completion; a few are bad rows.
    labels = [as_label(row["label"]) for row in rows if row.get("label") is not None]
    binary = labels and labels.count(None) * 4 <= len(labels)
    return {"prompt": prompt, "completion": completion, "label": "label"} if binary else None


def _messages(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    for name in CONVERSATION:
        # The two usual names speak for themselves: what else stands in them is a bad row with a clear reason.
        if name in columns and (name in CONVERSATION[:2] or any(is_turns(row.get(name)) for row in rows)):
            return {"messages": name}
    return None


def _alpaca(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    output = _first(columns, ("output", "response", "completion"))
    if "instruction" not in columns or output is None:
        return None
    extra = _first(columns, ("input", "context"))
    return {"instruction": "instruction", "output": output} | ({"input": extra} if extra else {})


def _prompt_completion(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    prompt, completion = _first(columns, QUESTION), _first(columns, COMPLETION)
    return {"prompt": prompt, "completion": completion} if prompt and completion else None


def _prompt_answer(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    prompt, answer = _first(columns, QUESTION), _first(columns, REFERENCE)
    return {"prompt": prompt, "answer": answer} if prompt and answer else None


def _prompt(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    prompt = _first(columns, (*QUESTION, "instruction"))
    return {"prompt": prompt} if prompt else None


def _text(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str] | None:
    return {"text": "text"} if "text" in columns else None


RULES: Mapping[str, Rule] = {
    PREFERENCE: _pair, IMPLICIT: _implicit, UNPAIRED: _unpaired, MESSAGES: _messages, ALPACA: _alpaca,
    PROMPT_COMPLETION: _prompt_completion, PROMPT_ANSWER: _prompt_answer, PROMPT: _prompt, TEXT: _text,
}  # fmt: skip

# A dataset may be several kinds at once (ultrafeedback has prompt, chosen, rejected and messages): the order in which
# they are tried depends on what the algorithm trains on. `unpaired` stands before `prompt-completion`, or sft would
# train on the completions that are labelled bad.
ORDER: Mapping[Takes, tuple[str, ...]] = {
    "sft": (MESSAGES, UNPAIRED, PROMPT_COMPLETION, ALPACA, PREFERENCE, IMPLICIT, PROMPT_ANSWER, TEXT, PROMPT),
    "preference": (PREFERENCE, IMPLICIT, UNPAIRED, MESSAGES, ALPACA, PROMPT_COMPLETION, PROMPT_ANSWER, PROMPT, TEXT),
    "reward": (PREFERENCE, IMPLICIT, UNPAIRED, MESSAGES, ALPACA, PROMPT_COMPLETION, PROMPT_ANSWER, PROMPT, TEXT),
    "unpaired": (UNPAIRED, PREFERENCE, IMPLICIT, MESSAGES, ALPACA, PROMPT_COMPLETION, PROMPT_ANSWER, PROMPT, TEXT),
    "prompts": (PROMPT_ANSWER, PREFERENCE, IMPLICIT, UNPAIRED, PROMPT_COMPLETION, MESSAGES, ALPACA, PROMPT, TEXT),
}


def recognise(rows: Rows, request: DataRequest) -> Recognised:
    """The kind of `rows` for what `request.takes`.

    Raises:
        DataError: no row can be read, no kind fits the columns, or `text_field` is not a column.
    """
    sample = rows.sample(SAMPLE)
    if not rows.columns:
        return Recognised(TEXT, "no column could be read", {})  # every row is bad; they are reported as such
    if request.text_field is not None:
        if request.text_field not in rows.columns:
            raise DataError(f"{rows.name}: text_field: {unknown('column', request.text_field, rows.columns)}")
        return Recognised(TEXT, f"text_field is {request.text_field!r}", {"text": request.text_field})
    images = [name for name in ("image", "images") if name in rows.columns]
    if images:
        raise DataError(f"{rows.name}: column {images[0]!r} holds images, which cannot be trained on; to train on "
                        "the text alone, pass a datasets.Dataset without that column")  # fmt: skip
    for kind in ORDER[request.takes]:
        roles = RULES[kind](rows.columns, sample)
        if roles is not None:
            form, mixed = _form(roles, sample)
            why = f"columns {', '.join(roles.values())}{FORMS[form]}{mixed}"
            return Recognised(kind, why, roles, form, tuple(rows.columns))
    known = "\n".join(f"  {kind}: {columns}" for kind, columns in KINDS.items())
    raise DataError(f"{rows.name}: the columns {', '.join(rows.columns)} are of no known kind. Kinds and their "
                    f"columns:\n{known}\ncolumn_mapping={{'your column': 'a column above'}} renames them")  # fmt: skip


def _form(roles: Mapping[str, str], rows: Sequence[Row]) -> tuple[str, str]:
    """The form, and what is to be said where rows differ in it: one row with turns brings all under the template."""
    spoken = [roles[part] for part in ("messages", "chosen", "completion", "prompt") if part in roles]
    for column in spoken:
        values = [row.get(column) for row in rows if row.get(column) is not None]
        if any(is_turns(value) for value in values):
            plain = sum(isinstance(value, str) and not is_turns(value) for value in values)
            if not plain or column == roles.get("messages"):  # there a string is a bad row
                return "turns", ""
            return "turns", (f"; in {plain} of the first {len(values)} rows {column} is a plain string, which becomes "
                             "a turn")
        if column == "chosen" and any(is_transcript(value) for value in values):
            return "transcripts", ""
    return "strings", ""


def as_label(value: Any) -> bool | None:
    """A label as true or false; None where it is neither."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if isinstance(value, bool):
        return value
    return bool(value) if value in (0, 1) else None
