"""Chat templates: which one is in effect, and how it renders a conversation."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from aligntune.data.rows import RowFault
from aligntune.data.turns import Message
from aligntune.errors import DataError

# What a template can raise on a row: raise_exception() and undefined names, and the errors of the expressions in it.
RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

# For base models, whose tokenizers bring no template. Plain words, so that no vocabulary has to grow; every turn of the
# assistant ends with the end-of-sequence token, which generation stops at. `{bos}` is `bos_token` for tokenizers that
# open a text with it: rendered text is encoded without the tokenizer adding special tokens.
DEFAULT_TEMPLATE = """\
{bos}{%- for message in messages -%}
    {{- '### ' + message['role'] | capitalize + ':\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n\\n' -}}
    {%- else -%}
        {{- message['content'] + '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""


REFUSES = (
    "{{- raise_exception('the tokenizer has neither a chat template nor an end-of-sequence token to end a turn with; "
    "set tokenizer.eos_token, or give a Jinja file: chat_template=') -}}"
)


@dataclass(frozen=True)
class Template:
    """A chat template bound to a tokenizer's special tokens.

    Args:
        source: the Jinja text.
        special_tokens: `tokenizer.special_tokens_map`, which templates read (`bos_token`, `eos_token`).
        name: what to call it in messages and reports.
    """

    source: str
    special_tokens: dict[str, Any]
    name: str

    @cached_property
    def tagged(self) -> bool:
        """It marks what the model generates with `{% generation %}`."""
        return _TAG.search(self.source) is not None

    @property
    def dated(self) -> bool:
        """It writes today's date, so tomorrow's tokens differ from today's."""
        return "strftime_now" in self.source

    def render(self, messages: list[Message], *, generation_prompt: bool = False, **row: Any) -> str:
        """The conversation as text; `row` holds `tools` and other arguments of one row.

        Raises:
            RowFault: the template refuses the conversation.
        """
        try:
            texts, _ = render_jinja_template(
                [messages], chat_template=self.source, add_generation_prompt=generation_prompt,
                **{**self.special_tokens, **row},
            )  # fmt: skip
        except RENDER_ERRORS as error:
            raise self._fault(error) from error
        return texts[0]

    def render_tagged(self, messages: list[Message], **row: Any) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the (start, end) characters of each `{% generation %}` block.

        Raises:
            RowFault: the template refuses the conversation.
        """
        try:
            texts, spans = render_jinja_template(
                [messages], chat_template=self.source, return_assistant_tokens_mask=True,
                **{**self.special_tokens, **row},
            )  # fmt: skip
        except RENDER_ERRORS as error:
            raise self._fault(error) from error
        return texts[0], [tuple(span) for span in spans[0]]

    def _fault(self, error: Exception) -> RowFault:
        return RowFault("chat template", f"{self.name} refuses the conversation: {error or type(error).__name__}")

    @cached_property
    def lacks_system_role(self) -> bool:
        """It refuses a system turn, or drops its text (Gemma: "System role not supported")."""
        probe, user = "b1f3-probe", [{"role": "user", "content": "hello"}]
        try:
            self.render(user, generation_prompt=True)
        except RowFault:
            return False  # it refuses more than the system turn; the rows will say what
        try:
            return probe not in self.render([{"role": "system", "content": probe}, *user], generation_prompt=True)
        except RowFault:
            return True


@dataclass
class Templates:
    """The templates that a dataset may be rendered with.

    Args:
        own: from the request's file or the tokenizer, or the default for base models.
        given: False where `own` is that default.
        tokenizer: has `own` set as its chat template where the file or the default is in use.
    """

    own: Template
    given: bool
    tokenizer: Any
    _training: list[Template | None] = field(default_factory=list)

    def training(self) -> Template | None:
        """TRL's training template for this family, or None; TRL is imported only where a row needs this."""
        if not self._training:
            self._training.append(_training_template(self.tokenizer, self.own))
        return self._training[0]


def choose_templates(path: str | None, tokenizer: Any) -> Templates:
    """The templates in effect; `tokenizer` itself is never changed.

    Raises:
        DataError: the file is missing, or no valid Jinja.
    """
    special = dict(tokenizer.special_tokens_map)
    source = tokenizer.chat_template
    if isinstance(source, dict):  # named variants
        source = source.get("default")
    name, given = "the tokenizer's chat template", source is not None
    if path is not None:
        source, name, given = _read_template(Path(path).expanduser()), f"the chat template {path}", True
    elif source is None:
        source, name = default_template(tokenizer), "the default chat template for base models"
    if source != tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)  # the caller's own stays as it is
        tokenizer.chat_template = source
    return Templates(Template(source, special, name), given, tokenizer)


def default_template(tokenizer: Any) -> str:
    """The template for a tokenizer that brings none; one that refuses conversations where nothing can end a turn."""
    if tokenizer.eos_token is None:
        return REFUSES
    opens = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return DEFAULT_TEMPLATE.replace("{bos}", "{{- bos_token -}}" if opens else "")


def _read_template(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"chat_template: {path} cannot be read: {error.strerror or error}") from error
    try:
        # `generation` is a tag that transformers adds; for the check of the syntax it is taken out.
        bare = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", source)
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(bare)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"chat_template: {path}:{error.lineno}: {error.message}") from error
    return source


def _training_template(tokenizer: Any, own: Template) -> Template | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        source = get_training_chat_template(tokenizer)
    except RENDER_ERRORS:  # ValueError: TRL knows no training template for this one
        return None
    if source is None or _TAG.search(source) is None:
        return None
    return Template(source, own.special_tokens, "TRL's training template for this family")
