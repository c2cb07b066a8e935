"""Sums of numbers from 0 to 99: a small model learns them in a minute or two, and a grade is exact.

There are 5,050 problems, since the order of a and b does not make another one; each is asked in both orders. A
problem's place is decided by a hash of the problem alone, so the lists are the same on every machine and Python
version, and no held-out problem is in the training list in either order.

One phrasing and one operation on purpose: with more of either the embedded model needs about twice the steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

DESCRIPTION = "Sums of numbers from 0 to 99"
SEED = 20250
LOW, HIGH = 0, 99  # operands
HELD_OUT = 256  # problems; two rows each, where a is not b

Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One problem, in the order in which it is asked."""

    left: int
    right: int

    @property
    def answer(self) -> int:
        return self.left + self.right

    @property
    def key(self) -> str:
        """The same for `3 + 4` and `4 + 3`."""
        first, second = sorted((self.left, self.right))
        return f"{first}+{second}"

    def draw(self, what: str, choices: int) -> int:
        """A number in 0 .. choices-1 that depends on nothing but the problem, the seed and `what`."""
        digest = hashlib.sha256(f"{SEED}:{what}:{self.key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % choices

    @property
    def question(self) -> str:
        return f"What is {self.left} + {self.right}?"

    @property
    def wrong_answer(self) -> int:
        """A near miss: one off, or ten off (a lost carry)."""
        misses = [self.answer + 1, self.answer - 1, self.answer + 10, self.answer - 10]
        misses = [miss for miss in misses if miss >= 0]
        return misses[self.draw("miss", len(misses))]


@lru_cache(maxsize=2)
def problems(split: str) -> tuple[Problem, ...]:
    """The rows of "train" (9,490) or "test" (510), in their fixed order; disjoint by `Problem.key`."""
    pairs = [Problem(left, right) for left in range(LOW, HIGH + 1) for right in range(LOW, left + 1)]
    # Sorted by hash rather than random.shuffle: the order cannot move with a Python release.
    pairs.sort(key=lambda problem: (problem.draw("order", 2**63), problem.key))
    chosen = pairs[:HELD_OUT] if split == "test" else pairs[HELD_OUT:]
    rows = [row for pair in chosen for row in {pair, Problem(pair.right, pair.left)}]
    return tuple(sorted(rows, key=lambda row: (row.draw(f"place {row.left}", 2**63), row.left)))


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


SENTENCES = ("It is {}.", "The answer is {}.", "I think that is {}, but I am not sure.")


def brief_rows(split: str) -> list[Row]:
    """`prompt`, `chosen` (the bare answer), `rejected` (the same number in a sentence): a taste, which a small reward
    model learns in seconds where telling right from nearly right takes it far longer."""
    return [
        {
            "prompt": [_user(problem.question)],
            "chosen": [_assistant(problem.answer)],
            "rejected": [_assistant(SENTENCES[problem.draw("sentence", len(SENTENCES))].format(problem.answer))],
        }
        for problem in problems(split)
    ]


def prompt_rows(split: str) -> list[Row]:
    """`prompt` (a list of one user message) and `answer` (a string), for rewards that read the answer."""
    return [{"prompt": [_user(problem.question)], "answer": str(problem.answer)} for problem in problems(split)]
