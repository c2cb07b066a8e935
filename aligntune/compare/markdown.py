"""report.md: the verdict, what was found, and every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.compare.tables import Table, tables


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    a, b = report["arms"]["a"]["label"], report["arms"]["b"]["label"]
    parts = [f"# {b} against {a}", f"**{_escape(report['verdict'])}**",
             f"{report['algorithm']}, {_escape(report['recipe'])}, {report['created']}"]
    said = [f"* {one['severity']}: {_escape(one['text'])}" for one in report["findings"]]
    said += [f"* assertion {'holds' if one['holds'] else 'FAILED'}: {_escape(one['text'])} ({one['found']})"
             for one in report["assertions"]]
    baseline = report["baseline"]
    if baseline:
        said += [f"* worse than the baseline: {text}" for text in baseline["worse"]]
        said.append(f"* baseline of {baseline['created']}: {_escape(baseline['verdict'])}")
    if said:
        parts.append("\n".join(said))
    for table in tables(report):
        parts.append(f"## {table.title}")
        parts.append(_table(table))
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_escape(cell) for cell in cells) + " |"

    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *map(line, table.rows)])


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
