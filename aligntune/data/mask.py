"""Which characters of a rendered example are learnt.

A conversation is rendered and masked by the first of these that holds for the row:

1. The template's own `{% generation %}` tags.
2. Prefix difference, verified: the conversation up to an assistant turn, rendered with the generation prompt, must be
   how the whole conversation starts, and so must the conversation up to that turn's end. What lies between is learnt.
3. TRL's training template for the family, by its tags. It renders some conversations differently, which is said.

Otherwise the row is a bad row. Positions are found in the text and carried to tokens by the tokenizer's offsets; no
token id decides, so a pad token that equals the end-of-turn token masks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aligntune.data.convert import Example, Speech
from aligntune.data.rows import RowFault
from aligntune.data.template import Template, Templates
from aligntune.data.turns import REASONING_KEYS, Message

TAGS, PREFIX, TRAINING = "generation tags", "prefix difference", "TRL's training template"
PLAIN, WHOLE = "plain text", "nothing is masked"

# Ends of turn of known families, for templates that leave theirs outside of what they mark as generated.
END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|end_of_text|>", "<|eom_id|>", "</s>",
)  # fmt: skip

Span = tuple[int, int]


@dataclass(slots=True)
class Rendered:
    """One reply with its context, as text.

    Args:
        text: all of it.
        spans: (start, end) characters that are learnt, in order.
        method: how the spans were found.
        prompt: what the model is given at inference before the last reply, to compare its tokens; None: not compared.
        special: the tokenizer adds its special tokens (plain text; templates write their own).
        lost: a piece of a learnt turn that the render lacks, or "".
        extended: an end of turn outside of the tags was added to a span.
        unprompted: the reply does not continue the generation prompt.
    """

    text: str
    spans: list[Span] = field(default_factory=list)
    method: str = PLAIN
    prompt: str | None = None
    special: bool = False
    lost: str = ""
    extended: bool = False
    unprompted: bool = False


class Unverified(Exception):  # noqa: N818 - a step of the ladder that does not hold, never shown as an error
    """Why one way of masking does not hold for a row."""


class Masker:
    """Renders examples and marks what is learnt.

    Args:
        templates: the chat templates in effect.
        tokenizer: its end-of-sequence token ends plain text.
    """

    def __init__(self, templates: Templates, tokenizer: Any) -> None:
        self.templates = templates
        self.eos: str | None = tokenizer.eos_token
        added = tokenizer.get_added_vocab()
        self.enders = tuple(dict.fromkeys([*([self.eos] if self.eos else []), *(e for e in END_OF_TURN if e in added)]))

    def replies(self, example: Example) -> list[Rendered]:
        """Each reply of `example` after its context, all under one template.

        Raises:
            RowFault: the template refuses the conversation, or no way of masking holds.
        """
        context = example.context
        if isinstance(context, str):
            return [self._plain(context, reply, whole=example.whole) for reply in example.replies]
        conversations = [_turns(reply) for reply in example.replies]
        reasons = []
        for attempt in (self._by_tags, self._by_prefix, self._by_training_template):
            try:
                return attempt(context, conversations, example.render)
            except Unverified as reason:
                reasons.append(str(reason))
        raise RowFault(
            "chat template",
            f"what the assistant says cannot be told apart in {self.templates.own.name}: {'; '.join(reasons)}. "
            "Give a Jinja file with {% generation %} tags: chat_template=",
        )

    def whole(self, example: Example) -> list[Rendered]:
        """Each reply after its context with nothing masked, for reward models."""
        found = []
        for reply in example.replies:
            if isinstance(example.context, str):
                found.append(self._plain(example.context, reply, whole=True))
                continue
            messages = [*example.context, *_turns(reply)]
            text = self.templates.own.render(messages, **example.render)
            spoken = [message for message in messages[len(example.context) :] if message["role"] == "assistant"]
            lost = next(filter(None, (_lost(message, text) for message in spoken)), "")
            found.append(Rendered(text, [(0, len(text))], WHOLE, lost=lost))
        return found

    def prompt(self, example: Example) -> Rendered:
        """The prompt of an online method, as it will be rendered for generation."""
        if isinstance(example.context, str):
            return Rendered(example.context, special=True)
        return Rendered(self.templates.own.render(example.context, generation_prompt=True, **example.render))

    def _plain(self, context: str, reply: Speech, *, whole: bool) -> Rendered:
        assert isinstance(reply, str)
        ended = reply if self.eos is None or reply.endswith(self.eos) else reply + self.eos
        text = context + ended
        if whole:
            return Rendered(text, [(0, len(text))], special=True)
        return Rendered(text, [(len(context), len(text))], prompt=context, special=True)

    def _by_tags(self, context: list[Message], replies: list[list[Message]], row: dict[str, Any]) -> list[Rendered]:
        if not self.templates.own.tagged:
            raise Unverified("it has no {% generation %} tags")
        return [self._tagged(self.templates.own, TAGS, context, reply, row) for reply in replies]

    def _by_training_template(
        self, context: list[Message], replies: list[list[Message]], row: dict[str, Any]
    ) -> list[Rendered]:
        template = self.templates.training()
        if template is None:
            raise Unverified("TRL has no training template for it")
        found = [self._tagged(template, TRAINING, context, reply, row) for reply in replies]
        for rendered, reply in zip(found, replies, strict=True):
            before = _before_last(context, reply)
            if before:
                rendered.unprompted = not rendered.text.startswith(
                    template.render(before, generation_prompt=True, **row)
                )
        return found

    def _tagged(
        self, template: Template, method: str, context: list[Message], reply: list[Message], row: dict[str, Any]
    ) -> Rendered:
        text, spans = template.render_tagged([*context, *reply], **row)
        spoken = [message for message in reply if message["role"] == "assistant"]
        earlier = sum(message["role"] == "assistant" for message in context)
        if len(spans) != earlier + len(spoken):
            raise Unverified(f"its tags mark {len(spans)} pieces, of {earlier + len(spoken)} assistant turns")
        spans = spans[earlier:]
        ended = [self._with_end(text, span) for span in spans]
        lost = next(filter(None, (_lost(m, text[a:b]) for m, (a, b) in zip(spoken, ended, strict=True))), "")
        return Rendered(text, ended, method, lost=lost, extended=ended != spans)

    def _by_prefix(self, context: list[Message], replies: list[list[Message]], row: dict[str, Any]) -> list[Rendered]:
        render = self.templates.own.render
        first = render(context, generation_prompt=True, **row) if context else ""  # shared by both replies of a pair
        return [self._differing(render, context, reply, first, row) for reply in replies]

    def _differing(
        self, render: Callable[..., str], context: list[Message], reply: list[Message], first: str, row: dict[str, Any]
    ) -> Rendered:
        messages = [*context, *reply]
        text = render(messages, **row)
        spans: list[Span] = []
        lost, before = "", ""
        for i in range(len(context), len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            if i == 0:
                raise Unverified("the conversation starts with the assistant, so no prompt precedes it")
            before = first if i == len(context) else self._prefix(render, messages[:i], row, generation_prompt=True)
            after = text if i == len(messages) - 1 else self._prefix(render, messages[: i + 1], row)
            if not text.startswith(before):
                raise Unverified(f"rendered alone, what precedes turn {i} is not how the whole conversation starts")
            if not text.startswith(after) or len(after) < len(before):
                raise Unverified(f"turn {i} is rendered differently where the conversation goes on")
            spans.append((len(before), len(after)))
            lost = lost or _lost(messages[i], text[len(before) : len(after)])
        ended = [self._with_end(text, span) for span in spans]
        return Rendered(text, ended, PREFIX, prompt=before, lost=lost, extended=ended != spans)

    @staticmethod
    def _prefix(render: Callable[..., str], messages: list[Message], row: dict[str, Any], **options: Any) -> str:
        try:
            return render(messages, **options, **row)
        except RowFault as fault:  # the whole conversation was rendered: only this part of it is refused
            raise Unverified(f"part of the conversation is refused: {fault.why}") from fault

    def _with_end(self, text: str, span: Span) -> Span:
        """`span`, and the end of turn right after it where the template leaves that out."""
        start, end = span
        if text[start:end].rstrip().endswith(self.enders):
            return span
        return start, end + next((len(ender) for ender in self.enders if text.startswith(ender, end)), 0)


def _turns(reply: Speech) -> list[Message]:
    assert not isinstance(reply, str)
    return reply


def _before_last(context: list[Message], reply: list[Message]) -> list[Message]:
    messages = [*context, *reply]
    return messages[: max(i for i, message in enumerate(messages) if message["role"] == "assistant")]


def _lost(message: Message, rendered: str) -> str:
    """The first piece of an assistant turn that its render lacks, whitespace aside; "" where all is there."""
    for key in ("content", *REASONING_KEYS):
        said = message.get(key)
        if not isinstance(said, str) or said.strip() in rendered:
            continue
        squeezed = "".join(rendered.split())
        if "".join(said.split()) in squeezed:
            continue
        head, mark, tail = said.rpartition("</think>")
        kept = mark and "".join(tail.split()) in squeezed
        return (head + mark).strip() if kept else said.strip()
    return ""
