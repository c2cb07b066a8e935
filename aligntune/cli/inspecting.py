"""backends, explain, options: what can be asked before anything is trained."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from aligntune.cli.output import table


class Format(enum.StrEnum):
    """How options are printed."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON_SCHEMA = "json-schema"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(backends)
    app.command()(explain)
    app.command()(options)


def backends() -> None:
    """Which backend runs which algorithm.

    With the reasons, and what can run on this machine.
    """
    from aligntune.algorithms import ALGORITHMS
    from aligntune.backends import BACKENDS
    from aligntune.backends.base import supports

    engines = [BACKENDS.load(name) for name in BACKENDS.names()]
    reasons: list[str] = []
    rows = []
    for algorithm in ALGORITHMS:
        cells = []
        for engine in engines:
            verdict = supports(engine, algorithm.name)
            if verdict:
                cells.append("yes")
                continue
            reason = f"{engine.name}: {verdict.reason}"
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"no [{reasons.index(reason) + 1}]")
        rows.append((algorithm.name, algorithm.summary, *cells))
    table(("algorithm", "", *(engine.name for engine in engines)), rows)
    for number, reason in enumerate(reasons, 1):
        typer.echo(f"[{number}] {reason}")
    typer.echo("Not with these options (`aligntune explain BACKEND ALGORITHM` says why):")
    for engine in engines:
        if engine.gates:
            typer.echo(f"  {engine.name}: {', '.join(map(str, engine.gates))}")
    typer.echo("On this machine:")
    for engine in engines:
        typer.echo(f"  {engine.name}: {engine.available()}")


def explain(
    backend: Annotated[str, typer.Argument(show_default=False)],
    algorithm: Annotated[str, typer.Argument(show_default=False)],
) -> None:
    """How a backend runs an algorithm, or why not.

    Its data, options, defaults, and what differs from TRL's defaults.
    """
    from aligntune.core.introspection import explain as ask

    typer.echo(str(ask(backend, algorithm)))


def options(
    algorithm: Annotated[str | None, typer.Argument(help="Only the options that it takes.",
                                                    show_default=False)] = None,
    format: Annotated[Format, typer.Option(help="How they are printed.")] = Format.TEXT,
) -> None:
    """Every option with its default and meaning."""
    from aligntune.core import option_docs

    if format is Format.JSON_SCHEMA:
        import json

        typer.echo(json.dumps(option_docs.json_schema(algorithm), indent=2))
    elif format is Format.MARKDOWN:
        typer.echo(option_docs.markdown(algorithm))
    else:
        typer.echo(option_docs.text(algorithm))
