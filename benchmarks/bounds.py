"""What `benchmarks.parity` measures of two runs, and the bounds that it is held against.

* Yardstick: two trl runs in fp32 that differ in their attention alone (sdpa, eager): one function, rounded in two ways.
  The mean of their differences may be near 0 by luck: it counts as no less than its standard error. Nor does either
  count as less than the rounding of a loss: two runs that agree to its last bit leave a third no room for it.
* What those two round alike, as their sums over tokens and their softmax may, is no part of the yardstick. Where it is
  not kept, a third trl run in fp64 tells how far from it each is.
* Distance of a run in lower precision: root mean square, over all steps and seeds, of its loss less that of the fp32
  run on the same batches; of gradients, for each parameter, the norm of the difference over the norm, over the seeds.
  A ratio of two such norms over n numbers has a standard deviation of 1 / sqrt(n); three of them are allowed for.
  Of methods whose batches teach few tokens it is the geometric mean over many batches: in one of 32 rounding may move
  the gradient 30 times as far as in others, in each run its own way.
* One run's distance says little: steps of Adam enlarge what any rounding began. It is pooled over seeds; a ratio of two
  pooled distances has a 95 % interval of the seeds, drawn anew with both distances of each.
* Two fp32 runs on trl that are not far closer than bf16 brings one are chaotic, and a bound of theirs says nothing: of
  every method they are held against trl in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

Losses: TypeAlias = torch.Tensor
"""(steps,), fp64."""
Gradients: TypeAlias = dict[str, torch.Tensor]

YARD, BF16, FP8, FIRST, QUIET = 2.0, 1.25, 1.5, 1e-6, 0.1
"""Bounds: times the yardstick; times trl's own distance; times that in bf16; relative, of one step; the last is
of the measurement itself: two fp32 runs may be this share of bf16's distance apart, or chaos was measured."""
ROUNDING = 2.0**-23
"""What the rounding of fp32 leaves of a loss, relative to its size, or to 1, the size of the terms of one near 0."""
DRAWS = 10_000
LOSS = "rms of loss - fp32 loss"


@dataclass(frozen=True)
class Check:
    """One bound. `own` is what it is a multiple of: the yardstick, or the distance of another run."""

    part: str
    what: str
    value: float
    own: float | None
    bound: float
    steps: int
    seeds: int
    interval: tuple[float, float] | None = None
    """Of value over own: 95 %, over seeds."""
    raw: float | None = None
    """Of a yardstick: what the two runs themselves differ by, where `own` is the least that it counts as."""

    @property
    def holds(self) -> bool:
        return self.own != 0 and self.value <= self.bound  # False of NaN, and of two runs that are one


def within_yardstick(
    part: str, trl: Sequence[Losses], other: Sequence[Losses], fast: Sequence[Losses], which: str = ""
) -> list[Check]:
    """Largest and mean signed difference of the losses over the seeds, each against twice that of two trl runs.

    The mean of the two is no less than its standard error, rms / sqrt(steps). Where the two are not one run, the rms
    is no less than `ROUNDING`, and the largest than twice that.
    """
    yard = [y - x for x, y in zip(trl, other, strict=True)]
    ours = [y - x for x, y in zip(trl, fast, strict=True)]
    steps, seeds = len(trl[0]), len(trl)
    largest = [max(float(d.abs().max()) for d in apart) for apart in (yard, ours)]
    signed = [max(float(d.mean().abs()) for d in apart) for apart in (yard, ours)]
    raw = largest[0], signed[0]
    rounding = ROUNDING * max(1.0, *(float(x.abs().max()) for x in trl)) if largest[0] else 0.0
    largest[0] = max(largest[0], 2 * rounding)
    signed[0] = max(signed[0], max(rms(yard), rounding) / math.sqrt(steps))
    return [Check(part, _named(what, which), value, own, YARD * own, steps, seeds, raw=one if one < own else None)
            for what, (own, value), one in (("max |loss difference|", largest, raw[0]),
                                            ("|mean signed difference|", signed, raw[1]))]


def _named(what: str, which: str) -> str:
    return f"{what}, {which}" if which else what


def first_loss(part: str, trl: Sequence[Losses], fast: Sequence[Losses], bound: float) -> Check:
    """The first step's loss, relative to its size."""
    value = max(float((y[0] - x[0]).abs() / x[0].abs()) for x, y in zip(trl, fast, strict=True))
    return Check(part, "loss of one step, relative", value, None, bound, 1, len(trl))


def rms(apart: Sequence[Losses]) -> float:
    return float(torch.cat(list(apart)).pow(2).mean().sqrt())


def distance(
    part: str, truth: Sequence[Losses], own: Sequence[Losses], found: Sequence[Losses], times: float, which: str = "",
    *, what: str = LOSS,
) -> Check:
    """How far losses are from those in fp32, against how far another run's are; `which` loss, or run."""
    theirs, ours = ([rms([x - t]) for x, t in zip(run, truth, strict=True)] for run in (own, found))
    return pooled(part, theirs, ours, times, steps=len(truth[0]), what=_named(what, which))


def pooled(
    part: str, own: Sequence[float], found: Sequence[float], times: float, *, steps: int, what: str = LOSS
) -> Check:
    """`distance` of each seed's."""
    theirs, ours = (np.square(np.asarray(each)) for each in (own, found))
    drawn = np.random.default_rng(0).integers(0, len(ours), size=(DRAWS, len(ours)))
    interval = None
    if len(ours) > 1 and theirs.all():
        low, high = np.quantile(np.sqrt(ours[drawn].sum(1) / theirs[drawn].sum(1)), [0.025, 0.975])
        interval = float(low), float(high)
    value, against = (math.sqrt(each.mean()) for each in (ours, theirs))
    return Check(part, what, value, against, times * against, steps, len(ours), interval)


def gradient_distances(truth: Sequence[Gradients], found: Sequence[Gradients]) -> dict[str, float]:
    """Of each parameter: the norm of (gradient - true gradient) over the true one's, over the batches."""
    distances = {}
    assert truth[0]
    for name in truth[0]:
        size = math.sqrt(sum(float(batch[name].pow(2).sum()) for batch in truth))
        assert size > 1e-7, f"the reference gradient of {name} is 0"
        apart = sum(float((x[name] - t[name]).pow(2).sum()) for x, t in zip(found, truth, strict=True))
        distances[name] = math.sqrt(apart) / size
    assert all(x.keys() == truth[0].keys() for x in (*found, *truth))
    return distances


def gradients_apart(
    part: str, truth: Sequence[Gradients], own: Sequence[Gradients], found: Sequence[Gradients], times: float = BF16
) -> list[Check]:
    """Every parameter's gradient; the check that is reported first is the one with the least room."""
    theirs, ours = gradient_distances(truth, own), gradient_distances(truth, found)
    chance = {name: 1 + 3 / math.sqrt(len(truth) * gradient.numel()) for name, gradient in truth[0].items()}
    checks = [Check(part, f"first-step gradient of {name}", ours[name], theirs[name],
                    times * theirs[name] * chance[name], 1, len(truth)) for name in truth[0]]
    return sorted(checks, key=lambda check: -check.value / check.bound)


@dataclass(frozen=True)
class Apart:
    """How far gradients in bf16 are from those in fp32: of each parameter, a distance a batch."""

    own: list[dict[str, float]]
    found: list[dict[str, float]]

    @classmethod
    def of(cls, truth: Sequence[Gradients], own: Sequence[Gradients], found: Sequence[Gradients]) -> Apart:
        return cls(*([gradient_distances([t], [x]) for t, x in zip(truth, run, strict=True)] for run in (own, found)))


def gradient_over_batches(part: str, seeds: Sequence[Apart], times: float = BF16) -> Check:
    """Of the parameter with the least room: geometric means over all seeds' batches; its interval is of batches."""

    def logs(side: str) -> np.ndarray:
        """(parameters, batches)."""
        return np.log([[one[name] for seed in seeds for one in getattr(seed, side)] for name in names])

    names = list(seeds[0].own[0])
    own, found = logs("own"), logs("found")
    least = int((found - own).mean(1).argmax())
    theirs, ours = (float(np.exp(each[least].mean())) for each in (own, found))
    drawn = np.random.default_rng(0).integers(0, own.shape[1], size=(DRAWS, own.shape[1]))
    low, high = np.exp(np.quantile((found - own)[least][drawn].mean(1), [0.025, 0.975]))
    return Check(part, f"gradient of {names[least]}, mean of batches", ours, theirs, times * theirs, len(seeds[0].own),
                 len(seeds), (float(low), float(high)))
