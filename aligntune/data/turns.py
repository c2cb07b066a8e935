"""Conversations: turns as other tools write them, made into `{"role", "content"}`; transcripts; shared beginnings."""

from __future__ import annotations

import json
import re
from typing import Any

from aligntune.data.rows import RowFault

Message = dict[str, Any]

# ShareGPT and its descendants; a name that is not here and not in ROLES makes a bad row.
ROLE_NAMES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "function": "tool", "observation": "tool",
    "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool")
# What an assistant turn may say beside its content; templates read one name or another.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \t]*")
_SPEAKER_ROLES = {"Human": "user", "Assistant": "assistant"}


def normalise(value: Any, field: str) -> list[Message]:
    """Turns with `role` and `content`; keys that are None are dropped (Arrow adds them to every turn of a column).

    Raises:
        RowFault: not a list of turns, an unknown role, a content that is missing, null or not text.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # csv can hold a conversation only as JSON text
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowFault(field, f"is text that looks like JSON but is not: {error.msg}") from error
    if not isinstance(value, list | tuple):
        raise RowFault(field, f"{type_name(value)}, expected a list of turns")
    if not value:
        raise RowFault(field, "is an empty list")
    return [_message(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _message(turn: Any, field: str) -> Message:
    if not isinstance(turn, dict):
        raise RowFault(field, f'{type_name(turn)}, expected a turn like {{"role": "user", "content": "..."}}')
    message = {key: value for key, value in turn.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if role is None:
        raise RowFault(field, "has neither role nor from")
    name = str(role).strip().lower()
    name = ROLE_NAMES.get(name, name)
    if name not in ROLES:
        raise RowFault(f"{field}.role", f"unknown role {role!r}; known: {', '.join([*ROLES, *ROLE_NAMES])}")
    key = "content" if "content" in message else "value"
    content = message.pop(key, None)
    if content is None:
        if not message.get("tool_calls"):
            missing = "is null" if "content" in turn or "value" in turn else "missing"
            raise RowFault(f"{field}.content", missing)
        return {"role": name, "content": "", **message}
    return {"role": name, "content": content if isinstance(content, str) else _joined(content, field), **message}


def _joined(content: Any, field: str) -> str:
    """The text of a content that is a list of parts."""
    if not isinstance(content, list):
        raise RowFault(f"{field}.content", f"{type_name(content)}, expected text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise RowFault(f"{field}.content", f"holds a part of type {kind!r}; only text can be trained on")
        texts.append(text)
    return "".join(texts)


def is_turns(value: Any) -> bool:
    """Whether `value` is meant as a conversation: a list of objects, or JSON text of one (the only form csv has)."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return False
        # A completion may be a JSON list of something else.
        return isinstance(value[0], dict) and ("role" in value[0] or "from" in value[0])
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def with_system(messages: list[Message], system_prompt: str | None, *, fold: bool) -> list[Message]:
    """`messages` opened by a system turn where they bring none; folded into the first user turn for templates without
    a system role (as Gemma 3's own template does)."""
    if system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if fold and len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
        first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        return [first, *messages[2:]]
    return messages


def is_transcript(text: Any) -> bool:
    """Whether `text` is a dialogue in the hh-rlhf form, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    return isinstance(text, str) and _SPEAKER.match(text) is not None and "Assistant:" in text


def transcript(text: str) -> list[Message]:
    """The turns of a dialogue in the hh-rlhf form."""
    found = list(_SPEAKER.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    return [
        {"role": _SPEAKER_ROLES[match.group(1)], "content": text[match.end() : end].strip()}
        for match, end in zip(found, ends, strict=True)
    ]


def split_shared(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole conversations as (the turns they share, the rest of chosen, the rest of rejected).

    Two that are the same are split before the last turn; such a pair teaches nothing and the report counts it.

    Raises:
        RowFault: they share no beginning, or do not part at an assistant's turn.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    shared -= chosen == rejected
    prompt, good, bad = chosen[:shared], chosen[shared:], rejected[shared:]
    if not good or not bad:
        longer, shorter = ("chosen", "rejected") if good else ("rejected", "chosen")
        raise RowFault(shorter, f"ends where {longer} goes on, so there is no answer to compare")
    if not prompt:
        raise RowFault("chosen", "and rejected share no first turn, so there is no prompt")
    if good[0]["role"] != "assistant" or bad[0]["role"] != "assistant":
        raise RowFault("chosen", f"and rejected part at turn {shared}, which is not the assistant's in both")
    return prompt, good, bad


def type_name(value: Any) -> str:
    """What `value` is, to follow a field's name: "is null", "is a number"."""
    if value is None:
        return "is null"
    names = {str: "text", list: "a list", tuple: "a list", dict: "an object", bool: "true or false", int: "a number",
             float: "a number"}  # fmt: skip
    return f"is {names.get(type(value), type(value).__name__)}"
