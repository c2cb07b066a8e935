"""From a recognised row to what an algorithm trains on: a table of (kind, shape), each cell a conversion or none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aligntune.data import recognise as kinds
from aligntune.data.recognise import Recognised, as_label
from aligntune.data.request import DataRequest, Takes
from aligntune.data.rows import LONE_SURROGATE, Row, RowFault, lone_surrogate
from aligntune.data.turns import (
    Message,
    is_transcript,
    is_turns,
    normalise,
    split_shared,
    transcript,
    type_name,
    with_system,
)
from aligntune.errors import DataError

Speech = str | list[Message]


@dataclass(slots=True)
class Example:
    """One thing to train on, before templates and tokens.

    Args:
        context: what is given: text or turns; empty where everything is to be learnt.
        replies: what is learnt: one for sft and unpaired, (chosen, rejected) for pairs, none for prompts.
        extra: columns that go along unchanged.
        render: arguments for the chat template that the row brings (`tools`, `chat_template_kwargs`).
        whole: there is no prompt; every token is learnt.
    """

    context: Speech
    replies: tuple[Speech, ...] = ()
    extra: Row = field(default_factory=dict)
    render: Row = field(default_factory=dict)
    whole: bool = False


@dataclass(frozen=True)
class Plan:
    """How the rows of one dataset are converted.

    Args:
        recognised: the dataset's kind and columns.
        takes: the shape that is wanted.
        chat: plain strings become turns.
        fold: system turns are folded into the first user turn.
        system_prompt: put before conversations that bring none.
        assistant_turns: which turns of an sft conversation are trained.
        description: the conversion in words.
    """

    recognised: Recognised
    takes: Takes
    chat: bool
    fold: bool
    system_prompt: str | None
    assistant_turns: str
    description: str

    def convert(self, row: Row) -> list[Example]:
        """The examples of one row.

        Raises:
            RowFault: the row cannot be trained.
        """
        examples = CELLS[self.recognised.kind, self.takes][1](row, self)
        if self.takes == "prompts" and isinstance(examples[0].context, list) != self.chat:
            raise RowFault("prompt", "is a conversation where other rows hold plain text")  # one column, one type
        if self.takes != "prompts":  # TRL renders prompts itself, without what a row brings
            render = _render_arguments(row)
            for example in examples:
                example.render = render
        said = [(example.context, example.replies, example.extra, example.render) for example in examples]
        if lone_surrogate(said) is not None:
            raise RowFault(self._halved(row), LONE_SURROGATE)
        return examples

    def _halved(self, row: Row) -> str:
        """Where in `row` a lone surrogate stands; the columns that play a part are looked at first."""
        for name in dict.fromkeys([*self.recognised.roles.values(), *row]):
            value = row.get(name)
            found = lone_surrogate({name: value})
            if found is None and isinstance(value, str):  # csv holds turns and tools as JSON text, which can escape one
                with suppress(ValueError):
                    found = lone_surrogate({name: json.loads(value)})
            if found is not None:
                return found
        return "row"

    def open(self, messages: list[Message]) -> list[Message]:
        return with_system(messages, self.system_prompt, fold=self.fold)

    def speech(self, row: Row, part: str, role: str) -> Speech:
        """The column that plays `part`: turns, or text (one turn of `role` where strings become turns)."""
        name = self.recognised.roles[part]
        value = present(row, name)
        if is_turns(value) or (self.recognised.form == "turns" and not isinstance(value, str)):
            return normalise(value, name)
        text = as_text(value, name)
        return [{"role": role, "content": text}] if self.chat else text

    def opened(self, row: Row, part: str) -> Speech:
        """A prompt that stands alone, with its system turn where it is a conversation."""
        context = self.speech(row, part, "user")
        return context if isinstance(context, str) else self.open(context)

    def text(self, row: Row, part: str) -> str:
        name = self.recognised.roles[part]
        return as_text(present(row, name), name)


def make_plan(recognised: Recognised, request: DataRequest, *, has_template: bool, fold: bool) -> Plan:
    """The plan for a dataset, or the error that says what the algorithm takes.

    Args:
        has_template: the tokenizer has a chat template of its own, or the request names one.
        fold: that template has no place for a system turn.

    Raises:
        DataError: no conversion from this kind.
    """
    kind, takes = recognised.kind, request.takes
    cell = CELLS.get((kind, takes))
    if cell is None:
        accepted = "\n".join(f"  {k}: {kinds.KINDS[k]}" for k, shape in CELLS if shape == takes)
        raise DataError(
            f"{request.algorithm} cannot train on this dataset: it was recognised as {kind} ({recognised.why}). "
            f"{request.algorithm} takes these kinds and columns:\n{accepted}"
        )
    if lone_surrogate(request.system_prompt) is not None:
        raise DataError(f"system_prompt {LONE_SURROGATE}")
    if kind == kinds.TEXT and request.system_prompt:
        raise DataError("system_prompt needs conversations, and this dataset is plain text without turns")
    if kind == kinds.TEXT and request.completion_only:
        raise DataError("completion_only=True needs a prompt or turns to tell completions by, and this dataset is "
                        "plain text; leave completion_only out to train on all of it")  # fmt: skip
    chat = _chat(recognised, request, has_template)
    description = cell[0]
    if chat and recognised.form == "strings" and kind not in (kinds.MESSAGES, kinds.ALPACA):
        description += "; strings became turns of a conversation"
    if request.system_prompt:
        description += "; system_prompt put before conversations without a system turn"
    if fold and (request.system_prompt or recognised.form == "turns"):
        description += "; the template has no system role: system turns are folded into the first user turn"
    if takes == "prompts" and "tools" in recognised.columns:
        description += "; the column tools goes to the rewards, it is not rendered into the prompts"
    return Plan(recognised, takes, chat, fold, request.system_prompt, request.assistant_turns, description)


def _chat(recognised: Recognised, request: DataRequest, has_template: bool) -> bool:
    """Whether strings become turns. Pairs and completions given as strings stay so, as in TRL, unless asked."""
    if recognised.kind in (kinds.MESSAGES, kinds.ALPACA) or recognised.form != "strings" or request.system_prompt:
        return True
    if request.apply_chat_template is not None:
        return request.apply_chat_template and recognised.kind != kinds.TEXT
    if request.takes == "prompts":
        return has_template
    # A bare question and answer run together as text would teach no boundary between them.
    return recognised.kind == kinds.PROMPT_ANSWER


def present(row: Row, name: str) -> Any:
    """The value of a column.

    Raises:
        RowFault: missing or null.
    """
    if name not in row:
        raise RowFault(name, "missing")
    if row[name] is None:
        raise RowFault(name, "is null")
    return row[name]


def as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowFault(name, f"{type_name(value)}, expected text")
    return value


def _turn(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]


def _render_arguments(row: Row) -> Row:
    """What a row brings for its own rendering, under TRL's names."""
    found: Row = {}
    tools = row.get("tools")
    if tools:
        found["tools"] = tools if isinstance(tools, list) else _json(tools, "tools")
    if isinstance(row.get("chat_template_kwargs"), dict):
        found.update({k: v for k, v in row["chat_template_kwargs"].items() if v is not None})
    return found


def _json(value: Any, name: str) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError) as error:
        raise RowFault(name, f"is neither a list nor JSON: {error}") from error


# sft ------------------------------------------------------------------------------------------------------------------


def _text_to_sft(row: Row, plan: Plan) -> list[Example]:
    return [Example("", (plan.text(row, "text"),), whole=True)]


def _messages_to_sft(row: Row, plan: Plan) -> list[Example]:
    name = plan.recognised.roles["messages"]
    return _by_turn([], plan.open(normalise(present(row, name), name)), plan, name)


def _by_turn(context: list[Message], reply: list[Message], plan: Plan, name: str) -> list[Example]:
    """The assistant turns of `reply` that are trained, as one example or one each."""
    turns = [i for i, message in enumerate(reply) if message["role"] == "assistant"]
    if not turns:
        raise RowFault(name, "has no assistant turn to train on")
    if plan.assistant_turns == "all":
        return [Example(context, (reply,))]
    if plan.assistant_turns == "last":
        turns = turns[-1:]
    return [Example([*context, *reply[:i]], (reply[i : i + 1],)) for i in turns]


def _alpaca_to_sft(row: Row, plan: Plan) -> list[Example]:
    return [Example(plan.open(_alpaca_prompt(row, plan)), (_turn("assistant", plan.text(row, "output")),))]


def _alpaca_prompt(row: Row, plan: Plan) -> list[Message]:
    instruction = plan.text(row, "instruction")
    if not instruction.strip():
        raise RowFault(plan.recognised.roles["instruction"], "is empty")
    extra = row.get(plan.recognised.roles.get("input", "")) or ""
    extra = as_text(extra, plan.recognised.roles.get("input", ""))
    return _turn("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction)


def _completion_to_sft(row: Row, plan: Plan) -> list[Example]:
    context, reply = _prompt_and_reply(row, plan)
    if isinstance(context, list) and isinstance(reply, list):
        return _by_turn(context, reply, plan, plan.recognised.roles["completion"])
    return [Example(context, (reply,))]


def _prompt_and_reply(row: Row, plan: Plan) -> tuple[Speech, Speech]:
    """Prompt and completion in one form: text both, or turns both."""
    context, reply = plan.speech(row, "prompt", "user"), plan.speech(row, "completion", "assistant")
    if isinstance(context, str) and isinstance(reply, str):
        return context, reply
    context = _turn("user", context) if isinstance(context, str) else context
    reply = _turn("assistant", reply) if isinstance(reply, str) else reply
    _starts_as_assistant(reply, plan.recognised.roles["completion"])
    return plan.open(context), reply


def _starts_as_assistant(reply: list[Message], name: str) -> None:
    if reply[0]["role"] != "assistant":
        raise RowFault(name, f"starts with the turn of {reply[0]['role']!r}, expected the assistant's")


def _ends_as_assistant(reply: Speech, name: str) -> None:
    """Every token of a compared reply counts: a user's turn at its end would be learnt too."""
    if not isinstance(reply, str) and reply[-1]["role"] != "assistant":
        raise RowFault(name, f"ends with the turn of {reply[-1]['role']!r}, expected the assistant's")


def _chosen_to_sft(row: Row, plan: Plan) -> list[Example]:
    context, chosen, _ = _pair(row, plan)
    return [Example(context, (chosen,))]


def _answer_to_sft(row: Row, plan: Plan) -> list[Example]:
    context = plan.opened(row, "prompt")
    answer = _reference(present(row, plan.recognised.roles["answer"]), plan.recognised.roles["answer"])
    return [Example(context, (answer if isinstance(context, str) else _turn("assistant", answer),))]


# pairs ----------------------------------------------------------------------------------------------------------------


def _pair_to_pair(row: Row, plan: Plan) -> list[Example]:
    context, chosen, rejected = _pair(row, plan) if plan.takes == "reward" else _answers(row, plan)
    extra = {}
    if plan.takes == "reward" and "margin" in plan.recognised.columns:  # the collator takes it of all rows or none
        margin = present(row, "margin")
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise RowFault("margin", f"{type_name(margin)}, expected a number")
        extra["margin"] = float(margin)
    return [Example(context, (chosen, rejected), extra)]


def _answers(row: Row, plan: Plan) -> tuple[Speech, Speech, Speech]:
    """`_pair` of which both replies end as the assistant's."""
    context, chosen, rejected = _pair(row, plan)
    _ends_as_assistant(chosen, "chosen")
    _ends_as_assistant(rejected, "rejected")
    return context, chosen, rejected


def _pair(row: Row, plan: Plan) -> tuple[Speech, Speech, Speech]:
    """(prompt, chosen, rejected), each text or each turns."""
    good, bad = present(row, "chosen"), present(row, "rejected")
    name = plan.recognised.roles.get("prompt")
    dialogues = is_transcript(good) and is_transcript(bad)
    if isinstance(good, str) and isinstance(bad, str) and not dialogues:
        return _pair_of_strings(row, plan, good, bad)
    chosen = transcript(good) if dialogues else _reply(good, "chosen")
    rejected = transcript(bad) if dialogues else _reply(bad, "rejected")
    if dialogues or name is None or chosen[0]["role"] != "assistant":
        # Whole conversations: a prompt column beside them repeats what they start with (ultrafeedback).
        if plan.takes == "reward":  # it scores both whole; they need share nothing
            return [], plan.open(chosen), plan.open(rejected)
        prompt, chosen, rejected = split_shared(chosen, rejected)
        return plan.open(prompt), chosen, rejected
    _starts_as_assistant(rejected, "rejected")
    prompt_value = present(row, name)
    prompt = _turn("user", prompt_value) if isinstance(prompt_value, str) else normalise(prompt_value, name)
    if name == "conversations" and prompt[-1]["role"] == "assistant":
        raise RowFault(name, "ends with an answer, expected the conversation before chosen and rejected")
    return plan.open(prompt), chosen, rejected


def _reply(value: Any, name: str) -> list[Message]:
    if isinstance(value, dict):  # one turn (ShareGPT)
        value = [value]
    return _turn("assistant", value) if isinstance(value, str) else normalise(value, name)


def _pair_of_strings(row: Row, plan: Plan, chosen: str, rejected: str) -> tuple[Speech, Speech, Speech]:
    if plan.recognised.form == "transcripts":
        raise RowFault("chosen", 'or rejected is not a dialogue of the form "Human: ... Assistant: ..."')
    if "prompt" in plan.recognised.roles:
        prompt = plan.opened(row, "prompt")
        if isinstance(prompt, str):
            return prompt, chosen, rejected
        return prompt, _turn("assistant", chosen), _turn("assistant", rejected)
    if plan.chat:
        raise RowFault("prompt", "missing: plain strings become turns only with a prompt column")
    # As TRL's extract_prompt: the text they share, less a space that belongs to the first word that differs.
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    shared -= shared > 0 and chosen[shared - 1] == " "
    return chosen[:shared], chosen[shared:], rejected[shared:]


# unpaired -------------------------------------------------------------------------------------------------------------


def _unpaired_to_unpaired(row: Row, plan: Plan) -> list[Example]:
    context, reply = _prompt_and_reply(row, plan)
    _ends_as_assistant(reply, plan.recognised.roles["completion"])
    label = as_label(present(row, "label"))
    if label is None:
        raise RowFault("label", f"is {row['label']!r}, expected true or false")
    return [Example(context, (reply,), {"label": label})]


def _pair_to_unpaired(row: Row, plan: Plan) -> list[Example]:
    context, chosen, rejected = _answers(row, plan)
    return [Example(context, (chosen,), {"label": True}), Example(context, (rejected,), {"label": False})]


# prompts --------------------------------------------------------------------------------------------------------------

# TRL tells conversations by these columns, whichever it meets first: only `prompt` may stay.
NOT_FOR_REWARDS = ("prompt", "completion", "chosen", "rejected", "messages")
_NUMBER = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?%?")


def _prompt_example(row: Row, context: Speech, answer: str | None) -> list[Example]:
    """`prompt` (opened already), `answer` where there is a reference, every other column for the rewards to read."""
    if not (context if isinstance(context, str) else context[-1]["content"]).strip():
        raise RowFault("prompt", "is empty")
    if not isinstance(context, str) and context[-1]["role"] not in ("user", "tool"):
        raise RowFault("prompt", f"ends with the turn of {context[-1]['role']!r}; nothing is left to answer")
    extra = {key: value for key, value in row.items() if key not in NOT_FOR_REWARDS}
    if answer is not None:
        extra["answer"] = answer
    return [Example(context, (), extra)]


def _prompt_to_prompt(row: Row, plan: Plan) -> list[Example]:
    return _prompt_example(row, plan.opened(row, "prompt"), None)


def _answer_to_prompt(row: Row, plan: Plan) -> list[Example]:
    name = plan.recognised.roles["answer"]
    full = _reference(present(row, name), name)
    examples = _prompt_example(row, plan.opened(row, "prompt"), final_answer(full))
    if name == "answer" and "full_answer" not in row:
        examples[0].extra["full_answer"] = full
    return examples


def _reference(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowFault(name, f"{type_name(value)}, expected text or a number")
    return str(value)


def final_answer(text: str) -> str:
    """What stands after the last `####` of a GSM8K answer, thousands separators removed; other text as it is."""
    _, mark, tail = text.rpartition("####")
    if not mark:
        return text
    tail = tail.strip()
    return tail.replace(",", "") if _NUMBER.fullmatch(tail) else tail


def _completion_to_prompt(row: Row, plan: Plan) -> list[Example]:
    context, reply = _prompt_and_reply(row, plan)
    return _prompt_example(row, context, _own_or(row, _last_content(reply)))


def _messages_to_prompt(row: Row, plan: Plan) -> list[Example]:
    name = plan.recognised.roles["messages"]
    messages = normalise(present(row, name), name)
    row = {key: value for key, value in row.items() if key != name}
    if messages[-1]["role"] != "assistant":  # it ends with a question that nobody has answered: that is the prompt
        return _prompt_example(row, plan.open(messages), None)
    if len(messages) == 1:
        raise RowFault(name, "is one assistant turn, so there is no prompt")
    return _prompt_example(row, plan.open(messages[:-1]), _own_or(row, messages[-1]["content"]))


def _alpaca_to_prompt(row: Row, plan: Plan) -> list[Example]:
    context = plan.open(_alpaca_prompt(row, plan))
    return _prompt_example(row, context, _own_or(row, plan.text(row, "output")))


def _pair_to_prompt(row: Row, plan: Plan) -> list[Example]:
    context, _, _ = _pair(row, plan)
    return _prompt_example(row, context, None)


def _unpaired_to_prompt(row: Row, plan: Plan) -> list[Example]:
    context, _ = _prompt_and_reply(row, plan)
    return _prompt_example(row, context, None)


def _last_content(reply: Speech) -> str:
    return reply if isinstance(reply, str) else reply[-1]["content"]


def _own_or(row: Row, reference: str) -> str | None:
    """The reference, unless the row has an `answer` column of its own, which then stays."""
    return None if "answer" in row else reference


Converter = Callable[[Row, Plan], list[Example]]

_SPLIT = "the turns that both conversations share became the prompt"
CELLS: Mapping[tuple[str, str], tuple[str, Converter]] = {
    (kinds.TEXT, "sft"): ("text as it is, end-of-sequence token added", _text_to_sft),
    (kinds.MESSAGES, "sft"): ("conversations", _messages_to_sft),
    (kinds.ALPACA, "sft"): ("instruction and input became the user's turn, output the assistant's", _alpaca_to_sft),
    (kinds.PROMPT_COMPLETION, "sft"): ("prompt and completion", _completion_to_sft),
    (kinds.PREFERENCE, "sft"): ("prompt and chosen; rejected is not used", _chosen_to_sft),
    (kinds.IMPLICIT, "sft"): (f"chosen; rejected is not used; {_SPLIT}", _chosen_to_sft),
    (kinds.PROMPT_ANSWER, "sft"): ("question and whole reference answer", _answer_to_sft),
    (kinds.PREFERENCE, "preference"): ("pairs", _pair_to_pair),
    (kinds.IMPLICIT, "preference"): (f"pairs; {_SPLIT}", _pair_to_pair),
    (kinds.PREFERENCE, "reward"): ("pairs", _pair_to_pair),
    (kinds.IMPLICIT, "reward"): ("pairs", _pair_to_pair),
    (kinds.UNPAIRED, "unpaired"): ("completions with their labels", _unpaired_to_unpaired),
    (kinds.PREFERENCE, "unpaired"): ("each pair became two rows: chosen true, rejected false", _pair_to_unpaired),
    (kinds.IMPLICIT, "unpaired"): (f"each pair became two rows; {_SPLIT}", _pair_to_unpaired),
    (kinds.PROMPT, "prompts"): ("prompts", _prompt_to_prompt),
    (kinds.PROMPT_ANSWER, "prompts"): ("prompts; answer is the reference (GSM8K: after ####)", _answer_to_prompt),
    (kinds.PROMPT_COMPLETION, "prompts"): ("prompts; answer is the completion", _completion_to_prompt),
    (kinds.MESSAGES, "prompts"): ("turns before the last assistant turn; answer is that turn", _messages_to_prompt),
    (kinds.ALPACA, "prompts"): ("instruction and input; answer is the output", _alpaca_to_prompt),
    (kinds.PREFERENCE, "prompts"): ("prompts; chosen and rejected are not used", _pair_to_prompt),
    (kinds.IMPLICIT, "prompts"): (f"prompts; chosen and rejected are not used; {_SPLIT}", _pair_to_prompt),
    (kinds.UNPAIRED, "prompts"): ("prompts; completions and labels are not used", _unpaired_to_prompt),
}  # fmt: skip
"""(kind, takes): (the conversion in words, the conversion). A pair that is not here is a DataError."""
