"""The commands and how they end: errors as messages with an exit code, tracebacks with --debug.

Each command imports what it needs when it runs: `--help` imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from aligntune.cli import comparing, doctor, inspecting, launching, modelling, recipe_files, training
from aligntune.core import notices
from aligntune.errors import AlignTuneError

EPILOG = (
    "Exit codes: 0 done; 1 an unforeseen error, a model that cannot be loaded, or a failed check of doctor; 2 command "
    "line or configuration; 3 data; 4 backend not available here; 5 algorithm not supported by the backend; "
    "6 checkpoint; 7 a loss, gradient or reward that is not a number; 8 a reward function that failed; 9 an assertion "
    "of compare does not hold; 10 arms that cannot be compared; 11 the GPU ran out of memory; 130 Ctrl-C."
)


class Commands(TyperGroup):
    """A group whose errors are messages."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--debug` is understood wherever it stands."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlignTuneError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            if ctx.params.get("debug"):
                traceback.print_exc()
            complain("interrupted" + (f": {interrupt}" if str(interrupt) else ""), mark="")
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
training.register(app)
modelling.register(app)
recipe_files.register(app)
inspecting.register(app)
doctor.register(app)
launching.register(app)
comparing.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from aligntune._version import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Post-training for language models on interchangeable backends."""
    if debug:
        sys.excepthook = sys.__excepthook__


def complain(text: str, mark: str = "error: ") -> None:
    """An error on stderr; of several processes with the same error, the first one's in full."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        text = f"[rank {rank}] " + text.partition("\n")[0]
    typer.echo(mark + text, err=True)


def _unforeseen(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        complain("interrupted", mark="")
        return
    text = str(error).strip().partition("\n")[0]
    complain(f"unforeseen {kind.__name__}: {text}" if text else f"unforeseen {kind.__name__}")
    typer.echo("`--debug` shows where it happened", err=True)


def run() -> None:
    """Run the command line of this process."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.warnoptions:
        # What libraries deprecate among themselves is nothing that the reader of a command line can change.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars in a file are thousands of lines
    notices.quiet_libraries()
    # typer would install a hook of its own; the command alone does not.
    sys.excepthook = _unforeseen
    get_command(app)(prog_name="aligntune")
