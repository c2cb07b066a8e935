"""generate, evaluate, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aligntune.cli.output import table
from aligntune.cli.training import LENIENT, OverridesArgument

if TYPE_CHECKING:
    from aligntune.core.recipes import Plan


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(generate)
    app.command(context_settings=LENIENT)(evaluate)
    app.command()(export)


def generate(
    model: Annotated[str, typer.Argument(help="A run folder, a saved model, a hub id, or builtin:NAME.",
                                         show_default=False)],
    prompts: Annotated[list[str] | None, typer.Argument(
        help="One answer each; without any, each line of stdin is one.", metavar="[PROMPT]...",
        show_default=False)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="256 by default.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; greedy where neither it nor --top-p, --top-k "
                                                      "or --min-p is given.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(show_default=False)] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this share of the likeliest one's "
                                                "probability.", show_default=False)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 tokens that occurred already become "
                                                             "unlikelier.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer; the answer keeps it. May be given "
                                                   "several times.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.", show_default=False)] = None,
    system_prompt: Annotated[str | None, typer.Option(show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts answered together.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[str, typer.Option(help="What generates: fast (our engine), hf (transformers), or auto: fast on a "
                                        "GPU, where it runs the model.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Answers of a model, on stdout."""
    from aligntune.core.callbacks import say
    from aligntune.core.generation import check_options
    from aligntune.core.generation import generate as answer
    from aligntune.core.inference import check_engine, generator_for, load
    from aligntune.errors import ConfigError

    asked = list(prompts or [])
    if not asked and not sys.stdin.isatty():
        asked = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not asked:
        raise ConfigError("generate: no prompt given")
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
               "min_p": min_p, "repetition_penalty": repetition_penalty, "stop_strings": stop}
    sampling = {name: value for name, value in options.items() if value is not None}
    check_options(sampling)  # before a model is loaded for nothing
    check_engine(engine)
    loaded, tokenizer = load(model, device=device, trust_remote_code=trust_remote_code)
    generator, told = generator_for(loaded, tokenizer, engine)
    if engine == "auto":
        say(f"generate: with {told}")
    texts = answer(loaded, tokenizer, asked, raw=raw, system_prompt=system_prompt, batch_size=batch_size, seed=seed,
                   generator=generator, **sampling)
    for prompt, text in zip(asked, texts, strict=True):
        typer.echo(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) if as_json else text)


def evaluate(
    recipe: Annotated[str, typer.Argument(help="A run folder (its newest checkpoint is evaluated), a YAML file or the "
                                          "name of a packaged recipe (its model_name is).", metavar="RUN|RECIPE",
                                          show_default=False)],
    overrides: OverridesArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Metrics on the evaluation data.

    Loss and perplexity, reward, accuracy and margin: whatever the algorithm has.
    """
    import tempfile

    from aligntune.cli.overrides import parse

    options = parse(overrides or [])
    with tempfile.TemporaryDirectory(prefix="aligntune-evaluate-") as scratch:
        plan, checkpoint = _to_evaluate(recipe, options, scratch)
        metrics = _metrics(plan, checkpoint)
    if as_json:
        typer.echo(json.dumps(metrics))
    else:
        table(("metric", "value"), [(name, f"{value:.6g}") for name, value in metrics.items()])


def _to_evaluate(recipe: str, options: dict[str, Any], scratch: str) -> tuple[Plan, Path | None]:
    """The plan, which writes to `scratch`, and the checkpoint to load, if it is that of a run."""
    from aligntune.core.checkpoints import newest_complete
    from aligntune.core.recipes import load_plan
    from aligntune.errors import ConfigError

    folder, checkpoint, source = Path(recipe).expanduser(), None, recipe
    if folder.is_dir() and (folder / "config.yaml").is_file():
        checkpoint, source = newest_complete(folder), str(folder / "config.yaml")
    elif not folder.exists() and "/" in recipe and folder.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"evaluate: there is no run folder {recipe!r}")
    elif (folder / "recipe.json").is_file():
        stages = sorted(entry.name for entry in folder.iterdir() if (entry / "config.yaml").is_file())
        raise ConfigError(f"evaluate: {recipe!r} is the folder of several stages: {', '.join(stages)}; give one")
    whole = {"resume": False, "output_dir": str(Path(scratch) / "run")}
    # A run is not continued here: its data and options are taken, its trackers are not.
    plan = load_plan(source, {**options, **whole, "report_to": "none", "overwrite": False})
    if plan.recipe.staged:
        raise ConfigError(f"evaluate: {recipe!r} has stages; train it, and give the folder of a stage")
    return plan, checkpoint


def _metrics(plan: Plan, checkpoint: Path | None) -> dict[str, float]:
    from aligntune.core.backend_factory import build_trainer
    from aligntune.core.rules import NO_EVALUATION, evaluates
    from aligntune.errors import DataError

    if not evaluates(vars(plan.stages[0].job.options)):
        raise DataError(f"evaluate: no evaluation data. {NO_EVALUATION}")  # before anything is loaded
    trainer = build_trainer(plan.stages[0].job)
    if checkpoint is not None:
        # Into the trainer of the run's own configuration: reference models stay what they were in training.
        trainer.trainer._load_from_checkpoint(str(checkpoint))
        trained = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        trainer.trainer.state.global_step, trainer.trainer.state.epoch = trained["global_step"], trained["epoch"]
    found = trainer.evaluate()
    return {name: value for name, value in sorted(found.items()) if isinstance(value, (int, float))}


def export(
    model: Annotated[str, typer.Argument(help="A run folder, a saved model, a hub id, or builtin:NAME.",
                                         metavar="RUN_OR_MODEL", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="The folder to write; files of other names in it stay.",
                                                show_default=False)] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The whole model with its adapters merged in, read back and "
                                         "compared; without it adapters alone.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="The hub repository to upload to; made where there is none.",
                                                    metavar="NAME", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made here is private.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """A trained model as a folder of its own, or on the hub.

    Weights keep the type that they are stored in.
    """
    from aligntune.core.callbacks import say
    from aligntune.core.inference import load_as_saved
    from aligntune.core.saving import check_repo_id, push, save
    from aligntune.core.trainer import no_bars
    from aligntune.errors import ConfigError

    if output is None and push_to_hub is None:
        raise ConfigError("export: give --output FOLDER, --push-to-hub NAME, or both")
    if push_to_hub is not None:
        check_repo_id(push_to_hub)  # before a model is loaded for nothing
    with no_bars():
        loaded, tokenizer = load_as_saved(model, trust_remote_code=trust_remote_code)
        if merged and not hasattr(loaded, "peft_config"):
            say("export: the model has no adapters to merge")
        if output is not None:
            check = save(loaded, tokenizer, output, merge_adapters=merged)
            if check is not None:
                say(f"read back and compared: {check}")
            typer.echo(str(output))
        if push_to_hub is not None:
            typer.echo(push(loaded, tokenizer, push_to_hub, merge_adapters=merged, private=private or None))
