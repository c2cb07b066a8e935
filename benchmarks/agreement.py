"""Whether two backends' reward curves are those of one learner, seed by seed: both backends began at the seed's model.

Steps are cut into windows; in a window a seed counts with the difference of its two mean rewards. What seeds have in
common, and what one began with, is in neither. Two things are asked of the differences:

    windows  the mean over seeds is apart from 0 by no more than chance: 3.5 standard errors of such a mean, of the
             deviation over seeds in all windows together, and no less than what sampling puts between two means,
             3.5 sqrt(2 / (seeds x points)) x the deviation of a point, which the differences of neighbouring points
             give. And by no more than 0.1: one seed that collapses is not excused by the spread that it makes
    whole    the mean difference over all windows, with its 95 % interval (Student's t over seeds), which lies within
             what a learner at half the reference's pace would be behind, to both sides; how much that is, the
             reference's own curve says, run through at half its speed

Curves agree that rose and passed both. They differ where a window is apart by more than chance, or 0 is not in the
interval of curves that do not agree. All others show nothing: what they rise by is too little, or their spread too
large, to tell a learner from one that is half as fast. Of made-up pairs with five
seeds and 300 steps, whose runs stray by 0.03 and points scatter by 0.035, 96 of 100 agreed where one learner rises by
0.45, 92 where it rises by 0.3, and 5 differed; at a third of the pace all differed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aligntune.compare.stats import student

WINDOWS, ERRORS, MOST, PACE = 6, 3.5, 0.1, 0.5
GAIN = 0.05
"""What a mean rises by, from the first window to the last third, where something was learnt."""
Points = Sequence[Sequence[float]]
"""[(step, seconds since the first step, reward), ...] of one run."""
Curves = Mapping[str, Mapping[int, Points]]
"""Of each backend, the reference first, a curve a seed."""


def curves_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Points]]:
    """The curves of a report's runs, which are in the order of the backends."""
    found: dict[str, dict[int, Points]] = {}
    for run in runs:
        found.setdefault(run["backend"], {})[run["seed"]] = run["points"]
    return found


def judge(curves: Curves) -> dict[str, Any]:
    """What holds between two backends' curves over the seeds that both have.

    Returns:
        `agree`, `differ`: as above; neither is "not shown". `learnt`: both means rose. `windows`, `last_third`: of
            each the steps, [mean, deviation] by backend, how far the means are `apart`, and what `chance` does.
            `whole`: the other's mean less the reference's, its `interval`, and `half_pace`, what a learner half as
            fast would be behind.
        `by_time`: `moments` and `whole`, at moments of the reference's run, a run that is over counting with its last
            window. `not_behind`: the other is nowhere lower beyond chance or by 0.1, and over all moments surely by
            less than `half_pace`. `behind`: it is lower beyond chance.
        `why`: why there is no judgement, in place of all that.
    """
    if len(curves) != 2:
        return {"why": f"two backends are compared, {len(curves)} ran"}
    reference, other = curves
    seeds = sorted(curves[reference].keys() & curves[other].keys())
    if len(seeds) < 2:
        return {"why": "a spread needs two seeds of each backend"}
    count = min(len(runs[seed]) for runs in curves.values() for seed in seeds)
    if count < 2:
        return {"why": "a curve needs two points"}
    cut = {name: [[*runs[seed]][:count] for seed in seeds] for name, runs in curves.items()}
    steps = {tuple(point[0] for point in points) for runs in cut.values() for points in runs}
    if len(steps) > 1:
        return {"why": "the runs logged rewards of other steps"}
    noise = max(map(_noise, cut.values()))
    half = statistics.fmean(map(_lost_at_half_pace, cut[reference]))
    spans, third = spans_of(count), (count - max(1, count // 3), count)
    of_windows, of_third = ({name: [[each[2] for each in centres(points, some)] for points in runs]
                             for name, runs in cut.items()} for some in (spans, [third]))
    windows, whole = _compared(of_windows, spans, noise, half)
    last = _apart(of_third, 0, _chance(_differences(of_windows), third, noise))
    (at,) = steps
    for one, (low, high) in zip((*windows, last), (*spans, third), strict=True):
        one["steps"] = [at[low], at[high - 1]]
    learnt = all(last[name][0] - windows[0][name][0] > GAIN for name in curves)
    held = all(one["apart"] <= min(MOST, one["chance"]) for one in (*windows, last))
    agree = learnt and held and -half < whole["interval"][0] and whole["interval"][1] < half
    beyond = any(one["apart"] > one["chance"] for one in (*windows, last))
    differ = not agree and (beyond or not whole["interval"][0] <= 0 <= whole["interval"][1])
    return {"agree": agree, "differ": differ, "learnt": learnt, "whole": whole, "last_third": last,
            "windows": windows, "by_time": _by_time(cut, spans, noise, half)}


def verdict(judgement: Mapping[str, Any]) -> str:
    """What the curves show, in words."""
    return "they agree" if judgement["agree"] else "they differ" if judgement["differ"] else "not shown by this run"


def spans_of(count: int) -> list[tuple[int, int]]:
    """Windows of `count` points, [first, past the last)."""
    number = max(1, min(WINDOWS, count // 2))
    return [(count * i // number, count * (i + 1) // number) for i in range(number)]


def centres(points: Points, spans: Sequence[tuple[int, int]]) -> list[tuple[float, float, float]]:
    """(step, seconds, reward), the mean of each window."""
    return [tuple(statistics.fmean(point[axis] for point in points[low:high]) for axis in range(3))  # type: ignore[misc]
            for low, high in spans]


def interpolated(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The line through (xs, ys), flat beyond its ends; xs rise."""
    if at <= xs[0]:
        return ys[0]
    for i in range(1, len(xs)):
        if at <= xs[i]:
            share = (at - xs[i - 1]) / (xs[i] - xs[i - 1]) if xs[i] > xs[i - 1] else 1.0
            return ys[i - 1] + share * (ys[i] - ys[i - 1])
    return ys[-1]


def _noise(runs: Sequence[Points]) -> float:
    """The deviation of one point about its curve: neighbours differ by little else."""
    squares = [(points[i][2] - points[i - 1][2]) ** 2 for points in runs for i in range(1, len(points))]
    return math.sqrt(statistics.fmean(squares) / 2)


def _lost_at_half_pace(points: Points) -> float:
    """The curve's mean reward less that of the part that a learner at `PACE` would come to in as many steps."""
    return statistics.fmean(point[2] - points[int(PACE * i)][2] for i, point in enumerate(points))


def _differences(values: Mapping[str, list[list[float]]]) -> list[list[float]]:
    """Of each seed, in each window: the other backend's reward less the reference's."""
    reference, other = values.values()
    return [[y - x for x, y in zip(*runs, strict=True)] for runs in zip(reference, other, strict=True)]


def _chance(differences: list[list[float]], span: tuple[int, int], noise: float) -> float:
    """What chance puts between two means over seeds, each seed's of so many points."""
    seeds = len(differences)
    deviation = math.sqrt(statistics.fmean(statistics.variance(window) for window in zip(*differences, strict=True)))
    return ERRORS * max(deviation, noise * math.sqrt(2 / (span[1] - span[0]))) / math.sqrt(seeds)


def _apart(values: Mapping[str, list[list[float]]], window: int, chance: float) -> dict[str, Any]:
    found = {name: [run[window] for run in runs] for name, runs in values.items()}
    means = [statistics.fmean(each) for each in found.values()]
    return {**{name: [statistics.fmean(each), statistics.stdev(each)] for name, each in found.items()},
            "apart": abs(means[1] - means[0]), "chance": chance}


def _compared(values: Mapping[str, list[list[float]]], spans: Sequence[tuple[int, int]], noise: float, half: float
              ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The windows, and the whole."""
    differences = _differences(values)
    windows = [_apart(values, i, _chance(differences, span, noise)) for i, span in enumerate(spans)]
    each = [statistics.fmean(seed) for seed in differences]
    deviation = max(statistics.stdev(each), noise * math.sqrt(2 / spans[-1][1]))
    mean, reach = statistics.fmean(each), student(len(each) - 1) * deviation / math.sqrt(len(each))
    return windows, {"difference": mean, "interval": [mean - reach, mean + reach], "half_pace": half}


def _by_time(cut: Mapping[str, list[Any]], spans: Sequence[tuple[int, int]], noise: float, half: float
             ) -> dict[str, Any]:
    smooth = {name: [list(zip(*centres(points, spans), strict=True)) for points in runs] for name, runs in cut.items()}
    reference, other = smooth
    at = [statistics.fmean(run[1][i] for run in smooth[reference]) for i in range(len(spans))]
    values = {name: [[interpolated(moment, run[1], run[2]) for moment in at] for run in runs]
              for name, runs in smooth.items()}
    moments, whole = _compared(values, spans, noise, half)
    for one, moment in zip(moments, at, strict=True):
        one["seconds"] = moment
    lower = [one for one in moments if one[other][0] < one[reference][0]]
    not_behind = all(one["apart"] <= min(MOST, one["chance"]) for one in lower) and -half < whole["interval"][0]
    beyond = any(one["apart"] > one["chance"] for one in lower) or whole["interval"][1] < 0
    return {"not_behind": not_behind, "behind": not not_behind and beyond, "moments": moments, "whole": whole}
