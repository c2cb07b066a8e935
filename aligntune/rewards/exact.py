"""`exact_match`: is the text the reference?"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aligntune.errors import ConfigError, unknown
from aligntune.rewards.answers import final_answer
from aligntune.rewards.columns import completion_text, reference_column, references

Part = Literal["whole", "answer"]


@dataclass(frozen=True)
class ExactMatch:
    r"""1.0 if the completion is the reference, else 0.0; None where the reference is null.

    Both are compared in Unicode's composed form (NFC) with the space around them stripped, and otherwise letter by
    letter: "7" is not "7.0" or "7.".

    | reference | completion | part | value |
    |---|---|---|---|
    | `132` | `" 132\n"` | whole | 1.0 |
    | `132` | `The answer is 132` | whole | 0.0 |
    | `#### 132` | `<think>47+85</think><answer>132</answer>` | answer | 1.0 |
    | `Paris` | `paris` | whole, ignore_case | 1.0 |

    Args:
        part: "whole" compares everything that was written; "answer" compares the final answer of both sides: the last
            `<answer>`, `\boxed{}` or `####`, or without such a mark what follows the thinking.
        ignore_case: compare casefolded.
        column: the column with the reference; default: the first of `answer`, `solution`, `target` that exists.
    """

    part: Part = "whole"
    ignore_case: bool = False
    column: str | None = None
    __name__ = "exact_match"

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ConfigError(f"exact_match: {unknown('part', self.part, get_args(Part))}")

    def _form(self, text: str) -> str:
        text = unicodedata.normalize("NFC", (final_answer(text) if self.part == "answer" else text).strip())
        return text.casefold() if self.ignore_case else text

    def check_columns(self, columns: Collection[str], where: str) -> None:
        """Raise DataError where the column with the reference is not among these of `where`."""
        reference_column(columns, column=self.column, reward=self.__name__, where=where)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        accepted = references(columns, len(completions), column=self.column, reward=self.__name__)
        values: list[float | None] = []
        for completion, texts in zip(completions, accepted, strict=True):
            if texts is None:
                values.append(None)
                continue
            form = self._form(completion_text(completion))
            # An empty answer is never right, even where the reference's own extraction comes out empty.
            values.append(float(bool(form) and form in map(self._form, texts)))
        return values
