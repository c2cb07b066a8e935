"""Recipes: YAML files by path or packaged name, one job or several stages, all of it validated before anything trains.

A recipe is the config of one job, or has `stages`, a list of such configs run one after another:

    defaults:                      # what every stage shares; a stage's own values win
      model: {model_name: builtin:tiny}
    stages:
      - {algorithm: sft, data: {dataset_name: builtin:arithmetic}}
      - algorithm: grpo
        model: {model_name: previous}        # the model that the stage before trained, adapters merged
        data: {dataset_name: builtin:arithmetic-prompts}
        rewards: {reward_functions: [exact_match]}
    probe: {dataset_name: builtin:arithmetic-prompts, split: test}   # scored before the first stage and after each

Stage N writes to `output_dir/N-algorithm`. An override `name=value` goes to every stage that takes the option, and
`stages.N.name=value` (N counts from 1) to that one. `output_dir`, `resume` and `overwrite` belong to the whole recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.algorithms import ALGORITHMS
from aligntune.core.config import SECTIONS
from aligntune.core.options import UNSET
from aligntune.core.probe import Probe, read_probe
from aligntune.core.resolve import OLD_NAMES, Job, option_table, read_config, resolve
from aligntune.core.rules import NOT_BOTH
from aligntune.errors import ConfigError, nearest, unknown

PREVIOUS = "previous"
"""The `model_name` of a stage that goes on with the model of the stage before."""

_SECTIONS = {*SECTIONS, "loss"}
_WHOLE = {"output_dir": None, "resume": False, "overwrite": False}
_TOP = ("defaults", "stages", "probe", *_WHOLE)
_SCOPED = re.compile(r"stages\.(\d+)\.(.+)")
_PATH = re.compile(r"[a-z_][\w.\[\]]*(?=:| = )")


@dataclass(frozen=True)
class Recipe:
    """A recipe as it is written.

    Args:
        name: the packaged name, or the file's name without its suffix.
        config: its raw content.
        path: the file, or None for one given as a mapping.
        summary: one line, the first of the comment at the top of the file.
        algorithms: those of its stages, in order; of a job without stages that one.
    """

    name: str
    config: dict[str, Any]
    path: Path | None = None
    summary: str = ""

    @property
    def algorithms(self) -> tuple[str, ...]:
        return tuple(str(name) for layer in _layers(self.config) if (name := layer.get("algorithm")) is not None)

    @property
    def staged(self) -> bool:
        return "stages" in self.config


@dataclass
class StageConfig:
    """One stage, resolved and validated.

    Args:
        number: from 1.
        name: its folder below the recipe's output_dir, "2-grpo"; "" for the only job of a recipe without stages.
        job: the resolved job; `output_dir` and a `previous` model are filled in when it runs.
        continues: it trains the model of the stage before.
    """

    number: int
    name: str
    job: Job
    continues: bool = False


@dataclass
class Plan:
    """A recipe with its overrides, ready to run."""

    recipe: Recipe
    stages: list[StageConfig]
    probe: Probe | None
    output_dir: str | None
    resume: bool | str
    overwrite: bool


def packaged() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    from importlib.resources import files

    folder = Path(str(files("aligntune") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """The file of a packaged recipe.

    Raises:
        ConfigError: there is none of this name; names the nearest.
    """
    found = packaged()
    if name not in found:
        raise ConfigError(unknown("recipe", name, found))
    return found[name]


def list_recipes() -> list[Recipe]:
    """The recipes that come with the package: name, summary, algorithms, path."""
    return [read_recipe(name) for name in packaged()]


def read_recipe(recipe: Any) -> Recipe:
    """A recipe by packaged name, YAML path, or as a mapping.

    Raises:
        ConfigError: no such recipe or file, not YAML, or not a mapping at the top.
    """
    if not isinstance(recipe, (str, os.PathLike)):
        return Recipe("recipe", read_config(recipe))
    path = _find(os.fspath(recipe))
    config = read_config(path)
    return Recipe(path.stem, config, path, _summary(path))


def _find(text: str) -> Path:
    path = Path(text).expanduser()
    if path.suffix not in (".yaml", ".yml") and os.sep not in text and not path.is_file():
        return recipe_path(text)
    if path.suffix not in (".yaml", ".yml") and text in (found := packaged()):
        return found[text]
    if path.is_dir():
        inside = path / "config.yaml"
        raise ConfigError(f"recipe: {text!r} is a folder" + (f"; its configuration is {inside}" if inside.is_file()
                                                             else "; a YAML file is wanted"))
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, [name for name in beside if name.endswith((".yaml", ".yml"))])
        close = str(path.parent / close) if close else nearest(path.stem, packaged())
        raise ConfigError(f"recipe: no file {text!r}" + (f"; did you mean {close!r}?" if close else
                                                         "; `aligntune recipes list` names those of the package"))
    return path


def _summary(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _layers(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The config of each stage as written, over the defaults; the config itself where there are no stages."""
    if "stages" not in config:
        return [{key: value for key, value in config.items() if key != "probe"}]
    stages = config["stages"] if isinstance(config["stages"], list) else []
    return [over(_defaults(config), stage) for stage in stages if isinstance(stage, Mapping)]


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    shared = config.get("defaults")
    return dict(shared) if isinstance(shared, Mapping) else {}


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers as one, by "section.name" paths; `above` wins whichever way either writes an option.

    `trainer_options` are merged key by key, any other option is taken whole.
    """
    merged: dict[str, tuple[str, Any]] = {}
    for layer in (below, above):
        mine: dict[str, tuple[str, Any]] = {}
        for path, name, value in leaves(layer):
            before = merged.get(name, ("", None))[1]
            if name == "trainer_options" and isinstance(before, Mapping) and isinstance(value, Mapping):
                value = {**before, **value}
            # An option given twice within one layer keeps both paths: resolve() says which.
            mine[path if name in mine else name] = (path, value)
        merged |= mine
    return dict(merged.values())


def leaves(layer: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(path, flat name, value) of what a layer sets; what has no place in a config comes as it stands."""
    for key, value in layer.items():
        if key in _SECTIONS and value is None:
            continue
        if key in _SECTIONS and isinstance(value, Mapping):
            for name, inner in value.items():
                yield f"{key}.{name}", OLD_NAMES.get(str(name), str(name)), inner
        elif isinstance(key, str) and key.partition(".")[0] in _SECTIONS and "." in key:
            name = key.partition(".")[2]
            yield key, OLD_NAMES.get(name, name), value
        else:
            yield key, OLD_NAMES.get(key, key), value


def load_plan(recipe: Any, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The recipe with its overrides, every stage resolved and checked; nothing heavy is imported.

    Args:
        recipe: packaged name, YAML path or mapping.
        overrides: options by flat name or "section.name" for every stage that takes them, "stages.N.name" for one,
            "probe.name" for the probe.

    Raises:
        ConfigError: every fault of every stage at once, those of stage N under "stages.N.".
    """
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    overrides = {key: value for key, value in (overrides or {}).items() if value is not UNSET}
    faults: list[str] = []
    probe = read_probe(read.config.get("probe"), overrides, faults)
    overrides = {key: value for key, value in overrides.items() if key != "probe" and not key.startswith("probe.")}
    stages = _staged(read, overrides, faults) if read.staged else _single(read, overrides, faults)
    if faults:
        raise ConfigError.from_faults(faults, str(read.path or "the recipe"))
    if not read.staged:
        options = stages[0].job.options
        return Plan(read, stages, probe, options.output_dir, options.resume, options.overwrite)
    whole = _whole(read.config, overrides)
    return Plan(read, stages, probe, **whole)


def _single(recipe: Recipe, overrides: dict[str, Any], faults: list[str]) -> list[StageConfig]:
    for key in overrides:
        if _SCOPED.fullmatch(key):
            faults.append(f"{key}: this recipe has no stages")
    explicit = {key: value for key, value in overrides.items() if not _SCOPED.fullmatch(key)}
    try:
        return [StageConfig(1, "", resolve(explicit, _layers(recipe.config)[0], what="the recipe"))]
    except ConfigError as error:
        faults += error.faults or [str(error)]
        return []


def _whole(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe with stages as a whole: from the overrides, else the top, else the defaults."""
    layers = (overrides, config, _defaults(config))
    values = {name: next((layer[name] for layer in layers if name in layer), default)
              for name, default in _WHOLE.items()}
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}


def _staged(recipe: Recipe, overrides: dict[str, Any], faults: list[str]) -> list[StageConfig]:
    config = recipe.config
    for key in config:
        if key not in _TOP:
            faults.append(f"{key}: in a recipe with stages, shared options stand under `defaults`" if key in
                          _SECTIONS or key in option_table(None) else unknown("key", key, _TOP))
    written = config["stages"]
    if not isinstance(written, list) or not written or not all(isinstance(stage, Mapping) for stage in written):
        faults.append("stages: a list of at least one config is wanted")
    if not isinstance(config.get("defaults"), Mapping | None):
        faults.append("defaults: a mapping of options is wanted")
    _check_whole(_whole(config, overrides), faults)
    if faults:
        return []
    shared, single = _scopes(overrides, len(written), faults)
    layers = _layers(config)
    algorithms = [_algorithm(over(layer, single[number])) for number, layer in enumerate(layers, 1)]
    defaults = {key: value for key, value in _defaults(config).items() if key not in _WHOLE}
    stages, found = [], []
    for number, stage in enumerate(written, 1):
        layer = over(_taken(defaults, number, algorithms), stage)
        own = _taken(shared, number, algorithms)
        if _model(over(layer, single[number])) == PREVIOUS:
            # A model for every stage is not for this one: it would undo the stage before.
            own = {path: value for path, name, value in leaves(own) if name != "model_name"}
        resolved, mine = _stage(number, layer, over(own, single[number]))
        found.append(mine)
        stages += [resolved] if resolved else []
    faults += _told(found)
    return stages


def _check_whole(whole: dict[str, Any], faults: list[str]) -> None:
    if not isinstance(whole["resume"], bool):
        faults.append(f"resume = {whole['resume']!r}: a recipe with stages resumes with resume=true, where it stopped")
    for name in ("output_dir", "overwrite"):
        _, fault = option_table(None)[name].check(whole[name])
        faults += [fault] if fault else []
    if whole["resume"] and whole["overwrite"]:
        faults.append(NOT_BOTH)


def _scopes(
    overrides: dict[str, Any], count: int, faults: list[str]
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The overrides for all stages, and those for each one."""
    shared: dict[str, Any] = {}
    single: dict[int, dict[str, Any]] = {number: {} for number in range(1, count + 1)}
    for key, value in overrides.items():
        match = _SCOPED.fullmatch(key)
        if match and int(match[1]) in single:
            single[int(match[1])][match[2]] = value
        elif match or key.startswith("stages") or key.partition(".")[0].isdigit():
            faults.append(f"{key}: this recipe has the stages 1 to {count}; stages.N.name=value sets an option of one")
        elif key == "algorithm":
            faults.append("algorithm: each stage has its own; stages.N.algorithm=... sets one")
        elif key not in _WHOLE:
            shared[key] = value
    return shared, single


def _algorithm(layer: Mapping[str, Any]) -> str | None:
    name = layer.get("algorithm")
    try:
        return ALGORITHMS.resolve(name) if name is not None else None
    except ConfigError:
        return None  # told by resolve()


def _model(layer: Mapping[str, Any]) -> Any:
    return next((value for _, name, value in leaves(layer) if name == "model_name"), None)


def _taken(shared: Mapping[str, Any], number: int, algorithms: list[str | None]) -> dict[str, Any]:
    """What of `shared` goes to stage `number`: all but the options that only other stages take."""
    mine = algorithms[number - 1]
    others = {name for other in algorithms if other and other != mine for name in option_table(other)}
    return {path: value for path, name, value in leaves(shared)
            if not (mine and name not in option_table(mine) and name in others)}


def _stage(number: int, layer: dict[str, Any], own: dict[str, Any]) -> tuple[StageConfig | None, list[str]]:
    faults = [f"{name}: belongs to the whole recipe" for part in (layer, own) for name in _WHOLE if name in part]
    try:
        job = resolve({path: value for path, value in own.items() if path not in _WHOLE},
                      {path: value for path, value in layer.items() if path not in _WHOLE}, what="the recipe")
    except ConfigError as error:
        return None, [*faults, *(error.faults or [str(error)])]
    if number == 1 and job.options.model_name == PREVIOUS:
        faults.append("model.model_name = 'previous': there is no stage before the first")
    return StageConfig(number, f"{number}-{job.spec.name}", job, job.options.model_name == PREVIOUS), faults


def _told(found: list[list[str]]) -> list[str]:
    """The faults of all stages: one that every stage has is told once, any other under its stage."""
    common = [fault for fault in found[0] if len(found) > 1 and all(fault in other for other in found[1:])]
    told = list(common)
    for number, faults in enumerate(found, 1):
        for fault in faults:
            if fault not in common:
                told.append(f"stages.{number}.{fault}" if _PATH.match(fault) else f"stages.{number}: {fault}")
    return told
