"""train, validate, preview."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aligntune.cli.output import gib, number, table

if TYPE_CHECKING:
    from aligntune.core.recipe_run import StageResult
    from aligntune.core.recipes import Plan, StageConfig

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.",
                                               metavar="RECIPE", show_default=False)]
OverridesArgument = Annotated[list[str] | None, typer.Argument(
    help="Options over the recipe's: section.name=value or name=value; stages.N.name=value for one stage.",
    metavar="NAME=VALUE", show_default=False)]
# An unknown --option reaches the parser of overrides, which names what is meant.
LENIENT = {"ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(context_settings=LENIENT)(train)
    app.command(context_settings=LENIENT)(validate)
    app.command(context_settings=LENIENT)(preview)


def train(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a recipe: one job, or stage after stage.

    Values are read as YAML: learning_rate=1e-4, max_samples=null, lora_target_modules=[q_proj,v_proj].
    resume=true continues where a run stopped.
    """
    from aligntune.cli.overrides import parse
    from aligntune.core.recipe_run import run_recipe

    main = os.environ.get("RANK", "0") == "0"
    if not main:
        _hush()
    given = parse(overrides or [])
    try:
        results = run_recipe(recipe, given)
    except KeyboardInterrupt as stop:
        where = str(stop).partition(";")[0]
        how = "resume=true for overwrite=true" if given.get("overwrite") else "resume=true"
        raise KeyboardInterrupt(f"{where}; the same command with {how} goes on" if where else "") from stop
    if main:
        _report(results)
    _leave_group()


def _hush() -> None:
    """One process of several talks: bars and warnings of the libraries would come once for each."""
    import warnings

    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1",
                      HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    warnings.simplefilter("ignore")


def _leave_group() -> None:
    """The processes leave together: one that goes while another still speaks to it may be aborted."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed

        if torch.distributed.is_initialized():  # not where every stage was done before
            from accelerate import PartialState

            PartialState().wait_for_everyone()
            PartialState().destroy_process_group()


def _report(results: list[StageResult]) -> None:
    rows = []
    for result in results:
        summary = result.summary
        peak = summary.get("peak_memory") or {}
        speed = summary.get("generated_tokens_per_second")
        rows.append((
            result.name, result.backend, result.global_step, number(summary.get("final_loss")),
            number(summary.get("final_reward")), number(summary.get("tokens_per_second"), ",.0f"),
            number(speed, ",.0f"), gib(peak.get("gpu_reserved_bytes", peak.get("cpu_rss_bytes"))),
            f"{summary.get('wall_seconds', 0):.0f} s",
        ))
    columns = ("stage", "backend", "steps", "loss", "reward", "tok/s", "gen tok/s", "memory", "time")
    table(columns, rows)
    _report_probe(results)
    for result in results:
        folder = Path(result.output_dir)
        plots = ", ".join(name for name in ("loss.png", "reward.png") if (folder / name).is_file())
        typer.echo(f"{result.name}: {folder}" + (f" ({plots})" if plots else ""))
    if results[-1].model:
        typer.echo(f"model: {results[-1].model}")


def _report_probe(results: list[StageResult]) -> None:
    if results[0].probe_before is None:
        return
    rows = [("before training", number(results[0].probe_before, ".3f"))]
    rows += [(f"after {result.name}", number(result.probe_after, ".3f")) for result in results]
    table(("held-out probe", "score"), rows)


def validate(
    recipe: RecipeArgument, overrides: OverridesArgument = None,
    data: Annotated[bool, typer.Option("--data", help="Read and tokenise the data too, as training would.")] = False,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the whole resolved configuration as YAML.")] = False,
) -> None:
    """Check a recipe and show what it resolves to.

    Nothing is trained and no model is downloaded. With --data the tokenizer and the data are read, as training would.
    """
    from aligntune.cli.overrides import parse
    from aligntune.core.recipe_run import check_backends, check_data
    from aligntune.core.recipes import load_plan

    plan = load_plan(recipe, parse(overrides or []))
    check_backends(plan)
    reports = check_data(plan) if data else {}
    for stage in plan.stages:
        _show_stage(stage, yaml=yaml)
        if stage.number in reports:
            typer.echo(reports[stage.number].text())
    if plan.probe is not None:
        typer.echo(f"probe: {plan.probe}, {plan.probe.max_samples or 'all'} prompts")
    typer.echo(f"{plan.recipe.path or recipe}: valid" + ("" if data else " (the data was not read; --data reads it)"))


def _show_stage(stage: StageConfig, *, yaml: bool) -> None:
    job = stage.job
    if yaml:
        from omegaconf import OmegaConf

        typer.echo((f"# stage {stage.name}\n" if stage.name else "") + OmegaConf.to_yaml(job.config))
        return
    from aligntune.core.resolve import option_table

    paths = option_table(job.spec.name)
    chosen = [(paths[name].path, _shown(job, name), origin) for name, origin in job.origin.items()
              if origin != "default" and name in paths]
    chosen += [("backend", job.backend, "chosen")] if job.origin["backend"] == "default" else []
    title = f"{stage.name or job.spec.name}: {job.spec.title}, backend {job.backend}"
    table(("option", "value", "from"), sorted(chosen), title=title)
    for notice in job.notices:
        typer.echo(f"- {notice}")


def _shown(job: Any, name: str) -> str:
    from aligntune.core.resolve import object_label

    value = vars(job.options)[name]
    return object_label(value) if name in job.objects and not isinstance(value, list) else str(value)


def preview(
    recipe: Annotated[str | None, typer.Argument(
        help="A YAML file, or the name of a packaged recipe; or none, with --dataset.", metavar="[RECIPE]",
        show_default=False)] = None,
    overrides: OverridesArgument = None,
    dataset: Annotated[str | None, typer.Option(help="Look at this dataset instead of a recipe's.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer and chat template, with --dataset.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="For which algorithm, with --dataset; sft.")] = None,
) -> None:
    """What the model will see.

    The kind of data that was recognised, lengths, masks, bad rows, one decoded example.
    """
    from aligntune.cli.overrides import parse
    from aligntune.core.recipe_run import check_data

    arguments = list(overrides or [])
    if dataset is not None and recipe is not None:
        arguments.insert(0, recipe)  # with --dataset the first word is an option already
    plan = _plan_to_preview(recipe, dataset, model, algorithm, parse(arguments))
    plan.probe = None
    reports = check_data(plan, list_bad_rows=True)
    for stage in plan.stages:
        if stage.name:
            typer.echo(f"stage {stage.name}")
        typer.echo(reports[stage.number].text())


def _plan_to_preview(
    recipe: str | None, dataset: str | None, model: str | None, algorithm: str | None, options: dict[str, Any]
) -> Plan:
    from aligntune.algorithms import ALGORITHMS
    from aligntune.core.recipes import load_plan
    from aligntune.errors import ConfigError

    if dataset is None:
        given = [name for name, value in (("--model", model), ("--algorithm", algorithm)) if value is not None]
        if given:
            raise ConfigError(f"{' and '.join(given)}: these go with --dataset; a recipe takes model_name=... instead")
        if recipe is None:
            raise ConfigError("preview: give a recipe, or --dataset")
        return load_plan(recipe, options)
    if model is None:
        raise ConfigError("preview --dataset: --model is wanted too (its tokenizer decides what the model sees); "
                          "builtin:tiny needs no download")
    name = algorithm or "sft"
    # One is wanted, and none is asked for here: it reads no column.
    needs_reward = name in ALGORITHMS and ALGORITHMS.load(name).needs_reward
    config = {"algorithm": name, "dataset_name": dataset, "model_name": model,
              **({"reward_functions": ["format"]} if needs_reward else {})}
    return load_plan(config, options)
