"""Compares two ways of training: the same model? How much faster, how much smaller? With error bars.

    import aligntune

    report = aligntune.compare("sft-builtin", a="trl", b="fast", steps=40)
    print(report.verdict)

`aligntune.compare` is this package and can be called; importing it imports nothing heavy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligntune.compare.protocol import Runner
    from aligntune.compare.report import Report


def compare(
    recipe: Any,
    *,
    a: Any = "trl",
    b: Any = "fast",
    stage: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    steps: int | None = None,
    repeats: int = 2,
    warmup: int = 5,
    oracle: bool = True,
    target_loss: float | None = None,
    price: float | None = None,
    asserts: Sequence[str] = (),
    baseline: str | os.PathLike[str] | None = None,
    python_a: str | None = None,
    python_b: str | None = None,
    setup_a: str | None = None,
    setup_b: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    keep: bool = False,
    fits: str | None = None,
    runner: Runner | None = None,
    command: Sequence[str] | None = None,
) -> Report:
    """Train a recipe with two arms, each in fresh processes, and compare what they train and what they cost.

    Args:
        recipe: packaged name, YAML path or mapping.
        a, b: "trl", "fast", "fast,name=value,...", a peer ("liger", "unsloth"), or {"backend": ..., options}.
        stage: which stage of a recipe that has stages, from 1; a model that is `previous` needs a `model_name`.
        overrides: options for both arms, by flat name or "section.name".
        steps: optimizer steps of each run; None keeps the recipe's.
        repeats: runs of each arm, in the order A B B A; with 2 or more the noise is measured.
        warmup: first steps that no speed is taken from.
        oracle: also run an fp32 oracle (the first steps) and a yardstick, TRL with another attention.
        target_loss: of "time to loss"; None takes where arm a has all but a hundredth of its way down behind it.
        price: of the machine an hour, in any currency.
        asserts: "speedup>=1.3", "parity", ...; `Report.failed` says which do not hold.
        baseline: an earlier report.json.
        python_a, python_b: the interpreter of an arm, with torch, transformers and trl of its own; or a folder of
            packages (`pip install --target`) that this one is run with.
        setup_a, setup_b: "module:function", called with the built AlignTrainer before training.
        output_dir: for the outputs; None makes comparisons/<recipe>-<time>.
        keep: leave the arms' gradients and probe distributions on disk.
        fits: also find the largest "batch", or the longest "context", that each arm trains on this card (sft).
        runner: runs one arm; the default starts a process.
        command: what to write down as the command; None is this process's own.

    Raises:
        ConfigError: a fault of the recipe, the options or the assertions, before anything runs.
        ComparisonError: an arm died.
        BackendUnavailableError, UnsupportedAlgorithmError: an arm that cannot run here.
    """
    from aligntune.compare.run import run

    return run(
        recipe, a=a, b=b, stage=stage, overrides=dict(overrides or {}), steps=steps, repeats=repeats, warmup=warmup,
        oracle=oracle, target_loss=target_loss, price=price, asserts=asserts, baseline=baseline, python_a=python_a,
        python_b=python_b, setup_a=setup_a, setup_b=setup_b, output_dir=output_dir, keep=keep, fits=fits, runner=runner,
        command=command,
    )


class _Callable(ModuleType):
    """The package, callable: `aligntune.compare` is the function's name and, once imported, the package's."""

    __call__ = staticmethod(compare)


sys.modules[__name__].__class__ = _Callable
