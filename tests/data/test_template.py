"""Which chat template is in effect, and the default for base models."""

from __future__ import annotations

import pytest

from aligntune.data.rows import RowFault
from aligntune.data.template import choose_templates
from aligntune.errors import DataError
from tests.data import rows as data
from tests.data.rows import assistant, learnt, prepared, system, user
from tests.data.tokenizers import TEMPLATES, make

TAGGED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_a_file_is_used_in_place_of_the_tokenizers_own(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(TAGGED)
    tokenizer = make("llama3.1")
    own = tokenizer.chat_template
    found = prepared(data.TWO_TURNS, "sft", tokenizer=tokenizer, chat_template=str(path))
    assert learnt(found) == "42.<|eot_id|>|12.<|eot_id|>"
    assert found.tokenizer.decode(found.train[0]["input_ids"]).startswith("[user]What is 12 + 30?[assistant]42.")
    assert found.tokenizer.chat_template == TAGGED
    assert tokenizer.chat_template == own  # the caller's tokenizer is left as it was
    assert str(path) in found.report.template


def test_a_file_that_is_missing_or_no_jinja(tmp_path):
    with pytest.raises(DataError, match=r"chat_template: .*gone\.jinja cannot be read: No such file"):
        choose_templates(str(tmp_path / "gone.jinja"), make("base"))
    path = tmp_path / "broken.jinja"
    path.write_text("line one\n{% for m in messages %}")
    with pytest.raises(DataError, match=r"broken\.jinja:2: .*endfor"):
        choose_templates(str(path), make("base"))


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_every_template_of_trl_passes_the_check_of_the_syntax(path):
    templates = choose_templates(str(path), make("qwen3"))
    assert templates.given and templates.own.tagged is ("endgeneration" in path.read_text())


def test_the_default_for_base_models_renders_as_documented():
    own = choose_templates(None, make("base")).own
    turns = [system("s"), user("q"), assistant("a"), user("r")]
    assert own.render(turns, generation_prompt=True) == (
        "### System:\ns\n\n### User:\nq\n\n### Assistant:\na<|endoftext|>\n\n### User:\nr\n\n### Assistant:\n"
    )
    assert choose_templates(None, make("base-bos")).own.render([user("q")]) == "<s>### User:\nq\n\n"


def test_the_default_is_handed_on_only_where_conversations_were_made_with_it():
    assert "### Assistant" in prepared(data.ALPACA, "sft", "base").tokenizer.chat_template
    assert prepared(data.TEXT, "sft", "base").tokenizer.chat_template is None
    assert prepared([{"prompt": "q"}], "prompts", "base").tokenizer.chat_template is None
    assert prepared([{"prompt": "q"}], "prompts", "base", system_prompt="s").tokenizer.chat_template is not None


def test_a_tokenizer_that_cannot_end_a_turn_is_refused():
    tokenizer = make("base", eos_token=None)
    assert tokenizer.eos_token is None
    with pytest.raises(DataError, match="neither a chat template nor an end-of-sequence .* set tokenizer.eos_token"):
        prepared(data.ALPACA, "sft", tokenizer=tokenizer)
    report = prepared(data.TEXT, "sft", tokenizer=tokenizer).report
    assert any("no completion is ended" in warning for warning in report.warnings)


def test_named_variants_of_a_template():
    tokenizer = make("qwen3")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ raise_exception('no') }}"}
    found = prepared(data.TWO_TURNS, "sft", tokenizer=tokenizer, assistant_turns="last")
    assert learnt(found) == "<think>\n\n</think>\n\n12.<|im_end|>\n"


@pytest.mark.parametrize(
    ("family", "lacks"), [("gemma", True), ("gemma3", False), ("qwen3", False), ("llama3.1", False), ("r1", False)]
)
def test_templates_without_a_system_role(family, lacks):
    assert choose_templates(None, make(family)).own.lacks_system_role is lacks


def test_a_template_with_a_system_role_gets_system_turns():
    found = prepared(data.MESSAGES[:1], "sft", "qwen2.5", system_prompt="Speak.")
    text = found.tokenizer.decode(found.train[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nSpeak.<|im_end|>\n<|im_start|>user\nWhat is the capital")
    assert "fold" not in found.report.conversion


def test_a_template_that_drops_system_turns_lacks_the_role_and_one_that_refuses_all_does_not():
    tokenizer = make("qwen3")
    tokenizer.chat_template = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    assert choose_templates(None, tokenizer).own.lacks_system_role
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    own = choose_templates(None, tokenizer).own
    assert not own.lacks_system_role
    with pytest.raises(RowFault, match="refuses the conversation: never"):
        own.render([user("q")])


def test_dated_templates_are_warned_of():
    tokenizer = make("qwen3")
    tokenizer.chat_template = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}" + TAGGED
    report = prepared(data.TWO_TURNS, "sft", tokenizer=tokenizer).report
    assert any("today's date" in warning for warning in report.warnings)
    assert not prepared(data.TWO_TURNS, "sft", "llama3.1").report.warnings
