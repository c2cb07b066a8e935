"""`exact_match` and `format`: the documented values, and attempts to get them for nothing."""

import pytest

from aligntune.errors import ConfigError, DataError
from aligntune.rewards import get_reward


def exact(completions, answers, **options):
    return get_reward("exact_match", **options)(["q"] * len(completions), completions, None, answer=answers)


def messages(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def test_values():
    assert exact(["132", " 132\n", "133", "", "The answer is 132"], ["132"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_message_lists_and_numbers():
    chat = messages(("assistant", "132"))
    assert exact([chat, chat], [132, "131"]) == [1.0, 0.0]
    assert exact([[], messages(("assistant", None)), messages(("user", "132"))], ["132"] * 3) == [0.0, 0.0, 0.0]
    # With tools the last assistant message is the answer, whatever the tool printed.
    turns = messages(("assistant", "call"), ("tool", "132"), ("assistant", "131"))
    assert exact([turns, turns], ["132", "131"]) == [0.0, 1.0]
    parts = messages(("assistant", [{"type": "text", "text": "13"}, {"type": "text", "text": "2"}]))
    assert exact([parts], ["132"]) == [1.0]


def test_unicode_is_compared_composed():
    assert exact(["Cafe\u0301", "Caf\u00e9", "cafe"], ["Caf\u00e9"] * 3) == [1.0, 1.0, 0.0]
    assert exact(["STRASSE"], ["Stra\u00dfe"], ignore_case=True) == [1.0]
    assert exact(["paris"], ["Paris"]) == [0.0]


def test_part_answer():
    tagged = "<think>47+85</think><answer>132</answer>"
    completions = [tagged, r"so \boxed{132}", "132", "<think>132", "<answer></answer>"]
    assert exact(completions, ["x\n#### 132"] * 5, part="answer") == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert exact(completions, ["x\n#### 132"] * 5) == [0.0] * 5


def test_an_empty_answer_is_never_right():
    assert exact(["", " ", "<answer></answer>"], ["#### "] * 3, part="answer") == [0.0, 0.0, 0.0]


def test_null_references_and_alternatives():
    assert exact(["a", "b", "c"], [None, ["a", "b"], ["a", "b"]]) == [None, 1.0, 0.0]


@pytest.mark.parametrize("cell", ["", "  ", [], True, {"a": 1}, float("nan")])
def test_a_reference_that_cannot_be_one_names_its_row(cell):
    with pytest.raises(DataError, match="exact_match.*'answer', row 1"):
        exact(["x", ""], ["x", cell])


def test_columns():
    reward = get_reward("exact_match")
    assert reward(["q"], ["5"], None, target=["5"]) == [1.0]
    assert reward(["q"], ["5"], None, target=["4"], solution=["5"]) == [1.0]  # solution comes before target
    assert get_reward("exact_match", column="gold")(["q"], ["5"], None, gold=["5"], answer=["4"]) == [1.0]
    with pytest.raises(DataError, match=r"'answer' or 'solution' or 'target'.*its columns: anwser, level") as caught:
        reward(["q"], ["5"], None, anwser=["5"], level=[1], trainer_state=object(), log_metric=print)
    assert "'column': 'anwser'" in str(caught.value)
    with pytest.raises(DataError, match="none beside the prompt"):
        reward(["q"], ["5"], None, trainer_state=object())
    with pytest.raises(DataError, match="'gold'"):
        get_reward("exact_match", column="gold")(["q"], ["5"], None, answer=["5"])
    with pytest.raises(DataError, match="one value for each of 2"):
        reward(["q", "q"], ["5", "5"], None, answer=["5"])
    with pytest.raises(DataError, match="one value for each of 2"):
        reward(["q", "q"], ["5", "5"], None, answer="55")


def test_a_completion_that_is_neither_text_nor_messages():
    with pytest.raises(DataError, match="list of messages, got a int"):
        exact([5], ["5"])


def test_options_are_checked():
    with pytest.raises(ConfigError, match="'answer'"):
        get_reward("exact_match", part="anser")


GOOD = "<think>4 + 5</think>\n<answer>9</answer>"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        (f"  {GOOD}\n", 1.0),
        ("<think>\u00fc\n\n\u65e5\u672c</think><answer>\U0001f389</answer>", 1.0),
        ("", 0.0),
        ("9", 0.0),
        ("<think>4 + 5</think> 9", 0.0),
        ("<think></think><answer>9</answer>", 0.0),
        ("<think> \n</think><answer>9</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        (GOOD + " and more", 0.0),
        ("Well: " + GOOD, 0.0),
        ("<think>a</think>b<answer>9</answer>", 0.0),
        (GOOD + GOOD, 0.0),
        ("<think>a<answer>9</answer></think>", 0.0),
        ("<think>a<think>b</think></think><answer>9</answer>", 0.0),
        ("<answer>9</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>9", 0.0),
        ("<think>a<answer>9</think></answer>", 0.0),
        ("</think><think>a<answer>9</answer>", 0.0),
        ("4 + 5</think><answer>9</answer>", 0.0),
        ("<think><answer>" * 20_000, 0.0),
    ],
)
def test_format(text, value):
    reward = get_reward("format")
    assert reward(["q", "q"], [text, messages(("assistant", text))]) == [value, value]


def test_format_when_the_template_opened_the_thinking():
    reward = get_reward("format", think_opened=True)
    assert reward(["q"] * 2, ["4 + 5</think><answer>9</answer>", GOOD]) == [1.0, 0.0]


def test_format_with_other_tags():
    reward = get_reward("format", tags=["plan", "code", "test"])
    assert reward(["q"] * 2, ["<plan>a</plan><code>b</code><test>c</test>", GOOD]) == [1.0, 0.0]


@pytest.mark.parametrize("tags", [[], ["a", "a"], "think", ["a b"], [1], None])
def test_format_refuses_tags_that_cannot_be_matched(tags):
    with pytest.raises(ConfigError, match="tags"):
        get_reward("format", tags=tags)
