"""`guard`: a reward function that goes wrong is named, with the row it went wrong on."""

from __future__ import annotations

import decimal
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any

from aligntune.errors import AlignTuneError, ConfigError, DataError, NonFiniteError, RewardError, nearest
from aligntune.rewards.columns import completion_text, prompt_text, shown

RewardFunction = Callable[..., Any]


class _Naming:
    """Context in which an exception of the user's code becomes a `RewardError` that says whose it is.

    A context manager rather than `except Exception`, so that Ctrl-C and aligntune's own errors pass untouched.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, AlignTuneError):
            raise RewardError(f"{self.message} raised {type(error).__name__}: {error}") from error


def _text(value: Any, read: Callable[[Any], str]) -> str:
    try:
        return read(value)
    except DataError:
        return repr(value)


def _row(row: int, prompts: list[Any], completions: list[Any]) -> str:
    return (
        f"row {row} of the batch of {len(completions)} (prompt {shown(_text(prompts[row], prompt_text))}, "
        f"completion {shown(_text(completions[row], completion_text))})"
    )


def _single(row: int, count: int, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for one row; what is not one value a row (the trainer's state, say) goes through as it is."""
    return {
        name: value[row : row + 1] if isinstance(value, (list, tuple)) and len(value) == count else value
        for name, value in columns.items()
    }


def _number(value: Any) -> float | None:
    """`value` as a float; None if it is no number."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a 0-d tensor or array
        value = value.item()
    return float(value) if isinstance(value, (numbers.Real, decimal.Decimal)) else None


def _checked(values: Any, name: str, prompts: list[Any], completions: list[Any]) -> list[float | None]:
    """`values` as a list of floats and Nones, one a completion."""
    if hasattr(values, "tolist"):  # a tensor or array
        values = values.tolist()
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise RewardError(
            f"reward {name!r} returned a {type(values).__name__}; it must return a list of {len(completions)} numbers "
            "(or None for a row it does not apply to), one a completion"
        )
    values = list(values)
    if len(values) != len(completions):
        raise RewardError(f"reward {name!r} returned {len(values)} values for {len(completions)} completions")
    checked: list[float | None] = []
    for row, value in enumerate(values):
        number = None if value is None else _number(value)
        if value is not None and number is None:
            raise RewardError(
                f"reward {name!r} returned {shown(repr(value))}, which is not a number, "
                f"for {_row(row, prompts, completions)}"
            )
        if number is not None and not math.isfinite(number):
            raise NonFiniteError(f"reward {name!r} returned {number} for {_row(row, prompts, completions)}")
        checked.append(number)
    return checked


def is_module(value: object) -> bool:
    """Whether `value` is a torch module (a reward model), asked without importing torch."""
    return any(kind.__module__.startswith("torch.nn.") and kind.__name__ == "Module" for kind in type(value).__mro__)


def function_name(function: Any) -> str:
    """The name a reward is logged under: `__name__`, of a partial the wrapped function's, else the class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def is_async(function: Any) -> bool:
    """Whether calling `function` gives a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


HANDED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL's trainers call every reward with, beside the columns of the rows."""


def _by_keyword(function: Any) -> tuple[dict[str, bool], bool] | None:
    """(names that `function` takes by keyword, whether each is required; whether it takes any other); None: unknown."""
    try:
        # Of a decorated function it is the decorator's that is called.
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return None  # some builtins have no signature
    named = {one.name: one.default is one.empty for one in parameters
             if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return named, any(one.kind is one.VAR_KEYWORD for one in parameters)


def _callable_as_reward(function: Any, label: str) -> None:
    """That `function` takes what every reward is called with, all of it by keyword.

    Raises:
        ConfigError: it lacks one of them; says how it is called.
    """
    named, any_other = _by_keyword(function) or ({}, True)
    missing = [] if any_other else [name for name in HANDED if name not in named]
    if missing:
        raise ConfigError(f"reward {label!r} does not take {', '.join(missing)}: it is called with "
                          f"{', '.join(HANDED)} and the columns of the rows, all by keyword; end its parameters with "
                          "**columns")


def column_faults(guarded: RewardFunction, columns: Collection[str], where: str) -> list[str]:
    """What a guarded reward asks of the columns that it is handed from `where`, and does not get; a line each."""
    label, function = guarded.__name__, guarded.__wrapped__  # type: ignore[attr-defined]
    named, any_other = _by_keyword(function) or ({}, True)
    there = f"its columns: {', '.join(sorted(columns)) or 'none beside the prompt'}"
    faults = []
    for name, required in named.items():
        if required and name not in columns and name not in HANDED:
            close = nearest(name, columns)
            faults.append(f"reward {label!r} needs the column {name!r}, which {where} does not hand to rewards; {there}"
                          + (f"; did you mean {close!r}?" if close else ""))
    refused = [] if any_other else sorted(name for name in columns if name not in named)
    if refused:
        faults.append(f"reward {label!r} does not take {', '.join(refused)} of {where}, which every reward is handed; "
                      "end its parameters with **columns")
    own = getattr(function, "check_columns", None)
    if own is not None:
        try:
            own(columns, where)
        except DataError as error:
            faults.append(str(error))
    return faults


def guard(function: RewardFunction, name: str | None = None) -> RewardFunction:
    """`function` with its failures named: the same values, as a list of floats and Nones, or a typed error.

    If the function raises, it is called again with one row at a time, to find the row. The result has the name of the
    function as `__name__`, is a coroutine function if `function` is one, and holds `function` as `__wrapped__`.

    Args:
        function: f(prompts, completions, completion_ids, **columns) -> one number or None a completion.
        name: the name for messages and logs; default: the function's own.

    Raises:
        ConfigError: the function cannot be called in this way.

    Raises (when called):
        RewardError: the function raised, or returned something other than one number or None a completion.
        NonFiniteError: a value is NaN or infinite.
    """
    label = name or function_name(function)
    _callable_as_reward(function, label)

    def rows(
        prompts: list[Any], completions: list[Any], columns: dict[str, Any]
    ) -> Iterable[tuple[_Naming, dict[str, Any]]]:
        arguments = {"prompts": prompts, "completions": completions, **columns}
        for row in range(len(completions)):
            naming = _Naming(f"reward {label!r}, {_row(row, prompts, completions)},")
            yield naming, _single(row, len(completions), arguments)

    def call(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            with _Naming(f"reward {label!r}"):
                values = function(prompts=prompts, completions=completions, **columns)
        except RewardError:
            for naming, arguments in rows(prompts, completions, columns):
                with naming:
                    function(**arguments)
            raise  # it fails on the batch only
        return _checked(values, label, prompts, completions)

    async def call_async(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            with _Naming(f"reward {label!r}"):
                values = await function(prompts=prompts, completions=completions, **columns)
        except RewardError:
            for naming, arguments in rows(prompts, completions, columns):
                with naming:
                    await function(**arguments)
            raise
        return _checked(values, label, prompts, completions)

    guarded: Any = call_async if is_async(function) else call
    guarded.__name__ = guarded.__qualname__ = label
    guarded.__doc__ = getattr(function, "__doc__", None)
    guarded.__wrapped__ = function
    return guarded
