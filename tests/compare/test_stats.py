"""Intervals: pinned values, coverage, and no alarm between runs of one program."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aligntune.compare.stats import block_length, mean_interval, percentiles, student, throughput_ratio


def test_a_constant_series_has_a_point_for_an_interval() -> None:
    found = mean_interval([[0.5] * 20])
    assert found.as_list() == [0.5, 0.5, 0.5]
    assert found.exp().value == pytest.approx(math.exp(0.5))
    assert not found.contains(0.4) and found.contains(0.5)


def test_no_values_are_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([[], []])


def test_the_interval_of_independent_steps_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    found = mean_interval([values.tolist()])
    width = 1.96 / math.sqrt(2000)
    assert found.high - found.low == pytest.approx(2 * width, rel=0.12)
    assert found.value == pytest.approx(values.mean())


def test_blocks_widen_the_interval_of_neighbours_that_are_alike() -> None:
    generator = np.random.default_rng(1)
    series, last = [], 0.0
    for _ in range(1000):
        last = 0.9 * last + generator.normal()
        series.append(last)
    alone = 2 * 1.96 * float(np.std(series)) / math.sqrt(1000)
    found = mean_interval([series])
    assert block_length(1000) == 32
    assert found.high - found.low > 2 * alone


def test_blocks_stay_within_a_run() -> None:
    # Two runs of other levels: a block across both would give means between them.
    drawn = mean_interval([[0.0] * 10, [1.0] * 10])
    assert drawn.as_list() == [0.5, 0.5, 0.5]


def _run(generator: np.random.Generator, level: float, steps: int = 40) -> list[float]:
    noise, last = [], 0.0
    process = generator.normal(0, 0.02)
    for _ in range(steps):
        last = 0.6 * last + generator.normal(0, 0.04)
        noise.append(level + process + last)
    return noise


def test_runs_of_one_program_raise_no_alarm_and_the_interval_holds_1() -> None:
    generator = np.random.default_rng(2)
    alarms = inside = 0
    for _ in range(200):
        found = throughput_ratio([_run(generator, 0.0) for _ in range(2)], [_run(generator, 0.0) for _ in range(2)])
        alarms += found.significant
        inside += found.ratio.contains(1.0)
    assert alarms <= 2 and inside >= 190


def test_a_real_difference_is_seen() -> None:
    generator = np.random.default_rng(3)
    seen = 0
    for _ in range(50):
        found = throughput_ratio([_run(generator, math.log(1.83)) for _ in range(2)],
                                 [_run(generator, 0.0) for _ in range(2)])
        seen += found.significant and found.ratio.contains(1.83)
    assert seen >= 45


def test_b_is_the_faster_one_above_1_and_noise_is_what_repeats_differ_by() -> None:
    slow, fast = [0.0, 0.0, 0.0, 0.0], [-math.log(2)] * 4
    found = throughput_ratio([slow, slow], [fast, fast])
    assert found.ratio.as_list() == pytest.approx([2.0, 2.0, 2.0])
    assert found.significant and found.noise == pytest.approx(0.0)
    shifted = throughput_ratio([slow, [0.01] * 4], [slow, slow])
    assert shifted.noise is not None and 0.01 <= shifted.noise < 0.03 and not shifted.significant
    assert throughput_ratio([slow], [fast]).noise is None


def test_three_repeats_have_four_degrees_of_freedom() -> None:
    a = [[level] * 6 for level in (0.0, 0.01, -0.01)]
    b = [[level - 0.06] * 6 for level in (0.0, 0.01, -0.01)]
    found = throughput_ratio(a, b)
    deviation = math.sqrt(2 * 1e-4 / 3)
    assert math.log(found.ratio.high) == pytest.approx(0.06 + 2.776 * deviation)
    assert math.log(found.ratio.low) == pytest.approx(0.06 - 2.776 * deviation)
    assert found.significant  # 0.06 > 4.604 x 0.0082, the end of the 99 % interval
    assert not throughput_ratio(a, [[level - 0.035] * 6 for level in (0.0, 0.01, -0.01)]).significant


def test_noise_is_the_spread_of_repeats_and_the_interval_of_one_pair() -> None:
    generator = np.random.default_rng(4)
    a, b = ([generator.normal(level, 0.05, 30).tolist() for level in (0.0, 0.02)] for _ in range(2))
    inside = mean_interval([[x - y for x, y in zip(one, two, strict=True)] for one, two in zip(a, b, strict=True)])
    half = max(inside.high - inside.value, inside.value - inside.low)
    spread = max(abs(np.mean(arm[0]) - np.mean(arm[1])) for arm in (a, b))
    found = throughput_ratio(a, b)
    assert found.noise == pytest.approx(math.expm1(spread + half * math.sqrt(2)))


@pytest.mark.parametrize(("times", "significant"), [(4.9, False), (6.0, True)])
def test_what_is_significant_stands_at_99_percent(times: float, significant: bool) -> None:
    """The bootstrap's half-width h at 99 % is 1.314 h; repeats of one arm that differ by h deviate by h / 2, and
    9.925 times that is 4.96 h: together 5.13 h."""
    generator = np.random.default_rng(5)
    a, b = ([generator.normal(0, 0.05, 30) for _ in range(2)] for _ in range(2))
    a, b = ([values - values.mean() for values in arm] for arm in (a, b))
    inside = mean_interval([x - y for x, y in zip(a, b, strict=True)])
    half = max(inside.high - inside.value, inside.value - inside.low)
    found = throughput_ratio([a[0], a[1] + half], [values + half / 2 - times * half for values in b])
    assert math.log(found.ratio.value) == pytest.approx(times * half)
    assert found.significant is significant


def test_tables() -> None:
    assert (student(1), student(2), student(9), student(1000)) == (12.706, 4.303, 2.306, 2.042)
    assert percentiles([1.0, 2.0, 3.0]) == pytest.approx({"p10": 1.2, "p50": 2.0, "p90": 2.8})
    assert [block_length(n) for n in (1, 4, 20, 64)] == [1, 2, 4, 8]
