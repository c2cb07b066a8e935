"""Runs recipes: every stage checked before the first one trains, each in its own folder, each on the model before."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.core.recipes import Plan, StageConfig, load_plan
from aligntune.errors import AlignTuneError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from aligntune.core.trainer import AlignTrainer

STATE = "recipe.json"
"""In the recipe's output_dir: which stages are done, with their models and probe scores."""

MODEL = "model"
"""In a stage's folder: its model where the last checkpoint cannot be loaded as one."""

_MACHINE = ("output_dir", "resume", "overwrite", "backend")
"""Options that may differ between a finished stage and the recipe that is resumed."""


@dataclass
class StageResult:
    """How one stage went.

    Args:
        name: "2-grpo"; of a recipe without stages, the algorithm.
        algorithm, backend: their names.
        output_dir: its run folder.
        model: the folder that a later stage, or anybody, loads the trained model from; adapters are merged in it
            where a later stage goes on with it.
        global_step, training_loss, metrics: what `AlignTrainer.train` returned.
        summary: the run's summary.json.
        probe_before, probe_after: mean score of the probe, None without one.
    """

    name: str
    algorithm: str
    backend: str
    output_dir: str
    model: str | None
    global_step: int
    training_loss: float
    metrics: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    probe_before: float | None = None
    probe_after: float | None = None


def run_recipe(recipe: Any, overrides: Mapping[str, Any] | None = None, **options: Any) -> list[StageResult]:
    """Train a recipe, one stage after another.

    Args:
        recipe: the name of a packaged recipe, the path of a YAML file, or a mapping.
        overrides: options by flat name or "section.name" for every stage that takes them; "stages.N.name" (N from 1)
            for one stage, "probe.name" for the probe.
        **options: the same, as keywords.

    Returns:
        One result a stage; a recipe without stages has one.

    Raises:
        ConfigError: every fault of every stage at once, before anything trains.
        DataError, BackendUnavailableError, UnsupportedAlgorithmError: as the factories; of any stage, before the
            first one trains.
        CheckpointError: `resume=True` and there is nothing to resume, or it is of another recipe.
        KeyboardInterrupt: Ctrl-C, after a checkpoint; `resume=True` goes on where it stopped.
    """
    from aligntune.core import notices

    plan = load_plan(recipe, {**(overrides or {}), **options})
    notices.quiet_libraries()  # before they are imported
    check_backends(plan)
    # A bad row of a later stage is told now, not in hours.
    check_data(plan, skip_first=True)
    return _Run(plan).run()


def check_backends(plan: Plan) -> None:
    """Settle the backend of every stage and check rewards, trainer options and a model object for it.

    Raises:
        AlignTuneError: of every stage at once; of the first one's class where they differ.
    """
    from aligntune.backends.loading import check_model_object
    from aligntune.core.backend_factory import check_names, choose_backend

    errors: list[tuple[StageConfig | None, AlignTuneError]] = []
    for stage in plan.stages:
        try:
            choose_backend(stage.job)
            check_model_object(stage.job)
            check_names(stage.job)
        except AlignTuneError as error:
            errors.append((stage, error))
    _raise(errors)


def check_data(plan: Plan, *, skip_first: bool = False, list_bad_rows: bool = False) -> dict[int, Any]:
    """Read and tokenise the data of every stage and of the probe, as training would.

    Args:
        skip_first: not that of the first stage, whose trainer reads it before it trains anyway.
        list_bad_rows: bad rows, and columns that a reward lacks, stand in the report, where training would stop.

    Returns:
        The data report of each stage, by number.

    Raises:
        AlignTuneError: of every stage at once; of the first one's class where they differ.
    """
    from aligntune.backends.loading import load_tokenizer
    from aligntune.core.backend_factory import columns_check, data_request, prepare_data
    from aligntune.data.preview import preview

    reports: dict[int, Any] = {}
    errors: list[tuple[StageConfig | None, AlignTuneError]] = []
    source = plan.stages[0].job
    for stage in plan.stages:
        source = source if stage.continues else stage.job
        if stage.number == 1 and skip_first:
            continue
        try:
            job, tokenizer = stage.job, _quietly(load_tokenizer, source)
            reports[stage.number] = (
                preview(data_request(job), tokenizer, columns_check(job)) if list_bad_rows
                else prepare_data(job, tokenizer).report)
        except AlignTuneError as error:
            errors.append((stage, error))
    if plan.probe is not None:
        try:
            plan.probe.rows(_quietly(load_tokenizer, plan.stages[0].job))
        except AlignTuneError as error:
            errors.append((None, error))
    _raise(errors)
    return reports


def _quietly(load: Any, job: Any) -> Any:
    """`load(job)` without its notices: the stage itself says them."""
    said = list(job.notices)
    try:
        return load(job)
    finally:
        job.notices[:] = said


def _raise(errors: list[tuple[StageConfig | None, AlignTuneError]]) -> None:
    if not errors:
        return
    texts = [f"stage {stage.name}: {error}" if stage and stage.name else ("" if stage else "probe: ") + str(error)
             for stage, error in errors]
    first = errors[0][1]
    if len(errors) == 1 and texts[0] == str(first):
        raise first
    raise type(first)("\n".join(texts)) from first


class _Run:
    """One run of a plan: its folder, and what is kept of it in `recipe.json`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.staged = plan.recipe.staged
        self.configs = [_comparable(stage.job) for stage in plan.stages]
        self.root = self._settle() if self.staged else None
        self.kept = self._read_state()

    def run(self) -> list[StageResult]:
        results: list[StageResult] = []
        for stage in self.plan.stages:
            done = self._done(stage)
            results.append(done or self._train(stage, results[-1] if results else None))
            if done:
                self._say(f"{stage.name}: done before, in {done.output_dir}")
            self._write_state(results)
        return results

    # One stage

    def _train(self, stage: StageConfig, before: StageResult | None) -> StageResult:
        from aligntune.core.backend_factory import build_trainer

        job = stage.job
        if self.root is not None:
            folder = self.root / stage.name
            job.set("output_dir", str(folder))
            job.set("resume", self._can_resume(folder))
        if stage.continues:
            assert before is not None and before.model is not None
            job.set("model_name", before.model)
        trainer = build_trainer(job)
        probe, rows = self.plan.probe, None
        first = before.probe_after if before is not None and stage.continues else None
        if probe is not None:
            rows = probe.rows(trainer.tokenizer)
            first = self._probe(trainer, rows, f"before {stage.name or job.spec.name}") if first is None else first
        output = trainer.train()
        result = StageResult(
            stage.name or job.spec.name, job.spec.name, trainer.backend, str(trainer.run_dir.path),
            self._save(stage, trainer), output.global_step, output.training_loss, dict(output.metrics),
            trainer.run_dir.read_json("summary.json") or {}, first,
            self._probe(trainer, rows, f"after {stage.name or job.spec.name}") if probe is not None else None,
        )
        del trainer
        _free()
        return result

    def _probe(self, trainer: AlignTrainer, rows: Any, when: str) -> float:
        assert self.plan.probe is not None
        found = self.plan.probe.score(trainer, rows)
        self._say(f"{self.plan.probe}, {when}: {found['score']:.3f} ({found['prompts']} prompts, greedy)")
        return found["score"]

    def _save(self, stage: StageConfig, trainer: AlignTrainer) -> str | None:
        """Where a finished stage's model lies: its last checkpoint, or a merged copy where a later stage needs one."""
        following = self.plan.stages[stage.number:stage.number + 1]
        needed = bool(following) and following[0].continues
        if needed and hasattr(trainer.model, "peft_config"):
            return str(trainer.save_model(trainer.run_dir.path / MODEL, merge_adapters=True))
        checkpoint = trainer.run_dir.path / f"checkpoint-{trainer.trainer.state.global_step}"
        if checkpoint.is_dir():
            return str(checkpoint)
        return str(trainer.save_model(trainer.run_dir.path / MODEL)) if needed else None

    def _can_resume(self, folder: Path) -> bool:
        """Whether the stage stopped at a checkpoint; what it left without one is cleared."""
        from aligntune.core.checkpoints import complete_checkpoints
        from aligntune.core.run_dir import RunDir, on_main_process

        def look() -> str:
            if complete_checkpoints(folder):
                return "yes"
            RunDir(folder, is_main=True).clear()
            return ""

        return bool(on_main_process(look))

    # The recipe's folder

    def _settle(self) -> Path:
        from aligntune.core.run_dir import RunDir, on_main_process

        name, wanted = self.plan.recipe.name, self.plan.output_dir
        if self.plan.resume:
            return Path(on_main_process(lambda: str(_running(name, wanted))))
        if wanted is not None:
            on_main_process(lambda: _make_way(Path(wanted).expanduser(), overwrite=self.plan.overwrite))
        self.root, self.kept = RunDir.create(
            wanted, algorithm="recipe", model_name=name, overwrite=self.plan.overwrite).path, []
        self._write_state([])
        return self.root

    def _read_state(self) -> list[dict[str, Any]]:
        if self.root is None or not self.plan.resume:
            return []
        kept = json.loads((self.root / STATE).read_text(encoding="utf-8"))["stages"]
        names = [stage.name for stage in self.plan.stages]
        if [entry["result"]["name"] for entry in kept] != names[:len(kept)]:
            did = ", ".join(entry["result"]["name"] for entry in kept)
            raise CheckpointError(f"resume=true: {self.root} is a run of another recipe: it did {did}; this one has "
                                  f"{', '.join(names)}")
        return kept

    def _done(self, stage: StageConfig) -> StageResult | None:
        """What an earlier run of this recipe made of the stage, or None.

        Raises:
            CheckpointError: the stage is done with other options, or its model is gone.
        """
        if stage.number > len(self.kept):
            return None
        entry = self.kept[stage.number - 1]
        was, now = entry["config"], self.configs[stage.number - 1]
        changed = [f"{path}: {was.get(path)!r} then, {now.get(path)!r} now" for path in sorted({*was, *now})
                   if was.get(path) != now.get(path)]
        if changed:
            raise CheckpointError(f"resume=true: stage {stage.name} is done, with other options: {'; '.join(changed)}")
        result = StageResult(**entry["result"])
        assert self.root is not None
        result.output_dir = str(self.root / stage.name)  # the folder may have been moved
        if result.model is not None:
            result.model = str(self.root / result.model)
            if not Path(result.model).is_dir():
                raise CheckpointError(f"resume=true: the model of stage {stage.name} is gone: {result.model}")
        return result

    def _write_state(self, results: list[StageResult]) -> None:
        from aligntune.core.run_dir import RunDir

        root = self.root or (Path(results[-1].output_dir) if self.plan.probe is not None and results else None)
        if root is None:
            return
        entries = []
        for result, config in zip(results, self.configs, strict=False):
            shown = asdict(result)
            shown["output_dir"] = os.path.relpath(result.output_dir, root)
            shown["model"] = os.path.relpath(result.model, root) if result.model else None
            entries.append({"result": shown, "config": config})
        RunDir(root).write_json(STATE, {
            "recipe": self.plan.recipe.name, "probe": str(self.plan.probe) if self.plan.probe else None,
            "stages": entries, "all_stages": [stage.name for stage in self.plan.stages],
        })

    def _say(self, text: str) -> None:
        from aligntune.core.callbacks import say

        if os.environ.get("RANK", "0") == "0":
            say(text)


def _make_way(root: Path, *, overwrite: bool) -> str:
    """Remove what an earlier run of a recipe left in its folder, and nothing else.

    Raises:
        ConfigError: there is one and `overwrite` is false, or it cannot be written.
    """
    import shutil

    from aligntune.core.run_dir import RunDir, check_file_in, writing

    if not (root / STATE).is_file():
        return ""
    if not overwrite:
        raise ConfigError(f"output_dir: {str(root)!r} holds another run of a recipe; resume=true continues it, another "
                          "output_dir keeps both, overwrite=true removes it first")
    with writing("output_dir", root):
        check_file_in(root)
        for name in json.loads((root / STATE).read_text(encoding="utf-8"))["all_stages"]:
            RunDir(root / name, is_main=True).clear()
            shutil.rmtree(root / name / MODEL, ignore_errors=True)
        (root / STATE).unlink()
    return ""


def _running(name: str, wanted: str | None) -> Path:
    """The folder of the run to resume: the one that is named, or the newest of the recipe.

    Raises:
        CheckpointError: there is none.
    """
    if wanted is not None:
        if not (Path(wanted).expanduser() / STATE).is_file():
            raise CheckpointError(f"resume=true: {wanted!r} holds no run of a recipe with stages")
        return Path(wanted).expanduser().absolute()
    found = [path.parent for path in Path("runs").glob(f"*/{STATE}")
             if json.loads(path.read_text(encoding="utf-8")).get("recipe") == name]
    if not found:
        raise CheckpointError(f"resume=true: no run of the recipe {name!r} in runs/; give output_dir")
    return max(found, key=lambda path: (path.stat().st_mtime, path.name)).absolute()


def _comparable(job: Any) -> dict[str, Any]:
    """The job's options as JSON holds them, by path, without what may differ on another machine or day."""
    from omegaconf import OmegaConf

    flat: dict[str, Any] = {}
    tree: Any = OmegaConf.to_container(job.config)
    for name, value in tree.items():
        if isinstance(value, dict) and name not in _MACHINE:
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        elif name not in _MACHINE:
            flat[name] = value
    return json.loads(json.dumps(flat))


def _free() -> None:
    """Give back what the stage's model held before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
