"""doctor: what this installation and machine can do, and what is wrong with them."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from aligntune.cli.output import gib, table

LOW_DISK = 10 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: "bad" makes the command fail."""

    state: Literal["ok", "note", "bad"]
    what: str
    found: str


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(doctor)


def doctor() -> None:
    """Check this installation and machine.

    Versions, GPU, bitsandbytes, Triton, disk, caches, environment; exit code 1 if something is broken.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (python, packages, gpu, kernels, auto, storage, environment)
    findings = [finding for check in checks for finding in check()]
    table(("", "", ""), [(finding.state, finding.what, finding.found) for finding in findings])
    bad = [finding for finding in findings if finding.state == "bad"]
    if bad:
        typer.echo(f"{len(bad)} broken: {', '.join(finding.what for finding in bad)}", err=True)
        raise typer.Exit(1)
    typer.echo("nothing is broken")


def python() -> Iterator[Finding]:
    """The interpreter and this package."""
    from aligntune._version import __version__

    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok" if sys.version_info >= (3, 11) else "bad", "python", f"{version} ({sys.executable})")
    yield Finding("ok", "aligntune", f"{__version__} ({Path(__file__).parents[1]})")


def packages() -> Iterator[Finding]:
    """Every dependency is there; those with a tested range are inside it."""
    from importlib.metadata import PackageNotFoundError, version

    from aligntune.backends._compat import TESTED, minor

    for name in (*TESTED, "accelerate", "datasets", "omegaconf"):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("bad", name, f"not installed: pip install {name}")
            continue
        if name not in TESTED:
            yield Finding("ok", name, found)
            continue
        low, high = TESTED[name]
        tested = f"tested with {low}" + (f" to {high}" if high != low else "")
        if minor(found) < minor(low):
            yield Finding("bad", name, f"{found}, too old: {tested}")
        elif minor(found) > minor(high):
            yield Finding("note", name, f"{found}, newer than any that was tested: {tested}")
        else:
            yield Finding("ok", name, f"{found} ({tested})")


def gpu() -> Iterator[Finding]:
    """torch can be imported, how it was built, and the cards it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("bad", "torch import", str(error).partition("\n")[0])
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    driver = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
    if torch.cuda.is_available():
        yield Finding("ok", "torch build", build)
    elif driver:
        yield Finding("bad", "torch build", f"{build}: an NVIDIA driver is here and torch cannot use it; "
                      + ("the driver may be too old for this CUDA" if torch.version.cuda else
                         "install a CUDA build of torch"))
    else:
        yield Finding("note", "torch build", f"{build}; no NVIDIA driver here: training runs on the CPU")
    from aligntune.core.environment import cards

    for index, card in enumerate(cards()):
        free = gib(torch.cuda.mem_get_info(index)[0])
        yield Finding("ok", f"GPU {index}", f"{card['name']}, {gib(card['memory_bytes'])} ({free} free), compute "
                                            f"capability {card['compute_capability']}")


def kernels() -> Iterator[Finding]:
    """bitsandbytes (QLoRA, 8-bit optimizers) and Triton (backend fast), imported."""
    from importlib.metadata import version

    for name, purpose, needed in (("bitsandbytes", "4-bit bases and 8-bit optimizers", True),
                                  ("triton", "backend fast", sys.platform == "linux")):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            yield Finding("bad" if needed else "note", name, f"{reason}: no {purpose}")
            continue
        yield Finding("ok", name, f"{version(name)} ({purpose})")


def auto() -> Iterator[Finding]:
    """What each backend can do here, and which one "auto" takes."""
    from aligntune.backends import BACKENDS

    for name in BACKENDS.names():
        here = BACKENDS.load(name).available()
        yield Finding("ok" if here else "note", f"backend {name}", str(here))
    fast = BACKENDS.load("fast").available() and os.environ.get("TRITON_INTERPRET") != "1"
    yield Finding("ok", "backend auto", "fast, and trl for what fast does not run" if fast else "trl")


def storage() -> Iterator[Finding]:
    """Room for checkpoints, and caches that can be written."""
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("ok" if free > LOW_DISK else "note", "disk here",
                  f"{gib(free)} free in {Path.cwd()}" + ("" if free > LOW_DISK else "; checkpoints may not fit"))
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    places = {"runs": Path.cwd(), "hub cache": Path(os.environ.get("HF_HUB_CACHE", home / "hub")),
              "datasets cache": Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))}
    for what, path in places.items():
        fault = unwritable(path)
        if fault:
            yield Finding("bad", what, fault)
        else:
            yield Finding("ok", what, f"{path} can be written")


def unwritable(path: Path) -> str:
    """Why no file can be made in `path` (or in the folder that it would be made in), or ""."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"


def environment() -> Iterator[Finding]:
    """Variables that change what a run does."""
    from aligntune.core.environment import flags

    notes = {"TRITON_INTERPRET": "kernels are interpreted, for tests, about 1000x slower",
             "HF_HUB_OFFLINE": "nothing is downloaded", "TRANSFORMERS_OFFLINE": "nothing is downloaded",
             "HF_DATASETS_OFFLINE": "no dataset is downloaded",
             "CUDA_VISIBLE_DEVICES": "only these GPUs are seen", "CUDA_LAUNCH_BLOCKING": "slow"}
    for name, value in flags().items():
        note = notes.get(name)
        on = value not in ("", "0") or name == "CUDA_VISIBLE_DEVICES"
        yield Finding("note" if note and on else "ok", name, f"{value!r}" + (f": {note}" if note and on else ""))
