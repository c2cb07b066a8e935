"""`math`: grades that math-verify gives, and bounds that it does not keep by itself."""

import logging
import os
import threading
import time

import pytest

from aligntune.errors import AlignTuneError, ConfigError
from aligntune.rewards import get_reward, mathematics
from aligntune.rewards.mathematics import MathVerify


@pytest.fixture(scope="module")
def math():
    return get_reward("math")


@pytest.mark.parametrize(
    ("reference", "completion", "value"),
    [
        ("Six sevens.\n#### 42", r"It is \boxed{42.0}", 1.0),
        ("He pays 1,200.\n#### 1,200", "The answer is 1200.", 1.0),
        ("1/2", r"<think>0.4?</think>The answer is $\frac{1}{2}$", 1.0),
        ("$x^2 - 1$", r"\boxed{(x-1)(x+1)}", 1.0),
        (r"So \boxed{\frac{3}{4}}", "#### 0.75", 1.0),
        ("2x+1", r"\boxed{1 + 2x}", 1.0),
        ("2x+1", r"\boxed{2}", 0.0),  # not the leading number of the reference
        ("42", "42", 1.0),
        ("42", "42.00001", 0.0),
        ("-3", "<answer>\u22123</answer>", 1.0),  # U+2212, which models write
        ("3", "<answer>-3</answer>", 0.0),
        ("18", "<answer>18 dollars</answer>", 1.0),
        ("18", "<answer>$18.00</answer>", 1.0),
        ("0.5", "<answer>50%</answer>", 1.0),
        ("0.5", "<answer>50 percent</answer>", 1.0),
        ("100000", "<answer>1e5</answer>", 1.0),
        ("1e5", "<answer>1</answer>", 0.0),
        ("1000000", "<answer>1 000 000</answer>", 1.0),
        ("0", "<answer></answer>", 0.0),
        ("0", "", 0.0),
        ("42", r"\boxed{41} or \boxed{42} or \boxed{43}", 0.0),  # the last one counts
        ("42", r"\boxed{41 or 42}", 0.0),
        ("42", r"\boxed{41, 42}", 0.0),
        ("42", r"<answer>1</answer><answer>42</answer>", 1.0),
        ("42", "<think>It is 42", 0.0),
        ("42", r"<think>\boxed{42}</think>\boxed{41}", 0.0),
        ("42", r"\boxed{42", 0.0),
        ("Tuesday", "<answer>tuesday</answer>", 1.0),
        ("no", "<answer>on</answer>", 0.0),  # a product of letters commutes; a word does not
        ("9" * 5000, r"\boxed{" + "9" * 5000 + "}", 1.0),
        ("1", "9" * 5000, 0.0),
        ("1.000.000", "<answer>0</answer>", 0.0),
        ("5", "\u65e5\u672c \U0001f389 \x00 \ud800", 0.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
        ("(1, 2)", r"\boxed{(2, 1)}", 0.0),
    ],
)
def test_values(math, reference, completion, value):
    assert math.score(completion, reference) == value


def test_as_a_reward(math):
    chat = [{"role": "assistant", "content": r"\boxed{\frac12}"}]
    rewards = math(["q"] * 4, [chat, "0.5", "0.4", "x"], None, answer=[0.5, "1/2", "1/2", None])
    assert rewards == [1.0, 1.0, 0.0, None]
    assert math(["q"] * 2, ["7", "9"], None, solution=[["7", "8"], ["7", "8"]]) == [1.0, 0.0]


@pytest.mark.parametrize("text", ["9**9**9**9", r"\boxed{99999999!}", r"\boxed{" + "(" * 3000 + "}"])
def test_a_bomb_is_cut_off_in_bounded_time_and_said(text, caplog):
    reward = MathVerify(seconds=0.5)
    reward.score("1.0", "1")  # the start of the process is not what is timed
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="aligntune.rewards"):
        assert reward.score(text, "5") == 0.0
    assert time.monotonic() - start < 30
    assert "no grade for" in caplog.text and "within 0.5 s of CPU time; it scores 0" in caplog.text
    assert reward.score(r"\boxed{5.0}", "5") == 1.0  # and it goes on


def test_from_threads(math):
    values = {}

    def work(number):
        values[number] = math.score(rf"\boxed{{{number}.0}}", "3")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {number: float(number == 3) for number in range(8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork_the_child_uses_a_process_of_its_own(math):
    assert math.score(r"\boxed{3.0}", "3") == 1.0
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(math.score(r"\boxed{4.0}", "4")).encode())
        for grader in mathematics._GRADERS.values():
            grader.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"1.0"
    assert math.score(r"\boxed{5.0}", "5") == 1.0  # the parent's pipes were not touched
    os.close(read)
    os.close(write)


def test_a_killed_worker_is_started_again(math):
    assert math.score("3.0", "3") == 1.0
    grader = mathematics._grader(math.seconds, int(math.memory_gb * 1e9))
    grader._process.kill()
    grader._process.wait()
    assert math.score("3.0", "3") == 1.0


def test_the_worker_says_why_it_cannot_start(monkeypatch):
    grader = mathematics._Grader(1.0, 10**9)
    monkeypatch.setattr(mathematics.sys, "path", [])
    monkeypatch.setattr(mathematics.sys, "executable", "/bin/false")
    with pytest.raises(AlignTuneError, match="math-verify failed.*pip install math-verify"):
        grader.same("1", "2", isolated=True)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"seconds": "5"}, {"seconds": float("nan")}, {"memory_gb": 0.1}])
def test_limits_are_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        get_reward("math", **options)
