"""Sums and differences of numbers from 0 to 99: a small model learns them in minutes, and a grade is exact.

There are 10,100 problems: `a + b` (the order of a and b does not make another problem) and `a - b` with a >= b. A
problem's place is decided by a hash of the problem alone, so the lists are the same on every machine and Python
version, and no held-out problem, in either order or under any phrasing, is in the training list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

DESCRIPTION = "Sums and differences of numbers from 0 to 99"
SEED = 20250
LOW, HIGH = 0, 99  # operands
HELD_OUT = 512
PHRASINGS = ("What is {}?", "Compute {}.", "Find {}.")

Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One problem, in the order in which it is asked."""

    left: int
    sign: str
    right: int

    @property
    def answer(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def key(self) -> str:
        """The same for `3 + 4` and `4 + 3`."""
        first, second = (self.left, self.right) if self.sign == "-" else sorted((self.left, self.right))
        return f"{first}{self.sign}{second}"

    def draw(self, what: str, choices: int) -> int:
        """A number in 0 .. choices-1 that depends on nothing but the problem, the seed and `what`."""
        digest = hashlib.sha256(f"{SEED}:{what}:{self.key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % choices

    @property
    def question(self) -> str:
        return PHRASINGS[self.draw("phrasing", len(PHRASINGS))].format(f"{self.left} {self.sign} {self.right}")

    @property
    def wrong_answer(self) -> int:
        """A near miss: one off, ten off (a lost carry), or the other operation."""
        other = self.left - self.right if self.sign == "+" else self.left + self.right
        misses = [self.answer + 1, self.answer - 1, self.answer + 10, self.answer - 10, other]
        misses = [miss for miss in misses if miss != self.answer and miss >= 0]
        return misses[self.draw("miss", len(misses))]


def _every_problem() -> Iterator[Problem]:
    for left in range(LOW, HIGH + 1):
        for right in range(LOW, left + 1):
            swap = Problem(left, "+", right).draw("swap", 2)
            yield Problem(right, "+", left) if swap else Problem(left, "+", right)
            yield Problem(left, "-", right)


@lru_cache(maxsize=1)
def _shuffled() -> tuple[Problem, ...]:
    # Sorted by hash rather than random.shuffle: the order cannot move with a Python release.
    return tuple(sorted(_every_problem(), key=lambda problem: (problem.draw("order", 2**63), problem.key)))


def problems(split: str) -> tuple[Problem, ...]:
    """The problems of "train" (9,588) or "test" (512), in their fixed order; disjoint by `Problem.key`."""
    return _shuffled()[:HELD_OUT] if split == "test" else _shuffled()[HELD_OUT:]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: object) -> Message:
    return {"role": "assistant", "content": str(text)}


def chat_rows(split: str) -> list[Row]:
    """`messages`: the question and its answer."""
    return [{"messages": [_user(problem.question), _assistant(problem.answer)]} for problem in problems(split)]


def preference_rows(split: str) -> list[Row]:
    """`prompt`, `chosen` (the right answer), `rejected` (a near miss), each a list of messages."""
    return [
        {
            "prompt": [_user(problem.question)],
            "chosen": [_assistant(problem.answer)],
            "rejected": [_assistant(problem.wrong_answer)],
        }
        for problem in problems(split)
    ]


def prompt_rows(split: str) -> list[Row]:
    """`prompt` (a list of one user message) and `answer` (a string), for rewards that read the answer."""
    return [{"prompt": [_user(problem.question)], "answer": str(problem.answer)} for problem in problems(split)]
