"""The curve of each algorithm's page, from the committed histories: `python -m benchmarks.curves` writes them anew.

`docs/assets/curves/NAME.svg` has two panels of what a builtin recipe's run logged, `learning-NAME.svg` those of
backends beside each other, where they were measured; nothing in them is drawn by hand.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.agreement import interpolated
from benchmarks.tables import RESULTS, ROOT

ASSETS = ROOT / "docs" / "assets" / "curves"
LEARNING = RESULTS / "learning.json"
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot: its title, and the logged names that it draws."""

    title: str
    metrics: tuple[str, ...]


_LOSS = Panel("loss", ("loss", "eval_loss"))
_PAIRS = (_LOSS, Panel("pairs ranked right", ("rewards/accuracies", "eval_rewards/accuracies")))
_REWARD = Panel("reward of the answers sampled", ("reward",))

CURVES: dict[str, tuple[Panel, Panel]] = {
    "sft": (_LOSS, Panel("right tokens", ("mean_token_accuracy", "eval_mean_token_accuracy"))),
    "reward": (_LOSS, Panel("pairs ranked right", ("accuracy", "eval_accuracy"))),
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "cpo"), _PAIRS),
    "kto": (_LOSS, Panel("reward margin", ("rewards/margins", "eval_rewards/margins"))),
    "ppo": (_REWARD, Panel("loss of the critic", ("loss/value_avg",))),
    "rloo": (_REWARD, Panel("KL of an answer to the reference, nats", ("kl",))),
    "grpo": (_REWARD, Panel("KL of a token to the reference, nats", ("kl",))),
    "gspo": (_REWARD, Panel("share of answers clipped", ("clip_ratio/region_mean",))),
    "dapo": (Panel("reward of the batch, and of all drawn", ("reward", "dynamic_sampling/reward_drawn")),
             Panel("groups drawn that were flat", ("dynamic_sampling/flat_groups",))),
    "dr_grpo": (_REWARD, Panel("tokens of an answer", ("completions/mean_length",))),
}
"""What is drawn of each algorithm's run; `benchmarks.recipes` keeps these metrics in the committed history."""

WIDTH, HEIGHT = 720, 240
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT, APART = 48, 34, 290, 156, 358
COLOURS = ("#1f6feb", "#d1570a")


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between `low` and `high`."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda each: abs(each - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _bounds(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _frame(title: str, bounds: tuple[float, float], last: float, offset: int
           ) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
    """Title and ruled axes of a plot, x from 0 to `last`; and what maps values onto them."""
    low, high = bounds

    def x(step: float) -> float:
        return offset + LEFT + PLOT_WIDTH * step / last

    def y(value: float) -> float:
        return TOP + PLOT_HEIGHT * (high - value) / (high - low)

    parts = [f'<text x="{offset + LEFT}" y="{TOP - 14}" font-weight="bold">{title}</text>']
    for value in ticks(low, high):
        at = f"{y(value):.1f}"
        parts.append(f'<line x1="{x(0):.1f}" x2="{x(last):.1f}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(0) - 6:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in ticks(0, last):
        parts.append(f'<text x="{x(step):.1f}" y="{TOP + PLOT_HEIGHT + 16}" text-anchor="middle">{step:g}</text>')
    return parts, x, y


def _plot(panel: Panel, series: dict[str, Points], offset: int) -> list[str]:
    lines = [(name, series[name]) for name in panel.metrics if series.get(name)]
    xs, ys = ([point[axis] for _, points in lines for point in points] for axis in (0, 1))
    parts, x, y = _frame(panel.title, _bounds(ys), max(xs), offset)
    for (_, points), colour in zip(lines, COLOURS, strict=False):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(points) < 20:
            parts += [f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.6" fill="{colour}"/>'
                      for step, value in points]
    for index, ((name, _), colour) in enumerate(zip(lines, COLOURS, strict=False)):
        parts.append(f'<text x="{x(0) + index * 150:.1f}" y="{TOP + PLOT_HEIGHT + 36}" fill="{colour}">{name}</text>')
    return parts


def chosen(report: dict[str, Any]) -> dict[str, Any]:
    """The row that is drawn: the first seed whose history was kept.

    Raises:
        LookupError: no row has one.
    """
    kept = [row for row in report["rows"] if row.get("history")]
    if not kept:
        raise LookupError(f"no history in the results of {report['command']}")
    return kept[0]


def svg(algorithm: str, report: dict[str, Any]) -> str:
    """The image of a committed result, as text."""
    row = chosen(report)
    series = {name: [tuple(point) for point in points] for name, points in row["history"].items()}
    about = f"{report['command'].replace('SEED', str(row['seed']))}, by step of {algorithm}"
    return _page(about, [_plot(panel, series, index * APART) for index, panel in enumerate(CURVES[algorithm])])


def _page(about: str, plots: Sequence[list[str]]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f'<title>{about}</title>', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    return "\n".join([*parts, *(part for plot in plots for part in plot), "</svg>"]) + "\n"


# What `benchmarks.learning` measured: backends beside each other, a curve a seed.

GRID = 48
DRAWN = {"fast": COLOURS[0], "trl": COLOURS[1]}


def _band(runs: Sequence[Points], last: float) -> list[tuple[float, float, float]]:
    """(x, mean, deviation) over seeds of curves that each are smoothed over a sixth of their points, up to `last`."""
    lines = [list(zip(*_smoothed(points), strict=True)) for points in runs]
    found = []
    for i in range(GRID + 1):
        at = last * i / GRID
        values = [interpolated(at, *each) for each in lines]
        found.append((at, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return found


def _smoothed(points: Points) -> Points:
    reach = max(1, len(points) // 12)
    near = [points[max(0, i - min(reach, i, len(points) - 1 - i)) : i + 1 + min(reach, i, len(points) - 1 - i)]
            for i in range(len(points))]
    return [(points[i][0], statistics.fmean(value for _, value in some)) for i, some in enumerate(near)]


def learning_svg(row: dict[str, Any]) -> str:
    """The image of an algorithm's row: reward by step and by seconds, each backend's mean with twice its deviation."""
    plots = []
    unit = f"seconds since the first step, {row['at_once']} at once" if row["at_once"] > 1 else (
        "seconds since the first step")
    for index, (axis, title) in enumerate(((0, "reward, by step"), (1, f"reward, by {unit}"))):
        curves: dict[str, list[Points]] = {}
        for run in row["runs"]:
            curves.setdefault(run["backend"], []).append([(point[axis], point[2]) for point in run["points"]])
        bands = {name: _band(runs, statistics.fmean(points[-1][0] for points in runs))
                 for name, runs in curves.items()}
        edges = [mean + side * 2 * spread for band in bands.values() for _, mean, spread in band for side in (-1, 1)]
        last = max(band[-1][0] for band in bands.values())
        parts, x, y = _frame(title, _bounds(edges), last, index * APART)
        for name, band in bands.items():
            around = [(at, mean + 2 * spread) for at, mean, spread in band] + [
                (at, mean - 2 * spread) for at, mean, spread in reversed(band)]
            outline = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in around)
            parts.append(f'<polygon points="{outline}" fill="{DRAWN[name]}" fill-opacity="0.15"/>')
        for number, (name, band) in enumerate(bands.items()):
            path = " ".join(f"{x(at):.1f},{y(mean):.1f}" for at, mean, _ in band)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{DRAWN[name]}" stroke-width="1.8"/>')
            parts.append(f'<text x="{x(0) + number * 150:.1f}" y="{TOP + PLOT_HEIGHT + 36}" fill="{DRAWN[name]}">'
                         f'{name}, {len(curves[name])} seeds</text>')
        plots.append(parts)
    return _page(f"{row['command']}: {row['algorithm']}", plots)


def learning_rows() -> list[dict[str, Any]]:
    """The committed rows of `benchmarks.learning`; none before it has run."""
    return json.loads(LEARNING.read_text())["rows"] if LEARNING.exists() else []


def report_of(algorithm: str) -> dict[str, Any]:
    return json.loads((RESULTS / "recipes" / f"{algorithm}-builtin.json").read_text())


def main() -> int:
    ASSETS.mkdir(parents=True, exist_ok=True)
    images = {algorithm: svg(algorithm, report_of(algorithm)) for algorithm in CURVES}
    images |= {f"learning-{row['algorithm']}": learning_svg(row) for row in learning_rows()}
    for name, text in images.items():
        path = ASSETS / f"{name}.svg"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
