"""The options for people and tools, from the dataclasses that define them: text, Markdown, JSON schema."""

from __future__ import annotations

import json
import textwrap
import types
from typing import Any

from aligntune.algorithms import ALGORITHMS
from aligntune.core.config import YAML_ORDER
from aligntune.core.options import OptionInfo, infos
from aligntune.core.resolve import option_table, takers


def sections(algorithm: str | None = None) -> dict[str, list[OptionInfo]]:
    """The options by section, "" first; those that `algorithm` takes, with its own defaults.

    Without an algorithm the `loss` section is left out: each algorithm has its own.

    Raises:
        ConfigError: no such algorithm; names the nearest.
    """
    name = ALGORITHMS.resolve(algorithm) if algorithm else None
    found: dict[str, list[OptionInfo]] = {section: [] for section in ("", *YAML_ORDER)}
    for row in option_table(name).values():
        if name or row.section != "loss":
            found[row.section].append(row)
    return {section: rows for section, rows in found.items() if rows}


def default(row: OptionInfo, algorithm: str | None) -> Any:
    """The option's default: the algorithm's, where it has one of its own."""
    return ALGORITHMS.load(algorithm).defaults.get(row.name, row.default) if algorithm else row.default


def _note(row: OptionInfo, algorithm: str | None) -> str:
    """Which algorithms take the option, where not all of them do."""
    if algorithm or row.section == "loss":
        return ""
    names = takers(row.name)
    return "" if len(names) == len(ALGORITHMS) else f" Only {', '.join(names)}."


def text(algorithm: str | None = None, width: int = 96) -> str:
    """The options as indented text."""
    lines = []
    for section, rows in _with_losses(algorithm).items():
        lines.append(section or "(top level)")
        for row in rows:
            lines.append(f"  {row.name} = {_literal(default(row, algorithm))}")
            words = f"{row.help} Takes {row.allowed()}.{_note(row, algorithm)}"
            lines.append(textwrap.fill(words, width, initial_indent="      ", subsequent_indent="      "))
        lines.append("")
    return "\n".join(lines).rstrip()


def markdown(algorithm: str | None = None) -> str:
    """The options as one Markdown table a section."""
    parts = []
    for section, rows in _with_losses(algorithm).items():
        lines = [f"### {section or 'Top level'}", "", "| option | default | meaning | takes |", "|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.name}`", f"`{_literal(default(row, algorithm))}`", row.help + _note(row, algorithm),
                     row.allowed())
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _with_losses(algorithm: str | None) -> dict[str, list[OptionInfo]]:
    found = sections(algorithm)
    if algorithm is None:
        for name in ALGORITHMS.names():
            found[f"loss ({name})"] = infos(ALGORITHMS.load(name).options, "loss")
    return found


def _literal(value: Any) -> str:
    """A default as it is written in YAML."""
    return json.dumps(value) if not isinstance(value, str) else value


def json_schema(algorithm: str | None = None) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config in sections; of one without an algorithm, `loss` is free."""
    properties: dict[str, Any] = {}
    for section, rows in sections(algorithm).items():
        entries = {row.name: _schema(row, default(row, algorithm)) for row in rows}
        if section:
            properties[section] = {"type": "object", "additionalProperties": False, "properties": entries}
        else:
            properties |= entries
    if algorithm is None:
        properties["loss"] = {"type": "object"}
        properties["algorithm"] = {"enum": ALGORITHMS.names(), "description": properties["algorithm"]["description"]}
    else:
        properties["algorithm"] = {"const": ALGORITHMS.resolve(algorithm)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"aligntune {algorithm or 'config'}", "type": "object", "additionalProperties": False,
        "properties": properties,
    }


_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
          types.NoneType: "null"}


def _schema(row: OptionInfo, value: Any) -> dict[str, Any]:
    kinds = [kind for kind in row.kinds if kind in _TYPES and not (kind is int and float in row.kinds)]
    forms = [_form(row, kind) for kind in kinds]
    schema: dict[str, Any] = {"description": row.help, "default": value}
    return {**schema, **(forms[0] if len(forms) == 1 else {"anyOf": forms} if forms else {})}


def _form(row: OptionInfo, kind: type) -> dict[str, Any]:
    form: dict[str, Any] = {"type": _TYPES[kind]}
    bounds = {"minimum": row.ge, "exclusiveMinimum": row.gt, "maximum": row.le, "exclusiveMaximum": row.lt}
    if row.filled and kind in (str, list):
        form["minLength" if kind is str else "minItems"] = 1
    if kind in (int, float):
        form |= {name: bound for name, bound in bounds.items() if bound is not None}
    elif kind is str and row.choices:
        form = {"enum": [choice for choice in row.choices if isinstance(choice, str)]}
    elif kind is list and row.item in _TYPES:
        form["items"] = {"type": _TYPES[row.item]} | ({"minLength": 1} if row.filled else {})
        if row.item is str and row.choices:
            form["items"] = {"enum": list(row.choices)}
    return form
