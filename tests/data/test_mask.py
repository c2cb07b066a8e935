"""What is learnt, as text, for the templates that trl carries and for templates that misbehave."""

from __future__ import annotations

import pytest

from aligntune.data.mask import PREFIX, TAGS, TRAINING
from aligntune.errors import DataError
from tests.data import rows as data
from tests.data.rows import assistant, learnt, prepared, system, user
from tests.data.tokenizers import make

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOUR = [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}]


def with_template(source, family="qwen3"):
    tokenizer = make(family)
    tokenizer.chat_template = source
    return tokenizer


THINK, NOTHING = "<think>\n{}\n</think>\n\n", "<think>\n\n</think>\n\n"
R1 = "<｜Assistant｜>{}<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("family", "rows", "turns", "expected", "method"),
    [
        ("llama3.1", data.TWO_TURNS, "all", "42.<|eot_id|>|12.<|eot_id|>", PREFIX),
        ("llama3.1", data.TWO_TURNS, "last", "12.<|eot_id|>", PREFIX),
        ("llama3.1", data.REASONING, "all", THINK.format("two and forty") + "42.<|eot_id|>|"
         + THINK.format("take thirty") + "12.<|eot_id|>", PREFIX),
        ("gemma", data.TWO_TURNS, "all", "42.<end_of_turn>\n|12.<end_of_turn>\n", PREFIX),
        ("gemma", data.REASONING, "last", THINK.format("take thirty") + "12.<end_of_turn>\n", PREFIX),
        ("gemma3", data.TWO_TURNS, "all", "42.<end_of_turn>\n|12.<end_of_turn>\n", PREFIX),
        ("qwen2.5", data.TWO_TURNS, "all", "42.<|im_end|>\n|12.<|im_end|>\n", PREFIX),
        # Qwen3 rewrites earlier turns: only the last can be told apart in its own template.
        ("qwen3", data.TWO_TURNS, "all", f"{NOTHING}42.<|im_end|>\n|{NOTHING}12.<|im_end|>\n", TRAINING),
        ("qwen3", data.TWO_TURNS, "last", f"{NOTHING}12.<|im_end|>\n", PREFIX),
        ("qwen3", data.REASONING, "all", THINK.format("two and forty") + "42.<|im_end|>\n|"
         + THINK.format("take thirty") + "12.<|im_end|>\n", TRAINING),
        ("qwen3", data.REASONING, "last", THINK.format("take thirty") + "12.<|im_end|>\n", PREFIX),
        # R1's own template deletes the reasoning of every turn, and its generation prompt opens <think>.
        ("r1", data.TWO_TURNS, "all", f"{R1.format('42.')}|{R1.format('12.')}", TRAINING),
        ("r1", data.REASONING, "all", R1.format(THINK.format("two and forty") + "42.") + "|"
         + R1.format(THINK.format("take thirty") + "12."), TRAINING),
        ("r1", data.REASONING, "last", R1.format(THINK.format("take thirty") + "12."), TRAINING),
        ("base", data.TWO_TURNS, "all", "42.<|endoftext|>|12.<|endoftext|>", TAGS),
        ("base-bos", data.REASONING, "last", THINK.format("take thirty") + "12.</s>", TAGS),
    ],
)  # fmt: skip
def test_families(family, rows, turns, expected, method):
    found = prepared(rows, "sft", family, assistant_turns=turns)
    assert learnt(found) == expected
    assert found.report.masks == {method: 1}
    assert found.report.end_of_turn_percent == 100.0
    assert any("TRL's training template" in warning for warning in found.report.warnings) is (method == TRAINING)
    assert not any("deletes text" in warning for warning in found.report.warnings)


@pytest.mark.parametrize("family", ["llama3.1", "gemma", "qwen2.5", "qwen3", "r1", "base"])
@pytest.mark.parametrize("rows", [data.TWO_TURNS, data.REASONING], ids=["plain", "reasoning"])
def test_split_makes_one_row_of_each_turn(family, rows):
    found = prepared(rows, "sft", family, assistant_turns="split")
    assert len(found.train) == found.report.examples == 2 and found.report.rows_trained == 1
    first, second = learnt(found, 0), learnt(found, 1)
    assert "42." in first and "12." not in first
    assert "12." in second and "42." not in second
    assert ("two and forty" in first) is (rows is data.REASONING)
    history = found.tokenizer.decode(found.train[1]["input_ids"])
    assert "42." in history and "And 42 - 30?" in history


def test_gemma_folds_system_turns_and_says_so():
    rows = [{"messages": [system("Be brief."), user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}]
    found = prepared(rows, "sft", "gemma", system_prompt="Speak.")
    texts = [found.tokenizer.decode(ids) for ids in found.train["input_ids"]]
    assert texts[0].startswith("<bos><start_of_turn>user\nBe brief.\n\nq<end_of_turn>")
    assert texts[1].startswith("<bos><start_of_turn>user\nSpeak.\n\nq<end_of_turn>")
    assert "no system role: system turns are folded" in found.report.conversion
    prompts = prepared([{"prompt": "q"}], "prompts", "gemma", system_prompt="Speak.")
    assert prompts.train[0]["prompt"] == [user("Speak.\n\nq")]


def test_a_conversation_that_the_template_refuses_is_a_bad_row():
    rows = [*FOUR, {"messages": [user("a"), user("b"), assistant("c")]}]
    with pytest.raises(DataError, match="list: row 1: chat template: .*Conversation roles must alternate"):
        prepared(rows, "sft", "gemma")


def test_the_same_ids_of_pad_and_end_of_turn_mask_nothing():
    tokenizer = make("llama3.1", pad_token="<|eot_id|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    found = prepared(data.TWO_TURNS, "sft", tokenizer=tokenizer)
    assert learnt(found) == "42.<|eot_id|>|12.<|eot_id|>"


def test_an_end_of_turn_outside_of_the_tags_is_supervised_all_the_same():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    found = prepared(FOUR, "sft", tokenizer=with_template(source))
    assert learnt(found) == "b<|im_end|>|d<|im_end|>"
    assert found.report.end_of_turn_percent == 100.0
    assert [warning for warning in found.report.warnings if "leaves the end of turn out" in warning]


def test_tags_on_the_last_turn_alone_do_not_pass_for_all_turns():
    source = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    found = prepared(FOUR, "sft", tokenizer=with_template(source))
    assert learnt(found) == "b<|im_end|>|d<|im_end|>" and found.report.masks == {PREFIX: 1}


def test_text_that_a_template_deletes_from_a_supervised_turn_is_counted_and_shown():
    source = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    rows = [*FOUR, *data.REASONING]
    found = prepared(rows, "sft", tokenizer=with_template(source))
    assert learnt(found, 1) == "\n\n42.<|im_end|>\n|\n\n12.<|im_end|>\n"
    (warning,) = [warning for warning in found.report.warnings if "deletes text" in warning]
    assert "1 of 2 examples, first list: row 1: '<think>\\ntwo and forty\\n</think>'" in warning
    pairs = [{"prompt": [user("q")], "chosen": [assistant("<think>x</think>a")], "rejected": [assistant("b")]}]
    for takes in ("preference", "reward"):
        report = prepared(pairs, takes, tokenizer=with_template(source)).report
        assert any("deletes text" in warning and "<think>x</think>" in warning for warning in report.warnings), takes


def test_reasoning_that_a_template_does_not_know_is_counted():
    rows = [{"messages": [user("q"), {**assistant("a"), "reasoning_content": "because"}]}]
    assert any("'because'" in warning for warning in prepared(rows, "sft", "llama3.1").report.warnings)
    assert learnt(prepared(rows, "sft", "qwen3")) == THINK.format("because") + "a<|im_end|>\n"
    assert not prepared(rows, "sft", "qwen3").report.warnings


def test_a_template_that_rewrites_history_and_has_no_tags_is_refused_with_the_way_out():
    said = "{{ m.content }}"
    source = CHATML.replace(said, f"{{% if loop.last %}}{said}{{% else %}}({said}){{% endif %}}")
    with pytest.raises(DataError) as caught:
        prepared([FOUR[0]], "sft", tokenizer=with_template(source))
    message = str(caught.value)
    assert "list: row 0: chat template: what the assistant says cannot be told apart" in message
    assert "no {% generation %} tags" in message and "TRL has no training template" in message
    assert "Give a Jinja file with {% generation %} tags: chat_template=" in message


def test_replies_that_do_not_continue_the_generation_prompt_are_counted():
    report = prepared([*FOUR, *data.REASONING], "sft", "r1").report
    (warning,) = [warning for warning in report.warnings if "does not continue the generation prompt" in warning]
    assert "(1 of 2 examples, first list: row 0)" in warning


def test_a_conversation_that_the_assistant_opens():
    rows = [{"messages": [assistant("b"), user("c"), assistant("d")]}]
    assert learnt(prepared(rows, "sft", "base")) == "b<|endoftext|>|d<|endoftext|>"  # tags know
    with pytest.raises(DataError, match="starts with the assistant, so no prompt precedes it"):
        prepared(rows, "sft", tokenizer=with_template(CHATML))
    assert learnt(prepared(rows, "sft", tokenizer=with_template(CHATML), assistant_turns="last")) == "d<|im_end|>\n"


def test_a_token_that_spans_the_end_of_the_prompt_is_learnt_and_said():
    tokenizer = with_template(CHATML.replace("\n", "  "))  # two blanks, which merge with what follows
    rows = [{"messages": [user("q"), assistant("answer")]}, {"messages": [user("q"), assistant(" answer")]}]
    found = prepared(rows, "sft", tokenizer=tokenizer)
    for i in range(2):
        assert learnt(found, i).lstrip(" ").startswith("answer<|im_end|>")
    plain = prepared([{"prompt": "2 + 2 is ", "completion": "four"}], "sft", "base")
    assert learnt(plain) == " four<|endoftext|>"  # " four" is one token; TRL learns it as well
    assert any("a token spans the end of the prompt" in warning for warning in plain.report.warnings)
    assert not prepared([{"prompt": "2 + 2 is", "completion": " four"}], "sft", "base").report.warnings


def test_a_template_whose_turns_end_in_plain_text_is_told_apart_and_warned_of():
    source = CHATML.replace("<|im_end|>", "[END]").replace("<|im_start|>", "[START]")
    found = prepared(FOUR, "sft", tokenizer=with_template(source))
    assert learnt(found) == "b[END]\n|d[END]\n"
    assert found.report.end_of_turn_percent == 0.0
    assert any("does not end in a token that stops generation" in warning for warning in found.report.warnings)


def test_pairs_share_one_prompt_and_one_template():
    rows = [{"prompt": [user("a"), assistant("b"), user("c")], "chosen": [assistant("d")],
             "rejected": [assistant("e"), user("f"), assistant("g")]}]  # fmt: skip
    found = prepared(rows, "preference", "qwen3")
    row, decode = found.train[0], found.tokenizer.decode
    assert found.report.masks == {TRAINING: 1}  # rejected needs it, so chosen is rendered with it as well
    assert decode(row["prompt_ids"]) == (
        f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{NOTHING}b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert decode(row["chosen_ids"]) == f"{NOTHING}d<|im_end|>\n"
    assert decode(row["rejected_ids"]).startswith(f"{NOTHING}e<|im_end|>\n<|im_start|>user\nf")


def test_completion_only_false_learns_every_token():
    found = prepared(data.TWO_TURNS, "sft", "llama3.1", completion_only=False)
    assert list(found.train[0]["labels"]) == list(found.train[0]["input_ids"])
    assert found.report.supervised_percent == 100.0


def test_empty_answers_are_learnt_as_a_stop_and_counted():
    rows = [*data.ALPACA, {"instruction": "x", "input": "", "output": ""}]
    found = prepared(rows, "sft", "llama3.1")
    assert learnt(found, 2) == "<|eot_id|>"
    assert any("the completion is empty" in warning and "list: row 2" in warning for warning in found.report.warnings)


def test_tools_of_a_row_reach_the_template():
    tools = [{"type": "function", "function": {"name": "add_up", "parameters": {}}}]
    function = {"name": "add_up", "arguments": {"a": 1}}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    rows = [{"messages": [user("q"), call, {"role": "tool", "content": "3"}, assistant("three")], "tools": tools}]
    found = prepared(rows, "sft", "qwen2.5")
    assert '"name": "add_up", "parameters"' in found.tokenizer.decode(found.train[0]["input_ids"])
    assert learnt(found).count("<|im_end|>") == 2 and "<tool_call>" in learnt(found) and "three" in learnt(found)


def test_pairs_whose_tokens_part_within_the_prompt_lose_none():
    row = {"prompt": "two  ", "chosen": "  plus", "rejected": "prompt"}  # a blank of the prompt joins "prompt"
    for one in (row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}):
        found = prepared([one], "preference", "base")
        ids = found.train[0]
        for name in ("chosen", "rejected"):
            whole = found.tokenizer(one["prompt"] + one[name] + "<|endoftext|>")["input_ids"]
            assert ids["prompt_ids"] + ids[f"{name}_ids"] == whole
        assert any("a token spans the end of the prompt" in warning for warning in found.report.warnings)
