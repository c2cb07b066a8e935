"""The process in which math-verify runs: one request a line on stdin, one reply a line on stdout, both JSON.

Run as a file by `aligntune.rewards.mathematics`; it imports nothing of aligntune. SymPy can take hours or gigabytes
over an expression that a model made up (`9**9**9`), and nothing inside Python stops it: math-verify's own limit is a
SIGALRM, which works in a main thread only and is not seen while one long C operation runs. So the limits here are the
operating system's: this process is killed when it has used up its CPU time for one request (CPU time, so that a busy
machine does not change the grade), and an allocation beyond the memory limit fails.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from decimal import Decimal
from typing import Any

NUMBER = re.compile(r"\$?\s*[+-]?\s*\$?\s*(\d{1,3}( \d{3})+|\d[\d,]*)?(\.\d*)?\s*\\?%?\s*\.?")
UNIT = re.compile(r"(?<=[\d.])\s+(?!pi\b)[^\W\d_]{2,}( [^\W\d_]{2,})*\.?")  # the words of "18 US dollars"
NOT_ONE_NUMBER = re.compile(r"\d\.\d+\.\d|\d_\d")  # 1.000.000 would be read as a product
SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d+)?[eE][+-]?\d{1,3}")
MINUS_SIGNS = str.maketrans("\u2212\u2013\uff0d", "---")


def parse_isolated(text: str) -> list[Any]:
    """SymPy forms of a text that is nothing but an answer; [] where it is not mathematics."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    text = text.translate(MINUS_SIGNS).strip()
    if SCIENTIFIC.fullmatch(text):  # math-verify reads 1e5 as 1
        text = format(Decimal(text), "f")
    if NOT_ONE_NUMBER.search(text):
        return []
    unit = UNIT.search(text)
    value = text[: unit.start()] if unit and unit.end() == len(text) else text
    if NUMBER.fullmatch(value) and any(map(str.isdigit, value)):
        value = re.sub(r"[$\s\\,]", "", value).rstrip(".").lstrip("+")
        percent = "%" if unit and unit.group().strip(" .").lower() == "percent" else ""
        return parse(value + percent, [ExprExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    if "$" not in text and "\\(" not in text and "\\[" not in text:
        # As LaTeX, whole: the plain-text patterns would read `2x + 1` as the number 2.
        text = f"\\boxed{{{text}}}"
    return parse(text, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def parse_prose(text: str) -> list[Any]:
    """SymPy forms of the answer that math-verify finds in a text without a mark."""
    from math_verify import parse

    return parse(text.translate(MINUS_SIGNS), fallback_mode="no_fallback", parsing_timeout=None)


def grade(gold: str, text: str, isolated: bool) -> bool | None:
    """Whether `text` means `gold`; None if `gold` cannot be read as mathematics."""
    from math_verify import verify

    expected = parse_isolated(gold)
    if not expected:
        return None
    found = parse_isolated(text) if isolated else parse_prose(text)
    return bool(found) and bool(verify(expected, found, timeout_seconds=None))


def main(cpu_seconds: float, memory_bytes: int) -> None:
    # Whatever a library prints must not land between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the trainer decides when we end
    logging.disable(logging.CRITICAL)
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        replies.write(json.dumps({"error": str(error)}) + "\n")
        replies.flush()
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    replies.write(json.dumps({"ready": True}) + "\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF's default action ends the process
        try:
            result = grade(**request)
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            result = False  # math-verify's parsers fail in many ways on what is not mathematics
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps({"same": result}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
