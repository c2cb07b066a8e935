"""Learning curves: which agree, what is run in which order, what is written and drawn of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement, curves, learning, tables
from benchmarks.agreement import curves_of, judge, verdict


def runs_of(*, steps: int = 60, apart: float = 0.0, fallen: float = 0.0, spread: float = 0.04, noise: float = 0.04,
            speed: float = 1.0, pace: float = 1.0, rise: float = 0.35, source: int = 0,
            seeds: int = 3) -> dict[int, list[tuple[float, float, float]]]:
    """A curve a seed that rises from 0.45 to 0.8; at the end all are off by `apart`, and the first by `fallen`."""
    draw = random.Random(source)
    return {seed: [(i + 1.0, i / speed, 0.45 + rise * (1 - 0.95 ** (pace * i)) + spread * (seed - 2)
                    + draw.gauss(0, noise) + (apart - (fallen if seed == 1 else 0)) * i / steps)
                   for i in range(steps)] for seed in range(1, seeds + 1)}


def test_curves_of_one_learner_agree() -> None:
    found = judge({"trl": runs_of(source=1), "fast": runs_of(source=2, speed=4)})
    assert verdict(found) == "they agree" and found["learnt"] is True
    assert found["by_time"]["not_behind"] is True and found["by_time"]["behind"] is False
    assert len(found["windows"]) == 6 and found["windows"][0]["steps"] == [1, 10]
    last = found["last_third"]
    assert last["steps"] == [41, 60] and last["apart"] < last["chance"] < 0.06
    # Three seeds 0.04 from each other, which is in no difference.
    assert last["trl"][1] == pytest.approx(0.04, abs=0.015)
    low, high = found["whole"]["interval"]
    assert low < 0 < high and 0.05 < found["whole"]["half_pace"] < 0.09
    # Four times as fast: at the reference's second window the other is where it is at four times the steps.
    moment = found["by_time"]["moments"][1]
    assert moment["seconds"] == pytest.approx(14.5) and moment["fast"][0] > moment["trl"][0] + 0.1


@pytest.mark.parametrize("other", [
    {"apart": -0.15},
    {"apart": 0.15},  # better is another curve too
    {"fallen": 0.6},  # what one seed spreads excuses nothing
    {"apart": -0.15, "noise": 0.2},  # nor does noise
    {"pace": 1 / 3},
    {"pace": 0.5},
    {"pace": 3.0},
    {"rise": 0.0},
    {"rise": -0.2},
])
def test_other_curves_do_not(other: dict[str, Any]) -> None:
    found = judge({"trl": runs_of(source=1), "fast": runs_of(source=2, **other)})
    better = other.get("apart", 0) > 0 or other.get("pace", 0) > 1
    assert found["agree"] is False and found["by_time"]["not_behind"] is better
    if not {"fallen", "noise"} & other.keys():  # which of three seeds a collapse is in may be chance
        assert verdict(found) == "they differ" and found["by_time"]["behind"] is not better
    assert found["learnt"] is (other.get("rise", 1) > 0)


@pytest.mark.parametrize(("pace", "shown"), [(1.0, (85, 6)), (1 / 3, (0, 100)), (0.5, (0, 95))])
def test_how_often_a_learner_is_told_from_a_slower_one(pace: float, shown: tuple[int, int]) -> None:
    """Of 100 pairs: how many agree at least (of one learner) or at most, how many differ at most or at least."""
    found = [judge({"trl": runs_of(source=2 * i), "fast": runs_of(source=2 * i + 1, pace=pace)}) for i in range(100)]
    agree, differ = (sum(one[name] for one in found) for name in ("agree", "differ"))
    assert (agree >= shown[0] and differ <= shown[1]) if pace == 1 else (agree <= shown[0] and differ >= shown[1])


def test_too_small_a_rise_shows_nothing() -> None:
    """As much noise as half the rise: neither one learner nor a slower one is told."""
    for pace in (1.0, 0.5):
        found = judge({"trl": runs_of(source=1, rise=0.1, noise=0.08),
                       "fast": runs_of(source=2, rise=0.1, noise=0.08, pace=pace)})  # fmt: skip
        assert verdict(found) == "not shown by this run"
        assert found["by_time"]["not_behind"] is found["by_time"]["behind"] is False
        low, high = found["whole"]["interval"]
        assert max(-low, high) > found["whole"]["half_pace"]


def test_many_seeds_show_what_no_window_does() -> None:
    """Eight of them: lower by 0.015 throughout, where a learner half as fast would be by as much."""
    lower = {seed: [(step, at, reward - 0.015) for step, at, reward in points]
             for seed, points in runs_of(source=12, seeds=8, rise=0.08).items()}  # fmt: skip
    found = judge({"trl": runs_of(source=11, seeds=8, rise=0.08), "fast": lower})
    assert all(one["apart"] < one["chance"] for one in (*found["windows"], *found["by_time"]["moments"]))
    assert verdict(found) == "they differ" and found["by_time"]["behind"] is True


def test_a_shift_on_the_way_is_seen() -> None:
    other = {seed: [(step, at, reward - (0.12 if 20 < step <= 30 else 0)) for step, at, reward in points]
             for seed, points in runs_of(source=2).items()}  # fmt: skip
    found = judge({"trl": runs_of(source=1), "fast": other})
    assert found["last_third"]["apart"] <= found["last_third"]["chance"] and found["agree"] is False
    assert [one["apart"] > one["chance"] for one in found["windows"]] == [False, False, True, False, False, False]


def test_a_slower_backend_is_behind_at_equal_seconds_and_no_other_curve() -> None:
    found = judge({"trl": runs_of(source=1, speed=6), "fast": runs_of(source=2)})
    assert found["agree"] is True and found["by_time"]["not_behind"] is False and found["by_time"]["behind"] is True


def flat(*levels: float) -> dict[int, list[tuple[int, int, float]]]:
    return {seed: [(i, i, level) for i in range(4)] for seed, level in enumerate(levels)}


def test_by_hand() -> None:
    """Two seeds, flat: differences 0.02 and 0.04, deviation 0.01414; of two, an error of 0.01; no noise."""
    found = judge({"trl": flat(0.5, 0.52), "fast": flat(0.52, 0.56)})
    assert len(found["windows"]) == 2 and found["learnt"] is False and found["whole"]["half_pace"] == 0
    last, whole = found["last_third"], found["whole"]
    assert last["apart"] == pytest.approx(0.03) and last["chance"] == pytest.approx(3.5 * 0.01)
    assert last["fast"] == pytest.approx([0.54, 0.0282843], rel=1e-4)
    assert whole["difference"] == pytest.approx(0.03)
    assert whole["interval"] == pytest.approx([0.03 - 12.706 * 0.01, 0.03 + 12.706 * 0.01])
    assert verdict(found) == "not shown by this run", "nothing was learnt that a slower one would lack"
    # A run that is the other of its seed throughout differs by what seeds do not spread: its own 0.03.
    found = judge({"trl": flat(0.5, 0.52), "fast": flat(0.53, 0.55)})
    assert found["whole"]["interval"] == pytest.approx([0.03, 0.03]) and verdict(found) == "they differ"


def test_a_line_at_half_its_pace() -> None:
    """0, 1, 2, 3 against 0, 0, 1, 1: 1 on average."""
    rising = {seed: [(i, i, float(i)) for i in range(4)] for seed in (1, 2)}
    assert judge({"trl": rising, "fast": rising})["whole"]["half_pace"] == 1


def test_seeds_are_paired() -> None:
    """By the seed, not by their place: a seed that one backend lacks is left out of both."""
    trl, fast = runs_of(source=1, spread=0.2), runs_of(source=2, spread=0.2)
    assert judge({"trl": trl, "fast": fast})["agree"] is True
    assert judge({"trl": trl, "fast": {3: fast[3], 1: fast[1]}}) == judge(
        {"trl": {1: trl[1], 3: trl[3]}, "fast": {1: fast[1], 3: fast[3]}})
    assert judge({"trl": trl, "fast": {1: fast[2], 2: fast[3], 3: fast[1]}})["agree"] is False


@pytest.mark.parametrize(("given", "why"), [
    ({"trl": runs_of()}, "1 ran"),
    ({"trl": {1: runs_of()[1]}, "fast": runs_of()}, "two seeds"),
    ({"trl": {1: runs_of()[1], 4: runs_of()[2]}, "fast": runs_of()}, "two seeds"),
    ({"trl": flat(0.5, 0.6), "fast": {0: [(1, 0, 0.5)], 1: [(1, 0, 0.5)]}}, "two points"),
    ({"trl": runs_of(), "fast": {seed: [(2 * step, at, r) for step, at, r in run] for seed, run in runs_of().items()}},
     "other steps"),
])
def test_without_enough_there_is_no_judgement(given: dict[str, Any], why: str) -> None:
    assert why in judge(given)["why"] and "agree" not in judge(given)


def test_interpolation() -> None:
    assert [agreement.interpolated(at, [0, 2, 4], [0, 1, 5]) for at in (-1, 1, 3, 9)] == [0, 0.5, 3, 5]


def test_each_sft_stage_runs_once_and_backends_take_turns(tmp_path: Path) -> None:
    before, then = learning.tasks_of(["grpo", "rloo", "ppo"], ["trl", "fast"], 2, 5, tmp_path)
    # All first stages are one: they stop where PPO's recipe does.
    assert [(task.algorithm, task.backend, task.seed) for task in before] == [("sft", "trl", 1), ("sft", "trl", 2)]
    assert [(task.algorithm, task.backend, task.seed) for task in then[:4]] == [
        ("grpo", "trl", 1), ("grpo", "fast", 1), ("grpo", "fast", 2), ("grpo", "trl", 2)]
    assert then[0].needs == then[1].needs == then[4].needs == then[8].needs == before[0].folder
    from aligntune.core.resolve import resolve

    job = resolve({"model_name": "builtin:tiny"}, then[0].stage)
    assert (job.options.max_steps, job.options.logging_steps, job.options.beta) == (5, 1, 0.04)
    assert (job.options.learning_rate, job.options.batch_size) == (1e-4, 256)
    steps = [stage["train.max_steps"] for name in ("ppo", "dapo") for stage in learning.stages_of(name, None)]
    assert steps == [700, 480, 700, 200]
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
        points = runs_of(source=task.seed + 10 * len(task.backend))[task.seed]
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
    command = ["--seeds", "3", "--json", str(out)]
    assert learning.main(["grpo", "--jobs", "2", "--commit", "c" * 40, *command], trainer(calls)) == 0
    assert learning.main(["dapo", "--commit", "d" * 40, *command], trainer(calls)) == 0
    assert {told["precision"] for _, told in calls} == {"bf16"}
    report = json.loads(out.read_text())
    assert (report["device"], report["commit"]) == ("NVIDIA H100", "d" * 40) and "dapo" in report["command"]
    assert [row["algorithm"] for row in report["rows"]] == ["grpo", "dapo"]  # the earlier one stayed
    row = report["rows"][0]
    assert row["changed"] == {name: learning.LONGER[name] for name in ("sft", "grpo")}
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
    judgement = report["rows"][0]["judgement"]
    first, last, whole = judgement["windows"][0], judgement["last_third"], judgement["whole"]
    low, high = whole["interval"]
    every = [*judgement["windows"], last]
    spread = max(abs(one["fast"][0] - one["trl"][0]) / min(one["fast"][1], one["trl"][1]) for one in every)
    assert lines[2] == (f"| grpo | {first['trl'][0]:.3f} to {last['trl'][0]:.3f} | {first['fast'][0]:.3f} to "
                        f"{last['fast'][0]:.3f} | {whole['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
                        f"(±{whole['half_pace']:.3f}) | {spread:.2f} | 7 of 7 | {verdict(judgement)} | "
                        f"{'no' if judgement['by_time']['not_behind'] else 'not shown'} | 59, 59 | 2 | 1 |")
    assert "NVIDIA H100; torch 2.11" in lines[-1]
    judgement["windows"][2] |= {"apart": 0.2}
    assert "| 6 of 7 |" in tables.learning(report)
    judgement |= {"learnt": False, "agree": False, "differ": False}
    assert "| not shown by this run; nothing learnt |" in tables.learning(report)
    judgement["by_time"] |= {"not_behind": False, "behind": True}
    assert "| yes | 59, 59 |" in tables.learning(report)
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
        assert json.loads(json.dumps(judge(curves_of(row["runs"])))) == row["judgement"]


def test_committed_curves_lie_within_each_others_spread() -> None:
    """By step; and at equal seconds fast is nowhere behind trl's."""
    rows = curves.learning_rows()
    assert {row["algorithm"] for row in rows} == {"grpo", "dapo", "rloo", "dr_grpo", "ppo"}
    for row in rows:
        found = row["judgement"]
        for one in (*found["windows"], found["last_third"]):
            assert 0 < one["apart"] <= min(one["trl"][1], one["fast"][1]) < 0.1, (row["algorithm"], one)
        assert found["learnt"] and found["by_time"]["not_behind"], row["algorithm"]
        assert all(len(runs) >= 3 for runs in curves_of(row["runs"]).values())


@pytest.mark.parametrize("row", curves.learning_rows(), ids=lambda row: row["algorithm"])
def test_no_committed_curve_agrees_with_its_own_slower_one(row: dict[str, Any]) -> None:
    """The reference's runs, each at a third of its pace."""
    trl = curves_of(row["runs"])["trl"]
    slow = {seed: [[step, at, points[i // 3][2]] for i, (step, at, _) in enumerate(points)]
            for seed, points in trl.items()}  # fmt: skip
    found = judge({"trl": trl, "fast": slow})
    assert not found["agree"] and not found["by_time"]["not_behind"]


def test_the_commands_of_the_docs_are_those_that_ran(report: dict[str, Any]) -> None:
    text = tables.learning_commands(report)
    assert text.startswith("```sh\npython -m benchmarks.learning grpo --seeds 2 --json") and "--commit" not in text


def test_before_it_is_measured_the_pages_show_nothing() -> None:
    if not curves.LEARNING.exists():
        assert tables.table("learning-grpo") == "" and tables.table("learning") == "Not measured yet.\n"
    quiet = {name.removeprefix("learning-") for name, said in tables.UNMEASURED.items() if not said}
    assert quiet == set(learning.ALGORITHMS)
