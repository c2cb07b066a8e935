"""What to compare: two arms, how often, with what asserted; read from the command line's words or from Python."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligntune.errors import ConfigError, unknown

PEER_NAMES = ("liger", "unsloth")
BACKEND_NAMES = ("trl", "fast", "auto")
OWN = ("output_dir", "overwrite", "resume", "seed", "backend")
"""Options that the comparison sets itself."""
_OF_ALL = {
    "output_dir": "each run has a folder in that of the comparison, which --output-dir names (output_dir=... in "
                  "Python)",
    "overwrite": "each run starts anew in a folder of its own",
    "resume": "each run starts anew in a folder of its own",
    "backend": "the arms say it: --a and --b (a=..., b=... in Python)",
}
"""Those of `OWN` that cannot be given for both arms either (a seed can), and why."""
QUIET: Mapping[str, Any] = {"report_to": "none", "progress": False, "stop_metric": None, "stop_value": None}
"""Options that every run has at these values: trackers and bars cost time, and no arm stops before the other."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        label: its name in the report.
        backend: "trl" or "fast"; peers are driven through "trl".
        options: options of this arm alone.
        peer: "liger", "unsloth" or None.
        python: the interpreter that runs it, or a folder of packages that this one is run with; None is this one.
        setup: "module:function", called with the built trainer.
        environment: variables of its process.
    """

    label: str
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None
    python: str | None = None
    setup: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def read_arm(given: Any, *, python: str | None = None, setup: str | None = None) -> Arm:
    """An arm from "fast", "fast,base_precision=fp8" or {"backend": "fast", ...options}.

    Raises:
        ConfigError: an unknown backend or peer, or something that is not name=value.
    """
    if isinstance(given, Arm):
        return given
    if isinstance(given, Mapping):
        options = {str(key): value for key, value in given.items()}
        name = str(options.pop("backend", "trl"))
        words = [name, *(f"{key}={value}" for key, value in options.items())]
    else:
        words = split(str(given))
        name = words[0] if words else ""
        from aligntune.cli.overrides import parse

        try:
            options = parse(words[1:])
        except ConfigError as error:
            faults = [f"arm {given!r}: {fault}" for fault in error.faults]
            raise ConfigError.from_faults(faults, "the comparison") from error
    if name not in (*BACKEND_NAMES, *PEER_NAMES):
        raise ConfigError(f"arm {','.join(words)!r}: "
                          + unknown("backend or peer", name, (*BACKEND_NAMES, *PEER_NAMES)))
    clash = [option for option in options if option.rpartition(".")[2] in OWN]
    if clash:
        raise ConfigError(f"arm {name!r}: {', '.join(clash)}: the comparison sets this itself, the same for both arms")
    label = ",".join(words) + (f" + {setup}" if setup else "")
    peer = name if name in PEER_NAMES else None
    return Arm(label, "trl" if peer else name, options, peer, python, setup)


def split(text: str) -> list[str]:
    """Words between commas that stand outside brackets and quotes."""
    words, depth, quote, word = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            words.append(word.strip())
            word = ""
            continue
        word += letter
    return [*words, word.strip()] if word.strip() or words else []


NUMBERS = ("speedup", "peak_ratio", "max_dloss", "drift", "kl", "top1", "tokens_per_second", "cold_start",
           "baseline_speedup")
FLAGS = ("parity", "data", "attestation", "significant")
_RULE = re.compile(r"\s*([a-z_0-9]+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Assertion:
    """`speedup>=1.3` or `parity`."""

    text: str
    name: str
    relation: str = ""
    bound: float = 0.0


def read_assertion(text: str) -> Assertion:
    """One --assert.

    Raises:
        ConfigError: an unknown name, or not `name>=number`.
    """
    bare = text.strip()
    if bare in FLAGS:
        return Assertion(bare, bare)
    found = _RULE.fullmatch(text)
    if not found:
        if bare in NUMBERS:
            raise ConfigError(f"--assert {bare!r}: a bound is wanted, like {bare}>=1")
        raise ConfigError(f"--assert {text!r}: " + unknown("assertion", bare, (*FLAGS, *NUMBERS)).removesuffix(".")
                          + ". Numbers take >=, <=, > or <")
    name, relation, bound = found.groups()
    if name not in NUMBERS:
        raise ConfigError(f"--assert {text!r}: " + (f"{name} takes no bound" if name in FLAGS else
                                                    unknown("assertion", name, (*FLAGS, *NUMBERS))))
    try:
        return Assertion(bare, name, relation, float(bound))
    except ValueError as error:
        raise ConfigError(f"--assert {text!r}: {bound!r} is not a number") from error


@dataclass(frozen=True)
class Settings:
    """A comparison, checked.

    Args:
        recipe: the recipe's name or path, for people.
        config: its content.
        overrides: options for both arms.
        a, b: the arms.
        steps: optimizer steps of each run; None keeps the recipe's.
        repeats: runs of each arm, at least 1; 2 or more measure the noise.
        warmup: steps at the start that no speed is taken from.
        seed: None keeps the recipe's.
        oracle: judge gradients against an fp32 run, and run the yardstick.
        target_loss: None takes what arm a nearly ends at.
        price: of the machine, an hour; None leaves cost out.
        keep: leave gradients and probe distributions on disk.
    """

    recipe: str
    config: dict[str, Any]
    overrides: dict[str, Any]
    a: Arm
    b: Arm
    steps: int | None = None
    repeats: int = 2
    warmup: int = 5
    seed: int | None = None
    oracle: bool = True
    target_loss: float | None = None
    price: float | None = None
    asserts: Sequence[Assertion] = ()
    keep: bool = False


def check_counts(*, steps: int | None, repeats: int, warmup: int, price: float | None = None,
                 target_loss: float | None = None) -> None:
    """Raise a ConfigError unless there is something left to measure."""
    faults = []
    if repeats < 1:
        faults.append(f"repeats = {repeats}: at least 1; 2 or more measure the noise")
    if warmup < 0:
        faults.append(f"warmup = {warmup}: 0 or more")
    if steps is not None and steps < warmup + 2:
        faults.append(f"steps = {steps}: at least warmup + 2 = {warmup + 2}")
    if price is not None and not 0 < price < math.inf:
        faults.append(f"price = {price}: above 0, in any currency an hour")
    if target_loss is not None and not math.isfinite(target_loss):
        faults.append(f"target_loss = {target_loss}: a number")
    if faults:
        raise ConfigError.from_faults(faults, "the comparison")


def check_options(overrides: Mapping[str, Any], arms: Sequence[Arm], *, steps: int | None) -> None:
    """Raise a ConfigError if the options for both arms, or those of one, hold what the comparison sets itself."""
    faults = [f"{path}: {_OF_ALL[name]}" for path in overrides if (name := path.rpartition(".")[2]) in _OF_ALL]
    for whose, options in (("", overrides), *((f"arm {arm.label!r}: ", arm.options) for arm in arms)):
        for path, value in options.items():
            name = path.rpartition(".")[2]
            if name in QUIET and value != QUIET[name]:
                faults.append(f"{whose}{path} = {value!r}: every run of a comparison has {name} = {QUIET[name]!r}")
            elif name == "max_steps" and steps not in (None, value):
                faults.append(f"{whose}{path} = {value!r}: the comparison is given steps = {steps} too; give one of "
                              "the two")
    if faults:
        raise ConfigError.from_faults(faults, "the comparison")
