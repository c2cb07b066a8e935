"""recipes list, show, copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aligntune.cli.output import table

NameArgument = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipes that come with the package.")
    recipes.command("list")(list_)
    recipes.command()(show)
    recipes.command()(copy)
    app.add_typer(recipes, name="recipes")


def list_() -> None:
    """Names, algorithms and a line about each."""
    from aligntune.core.recipes import list_recipes

    table(("recipe", "trains", "about"),
          [(recipe.name, ", ".join(recipe.algorithms), recipe.summary) for recipe in list_recipes()])


def show(name: NameArgument) -> None:
    """Print a recipe as it is written."""
    from aligntune.core.recipes import recipe_path

    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


def copy(
    name: NameArgument,
    to: Annotated[Path | None, typer.Argument(help="File or folder; NAME.yaml here by default.",
                                              show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe to a file of yours, to change it there."""
    from aligntune.core.recipes import recipe_path
    from aligntune.core.run_dir import writing
    from aligntune.errors import ConfigError

    source = recipe_path(name)
    text = source.read_bytes()
    target = to if to is not None else Path(source.name)
    with writing("recipes copy", target):
        if target.is_dir():
            target = target / source.name
        if target.exists() and not force:
            raise ConfigError(f"{str(target)!r} is there already; --force replaces it")
        if not target.parent.is_dir():
            raise ConfigError(f"no folder {str(target.parent)!r}")
        target.write_bytes(text)
    typer.echo(str(target))
