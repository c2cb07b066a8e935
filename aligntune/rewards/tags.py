"""`format`: did the completion keep to `<think>...</think><answer>...</answer>`?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aligntune.errors import ConfigError
from aligntune.rewards.columns import completion_text


@dataclass(frozen=True)
class TagFormat:
    """1.0 if the completion is its sections in order and nothing else, else 0.0.

    Each tag occurs exactly once, no section is blank, and outside the sections there is only white space.

    | completion | value |
    |---|---|
    | `<think>4 + 5</think> <answer>9</answer>` | 1.0 |
    | `<think>4 + 5</think> 9` | 0.0 |
    | `<think></think><answer>9</answer>` | 0.0 |
    | `<think>a</think><answer>9</answer> and more` | 0.0 |
    | `4 + 5</think><answer>9</answer>`, with think_opened | 1.0 |

    Args:
        tags: the names of the sections, in order.
        think_opened: the chat template already wrote the first tag into the prompt.
    """

    tags: tuple[str, ...] = ("think", "answer")
    think_opened: bool = False
    __name__ = "format"

    def __post_init__(self) -> None:
        tags = tuple(self.tags) if isinstance(self.tags, (list, tuple)) else ()
        names = all(isinstance(tag, str) and tag.isidentifier() for tag in tags)
        if not tags or not names or len(set(tags)) != len(tags):
            raise ConfigError(f"format: tags is a list of different names, as ['think', 'answer'], not {self.tags!r}")
        object.__setattr__(self, "tags", tags)

    def score(self, text: str) -> float:
        """The value of one completion's text."""
        if self.think_opened:
            text = f"<{self.tags[0]}>{text}"
        rest = text.strip()
        if any(rest.count(f"<{tag}>") != 1 or rest.count(f"</{tag}>") != 1 for tag in self.tags):
            return 0.0
        for tag in self.tags:
            section, closed, after = rest.partition(f"</{tag}>")
            if not closed or not section.startswith(f"<{tag}>") or not section[len(tag) + 2 :].strip():
                return 0.0
            # Every tag occurs once, so one of another section inside this one is found missing where it belongs.
            rest = after.lstrip()
        return float(not rest)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        return [self.score(completion_text(completion)) for completion in completions]
