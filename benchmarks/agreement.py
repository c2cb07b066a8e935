"""Whether two backends' reward curves are those of one learner: each mean within the other's spread over seeds.

Steps are cut into windows; in a window a seed counts with its mean reward. Of a window two numbers are kept:

    apart    the difference of the two backends' means over seeds
    allowed  twice the deviation over seeds, pooled over the two backends; or, where that is more, what sampling puts
             between two such means: 3 sqrt(2 / (seeds x points)) x the deviation of a point, which the differences
             of neighbouring points give; and never more than 0.1

The bound, because a backend of which one seed collapses is not excused by the spread that this makes. Twice, because
the means of three seeds of one distribution are apart by one deviation every fourth time. Of made-up curves of one
distribution with three seeds 1 to 4 windows of 100 were beyond, and where one backend fell behind by 0.15 on the way
to the end 2 runs of 100 were found to agree.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WINDOWS, DEVIATIONS, SAMPLING, MOST = 6, 2.0, 3.0, 0.1
GAIN = 0.05
"""What a mean rises by, from the first window to the last third, where something was learnt."""
Points = Sequence[Sequence[float]]
"""[(step, seconds since the first step, reward), ...] of one run."""


def judge(curves: Mapping[str, Sequence[Points]]) -> dict[str, Any]:
    """What holds between two backends' curves, the first of which is the reference; a curve a seed.

    Returns:
        `agree`: in every window of steps, and over the last third of them, the means are apart by no more than
            allowed. `learnt`: both means rose; curves that stay where they are agree for nothing. `windows`,
            `last_third`: of each the steps, [mean, deviation] by backend, apart, allowed.
        `by_time`: the same at moments of the reference's run, a run that is over counting with its last window.
            `not_behind`: the other's mean is nowhere lower by more than allowed. `within`: nor higher.
        `why`: why there is no judgement, in place of all that.
    """
    if len(curves) != 2:
        return {"why": f"two backends are compared, {len(curves)} ran"}
    if min(map(len, curves.values())) < 2:
        return {"why": "a spread needs two seeds of each backend"}
    count = min(len(points) for runs in curves.values() for points in runs)
    if count < 2:
        return {"why": "a curve needs two points"}
    cut = {name: [[*points][:count] for points in runs] for name, runs in curves.items()}
    steps = {tuple(point[0] for point in points) for runs in cut.values() for points in runs}
    if len(steps) > 1:
        return {"why": "the runs logged rewards of other steps"}
    noise = max(map(_noise, cut.values()))
    spans = spans_of(count)
    windows = [_window(cut, span, noise) for span in spans]
    last = _window(cut, (count - max(1, count // 3), count), noise)
    return {
        "agree": all(one["apart"] <= one["allowed"] for one in (*windows, last)),
        "learnt": all(last[name][0] - windows[0][name][0] > GAIN for name in curves),
        "last_third": last, "windows": windows, "by_time": _by_time(cut, spans, noise),
    }


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


def _compared(values: Mapping[str, list[float]], points: int, noise: float) -> dict[str, Any]:
    """Of each backend's value a seed, each the mean of so many points."""
    found = {name: [statistics.fmean(each), statistics.stdev(each)] for name, each in values.items()}
    (_, first), (_, second) = found.values()
    seeds = min(map(len, values.values()))
    by_chance = SAMPLING * noise * math.sqrt(2 / (seeds * points))
    pooled = math.sqrt((first**2 + second**2) / 2)
    means = [mean for mean, _ in found.values()]
    return {**found, "apart": abs(means[1] - means[0]),
            "allowed": min(MOST, max(DEVIATIONS * pooled, by_chance))}


def _window(cut: Mapping[str, list[Any]], span: tuple[int, int], noise: float) -> dict[str, Any]:
    low, high = span
    some = next(iter(cut.values()))[0]
    values = {name: [centres(points, [span])[0][2] for points in runs] for name, runs in cut.items()}
    return {"steps": [some[low][0], some[high - 1][0]], **_compared(values, high - low, noise)}


def _by_time(cut: Mapping[str, list[Any]], spans: Sequence[tuple[int, int]], noise: float) -> dict[str, Any]:
    smooth = {name: [list(zip(*centres(points, spans), strict=True)) for points in runs] for name, runs in cut.items()}
    reference, other = smooth
    moments = [statistics.fmean(run[1][i] for run in smooth[reference]) for i in range(len(spans))]
    found = []
    for moment, (low, high) in zip(moments, spans, strict=True):
        values = {name: [interpolated(moment, run[1], run[2]) for run in runs] for name, runs in smooth.items()}
        found.append({"seconds": moment, **_compared(values, high - low, noise)})
    behind = [one for one in found if one[reference][0] - one[other][0] > one["allowed"]]
    return {"not_behind": not behind, "within": all(one["apart"] <= one["allowed"] for one in found), "moments": found}
