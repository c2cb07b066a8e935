"""Where the final answer stands in a completion."""

from __future__ import annotations

import re

THINK_END = "</think>"
HASHES = "####"  # GSM8K marks its answers so
_BRACES = re.compile(r"\\+boxed\{|\\.|[{}]", re.DOTALL)


def without_thinking(text: str) -> str | None:
    """What follows the last `</think>`; the whole text if there is no thinking; None if thinking was never closed.

    The opening tag need not be there: some chat templates write it into the prompt.
    """
    _, closed, rest = text.rpartition(THINK_END)
    if "<think>" in rest:
        return None
    return rest if closed else text


def last_tag(text: str, tag: str = "answer") -> str | None:
    """The content of the last closed `<tag>...</tag>`, or None; of nested ones, the innermost."""
    end = text.rfind(f"</{tag}>")
    if end < 0:
        return None
    start = text.rfind(f"<{tag}>", 0, end)
    return None if start < 0 else text[start + len(tag) + 2 : end]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces close, or None; `\{` and `\}` do not count as braces.

    One pass over the text, whatever is in it: a model can emit thousands of boxes that it never closes.
    """
    opened: list[tuple[int, bool]] = []  # where the content of each open brace begins, and whether it is a box's
    found = (-1, -1)
    for match in _BRACES.finditer(text):
        if match[0] == "{" or match[0].endswith("boxed{"):
            opened.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            begin, box = opened.pop()
            if box and begin > found[0]:
                found = (begin, match.start())
    return text[slice(*found)] if found[0] >= 0 else None


def marked_answer(text: str) -> str | None:
    r"""The final answer, if the text marks one: `<answer>` (and a box inside it), `\boxed{}`, then `####`.

    The last mark of a kind counts, so a completion that lists every candidate gains nothing. Thinking is not read:
    an answer that was only thought was not given.

    >>> marked_answer(r"<think>\boxed{3}?</think> So \boxed{4}.")
    '4'
    >>> marked_answer("She has 6 * 7 = 42 eggs.\n#### 42")
    '42'
    """
    rest = without_thinking(text)
    if rest is None:
        return None
    tagged = last_tag(rest)
    if tagged is not None:
        boxed = last_boxed(tagged)
        return (tagged if boxed is None else boxed).strip()
    boxed = last_boxed(rest)
    if boxed is not None:
        return boxed.strip()
    _, hashes, tail = rest.rpartition(HASHES)
    return (tail.strip().splitlines() or [""])[0].strip() if hashes else None


def final_answer(text: str) -> str:
    """`marked_answer`, or where nothing is marked all that was written after the thinking; "" if there is no answer."""
    marked = marked_answer(text)
    return (without_thinking(text) or "").strip() if marked is None else marked
