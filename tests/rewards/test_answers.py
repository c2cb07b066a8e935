"""Where the final answer is found, on what models really emit."""

import time

import pytest

from aligntune.rewards.answers import final_answer, last_boxed, last_tag, marked_answer, without_thinking


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \boxed{3} b}", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5} \boxed{6", "5"),
        (r"}}} \boxed{7}", "7"),
        (r"{{{ \boxed{8}", "8"),
        (r"\\boxed{9}", "9"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        (r"boxed{4}", None),
        ("", None),
    ],
)
def test_last_boxed(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize("text", ["\\boxed{" * 100_000, "{" * 300_000, "<answer>" * 100_000, "</answer>" * 100_000])
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    assert marked_answer(text) is None
    assert time.process_time() - start < 5  # quadratic needs minutes


def test_last_tag():
    assert last_tag("<answer>1</answer><answer>2</answer>") == "2"
    assert last_tag("<answer>1<answer>2</answer>") == "2"
    assert last_tag("<answer>1") is None
    assert last_tag("1</answer>") is None
    assert last_tag("<answer></answer>") == ""


def test_thinking_is_not_read():
    assert without_thinking("<think>a</think>b") == "b"
    assert without_thinking("a</think>b") == "b"  # the template wrote the opening tag
    assert without_thinking("plain") == "plain"
    assert without_thinking("<think>a") is None
    assert without_thinking("<think>a</think>b<think>c") is None


@pytest.mark.parametrize(
    ("text", "marked", "final"),
    [
        ("132", None, "132"),
        ("6 * 7 = 42\n#### 42", "42", "42"),
        ("#### 42\nand so on", "42", "42"),
        ("#### 1\n#### 2", "2", "2"),
        ("####", "", ""),
        (r"<think>\boxed{1}</think> 2", None, "2"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2", "2"),
        (r"\boxed{1} <answer>2</answer>", "2", "2"),
        (r"<answer>so \boxed{3}</answer>", "3", "3"),
        (r"<answer></answer> 7", "", ""),
        (r"<think>\boxed{1}", None, ""),
        ("", None, ""),
    ],
)
def test_marks_and_their_order(text, marked, final):
    assert marked_answer(text) == marked
    assert final_answer(text) == final
