"""Learning curves: which agree, what is run in which order, what is written and drawn of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement, curves, learning, tables
from benchmarks.agreement import judge

SEEDS = (1, 2, 3)


def runs_of(*, steps: int = 60, apart: float = 0.0, fallen: float = 0.0, spread: float = 0.04, noise: float = 0.04,
            speed: float = 1.0, source: int = 0) -> list[list[tuple[float, float, float]]]:
    """A curve a seed that rises from 0.45 to 0.8; at the end all are off by `apart`, and the first by `fallen`."""
    draw = random.Random(source)
    found = []
    for seed in range(3):
        start = spread * (seed - 1)
        found.append([(i + 1.0, i / speed, 0.45 + 0.35 * (1 - 0.95**i) + start + draw.gauss(0, noise)
                       + (apart - (fallen if seed == 0 else 0)) * i / steps) for i in range(steps)])
    return found


def test_curves_of_one_learner_agree() -> None:
    found = judge({"trl": runs_of(source=1), "fast": runs_of(source=2, speed=4)})
    assert found["agree"] is True and found["learnt"] is True and found["by_time"]["not_behind"] is True
    assert len(found["windows"]) == 6 and found["windows"][0]["steps"] == [1, 10]
    last = found["last_third"]
    assert last["steps"] == [41, 60] and 0 < last["apart"] < 0.03
    # Three seeds 0.04 from each other: twice that deviation, about.
    assert last["trl"][1] == pytest.approx(0.04, abs=0.015) and 0.05 < last["allowed"] <= 0.1
    # Four times as fast: at the reference's second window the other is where it is at four times the steps.
    moment = found["by_time"]["moments"][1]
    assert moment["seconds"] == pytest.approx(14.5) and moment["fast"][0] > moment["trl"][0] + 0.1
    assert found["by_time"]["within"] is False


@pytest.mark.parametrize("other", [
    {"apart": -0.15},
    {"apart": 0.15},  # better is another curve too
    {"fallen": 0.6},  # what one seed spreads excuses nothing
    {"apart": -0.15, "noise": 0.2},  # nor does noise
])
def test_other_curves_do_not(other: dict[str, Any]) -> None:
    found = judge({"trl": runs_of(source=1), "fast": runs_of(source=2, **other)})
    assert found["agree"] is False
    assert found["by_time"]["not_behind"] is (other.get("apart", -1) > 0)


def test_a_shift_on_the_way_is_seen() -> None:
    other = [[(step, at, reward - (0.12 if 20 < step <= 30 else 0)) for step, at, reward in points]
             for points in runs_of(source=2)]
    found = judge({"trl": runs_of(source=1), "fast": other})
    assert found["last_third"]["apart"] <= found["last_third"]["allowed"] and found["agree"] is False
    assert [one["apart"] > one["allowed"] for one in found["windows"]] == [False, False, True, False, False, False]


def test_a_slower_backend_is_behind_at_equal_seconds_and_no_other_curve() -> None:
    found = judge({"trl": runs_of(source=1, speed=6), "fast": runs_of(source=2)})
    assert found["agree"] is True and found["by_time"]["not_behind"] is False


def test_by_hand() -> None:
    """Two seeds, flat: apart 0.02; deviations 0.01414 each, pooled the same, twice it 0.0283; no noise."""
    flat = {"trl": [[(i, i, 0.5) for i in range(4)], [(i, i, 0.52) for i in range(4)]],
            "fast": [[(i, i, 0.52) for i in range(4)], [(i, i, 0.54) for i in range(4)]]}  # fmt: skip
    found = judge(flat)
    assert found["agree"] is True and found["learnt"] is False and len(found["windows"]) == 2
    assert found["last_third"]["apart"] == pytest.approx(0.02)
    assert found["last_third"]["allowed"] == pytest.approx(2 * 0.0141421, rel=1e-4)
    assert found["last_third"]["fast"] == pytest.approx([0.53, 0.0141421], rel=1e-4)
    flat["trl"] = flat["trl"][:1] * 2  # its seeds are one: the pooled deviation is 0.01
    found = judge(flat)
    assert found["last_third"]["allowed"] == pytest.approx(0.02) and found["last_third"]["apart"] == pytest.approx(0.03)
    assert found["agree"] is False


@pytest.mark.parametrize(("given", "why"), [
    ({"trl": runs_of()}, "1 ran"),
    ({"trl": runs_of()[:1], "fast": runs_of()}, "two seeds"),
    ({"trl": [[(1, 0, 0.5)]] * 2, "fast": [[(1, 0, 0.5)]] * 2}, "two points"),
    ({"trl": runs_of(), "fast": [[(2 * step, at, r) for step, at, r in run] for run in runs_of()]}, "other steps"),
])
def test_without_enough_there_is_no_judgement(given: dict[str, Any], why: str) -> None:
    assert why in judge(given)["why"] and "agree" not in judge(given)


def test_interpolation() -> None:
    assert [agreement.interpolated(at, [0, 2, 4], [0, 1, 5]) for at in (-1, 1, 3, 9)] == [0, 0.5, 3, 5]


def test_each_sft_stage_runs_once_and_backends_take_turns(tmp_path: Path) -> None:
    before, then = learning.tasks_of(["grpo", "rloo", "ppo"], ["trl", "fast"], 2, 5, tmp_path)
    # GRPO's and RLOO's first stages are one; PPO's stops earlier.
    assert [(task.algorithm, task.backend, task.seed) for task in before] == [("sft", "trl", 1), ("sft", "trl", 2)] * 2
    assert [(task.algorithm, task.backend, task.seed) for task in then[:4]] == [
        ("grpo", "trl", 1), ("grpo", "fast", 1), ("grpo", "fast", 2), ("grpo", "trl", 2)]
    assert then[0].needs == then[1].needs == then[4].needs == before[0].folder != then[8].needs
    from aligntune.core.resolve import resolve

    job = resolve({"model_name": "builtin:tiny"}, then[0].stage)
    assert (job.options.max_steps, job.options.logging_steps, job.options.beta) == (5, 1, 0.04)
    assert len({task.folder for task in (*before, *then)}) == len(before) + len(then)


def trainer(calls: list[Any]) -> Any:
    """Writes what a run would: made-up curves, the compilation of a first step that takes 30 s; fast's seed 3 fails."""

    def train(task: learning.Task, **told: Any) -> str | None:
        calls.append((task, told))
        if task.algorithm == "sft":
            return None
        if (task.backend, task.seed) == ("fast", 3):
            return "exit 1: no room"
        run = task.folder / f"1-{task.algorithm}"
        run.mkdir(parents=True)
        points = runs_of(source=task.seed + 10 * len(task.backend))[task.seed - 1]
        metric = learning.METRICS.get(task.algorithm, "reward")
        lines = [{"step": step, "time": 30 + at, "kind": "train", metric: reward} for step, at, reward in points]
        lines.insert(5, {"step": 5, "time": 33, "kind": "eval", "eval_reward": 0.1})
        lines.insert(5, {"step": 5, "time": 33, "kind": "train", "loss": 0.1})  # PPO logs a reward every fourth step
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (run / "environment.json").write_text(json.dumps(
            {"gpus": [{"name": "NVIDIA H100"}], "packages": {"torch": "2.11", "trl": "1.16", "numpy": "2"}}))
        return None

    return train


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, calls = tmp_path / "new" / "out.json", []
    assert learning.main(["grpo", "--jobs", "2", "--commit", "c" * 40, "--json", str(out)], trainer(calls)) == 0
    assert learning.main(["dapo", "--commit", "d" * 40, "--json", str(out)], trainer(calls)) == 0
    assert {told["precision"] for _, told in calls} == {"bf16"}
    report = json.loads(out.read_text())
    assert (report["device"], report["commit"]) == ("NVIDIA H100", "d" * 40) and "dapo" in report["command"]
    assert [row["algorithm"] for row in report["rows"]] == ["grpo", "dapo"]  # the earlier one stayed
    row = report["rows"][0]
    assert (row["commit"], row["at_once"], row["versions"]) == ("c" * 40, 2, {"torch": "2.11", "trl": "1.16"})
    assert [(run["backend"], run["seed"]) for run in row["runs"]] == [
        ("trl", 1), ("trl", 2), ("trl", 3), ("fast", 1), ("fast", 2)]
    assert row["failed"] == [{"backend": "fast", "seed": 3, "why": "exit 1: no room"}]
    run = row["runs"][0]
    assert run["first_step_s"] == 30 and run["steps"] == 60 and len(run["points"]) == 60
    assert run["points"][0][:2] == [1, 0] and run["points"][-1][:2] == [60, 59]
    assert row["judgement"]["last_third"]["apart"] >= 0 and report["rows"][1]["metric"].startswith("dynamic_sampling/")
    assert "grpo fast 3: exit 1: no room" in capsys.readouterr().out


def test_a_process_that_fails_says_its_last_line(tmp_path: Path) -> None:
    task = learning.Task("grpo", "trl", 1, {"algorithm": "nosuch"}, tmp_path / "run")
    why = learning.train(task, precision="fp32", threads=1, limit=120)
    assert why is not None and why.startswith("exit 2: ") and "unknown algorithm 'nosuch'" in why
    assert learning.train(learning.Task("grpo", "trl", 1, {}, tmp_path / "x", tmp_path / "none"), precision="fp32",
                          threads=1, limit=1) == "its SFT stage failed"


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / "learning.json"
    learning.main(["grpo", "--seeds", "2", "--commit", "c" * 40, "--json", str(out)], trainer([]))
    return json.loads(out.read_text())


def test_another_run_keeps_the_other_algorithms_rows(tmp_path: Path, report: dict[str, Any]) -> None:
    """And a new row of an algorithm takes the place of the old one; the table names both runs."""
    out = tmp_path / "learning.json"
    for commit in ("d", "e"):
        learning.main(["dapo", "--seeds", "2", "--commit", commit * 40, "--json", str(out)], trainer([]))
    both = json.loads(out.read_text())
    assert [(row["algorithm"], row["commit"][0]) for row in both["rows"]] == [("grpo", "c"), ("dapo", "e")]
    assert both["rows"][0] == report["rows"][0]
    text = tables.learning(both)
    assert text.count("\nNVIDIA H100; ") == 2 and "commit cccccccccccc" in text and "commit eeeeeeeeeeee" in text


def test_the_table(report: dict[str, Any]) -> None:
    lines = tables.learning(report).splitlines()
    last = report["rows"][0]["judgement"]["last_third"]
    assert lines[2] == (f"| grpo | {last['trl'][0]:.3f} ± {last['trl'][1]:.3f} | {last['fast'][0]:.3f} ± "
                        f"{last['fast'][1]:.3f} | {last['apart']:.3f} ({last['allowed']:.3f}) | all 6 | no | 59, 59 "
                        "| 1 |")
    assert "NVIDIA H100; torch 2.11" in lines[-1]
    report["rows"][0]["judgement"]["windows"][2] |= {"apart": 0.2}
    assert "| 5 of 6 |" in tables.learning(report)
    report["rows"][0]["judgement"]["learnt"] = False
    assert "| 5 of 6, nothing learnt |" in tables.learning(report)
    report["rows"][0]["judgement"] = {"why": "a spread needs two seeds of each backend"}
    assert "| a spread needs two seeds of each backend |" in tables.learning(report)
    page = tables.learning_of("grpo")(report)
    assert page.startswith("![") and "(../assets/curves/learning-grpo.svg)" in page and "| grpo |" in page
    assert tables.learning_of("ppo")(report) == ""


def test_the_image(report: dict[str, Any]) -> None:
    row = report["rows"][0]
    image = curves.learning_svg(row)
    assert image.count("<polyline") == image.count("<polygon") == 4
    assert image.count(f'stroke="{curves.COLOURS[0]}"') == 2
    assert ">fast, 2 seeds<" in image and ">trl, 2 seeds<" in image
    assert "2 at once" not in image and "2 at once" in curves.learning_svg({**row, "at_once": 2})
    before = row["runs"][0]["points"][20][2]
    row["runs"][0]["points"][20][2] += 0.2
    assert curves.learning_svg(row) != image
    row["runs"][0]["points"][20][2] = before
    row["runs"][0]["points"] = [[step, at / 2, reward] for step, at, reward in row["runs"][0]["points"]]
    assert curves.learning_svg(row) != image


def test_committed_images_are_those_of_the_results() -> None:
    rows = curves.learning_rows()
    there = {path.stem for path in curves.ASSETS.glob("learning-*.svg")}
    assert there == {f"learning-{row['algorithm']}" for row in rows}, "draw them anew: python -m benchmarks.curves"
    for row in rows:
        path = curves.ASSETS / f"learning-{row['algorithm']}.svg"
        assert path.read_text() == curves.learning_svg(row), "draw it anew: python -m benchmarks.curves"
        # The judgement is that of the curves beside it.
        found = {backend: [run["points"] for run in row["runs"] if run["backend"] == backend]
                 for backend in dict.fromkeys(run["backend"] for run in row["runs"])}
        assert json.loads(json.dumps(judge(found))) == row["judgement"]


def test_before_it_is_measured_the_pages_show_nothing() -> None:
    if not curves.LEARNING.exists():
        assert tables.table("learning-grpo") == "" and tables.table("learning") == "Not measured yet.\n"
    assert {name.removeprefix("learning-") for name in tables.QUIET} == set(learning.ALGORITHMS)
