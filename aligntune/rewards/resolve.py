"""From what a user wrote under `reward_functions` to the functions and weights that a trainer takes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from aligntune.core.registry import Registry
from aligntune.errors import ConfigError, DataError, unknown
from aligntune.rewards.guard import HANDED, RewardFunction, column_faults, function_name, guard, is_async, is_module

REWARDS: Registry[Any] = Registry("reward")
REWARDS.register(
    "exact_match", "aligntune.rewards.exact:ExactMatch",
    summary="1 if the completion is the reference, letter by letter",
)
REWARDS.register(
    "math", "aligntune.rewards.mathematics:MathVerify", aliases=("math_verify",), install="pip install math-verify",
    summary="1 if the answer equals the reference as mathematics (math-verify)",
)
REWARDS.register(
    "format", "aligntune.rewards.tags:TagFormat",
    summary="1 if the completion is <think>...</think><answer>...</answer>",
)

_KEYS = ("name", "weight", "options")


def register(
    name: str, function: Any = None, *, aliases: tuple[str, ...] = (), summary: str = "", replace: bool = False
) -> Any:
    """Give a reward a name, so that `reward_functions=["my_reward"]` and YAML can use it. Also a decorator.

    >>> @register("shorter")
    ... def shorter(prompts, completions, **columns):
    ...     return [-len(completion) / 1000 for completion in completions]

    Args:
        name: the name; letter case and `-` for `_` do not matter when it is looked up.
        function: f(prompts, completions, completion_ids, **columns) -> one number or None a completion; or a class
            whose instances are such functions (the options go to its constructor); or "package.module:attribute" of
            either.
        aliases: other names for it.
        summary: one line for people.
        replace: take over a name that exists.

    Raises:
        ConfigError: the name is taken, or what was given can never be called.
    """
    if function is None:
        return functools.partial(register, name, aliases=aliases, summary=summary, replace=replace)
    if not callable(function) and not (isinstance(function, str) and ":" in function):
        raise ConfigError(f"reward {name!r}: expected a callable or 'package.module:attribute', got {function!r}")
    REWARDS.register(name, function, aliases=aliases, summary=summary, replace=replace)
    return function


def _attribute(target: str) -> Any:
    """The object behind "package.module:attribute" or "path/to/file.py:attribute"."""
    source, _, attribute = target.rpartition(":")
    try:
        if source.endswith(".py"):
            path = Path(source).expanduser().resolve()
            if not path.is_file():
                raise ConfigError(f"reward {target!r}: there is no file {source}")
            spec = importlib.util.spec_from_file_location(f"aligntune_rewards_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except ImportError as error:
        raise ConfigError(f"reward {target!r}: cannot import {source!r}: {error}") from error
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"reward {target!r}: {source}: {unknown('attribute', attribute, public)}")
    return getattr(module, attribute)


def _with_options(target: Any, name: str, options: Mapping[str, Any], build: bool) -> RewardFunction:
    """`target` with `options`: a class is built with them, if it is to be; a function gets them as keywords."""
    parameters = inspect.signature(target).parameters.values() if options else ()
    taken = [
        parameter.name for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in ("prompts", "completions", "completion_ids")
    ]
    faults = [
        f"reward {name!r}: {unknown('option', option, taken) if taken else f'it takes no options, got {option!r}'}"
        for option in options if option not in taken
    ]
    if faults:
        raise ConfigError.from_faults(faults, "the options of a reward")
    if isinstance(target, type):
        ours = target.__module__.partition(".")[0] == __name__.partition(".")[0]  # those load nothing
        return target(**options) if build or ours else target
    return _bound(target, dict(options)) if options else target


def _bound(function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    # Not functools.partial: a dataset column of the same name would override an option of the user's, in silence.
    def call(**arguments: Any) -> Any:
        return function(**{**arguments, **options})

    async def call_async(**arguments: Any) -> Any:
        return await function(**{**arguments, **options})

    bound: Any = call_async if is_async(function) else call
    with contextlib.suppress(ValueError):  # of a decorator's own function that does not name the option
        bound.__signature__ = inspect.signature(functools.partial(function, **options), follow_wrapped=False)
    return bound


def get_reward(name: str, **options: Any) -> RewardFunction:
    """The reward with this name, as a function in TRL's form, not yet guarded.

    Args:
        name: a registered name, or "package.module:attribute" or "path/to/file.py:attribute".
        options: what the reward documents as its `Args`.

    Raises:
        ConfigError: no such reward (names all) or option.
    """
    return _named(name, options, build=True)[0]


def _weight(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where}: a weight is a finite number, not {value!r}")
    return float(value)


def _one(entry: Any, build: bool) -> tuple[RewardFunction, str, float | None]:
    """(function, name, weight) of one entry; the weight is None where the entry gives none."""
    if isinstance(entry, Mapping):
        faults = [unknown("key", key, _KEYS) for key in entry if key not in _KEYS]
        if "name" not in entry:
            faults.append("the key 'name' is missing")
        if not isinstance(entry.get("options") or {}, Mapping):
            faults.append(f"options is a table of names and values, not {entry['options']!r}")
        if faults:
            raise ConfigError.from_faults([f"reward {dict(entry)!r}: {fault}" for fault in faults], "a reward")
        options = {str(key): value for key, value in (entry.get("options") or {}).items()}
        weight = None if entry.get("weight") is None else _weight(entry["weight"], f"reward {entry['name']!r}")
        inner = entry["name"]
        if callable(inner):
            return _with_options(inner, function_name(inner), options, build), function_name(inner), weight
        return *_named(inner, options, build), weight
    if callable(entry):
        return _with_options(entry, function_name(entry), {}, build), function_name(entry), None
    return *_named(entry, {}, build), None


def _named(name: Any, options: Mapping[str, Any], build: bool) -> tuple[RewardFunction, str]:
    if not isinstance(name, str):
        raise ConfigError(
            f"reward {name!r}: expected a name, a callable or a table with {', '.join(_KEYS)}; "
            f"names: {', '.join(sorted(REWARDS.names()))}"
        )
    if ":" in name and name not in REWARDS:
        target, label = _attribute(name), name.rpartition(":")[2]
        if not callable(target):
            raise ConfigError(f"reward {name!r} is a {type(target).__name__}, which cannot be called")
    else:
        label = REWARDS.resolve(name)
        target = REWARDS.load(label)
    return _with_options(target, label, options, build), label


def resolve_rewards(
    spec: Any, weights: Sequence[float] | None = None, *, build: bool = True
) -> tuple[list[RewardFunction], list[float]]:
    """The guarded functions and their weights, in order.

    Args:
        spec: a name, a callable, a table {name, weight, options}, or a list of these, mixed. None gives two empty
            lists (a reward model may be all there is). A torch module is a reward model and passes unguarded.
        weights: one a reward; default: the tables' own, else 1.
        build: False checks all of it and builds no class, which may load a model: the result is not to be called.

    Returns:
        Functions in TRL's form with `__name__` set for the logs (a second `math` is `math_2`), and their weights.

    Raises:
        ConfigError: unknown names or options, a function that cannot be called as a reward, a weight that is no finite
            number, the wrong number of weights, weights given in both places. All faults at once.
    """
    if spec is None:
        spec = []
    elif not isinstance(spec, (list, tuple)):
        spec = [spec]
    functions: list[RewardFunction] = []
    own: list[float | None] = []
    faults: list[str] = []
    counts: dict[str, int] = {}
    for entry in spec:
        try:
            function, name, weight = _one(entry, build)
            counts[name] = counts.get(name, 0) + 1
            label = name if counts[name] == 1 else f"{name}_{counts[name]}"
            if isinstance(function, type):  # not built: what would be called is looked at
                takes_self = inspect.isfunction(inspect.getattr_static(function, "__call__"))
                call = function.__call__
                function = functools.partial(call, None) if takes_self else call
            functions.append(function if is_module(function) else guard(function, label))
        except ConfigError as error:
            faults.extend(error.faults or [str(error)])
            continue
        own.append(weight)
    faults += _weight_faults(weights, len(spec), any(weight is not None for weight in own))
    if faults:
        raise ConfigError.from_faults(faults, "the rewards")
    given = own if weights is None else list(weights)
    return functions, [1.0 if weight is None else float(weight) for weight in given]


def check_columns(functions: Sequence[RewardFunction], columns: Collection[str], where: str = "the dataset") -> None:
    """That each reward can be called with these columns of `where`, which are all that it will be handed.

    Args:
        functions: as `resolve_rewards` gives them, built or not.
        columns: names; `prompt` is not among them, for rewards get it as `prompts`.

    Raises:
        DataError: a parameter without a default has no column, or a column no parameter, or a column a name that the
            trainer hands its own values by. All faults at once, with the columns that there are.
    """
    called = [function for function in functions if not is_module(function)]
    taken = sorted({*columns} & {*HANDED} - {"completion_ids"}) if called else []  # that column is not handed on
    faults = [f"{where} has a column {name!r}, and rewards are handed something else by that name: rename it"
              for name in taken]
    faults += [fault for function in called
               for fault in column_faults(function, columns, where)]
    if faults:
        raise DataError("\n".join(faults))


def _weight_faults(weights: Sequence[float] | None, count: int, own: bool) -> list[str]:
    if weights is None:
        return []
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        return [f"reward_function_weights: a list of {count} numbers, not {weights!r}"]
    faults = []
    if len(weights) != count:
        faults.append(f"reward_function_weights: {len(weights)} weights for {count} rewards")
    if own:
        faults.append("reward_function_weights: the rewards' own tables give weights as well; use one of the two")
    for index, weight in enumerate(weights):
        try:
            _weight(weight, f"reward_function_weights[{index}]")
        except ConfigError as error:
            faults.append(str(error))
    return faults
