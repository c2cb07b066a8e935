"""report.png: the verdict's four plots in one picture, for places that take no HTML."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"a": "#1f66b0", "b": "#c04f12"}
_GREY = "#7b8794"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Losses, their difference, step times and memory."""
    # Figure with its own canvas: pyplot would change the process's backend and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.4), dpi=110)
    FigureCanvasAgg(figure)
    (loss, apart), (times, memory) = figure.subplots(2, 2)
    labels = {role: f"{role}: {textwrap.shorten(report['arms'][role]['label'], 40)}" for role in ("a", "b")}
    for role in ("a", "b"):
        values = np.array([run["loss"] for run in report["curves"][role]], dtype=float)
        steps = np.arange(1, values.shape[1] + 1)
        loss.plot(steps, values.mean(0), color=COLOURS[role], label=labels[role], linewidth=1.4)
        loss.fill_between(steps, values.min(0), values.max(0), color=COLOURS[role], alpha=0.2, linewidth=0)
    loss.set(title="loss", xlabel="optimizer step")
    loss.legend(frameon=False, fontsize=8)
    _differences(report, apart)
    if report["speed"]:
        for role in ("a", "b"):
            milliseconds = 1e3 * np.array(report["speed"][role]["seconds"])
            times.hist(milliseconds, bins=30, color=COLOURS[role], alpha=0.55, label=labels[role])
        times.legend(frameon=False, fontsize=8)
    times.set(title="step times after the warm-up", xlabel="ms")
    _memory(report, memory)
    figure.suptitle("\n".join(textwrap.wrap(report["verdict"], 120)[:4]), fontsize=10)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)


def _differences(report: Mapping[str, Any], axes: Any) -> None:
    losses = report["parity"]["losses"]
    axes.set(title="difference of the losses, b - a", xlabel="optimizer step")
    if not losses:
        return
    pairs = np.array(losses["residuals"])
    steps = np.arange(1, pairs.shape[1] + 1)
    axes.plot(steps, pairs.mean(0), color=COLOURS["b"], linewidth=1.4)
    axes.fill_between(steps, pairs.min(0), pairs.max(0), color=COLOURS["b"], alpha=0.2, linewidth=0)
    if losses["yardstick"]:
        axes.plot(steps, losses["yardstick"], color=_GREY, linestyle="--", linewidth=1, label="yardstick")
        axes.legend(frameon=False, fontsize=8)
    axes.axhline(0, color=_GREY, linewidth=0.7)


def _memory(report: Mapping[str, Any], axes: Any) -> None:
    names = ("weights", "reference", "gradients", "optimizer", "head", "activations")
    left = np.zeros(2)
    for name in names:
        sizes = np.array([(report["memory"][role][name] or 0) / 2**20 for role in ("b", "a")])
        if sizes.any():
            axes.barh(["b", "a"], sizes, left=left, label=name, height=0.55)
            left += sizes
    axes.set(title="memory by category, MiB")
    if left.any():
        axes.legend(frameon=False, fontsize=8, ncols=3)
