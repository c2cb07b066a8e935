"""Speed, phases, warm-up, memory and cost, on runs whose numbers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aligntune.compare import measure
from tests.compare import made_up


def run(seconds: list[float], **more: Any) -> dict[str, Any]:
    steps = [made_up.step(n, 3.0 - 0.1 * n, seconds=value) for n, value in enumerate(seconds, 1)]
    return {"steps": steps, "online": False, "cold_start": 9.0, "environment": {"gpus": []}, "memory": {},
            "train_window": [10.0, 46.0], **more}


def test_phases_and_what_is_in_none() -> None:
    found = measure.arm_speed([run([0.1, 0.3])], [0, 1])
    assert found["phases"] == pytest.approx({"forward": 0.2 / 3, "backward": 0.1, "other": 0.2 / 6})
    assert found["tokens_per_second"] == pytest.approx(800 / 0.4)
    assert found["slots_per_second"] == pytest.approx(1000 / 0.4)
    assert found["step_seconds"] == pytest.approx({"p10": 0.12, "p50": 0.2, "p90": 0.28})


def test_the_warm_up_is_what_the_first_steps_took_beyond_usual_ones() -> None:
    one, two = run([2.0, 0.5, 0.1, 0.1, 0.1]), run([0.1] * 5)
    assert measure.arm_speed([one, two], [2, 3, 4])["warmup_extra"] == pytest.approx([2.3, 0.0])
    rehearsed = measure.arm_speed([run([0.1] * 5, rehearsal_seconds=3.0), two], [2, 3, 4])
    assert rehearsed["warmup_extra"] == pytest.approx([3.0, 0.0]) and rehearsed["rehearsal_seconds"] == [3.0, None]


def test_a_run_shorter_than_the_warm_up_keeps_its_last_half() -> None:
    def kept(count: int) -> list[int]:
        return measure.timed_steps([run([0.1] * count)], [run([0.1] * count)], 5)

    assert kept(7) == [5, 6] and kept(6) == [3, 4, 5] and kept(1) == [0]


def test_the_time_to_a_loss_is_that_of_the_step_that_reaches_it() -> None:
    one = run([1.0] * 10)  # smoothed over five steps: 2.7 with the fifth, 0.1 less with each after it
    for target, seconds in ((2.7, 5.0), (2.65, 6.0), (2.2, 10.0), (2.1, None)):
        assert measure._time_to(one, target) == seconds
        later = measure._time_to({**one, "rehearsal_seconds": 3.0}, target)
        assert later == (None if seconds is None else seconds + 3.0)
    assert measure._end_of([one]) == pytest.approx(2.2 + 0.01 * 0.5)


def test_money_and_energy() -> None:
    rates = {"a": {"tokens_per_second": 1000.0}, "b": {"tokens_per_second": 2000.0}}
    told, silent = run([0.1] * 4, machine={"energy_j": 3200.0}), run([0.1] * 4, machine={"energy_j": None})
    found = measure.cost([told], [silent], rates, 3.6)
    assert found["a"] == pytest.approx({"per_million_tokens": 1.0, "per_run": 0.036, "run_seconds": 36.0,
                                        "joules_per_token": 2.0})
    assert found["b"]["per_million_tokens"] == pytest.approx(0.5) and found["b"]["joules_per_token"] is None


def test_memory_is_the_largest_of_the_repeats(tmp_path: Path) -> None:
    runs = made_up.results(tmp_path)["a"]
    runs[1]["memory"] |= {"peak_allocated": 2**34, "head": 2**28}
    found = measure.arm_memory(runs)
    held = 2**20 + 2**20 + 2**21 + 2**28
    assert found["peak"] == 2**34 and found["activations"] == 2**34 - held and found["peak_is"].startswith("GPU")
