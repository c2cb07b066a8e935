"""Which kind a dataset is, for which algorithm, and why."""

from __future__ import annotations

import json

import pytest

from aligntune.data import DataRequest
from aligntune.data.load import load
from aligntune.data.recognise import KINDS, ORDER, RULES, as_label, recognise
from aligntune.errors import DataError
from tests.data import rows as data
from tests.data.rows import assistant, user


def kind_of(rows, takes="sft", **options):
    request = DataRequest(algorithm=takes, takes=takes, dataset=rows, **options)
    return recognise(load(request)[0], request)


@pytest.mark.parametrize(
    ("rows", "takes", "kind", "form"),
    [
        (data.TEXT, "sft", "text", "strings"),
        (data.MESSAGES, "sft", "messages", "turns"),
        ([{"conversations": [{"from": "human", "value": "x"}]}], "sft", "messages", "turns"),
        ([{"dialogue": [user("x")], "text": "y"}], "sft", "messages", "turns"),
        ([{"dialogue": "a b", "text": "y"}], "sft", "text", "strings"),
        (data.ALPACA, "sft", "alpaca", "strings"),
        ([{"instruction": "a", "input": "", "output": "b", "text": "a b"}], "sft", "alpaca", "strings"),  # tatsu-lab
        ([{"instruction": "a", "context": "", "response": "b", "category": "c"}], "sft", "alpaca", "strings"),  # dolly
        (data.PROMPT_COMPLETION, "sft", "prompt-completion", "strings"),
        (data.PROMPT_COMPLETION_TURNS, "sft", "prompt-completion", "turns"),
        ([{"prompt": "a", "completion": "b", "label": "sports"}], "sft", "prompt-completion", "strings"),
        (data.PREFERENCE, "preference", "preference", "strings"),
        (data.WHOLE_CONVERSATIONS, "preference", "preference without prompt", "turns"),
        (data.TRANSCRIPTS, "preference", "preference without prompt", "transcripts"),
        (data.GSM8K, "prompts", "prompt + reference answer", "strings"),
        ([{"problem": "p", "solution": "s", "answer": "a"}], "prompts", "prompt + reference answer", "strings"),  # MATH
        (data.PROMPTS, "prompts", "prompts", "turns"),
        (data.UNPAIRED, "unpaired", "unpaired", "strings"),
        ([{"prompt": "a", "completion": "b", "label": "True"}], "unpaired", "unpaired", "strings"),  # csv
    ],
)
def test_kinds(rows, takes, kind, form):
    found = kind_of(rows, takes)
    assert (found.kind, found.form) == (kind, form)
    assert all(column in found.why for column in found.roles.values())


def test_a_dataset_of_several_kinds_is_what_the_algorithm_trains_on():
    both = [
        {
            "prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")],
            "messages": [user("q"), assistant("a")], "score_chosen": 1.0,
        }
    ]  # fmt: skip  # ultrafeedback_binarized
    assert kind_of(both, "sft").kind == "messages"
    assert kind_of(both, "preference").kind == "preference"
    assert kind_of(both, "prompts").kind == "preference"
    # Labelled completions must not pass for completions: sft would learn the bad ones.
    assert kind_of(data.UNPAIRED, "sft").kind == "unpaired"


def test_text_field_decides():
    found = kind_of([{"body": "x", "prompt": "p", "completion": "c"}], text_field="body")
    assert found.kind == "text" and found.roles == {"text": "body"}
    with pytest.raises(DataError, match="unknown column 'bod'; did you mean 'body'"):
        kind_of([{"body": "x"}], text_field="bod")


def test_unknown_columns_show_every_kind_and_the_way_out():
    with pytest.raises(DataError) as caught:
        kind_of([{"foo": 1, "bar": 2}])
    message = str(caught.value)
    assert "foo, bar are of no known kind" in message and "column_mapping=" in message
    assert all(f"  {kind}: {columns}" in message for kind, columns in KINDS.items())


def test_images_are_refused():
    with pytest.raises(DataError, match="'images' holds images"):
        kind_of([{"images": [], "messages": [user("x")]}])


def test_every_kind_is_tried_for_every_shape():
    assert set(RULES) == set(KINDS)
    for takes, order in ORDER.items():
        assert sorted(order) == sorted(KINDS), takes


def test_the_first_rows_may_be_null():
    rows = [{"prompt": None, "completion": None}] * 3 + data.PROMPT_COMPLETION_TURNS
    assert kind_of(rows).form == "turns"


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), (" FALSE ", False), ("1", True), (2, None),
     ("good", None), (None, None), (0.5, None), ([], None)],
)  # fmt: skip
def test_labels(value, label):
    assert as_label(value) is label


def test_strings_among_turns_are_said():
    turns = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    strings = {"prompt": "a", "chosen": "b", "rejected": "c"}
    mixed = kind_of([strings, turns, strings], "preference")
    assert mixed.form == "turns"
    assert mixed.why.endswith("; in 2 of the first 3 rows chosen is a plain string, which becomes a turn")
    as_text = {column: json.dumps(value) for column, value in turns.items()}  # as csv has them
    for rows in ([turns, turns], [as_text, turns]):
        assert kind_of(rows, "preference").why == "columns prompt, chosen, rejected (lists of turns)"
    assert "plain string" not in kind_of([{"messages": [user("a")]}, {"messages": "a"}]).why  # a bad row, and said so
