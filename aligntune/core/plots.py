"""loss.png and reward.png, drawn from metrics.jsonl."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RAW, SMOOTH, EVAL = "#9ecae1", "#08519c", "#d94801"


def draw(records: Sequence[Mapping[str, Any]], folder: Path, *, title: str, online: bool) -> list[Path]:
    """Write loss.png, and reward.png for online methods; a plot without a single point is not drawn."""
    wanted = [("loss", "loss.png", "loss")]
    if online:
        wanted.append(("reward", "reward.png", "mean reward"))
    return [
        path for key, name, label in wanted
        if (path := _draw(records, folder / name, key=key, label=label, title=title)) is not None
    ]


def series(records: Sequence[Mapping[str, Any]], kind: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key` among the records of `kind`; a step logged twice counts with its last value."""
    points = {
        int(record["step"]): float(record[key]) for record in records
        if record.get("kind") == kind and isinstance(record.get(key), (int, float))
    }
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the `width` values around each (an odd number; fewer at both ends): it does not lag behind a trend."""
    half = width // 2
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _draw(records: Sequence[Mapping[str, Any]], path: Path, *, key: str, label: str, title: str) -> Path | None:
    steps, values = series(records, "train", key)
    eval_steps, eval_values = series(records, "eval", f"eval_{key}")
    if not steps and not eval_steps:
        return None
    # Figure with its own canvas: pyplot would change the process's backend and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.97, top=0.92, bottom=0.12)
    many = len(steps) >= 10
    marker = "" if len(steps) > 40 else "."
    if steps:
        axes.plot(steps, values, color=RAW if many else SMOOTH, linewidth=1, marker=marker, label="logged")
    if many:
        width = max(3, len(steps) // 15 | 1)
        axes.plot(steps, smooth(values, width), color=SMOOTH, linewidth=2, label=f"mean over {width} logs")
    if eval_steps:
        axes.plot(eval_steps, eval_values, color=EVAL, linewidth=1.2, linestyle="--", marker="o", markersize=5,
                  label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.png")
    figure.savefig(temporary)
    os.replace(temporary, path)
    return path
