"""Turns as other tools write them, transcripts, and where two conversations part."""

from __future__ import annotations

import pytest

from aligntune.data.rows import RowFault
from aligntune.data.turns import is_transcript, is_turns, normalise, split_shared, transcript, with_system
from tests.data.rows import assistant, system, user


def test_roles_of_sharegpt_and_others():
    turns = [
        {"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"},
        {"role": "Function", "content": "f"}, {"role": "model", "content": "m"}, {"role": "developer", "content": "d"},
    ]  # fmt: skip
    assert normalise(turns, "conversations") == [
        system("s"), user("h"), assistant("g"), {"role": "tool", "content": "f"}, assistant("m"),
        {"role": "developer", "content": "d"},
    ]  # fmt: skip


def test_keys_that_are_none_are_dropped_and_others_kept():
    turn = {"role": "assistant", "content": "x", "tool_calls": None, "reasoning_content": "why", "name": None}
    assert normalise([turn], "m") == [{"role": "assistant", "content": "x", "reasoning_content": "why"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert normalise([call], "m")[0]["tool_calls"] == call["tool_calls"]


def test_content_in_parts_of_text_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalise([{"role": "user", "content": parts}], "m") == [user("ab")]
    with pytest.raises(RowFault, match="part of type 'image'"):
        normalise([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "m")


def test_a_conversation_as_json_text_as_csv_holds_it():
    assert normalise('[{"role": "user", "content": "x"}]', "m") == [user("x")]
    assert is_turns('[{"from": "human", "value": "x"}]') and not is_turns('[{"name": "f"}]') and not is_turns("[{oops")
    with pytest.raises(RowFault, match="looks like JSON but is not"):
        normalise("[{", "m")


@pytest.mark.parametrize(
    ("value", "field", "why"),
    [
        (None, "messages", "is null, expected a list of turns"), ("hello", "messages", "is text, expected a list"),
        ([], "messages", "is an empty list"), (["hello"], "messages[0]", "is text, expected a turn"),
        ([{"content": "x"}], "messages[0]", "has neither role nor from"),
        ([user("x"), {"role": "usr", "content": "x"}], "messages[1].role", "unknown role 'usr'"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": None}], "messages[0].content", "is null"),
        ([{"role": "user", "content": 3}], "messages[0].content", "is a number, expected text"),
        ([{"role": "user", "content": {"a": 1}}], "messages[0].content", "is an object, expected text"),
        ([{"role": 5, "content": "x"}], "messages[0].role", "unknown role 5"),
    ],
)  # fmt: skip
def test_faults_name_the_turn(value, field, why):
    with pytest.raises(RowFault) as caught:
        normalise(value, "messages")
    assert caught.value.field == field and caught.value.why.startswith(why)


def test_system_prompts_are_added_once_and_folded_where_asked():
    assert with_system([user("q")], "s", fold=False) == [system("s"), user("q")]
    assert with_system([system("own"), user("q")], "s", fold=False) == [system("own"), user("q")]
    assert with_system([user("q")], "s", fold=True) == [user("s\n\nq")]
    own = [system("own"), user("q"), assistant("a")]
    assert with_system(own, None, fold=True) == [user("own\n\nq"), assistant("a")]
    assert with_system([system("own"), assistant("a")], None, fold=True) == [system("own"), assistant("a")]
    given = [user("q")]
    with_system(given, "s", fold=True)
    assert given == [user("q")]  # the caller's turns are not changed


def test_transcripts():
    text = "\n\nHuman: a question\nover two lines\n\nAssistant: an answer\n\nHuman:\n\nAssistant:  last "
    assert is_transcript(text) and not is_transcript("The Human: said\n\nAssistant: x") and not is_transcript(None)
    assert transcript(text) == [user("a question\nover two lines"), assistant("an answer"), user(""), assistant("last")]
    assert transcript("Human: hi\n\nAssistant: ") == [user("hi"), assistant("")]


def test_split_at_the_last_shared_turn():
    prompt, good, bad = split_shared([user("a"), assistant("b"), user("c"), assistant("d")],
                                     [user("a"), assistant("b"), user("c"), assistant("e")])  # fmt: skip
    assert (prompt, good, bad) == ([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")])
    longer = [user("a"), assistant("b"), user("c"), assistant("d")]
    prompt, good, bad = split_shared(longer, [user("a"), assistant("e")])
    assert prompt == [user("a")] and good == [assistant("b"), user("c"), assistant("d")] and bad == [assistant("e")]
    assert split_shared([user("a"), assistant("b")], [user("a"), assistant("b")]) == (
        [user("a")], [assistant("b")], [assistant("b")],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        ([user("a"), assistant("b")], [user("x"), assistant("c")], "share no first turn"),
        ([user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("d")], "part at turn 2"),
        ([user("a"), assistant("b")], [user("a"), assistant("b"), user("c"), assistant("d")], "ends where rejected"),
        ([user("a")], [user("a")], "share no first turn"),
    ],
)
def test_conversations_that_give_no_pair(chosen, rejected, why):
    with pytest.raises(RowFault, match=why):
        split_shared(chosen, rejected)
