"""launch: the command that starts several processes."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from aligntune.cli.training import LENIENT, OverridesArgument, RecipeArgument


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(context_settings=LENIENT)(launch)


def launch(
    recipe: RecipeArgument, overrides: OverridesArgument = None,
    nproc: Annotated[int | None, typer.Option(help="Processes; the number of GPUs by default.", min=1)] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU although there are GPUs.")] = False,
    accelerate_config: Annotated[Path | None, typer.Option(
        help="A configuration of accelerate (FSDP, DeepSpeed, several machines); `accelerate config` writes one.",
        show_default=False)] = None,
    show: Annotated[bool, typer.Option("--print", help="Print the command instead of running it.")] = False,
) -> None:
    """Train a recipe with several processes.

    Through accelerate on GPUs, through torchrun on the CPU (where accelerate starts one process in silence).
    """
    from aligntune.cli.overrides import parse
    from aligntune.core.recipes import load_plan

    arguments = list(overrides or [])
    load_plan(recipe, parse(arguments))  # a typo is told once, here, not by each process
    command, environment = command_of(
        recipe, arguments, nproc=nproc, gpus=0 if cpu else _gpus(), force_cpu=cpu, accelerate_config=accelerate_config)
    shown = shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])
    if show:
        typer.echo(shown)
        return
    typer.echo(shown, err=True)
    os.execvpe(command[0], command, {**os.environ, **environment})


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def command_of(
    recipe: str, overrides: list[str], *, nproc: int | None, gpus: int, force_cpu: bool = False,
    accelerate_config: Path | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command and what it needs in its environment.

    Raises:
        ConfigError: more processes than GPUs, no number on a machine without GPUs, or no such file.
    """
    from aligntune.errors import ConfigError

    train = ["-m", "aligntune", "train", recipe, *overrides]
    if accelerate_config is not None and not accelerate_config.is_file():
        raise ConfigError(f"--accelerate-config: no file {str(accelerate_config)!r}")
    if gpus:
        if nproc is not None and nproc > gpus:
            raise ConfigError(f"--nproc {nproc}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        if accelerate_config is not None:
            command += ["--config_file", str(accelerate_config)]
            command += ["--num_processes", str(nproc)] if nproc is not None else []
        else:
            processes = nproc or gpus
            command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
                        "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
        return [*command, *train], {}
    if nproc is None:
        raise ConfigError("--nproc: how many processes? There is no GPU here to count" if not force_cpu else
                          "--nproc: how many processes?")
    if accelerate_config is not None:
        raise ConfigError("--accelerate-config: accelerate starts ONE process on a CPU, whatever its configuration "
                          "says; torchrun is used there and reads none")
    if force_cpu:
        train.append("model.device=cpu")
    # Each process would otherwise start a thread a core.
    threads = max(1, (os.cpu_count() or 1) // nproc)
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    if force_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc),
            *train], environment
