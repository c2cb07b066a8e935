"""One comparison from the words of the user to the folder of outputs."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aligntune.compare import outputs, peers
from aligntune.compare.fits import WHAT, largest, require_card
from aligntune.compare.protocol import Runner, execute, in_a_fresh_process, leftovers, plan, spec_of
from aligntune.compare.reach import require
from aligntune.compare.report import SCHEMA, Report, build
from aligntune.compare.schema import faults_of
from aligntune.compare.settings import Settings, check_counts, check_options, read_arm, read_assertion
from aligntune.compare.start import check_objects, on_disk
from aligntune.core.backend_factory import choose_backend
from aligntune.core.environment import cards, command_line
from aligntune.core.recipes import PREVIOUS, Recipe, leaves, load_plan, over, packaged, read_recipe
from aligntune.core.resolve import Job, resolve
from aligntune.errors import ConfigError


def run(
    recipe: Any, *, a: Any, b: Any, stage: int | None, overrides: dict[str, Any], steps: int | None, repeats: int,
    warmup: int, oracle: bool, target_loss: float | None, price: float | None, asserts: Sequence[str], baseline: Any,
    python_a: str | None, python_b: str | None, setup_a: str | None, setup_b: str | None, output_dir: Any, keep: bool,
    fits: str | None, runner: Runner | None, command: Sequence[str] | None,
) -> Report:
    """`aligntune.compare`, see there."""
    check_counts(steps=steps, repeats=repeats, warmup=warmup, price=price, target_loss=target_loss)
    read = read_recipe(recipe)
    config = one_stage(read, stage, overrides)
    arms = read_arm(a, python=python_a, setup=setup_a), read_arm(b, python=python_b, setup=setup_b)
    check_options(overrides, arms, steps=steps)
    own = read.path is not None and read.path != packaged().get(read.name)
    settings = Settings(
        recipe=str(read.path) if own else read.name, config=config, overrides=overrides,
        a=arms[0], b=arms[1], steps=steps, repeats=repeats, warmup=warmup, oracle=oracle, target_loss=target_loss,
        price=price, asserts=tuple(read_assertion(text) for text in asserts), keep=keep,
    )
    earlier = read_baseline(baseline) if baseline is not None else None
    job = _check(settings, Path("comparisons"))
    if fits is not None:
        require_card(fits, cards=len(cards()), algorithm=job.spec.name)
    folder = _folder(output_dir, read.name)
    settings = on_disk(settings, job, folder)
    results = execute(
        settings, folder, runner=runner or in_a_fresh_process, say=_say, seed=int(job.options.seed),
        online=job.spec.online, peft=_peft(job), attention=job.options.attn_implementation,
    )
    sizes = _fits(settings, job, fits, folder, runner or in_a_fresh_process) if fits is not None else None
    data = build(settings, results, command=list(command) if command is not None else command_line(), baseline=earlier,
                 fits=sizes)
    faults = faults_of(data)
    assert not faults, faults
    report = Report(data, folder)
    outputs.write(report)
    if not keep:
        for path in leftovers([one for runs in results.values() for one in runs]):
            path.unlink()
    return report


def one_stage(recipe: Recipe, stage: int | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the job to compare.

    Raises:
        ConfigError: a recipe with stages and none chosen, no such stage, or one that goes on with another's model.
    """
    if not recipe.staged:
        if stage is not None:
            raise ConfigError(f"stage = {stage}: this recipe has no stages")
        return recipe.config
    stages = recipe.config["stages"]
    if stage is None or not 1 <= stage <= len(stages):
        names = ", ".join(f"{number} ({name})" for number, name in enumerate(recipe.algorithms, 1))
        raise ConfigError(f"this recipe has stages and one job is compared: --stage N (from Python "
                          f"stage=N) takes one of {names}")
    config = over(recipe.config.get("defaults") or {}, stages[stage - 1])
    named = {name.rpartition(".")[2] for name in overrides}
    continues = any(name == "model_name" and value == PREVIOUS for _, name, value in leaves(config))
    if continues and "model_name" not in named:
        raise ConfigError(f"stage {stage} goes on with the model of the stage before: name one with model_name=...")
    return config


def _check(settings: Settings, folder: Path) -> Job:
    """Every arm's options, resolved as the arm will resolve them: typos are told once, here, before anything runs."""
    load_plan(settings.config, {**settings.overrides, "backend": "trl"})
    found: Job | None = None
    for one in plan(settings, attention=None):
        spec = spec_of(settings, one, folder, seed=0, online=False, peft=False)
        try:
            job = resolve(spec.overrides, settings.config, what=f"arm {one.arm.label!r}")
        except ConfigError as error:
            if len(error.faults) != 1:
                raise
            raise ConfigError(f"arm {one.arm.label!r}: {error}", error.faults) from error
        check_objects(job, one.arm.options)
        if one.arm.peer is not None:
            peers.check(one.arm.peer, job)
        if one.role in ("a", "b") and one.arm.peer is None and one.arm.python is None:
            choose_backend(job)  # what cannot run here is told now, not when the other arm has trained
        found = job if one.role == "a" else found
    for arm in (settings.a, settings.b):
        require(arm)
    assert found is not None
    plain = resolve({**settings.overrides, **settings.a.options, "backend": "trl"}, settings.config)
    found.set("seed", plain.options.seed)
    return found


def _fits(settings: Settings, job: Job, what: str, folder: Path, runner: Runner) -> dict[str, Any]:
    start = max(1, int(vars(job.options)[WHAT[what]]))
    return {"what": WHAT[what]} | {
        role: largest(settings, arm, role, what, folder, start=start, seed=int(job.options.seed), runner=runner,
                      say=_say) for role, arm in (("a", settings.a), ("b", settings.b))}


def _peft(job: Job) -> bool:
    return bool(job.options.use_peft)


def _folder(output_dir: Any, name: str) -> Path:
    if output_dir is None:
        stem = re.sub(r"[^A-Za-z0-9._]+", "-", name)
        output_dir = Path("comparisons") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(os.fspath(output_dir)).expanduser().absolute()
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        report = folder / outputs.JSON
        if not report.is_file():
            raise ConfigError(f"output_dir: {str(folder)!r} holds something that is not a comparison")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_baseline(path: Any) -> dict[str, Any]:
    """An earlier report.json.

    Raises:
        ConfigError: no such file, or not a report of this schema.
    """
    file = Path(os.fspath(path))
    if file.is_dir():
        file = file / outputs.JSON
    if not file.is_file():
        raise ConfigError(f"baseline: no file {str(file)!r}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"baseline: {file} is not JSON: {error}") from error
    faults = faults_of(found)
    if faults:
        raise ConfigError.from_faults(faults, f"{file}, which is no report of schema {SCHEMA}")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
