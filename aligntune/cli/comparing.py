"""compare: two ways of training, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aligntune.cli.output import table
from aligntune.cli.training import LENIENT, OverridesArgument, RecipeArgument

if TYPE_CHECKING:
    from aligntune.compare.report import Report


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(context_settings=LENIENT)(compare)


def compare(
    recipe: RecipeArgument, overrides: OverridesArgument = None,
    a: Annotated[str, typer.Option("--a", help="One arm: trl, fast, liger, unsloth, or NAME,option=value,...")] = "trl",
    b: Annotated[str, typer.Option("--b", help="The other arm, the same way.")] = "fast",
    stage: Annotated[int | None, typer.Option(help="Which stage of a recipe with stages.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run; the recipe's by default.",
                                              show_default=False)] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each arm, in the order A B B A.")] = 2,
    warmup: Annotated[int, typer.Option(help="First steps that no speed is taken from.")] = 5,
    oracle: Annotated[bool, typer.Option("--oracle/--no-oracle", help="Hold gradients against an fp32 run, and losses "
                                         "against two implementations known to be equal.")] = True,
    target_loss: Annotated[float | None, typer.Option(help="Time to this loss; by default nearly where arm a ends.",
                                                      show_default=False)] = None,
    price: Annotated[float | None, typer.Option(help="Of the machine an hour.", show_default=False)] = None,
    asserts: Annotated[list[str] | None, typer.Option(
        "--assert", help="'speedup>=1.3', 'parity', ...; may be given several times.", show_default=False)] = None,
    baseline: Annotated[Path | None, typer.Option(help="An earlier report.json.", show_default=False)] = None,
    python_a: Annotated[str | None, typer.Option(help="Arm a's interpreter, or a folder of packages for it.",
                                                   show_default=False)] = None,
    python_b: Annotated[str | None, typer.Option(help="The same for arm b.", show_default=False)] = None,
    setup_a: Annotated[str | None, typer.Option(help="module:function, called with arm a's trainer before it trains.",
                                                show_default=False)] = None,
    setup_b: Annotated[str | None, typer.Option(help="The same for arm b.", show_default=False)] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the outputs.", show_default=False)] = None,
    fits: Annotated[str | None, typer.Option(help="Also find the largest 'batch' or 'context' that each arm trains on "
                                             "this card.", show_default=False)] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave gradients and distributions on disk.")] = False,
) -> None:
    """Train a recipe with two arms and say, with error bars, whether they train the same model and what each costs.

    Exits with 9 if an assertion does not hold or the baseline is missed, with 10 if the arms cannot be compared.
    """
    from aligntune.cli.overrides import parse
    from aligntune.compare import compare as run

    report = run(
        recipe, a=a, b=b, stage=stage, overrides=parse(overrides or []), steps=steps, repeats=repeats, warmup=warmup,
        oracle=oracle, target_loss=target_loss, price=price, asserts=asserts or [], baseline=baseline,
        python_a=python_a, python_b=python_b, setup_a=setup_a, setup_b=setup_b, output_dir=output_dir, keep=keep,
        fits=fits,
    )
    show(report)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def show(report: Report) -> None:
    """The verdict, what was found, the tables that matter, and where the rest lies."""
    from aligntune.compare.tables import first_tables

    typer.echo(report.verdict)
    for one in report.data["findings"]:
        typer.echo(f"- {one['text']}")
    for one in report.data["assertions"]:
        typer.echo(f"- assertion {one['text']}: {'holds' if one['holds'] else 'FAILED'} ({one['found']})")
    for text in (report.data["baseline"] or {}).get("worse", []):
        typer.echo(f"- worse than the baseline: {text}")
    for one in first_tables(report.data):
        table(one.columns, one.rows, title=one.title)
        if one.note:
            typer.echo(one.note + "\n")
    typer.echo(f"report: {report.folder / 'report.html'} (and report.md, report.json, report.png, steps.csv)")
