"""Every cell of the table (recognised kind x what the algorithm takes): the conversion, or the error."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from aligntune.data import DataRequest
from aligntune.data.convert import CELLS, Example, final_answer, make_plan
from aligntune.data.load import load
from aligntune.data.recognise import KINDS, RULES, Recognised, recognise
from aligntune.data.request import Takes
from aligntune.data.rows import RowFault
from aligntune.errors import DataError
from tests.data import rows as data
from tests.data.rows import assistant, system, user

ROW = {
    "text": {"text": "some text"},
    "messages": {"messages": [user("q"), assistant("a")], "extra": 7},
    "alpaca": {"instruction": "do", "input": "this", "output": "done", "extra": 7},
    "prompt-completion": {"prompt": "q", "completion": "a", "extra": 7},
    "preference": {"prompt": "q", "chosen": "good", "rejected": "bad", "extra": 7},
    "preference without prompt": {
        "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")], "extra": 7,
    },
    "prompt + reference answer": {"question": "q", "answer": "so\n#### 1,234", "extra": 7},
    "prompts": {"prompt": "q", "extra": 7},
    "unpaired": {"prompt": "q", "completion": "a", "label": False, "extra": 7},
}  # fmt: skip
Q, A, GOOD, BAD = [user("q")], [assistant("a")], [assistant("good")], [assistant("bad")]
DO = [user("do\n\nthis")]

# What each cell makes of ROW on a tokenizer with a chat template: (context, replies, extra) of each example.
EXPECTED = {
    ("text", "sft"): [("", ("some text",), {})],
    ("messages", "sft"): [([], ([*Q, *A],), {})],
    ("alpaca", "sft"): [(DO, ([assistant("done")],), {})],
    ("prompt-completion", "sft"): [("q", ("a",), {})],
    ("preference", "sft"): [("q", ("good",), {})],
    ("preference without prompt", "sft"): [(Q, (GOOD,), {})],
    ("prompt + reference answer", "sft"): [(Q, ([assistant("so\n#### 1,234")],), {})],
    ("preference", "preference"): [("q", ("good", "bad"), {})],
    ("preference without prompt", "preference"): [(Q, (GOOD, BAD), {})],
    ("preference", "reward"): [("q", ("good", "bad"), {})],
    ("preference without prompt", "reward"): [([], ([*Q, *GOOD], [*Q, *BAD]), {})],
    ("unpaired", "unpaired"): [("q", ("a",), {"label": False})],
    ("preference", "unpaired"): [("q", ("good",), {"label": True}), ("q", ("bad",), {"label": False})],
    ("preference without prompt", "unpaired"): [(Q, (GOOD,), {"label": True}), (Q, (BAD,), {"label": False})],
    ("messages", "prompts"): [(Q, (), {"extra": 7, "answer": "a"})],
    ("alpaca", "prompts"): [
        (DO, (), {"instruction": "do", "input": "this", "output": "done", "extra": 7, "answer": "done"})
    ],
    ("prompt-completion", "prompts"): [(Q, (), {"extra": 7, "answer": "a"})],
    ("preference", "prompts"): [(Q, (), {"extra": 7})],
    ("preference without prompt", "prompts"): [(Q, (), {"extra": 7})],
    ("prompt + reference answer", "prompts"): [
        (Q, (), {"question": "q", "extra": 7, "answer": "1234", "full_answer": "so\n#### 1,234"})
    ],
    ("prompts", "prompts"): [(Q, (), {"extra": 7})],
    ("unpaired", "prompts"): [(Q, (), {"label": False, "extra": 7})],
}


def recognised(kind):
    """A row of each kind, recognised as that kind and no other."""
    row = ROW[kind]
    roles = RULES[kind](tuple(row), [row])
    assert roles is not None
    return Recognised(kind, "test", roles, "turns" if kind in ("messages", "preference without prompt") else "strings")


def plan(rows, takes="sft", *, has_template=True, fold=False, **options):
    request = DataRequest(algorithm=takes, takes=takes, dataset=rows, **options)
    return make_plan(recognise(load(request)[0], request), request, has_template=has_template, fold=fold)


def converted(rows, takes="sft", **options):
    made = plan(rows, takes, **options)
    return [example for row in rows for example in made.convert(row)]


@pytest.mark.parametrize("takes", get_args(Takes))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_cell(kind, takes):
    request = DataRequest(algorithm="the algorithm", takes=takes, dataset=[ROW[kind]])
    if (kind, takes) not in EXPECTED:
        with pytest.raises(DataError) as caught:
            make_plan(recognised(kind), request, has_template=True, fold=False)
        first, *taken = str(caught.value).splitlines()
        assert f"the algorithm cannot train on this dataset: it was recognised as {kind} (test)" in first
        assert taken == [f"  {other}: {KINDS[other]}" for other, shape in CELLS if shape == takes] != []
        return
    made = make_plan(recognised(kind), request, has_template=True, fold=False)
    found = [(example.context, example.replies, example.extra) for example in made.convert(dict(ROW[kind]))]
    assert found == EXPECTED[kind, takes]
    assert made.description


def test_the_table_has_the_cells_that_are_tested_and_no_other():
    assert set(CELLS) == set(EXPECTED)


def test_prompts_of_a_base_model_are_text_and_of_conversations_turns():
    assert converted(data.GSM8K, "prompts", has_template=False)[0].context == data.GSM8K[0]["question"]
    assert converted([{"prompt": "q"}], "prompts", has_template=False)[0].context == "q"
    assert converted(data.PROMPTS, "prompts", has_template=False)[0].context == [user("Name a colour.")]
    assert converted(data.GSM8K, "sft", has_template=False)[0].context == [user(data.GSM8K[0]["question"])]


def test_strings_become_turns_only_where_asked():
    assert converted(data.PREFERENCE, "preference")[0].context == "The sky is"
    assert converted(data.PREFERENCE, "preference", apply_chat_template=True)[0] == Example(
        [user("The sky is")], ([assistant(" blue.")], [assistant(" green.")])
    )
    assert converted([{"prompt": "q"}], "prompts", apply_chat_template=False)[0].context == "q"
    asked = plan(data.PROMPT_COMPLETION, system_prompt="s")
    assert "strings became turns" in asked.description and "system_prompt put before" in asked.description
    assert asked.convert(data.PROMPT_COMPLETION[0])[0] == Example(
        [system("s"), user("The capital of France is")], ([assistant(" Paris.")],)
    )


def test_plain_text_takes_neither_system_prompt_nor_completion_only():
    with pytest.raises(DataError, match="plain text without turns"):
        plan(data.TEXT, system_prompt="s")
    with pytest.raises(DataError, match="leave completion_only out"):
        plan(data.TEXT, completion_only=True)
    assert plan(data.TEXT, apply_chat_template=True).convert({"text": "x"})[0].replies == ("x",)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("all", [([], 4)]),
        ("last", [([user("What is 12 + 30?"), assistant("42."), user("And 42 - 30?")], 1)]),
        ("split", [([user("What is 12 + 30?")], 1),
                   ([user("What is 12 + 30?"), assistant("42."), user("And 42 - 30?")], 1)]),
    ],
)  # fmt: skip
def test_assistant_turns(turns, expected):
    found = converted(data.TWO_TURNS, assistant_turns=turns)
    assert [(example.context, len(example.replies[0])) for example in found] == expected
    if turns != "all":
        assert [example.replies[0][0]["content"] for example in found] == ["42.", "12."][-len(found) :]


def test_the_last_assistant_turn_is_trained_though_a_user_turn_follows():
    rows = [{"messages": [user("a"), assistant("b"), user("c")]}]
    assert converted(rows, assistant_turns="last") == [Example([user("a")], ([assistant("b")],))]
    assert converted(rows, "prompts")[0].context == rows[0]["messages"]  # a question that is still open


def test_transcripts_and_prompt_columns_beside_whole_conversations():
    example = converted(data.TRANSCRIPTS, "preference")[0]
    assert example.context == [user("Hi there"), assistant("Hello!"), user("What is 2 + 2?")]
    assert example.replies == ([assistant("It is 4.")], [assistant("I do not know.")])
    beside = [{"prompt": "q", **data.WHOLE_CONVERSATIONS[0]}]
    assert converted(beside, "preference")[0].context == [user("The sky?")]
    mixed = [{"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    assert converted(mixed, "preference", system_prompt="s")[0].context == [system("s"), user("q")]
    mixed = [{"prompt": [user("q")], "chosen": "a", "rejected": "b"}]
    assert converted(mixed, "preference")[0] == Example([user("q")], ([assistant("a")], [assistant("b")]))


def test_a_scorer_reads_transcripts_whole_though_they_share_no_turn():
    pair = {"chosen": "\n\nHuman: one\n\nAssistant: a", "rejected": "\n\nHuman: two\n\nAssistant: b"}
    expected = ([user("one"), assistant("a")], [user("two"), assistant("b")])
    assert converted([pair], "reward") == [Example([], expected)]
    with pytest.raises(RowFault, match="share no first turn"):
        converted([pair], "preference")
    opened = converted([pair], "reward", system_prompt="s")[0]
    assert opened.replies == ([system("s"), *expected[0]], [system("s"), *expected[1]])


@pytest.mark.parametrize("takes", ["preference", "unpaired"])
@pytest.mark.parametrize("part", ["chosen", "rejected"])
def test_an_answer_that_ends_with_the_users_turn_is_none(part, takes):
    """Every token of it would count, those that the user should write too."""
    transcripts = {name: f"\n\nHuman: q\n\nAssistant: {name}" for name in ("chosen", "rejected")}
    turns = {"prompt": Q, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    said_on = {**transcripts, part: transcripts[part] + "\n\nHuman: bye"}
    for row in (said_on, {**turns, part: [*turns[part], user("c")]}):
        with pytest.raises(RowFault) as caught:
            converted([row], takes)
        assert str(caught.value) == f"{part}: ends with the turn of 'user', expected the assistant's"
        assert converted([row], "prompts")  # the prompt is whole
    if takes == "unpaired":
        with pytest.raises(RowFault, match="completion: ends with the turn of 'user'"):
            converted([{"prompt": Q, "completion": [assistant("a"), user("c")], "label": True}], takes)


def test_plain_pairs_without_prompt_part_where_trl_parts_them():
    rows = [{"chosen": "The sky is blue", "rejected": "The sky is green"}]
    assert converted(rows, "preference", has_template=False) == [Example("The sky is", (" blue", " green"))]
    rows = [{"chosen": " a", "rejected": "b"}]
    assert converted(rows, "preference", has_template=False) == [Example("", (" a", "b"))]


def test_a_system_prompt_reaches_every_kind_of_conversation_once():
    for rows, takes in [
        (data.MESSAGES, "sft"), (data.ALPACA, "sft"), (data.GSM8K, "sft"), (data.GSM8K, "prompts"),
        (data.MESSAGES, "prompts"), (data.ALPACA, "prompts"), (data.PREFERENCE, "prompts"),
        (data.TRANSCRIPTS, "prompts"), (data.UNPAIRED, "prompts"), (data.PROMPTS, "prompts"),
        (data.TRANSCRIPTS, "preference"),
        (data.PREFERENCE_TURNS, "unpaired"), (data.WHOLE_CONVERSATIONS, "reward"), (data.PREFERENCE, "reward"),
    ]:  # fmt: skip
        for fold in (False, True):
            for example in converted(rows, takes, system_prompt="Speak plainly.", fold=fold):
                turns = [*example.context, *(example.replies[0] if example.replies else [])]
                told = sum(turn["content"].count("Speak plainly.") for turn in turns)
                own = any(turn["content"].startswith("Be brief.") for turn in turns)
                assert told == (0 if own else 1), (rows, takes, fold)
                assert (turns[0]["role"] == "system") is not fold


def test_a_users_own_answer_column_stays():
    rows = [{"prompt": "q", "completion": "c", "answer": "mine"}]
    request = DataRequest(algorithm="grpo", takes="prompts", dataset=rows)
    roles = {"prompt": "prompt", "completion": "completion"}
    made = make_plan(Recognised("prompt-completion", "", roles), request, has_template=True, fold=False)
    assert made.convert(rows[0])[0].extra == {"answer": "mine"}
    solved = converted([{"problem": "p", "solution": "long #### 5", "level": 3}], "prompts")[0].extra
    assert solved == {"problem": "p", "solution": "long #### 5", "level": 3, "answer": "5"}


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("a\n#### 1,234", "1234"), ("#### -1,234,567.50", "-1234567.50"), ("x #### 7 #### 8", "8"), ("none", "none"),
        ("#### 1,2", "1,2"), ("#### red, green", "red, green"), ("#### $1,000", "$1000"), ("####", ""),
    ],
)  # fmt: skip
def test_final_answers_of_gsm8k(text, final):
    assert final_answer(text) == final


def test_reference_answers_may_be_numbers():
    assert converted([{"prompt": "q", "answer": 42}], "prompts")[0].extra["answer"] == "42"
    with pytest.raises(RowFault, match="answer: is true or false, expected text or a number"):
        converted([{"prompt": "q", "answer": True}], "prompts")


def test_rows_bring_tools_and_template_arguments():
    rows = [{**data.MESSAGES[0], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"a": 1, "b": None}}]
    assert converted(rows)[0].render == {"tools": [{"name": "f"}], "a": 1}
    with pytest.raises(RowFault, match="tools: is neither a list nor JSON"):
        converted([{**rows[0], "tools": "{oops"}])
    asked = plan(rows, "prompts")
    assert asked.convert(rows[0])[0].render == {} and "not rendered into the prompts" in asked.description


def test_margins_of_reward_rows():
    rows = [{**data.PREFERENCE[0], "margin": 2}]
    assert converted(rows, "reward")[0].extra == {"margin": 2.0}
    assert converted(rows, "preference")[0].extra == {}
    with pytest.raises(RowFault, match="margin: is text, expected a number"):
        converted([{**data.PREFERENCE[0], "margin": "2"}], "reward")
    with pytest.raises(RowFault, match="margin: missing"):
        converted([*rows, data.PREFERENCE[1]], "reward")


@pytest.mark.parametrize(
    ("rows", "takes", "fault"),
    [
        ([{"text": "x"}, {"text": None}], "sft", "text: is null"),
        ([{"text": "x"}, {"text": 3}], "sft", "text: is a number, expected text"),
        ([{"text": "x"}, {"other": 3}], "sft", "text: missing"),
        ([*data.ALPACA, {"instruction": "x", "input": ""}], "sft", "output: missing"),
        ([*data.ALPACA, {"instruction": " ", "output": "x"}], "sft", "instruction: is empty"),
        ([*data.ALPACA, {"instruction": "x", "input": ["y"], "output": "x"}], "sft", "input: is a list, expected text"),
        ([*data.MESSAGES, {"messages": [user("x")]}], "sft", "messages: has no assistant turn"),
        ([*data.PROMPT_COMPLETION_TURNS, {"prompt": [user("x")], "completion": [user("y")]}], "sft",
         "completion: starts with the turn of 'user'"),
        ([*data.PREFERENCE, {"prompt": "x", "chosen": "y", "rejected": None}], "preference", "rejected: is null"),
        ([*data.PREFERENCE, {"prompt": ["x"], "chosen": "y", "rejected": "z"}], "preference",
         "prompt: is a list, expected text"),
        ([*data.TRANSCRIPTS, {"chosen": "plain", "rejected": "text"}], "preference",
         "chosen: or rejected is not a dialogue"),
        ([*data.UNPAIRED * 2, {"prompt": "x", "completion": "y", "label": "good"}], "unpaired",
         "label: is 'good', expected true or false"),
        ([*data.PROMPTS, {"prompt": [user("x"), assistant("y")]}], "prompts",
         "prompt: ends with the turn of 'assistant'"),
        ([*data.PROMPTS, {"prompt": []}], "prompts", "prompt: is an empty list"),
        ([*data.MESSAGES, {"messages": [assistant("x")]}], "prompts", "messages: is one assistant turn"),
        ([{"prompt": "x"}, {"prompt": " \n"}], "prompts", "prompt: is empty"),
    ],
)  # fmt: skip
def test_bad_rows_say_field_and_why(rows, takes, fault):
    made = plan(rows, takes, has_template=False)
    for row in rows[:-1]:
        assert made.convert(row)
    with pytest.raises(RowFault) as caught:
        made.convert(rows[-1])
    assert str(caught.value).startswith(fault)


def test_prompts_of_two_types_do_not_share_a_column():
    with pytest.raises(RowFault, match="a conversation where other rows hold plain text"):
        converted([{"prompt": "x"}] * 40 + data.PROMPTS, "prompts", has_template=False)


def test_the_table_in_the_docs_is_the_table_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    lines = [[cell.strip() for cell in row] for row in rows]
    shapes = next(cells for cells in lines if cells[0] == "kind")[2:]
    told = {cells[0]: cells[2:] for cells in lines if cells[0] in KINDS}
    assert sorted(told) == sorted(KINDS) and sorted(shapes) == sorted(get_args(Takes))
    for kind, cells in told.items():
        for shape, cell in zip(shapes, cells, strict=True):
            assert (cell != "-") is ((kind, shape) in CELLS), (kind, shape)
