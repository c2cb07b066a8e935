"""What an option is: a dataclass field with its meaning, its range and the algorithms that take it.

The config dataclasses are the one table of options. Everything else is derived from it: the validator, the flat
names, `help()`, the documentation pages, the JSON schema.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal


class Unset:
    """The type of `UNSET`, the default of every factory argument: an explicit 4 is not "the default 4"."""

    _instance: Unset | None = None

    def __new__(cls) -> Unset:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "UNSET"  # pickles and copies to the one instance


UNSET: Final = Unset()

Audience = Literal["all", "offline", "online", "sft"]


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    objects: str | None = None,
    infinite: bool = False,
    filled: bool = False,
    audience: Audience = "all",
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: its documented default; mutable ones are copied for each config.
        help: one or two sentences for people, with the unit.
        choices: the allowed values of a string option (numbers of a `str | float` option stay free).
        ge, gt, le, lt: the range of a number (each item's, for a list of numbers).
        objects: the noun for Python objects that are accepted beside plain values ("a datasets.Dataset"), or None.
        infinite: whether +inf is a valid number.
        filled: whether a string, and a list, has to hold something.
        audience: the kind of algorithm that has this option.
    """
    metadata = {
        "help": help, "choices": choices, "ge": ge, "gt": gt, "le": le, "lt": lt, "objects": objects,
        "infinite": infinite, "filled": filled, "audience": audience,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class OptionInfo:
    """One option as the validator and the documentation see it; `section` is "" for the top-level scalars."""

    name: str
    section: str
    type: Any
    default: Any
    help: str
    choices: tuple[Any, ...] | None
    ge: float | None
    gt: float | None
    le: float | None
    lt: float | None
    objects: str | None
    infinite: bool
    filled: bool
    audience: Audience

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def kinds(self) -> tuple[type, ...]:
        """The plain Python types that the option takes; `NoneType` among them where null is allowed."""
        members = typing.get_args(self.type) if _is_union(self.type) else (self.type,)
        return tuple(typing.get_origin(member) or member for member in members)

    @property
    def item(self) -> Any:
        """The type of a list option's items (`Any` where they are free)."""
        for member in typing.get_args(self.type) if _is_union(self.type) else (self.type,):
            if typing.get_origin(member) is list:
                return typing.get_args(member)[0]
        return Any

    def allowed(self) -> str:
        """What the option takes, in words: "an integer >= 1 or null"."""
        words = []
        for kind in self.kinds:
            if kind is str and self.choices:
                words.append("one of " + ", ".join(repr(c) for c in self.choices if isinstance(c, str)))
            elif kind in (int, float):
                if kind is int and float in self.kinds:
                    continue
                words.append({int: "an integer", float: "a number"}[kind] + self._range())
            elif kind is list:
                items = {str: " of strings", float: " of numbers" + self._range(), int: " of integers"}
                items = {str: " of non-empty strings"} if self.filled else items
                words.append(("a non-empty list" if self.filled else "a list") + items.get(self.item, ""))
            elif kind is str and self.filled:
                words.append("a non-empty string")
            else:
                words.append({bool: "true or false", str: "a string", dict: "a mapping", types.NoneType: "null"}
                             .get(kind, "any value"))
        if self.objects:
            words.append(self.objects)
        return " or ".join(words)

    def _range(self) -> str:
        bounds = [f"{sign} {bound:g}" for sign, bound in
                  ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)) if bound is not None]
        return " " + " and ".join(bounds) if bounds else ""

    def check(self, value: Any) -> tuple[Any, str | None]:
        """`(value, None)` where `value` is valid (an int for a float option becomes a float), else `(value, fault)`."""
        kinds = self.kinds
        if Any in kinds or (value is None and types.NoneType in kinds):
            return value, None
        if isinstance(value, bool):
            return (value, None) if bool in kinds else (value, self._fault(value))
        if isinstance(value, (int, float)) and (int in kinds or float in kinds):
            if float in kinds:
                value = float(value)
            elif isinstance(value, float):
                return value, self._fault(value)
            return value, self._number_fault(value)
        if self.filled and isinstance(value, str | list | tuple) and not (
                value and all(isinstance(item, str) and item for item in value)):
            return value, self._fault(value)
        if isinstance(value, str) and str in kinds:
            if self.choices and value not in self.choices:
                from aligntune.errors import nearest

                close = nearest(value, [c for c in self.choices if isinstance(c, str)])
                return value, self._fault(value) + (f"; did you mean {close!r}?" if close else "")
            return value, None
        if isinstance(value, (list, tuple)) and list in kinds:
            return self._check_list(list(value))
        if isinstance(value, dict) and dict in kinds:
            return value, None
        return value, self._fault(value)

    def _check_list(self, values: list[Any]) -> tuple[Any, str | None]:
        item = self.item
        for index, value in enumerate(values):
            if item is str and (not isinstance(value, str) or (self.choices and value not in self.choices)):
                wanted = "one of " + ", ".join(map(repr, self.choices)) if self.choices else "a string"
                return values, f"{self.path}[{index}] = {value!r}: must be {wanted}"
            if item in (int, float):
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    return values, f"{self.path}[{index}] = {value!r}: a number is wanted"
                fault = self._number_fault(value)
                if fault:
                    return values, fault
        return values, None

    def _number_fault(self, value: float) -> str | None:
        finite = math.isfinite(value) or (self.infinite and value == math.inf)
        inside = (
            (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        )
        return None if finite and inside else self._fault(value)

    def _fault(self, value: Any) -> str:
        text = f"{self.path} = {value!r}: must be {self.allowed()}"
        if isinstance(value, str) and {int, float, bool} & set(self.kinds) and _looks_like_a_number(value):
            text += f" (write {value.strip()} without quotes)"
        return text


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _looks_like_a_number(text: str) -> bool:
    if text.strip().lower() in ("true", "false"):
        return True
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def infos(cls: type, section: str) -> list[OptionInfo]:
    """The options of the dataclass `cls`, which forms the YAML section `section`."""
    hints = typing.get_type_hints(cls)
    rows = []
    for item in dataclasses.fields(cls):
        default = item.default
        if default is dataclasses.MISSING:
            default = item.default_factory() if item.default_factory is not dataclasses.MISSING else None
        rows.append(OptionInfo(item.name, section, hints[item.name], default, **item.metadata))
    return rows


def describe(rows: Iterable[OptionInfo], width: int = 96) -> str:
    """The options as indented text, for docstrings: name, default, meaning, what is allowed."""
    import textwrap

    lines = []
    for row in rows:
        lines.append(f"    {row.name} (default {row.default!r})")
        text = f"{row.help} Takes {row.allowed()}."
        lines.append(textwrap.fill(text, width, initial_indent="        ", subsequent_indent="        "))
    return "\n".join(lines)
