"""Intervals for paired series of steps, honest about what two processes of the same program differ by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95
_SEED = 20240
# Quantiles of Student's t at 97.5 % and 99.5 % by degrees of freedom, the ends of 95 % and 99 % intervals.
_T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 10: 2.228, 12: 2.179,
         16: 2.120, 20: 2.086, 30: 2.042}
_T995 = {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 6: 3.707, 7: 3.499, 8: 3.355, 10: 3.169, 12: 3.055,
         16: 2.921, 20: 2.845, 30: 2.750}


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def contains(self, number: float) -> bool:
        return self.low <= number <= self.high

    def exp(self) -> Interval:
        return Interval(math.exp(self.value), math.exp(self.low), math.exp(self.high))

    def as_list(self) -> list[float]:
        return [self.value, self.low, self.high]


def student(freedom: int, table: Mapping[int, float] = _T975) -> float:
    """Student's t at the table's level (the next lower tabulated degrees of freedom)."""
    return table[max(key for key in table if key <= max(freedom, 1))]


def block_length(count: int) -> int:
    """Steps in a block: about the root of the series' length.

    The cube root, best for long series, leaves out half of the variance of 40 steps that are correlated at 0.6.
    """
    return max(1, round(count**0.5))


def bootstrap_means(
    series: Sequence[Sequence[float] | np.ndarray], *, draws: int = DRAWS, seed: int = _SEED
) -> np.ndarray:
    """Means of `draws` moving-block resamples (Kunsch 1989) of all series together; blocks stay within a series.

    Neighbouring steps are alike (clocks, caches, the data's order): resampling single steps would give intervals that
    are too narrow.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    count = 0
    for values in series:
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            continue
        block = min(block_length(len(array)), len(array))
        blocks = -(-len(array) // block)
        starts = generator.integers(0, len(array) - block + 1, size=(draws, blocks))
        index = (starts[:, :, None] + np.arange(block)).reshape(draws, -1)[:, : len(array)]
        total += array[index].sum(1)
        count += len(array)
    return total / max(count, 1)


def mean_interval(series: Sequence[Sequence[float]], *, seed: int = _SEED) -> Interval:
    """The mean over all series and its moving-block bootstrap interval.

    Raises:
        ValueError: there is nothing to take a mean of.
    """
    values = [np.asarray(one, dtype=np.float64) for one in series if len(one)]
    if not values:
        raise ValueError("no values")
    mean = float(np.concatenate(values).mean())
    drawn = bootstrap_means(values, seed=seed)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(min(low, mean)), float(max(high, mean)))


@dataclass(frozen=True)
class Ratio:
    """How many times as much B does a second as A does.

    Args:
        ratio: with its interval.
        noise: share by which repeats of one arm differ (half-width, bootstrap included); None with one repeat.
        significant: the 95 % interval leaves 1 out, one of 99 % does too, and the difference is larger than the noise.
    """

    ratio: Interval
    noise: float | None
    significant: bool


def throughput_ratio(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Ratio:
    """From log seconds per unit of work, one series a process, the i-th of `a` paired step by step with that of `b`.

    Two processes of the same program run at speeds that differ by more than their steps tell (where memory lies,
    what else the machine does). So the bootstrap's interval is widened by Student's t times the deviation between
    repeats of one arm, which A B B A measures. A check that runs every day and cries wolf once in twenty is soon not
    believed: what is called significant must stand at 99 % and exceed the spread of those repeats.
    """
    pairs = [[x - y for x, y in zip(one, two, strict=True)] for one, two in zip(a, b, strict=True)]
    inside = mean_interval(pairs)
    half = max(inside.high - inside.value, inside.value - inside.low)
    repeats = len(pairs)
    if repeats < 2:
        return Ratio(inside.exp(), None, not inside.contains(0.0))
    means = [[float(np.mean(one)) for one in arm] for arm in (a, b)]
    variance = float(np.mean([np.var(arm, ddof=1) for arm in means]))
    deviation = math.sqrt(2 * variance / repeats)
    total = math.hypot(half, student(2 * (repeats - 1)) * deviation)
    strict = math.hypot(half * 2.576 / 1.96, student(2 * (repeats - 1), _T995) * deviation)
    spread = max(max(arm) - min(arm) for arm in means)
    # One pair alone has an interval wider by sqrt(repeats) than all of them.
    noise = spread + half * math.sqrt(repeats)
    interval = Interval(inside.value, inside.value - total, inside.value + total)
    significant = abs(inside.value) > max(total, strict, noise)
    return Ratio(interval.exp(), math.expm1(noise), significant)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p10, p50 and p90."""
    found = np.quantile(np.asarray(values, dtype=np.float64), [0.1, 0.5, 0.9])
    return {name: float(value) for name, value in zip(("p10", "p50", "p90"), found, strict=True)}
