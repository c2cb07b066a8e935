"""What was read, what will be trained, and what it looks like: the pre-flight report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.data.rows import BadRow

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_BAD_ROWS = 10
SHOWN_CHARACTERS = 3000  # of the decoded example
BINS = 10
BAR = 30


@dataclass(frozen=True, slots=True)
class Segment:
    """A decoded piece of the example: `title` names its sequence, `learnt` whether the loss counts it."""

    title: str
    text: str
    learnt: bool


@dataclass
class DataReport:
    """The pre-flight of one dataset; `text()`, `markdown()` and `rich()` show it.

    Args:
        source: the dataset's name.
        algorithm: what it is prepared for.
        takes: the shape that was made.
        kind: the recognised kind.
        why: what it was recognised by.
        conversion: what was done with the rows.
        template: the chat template in effect, or "" for plain text.
        rows_read: rows of the dataset that were asked for; always `rows_trained + len(bad)`.
        rows_trained: rows that are trained.
        bad: every row that is not.
        examples: rows of the prepared dataset; more than `rows_trained` where one row makes several.
        max_seq_length: the limit in tokens.
        lengths: tokens of each sequence before cutting.
        tokens: tokens that are kept.
        supervised_tokens: those that the loss counts; None where the shape has no mask.
        truncated: examples that were cut.
        end_of_turn: examples whose last learnt turn ends in its end of turn; None where the shape has no mask.
        masks: {how the learnt text was found: examples}.
        example: one decoded example with its mask.
        warnings: what should be looked at, a sentence each.
        notes: what was decided on the way.
        eval: the report on the evaluation data.
    """

    source: str
    algorithm: str
    takes: str
    kind: str
    why: str
    conversion: str
    template: str = ""
    rows_read: int = 0
    rows_trained: int = 0
    bad: list[BadRow] = field(default_factory=list)
    examples: int = 0
    max_seq_length: int = 0
    lengths: Sequence[int] = field(default=(), repr=False)
    tokens: int = 0
    supervised_tokens: int | None = None
    truncated: int = 0
    end_of_turn: int | None = None
    masks: dict[str, int] = field(default_factory=dict)
    example: list[Segment] = field(default_factory=list, repr=False)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    eval: DataReport | None = None

    @property
    def truncated_percent(self) -> float:
        """Examples that were cut, in percent."""
        return _percent(self.truncated, self.examples)

    @property
    def supervised_percent(self) -> float | None:
        """Kept tokens that the loss counts, in percent; None where the shape has no mask."""
        return None if self.supervised_tokens is None else _percent(self.supervised_tokens, self.tokens)

    @property
    def end_of_turn_percent(self) -> float | None:
        """Examples whose last end of turn is learnt, in percent; None where the shape has no mask."""
        return None if self.end_of_turn is None else _percent(self.end_of_turn, self.examples)

    def histogram(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, sequences) of up to 10 bins of equal width over the lengths in tokens."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // BINS))
        counts = [0] * -(-(high - low + 1) // width)
        for length in self.lengths:
            counts[(length - low) // width] += 1
        return [(low + i * width, min(high, low + (i + 1) * width - 1), count) for i, count in enumerate(counts)]

    def quantile(self, share: float) -> int:
        """The sequence length in tokens that `share` (0 to 1) of the sequences do not exceed."""
        ordered = sorted(self.lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON, without the single lengths."""
        return {
            "source": self.source, "algorithm": self.algorithm, "takes": self.takes, "kind": self.kind, "why": self.why,
            "conversion": self.conversion, "template": self.template, "rows_read": self.rows_read,
            "rows_trained": self.rows_trained, "rows_bad": len(self.bad), "bad": [str(row) for row in self.bad],
            "examples": self.examples, "max_seq_length": self.max_seq_length, "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens, "supervised_percent": self.supervised_percent,
            "truncated": self.truncated, "truncated_percent": self.truncated_percent,
            "end_of_turn_percent": self.end_of_turn_percent, "histogram": self.histogram(), "masks": dict(self.masks),
            "warnings": list(self.warnings), "notes": list(self.notes),
            "eval": self.eval.as_dict() if self.eval else None,
        }  # fmt: skip

    def write_bad_rows(self, path: str | Path) -> int:
        """Write every bad row, with why and the row itself, as JSON lines; returns how many."""
        bad = [*self.bad, *(self.eval.bad if self.eval else [])]
        # UTF-8 has no lone surrogate: a backslash and its number, which is how JSON escapes it.
        with Path(path).open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in bad:
                found = {"where": row.where, "field": row.field, "why": row.why, "row": row.row}
                file.write(json.dumps(found, ensure_ascii=False, default=str) + "\n")
        return len(bad)

    def text(self) -> str:
        """The report for a terminal without colour: `>` opens the lines that are learnt."""
        lines = [f"Data for {self.algorithm}: {self.source}"]
        lines += [f"  {name:<12} {value}" for name, value in self.facts()]
        lines += ["  lengths in tokens"] + [f"    {row}" for row in self._bars()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  bad row: {row}" for row in self._bad_rows()]
        if self.example:
            lines.append("  one example (lines with > are learnt):" if self._masked else "  one example:")
            lines += [f"    {mark} {line}" for mark, line in self._example_lines()]
        if self.eval:
            lines.append(self.eval.text())
        return "\n".join(lines)

    def markdown(self) -> str:
        """The report as Markdown, for `data_report.md`."""
        lines = [f"# Data for {self.algorithm}: {self.source}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in self.facts()]
        lines += ["", "## Lengths in tokens", "", "```text", *self._bars(), "```"]
        if self.warnings:
            lines += ["", "## Warnings", "", *(f"* {_cell(warning)}" for warning in self.warnings)]
        if self.bad:
            lines += ["", f"## Bad rows: {len(self.bad):,}", "", *(f"* {_cell(row)}" for row in self._bad_rows())]
        if self.example:
            fence = "`" * max(3, 1 + max(_ticks(segment.text) for segment in self.example))
            heading = "One example: lines with > are learnt" if self._masked else "One example"
            shown = [f"{mark} {line}" for mark, line in self._example_lines()]
            lines += ["", f"## {heading}", "", f"{fence}text", *shown, fence]
        if self.eval:
            lines += ["", self.eval.markdown().rstrip("\n")]
        return "\n".join(lines) + "\n"

    def rich(self) -> RenderableType:
        """The report for `rich.print`: learnt text is green, the rest dim."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Data for {self.algorithm}: {self.source}", show_header=False, title_justify="left")
        for name, value in self.facts():
            table.add_row(name, Text(str(value)))
        table.add_row("lengths", Text("\n".join(self._bars())))
        parts: list[RenderableType] = [table]
        parts += [Text(f"warning: {warning}", style="yellow") for warning in self.warnings]
        parts += [Text(f"bad row: {row}", style="red") for row in self._bad_rows()]
        if self.example:
            shown, title = Text(), ""
            for segment in _shortened(self.example):
                if segment.title != title and segment.title != "row":
                    shown.append(f"{chr(10) if title else ''}{segment.title}\n", style="bold")
                title = segment.title
                shown.append(segment.text, style="green" if segment.learnt else "dim")
            heading = "one example: green is learnt" if self._masked else "one example"
            parts.append(Panel(shown, title=heading, title_align="left"))
        if self.eval:
            parts.append(self.eval.rich())
        return Group(*parts)

    def facts(self) -> list[tuple[str, str]]:
        """The report's figures as (name, value), in the order in which they are shown."""
        found = [("recognised", f"{self.kind}: {self.why}"), ("conversion", self.conversion)]
        found += [("note", note) for note in self.notes]
        if self.template:
            found.append(("template", self.template))
        rows = f"{self.rows_read:,} read = {self.rows_trained:,} trained + {len(self.bad):,} bad"
        if self.examples != self.rows_trained:
            rows += f"; {self.examples:,} examples"
        found.append(("rows", rows))
        middle = f"median {self.quantile(0.5):,}, 95% up to {self.quantile(0.95):,}, longest {self.quantile(1.0):,}"
        found.append(("tokens", f"{self.tokens:,} ({middle}; max_seq_length {self.max_seq_length:,})"))
        found.append(("truncated", f"{self.truncated_percent:.1f}% of examples ({self.truncated:,})"))
        if self._masked:
            found.append(("supervised", f"{self.supervised_percent:.1f}% of tokens ({self.supervised_tokens:,})"))
            found.append(("end of turn", f"supervised in {self.end_of_turn_percent:.1f}% of examples"))
            found.append(("mask", ", ".join(f"{name} ({count:,})" for name, count in self.masks.items())))
        return found

    @property
    def _masked(self) -> bool:
        return self.supervised_tokens is not None

    def _bars(self) -> list[str]:
        bins = self.histogram()
        most = max((count for _, _, count in bins), default=1) or 1
        wide = max((len(str(high)) for _, high, _ in bins), default=1)
        return [f"{low:>{wide}} to {high:>{wide}} {'█' * -(-count * BAR // most):<{BAR}} {count:,}"
                for low, high, count in bins]  # fmt: skip

    def _bad_rows(self) -> list[str]:
        return listed(self.bad)

    def _example_lines(self) -> Iterator[tuple[str, str]]:
        """(mark, line): a line break inside a learnt piece starts another marked line."""
        title = ""
        for segment in _shortened(self.example):
            if segment.title != title and segment.title != "row":
                yield " ", f"[{segment.title}]"
            title = segment.title
            for line in segment.text.splitlines() or [segment.text]:
                yield (">" if segment.learnt else " "), line


def listed(bad: Sequence[BadRow]) -> list[str]:
    """The first bad rows as lines, and how many more there are."""
    lines = [str(row) for row in bad[:SHOWN_BAD_ROWS]]
    more = len(bad) - len(lines)
    return [*lines, f"... and {more:,} more"] if more else lines


def _shortened(segments: Sequence[Segment]) -> Iterator[Segment]:
    """The segments up to SHOWN_CHARACTERS; the middle of one that is too long is left out, and it is said."""
    room = max(200, SHOWN_CHARACTERS // max(1, len(segments)))
    for segment in segments:
        text = segment.text
        if len(text) > room:
            gone = len(text) - room
            text = f"{text[: room // 2]} [... {gone:,} characters not shown ...] {text[-(room - room // 2) :]}"
        yield Segment(segment.title, text, segment.learnt)


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _ticks(text: str) -> int:
    longest = run = 0
    for char in text:
        run = run + 1 if char == "`" else 0
        longest = max(longest, run)
    return longest
