"""Reward curves of backends beside each other: the packaged builtin recipes on the card, for longer, seed by seed.

python -m benchmarks.learning --json FILE                                   every algorithm, trl and fast, 5 seeds
python -m benchmarks.learning grpo ppo --jobs 6 --json FILE                 some, six runs at once
python -m benchmarks.learning grpo --seeds 2 --steps 2 --precision fp32     a rehearsal, any machine

Each seed's SFT stage runs once, on backend trl, for all algorithms whose recipe has the same one; from its model every
backend runs the recipe's own stage with what `LONGER` changes: curves that hardly rise tell no learner from another.
So a seed's curves begin at one model and on the same prompts. Arithmetic is bf16 over fp32 weights, what `precision:
auto` is on such a card and what the backends' kernels and graphs are made for.

Of each logged reward: the step, seconds since the end of the first step (whose kernels are compiled; `first_step_s`
has it) and the reward. Backends take turns, A B, B A, ..., and `at_once` says how many runs shared the card and the
cores: seconds of runs with --jobs 1 alone are those of a machine of their own. FILE is written after every run; rows
of algorithms that were not asked for stay in it. `benchmarks.agreement` says what is held to be the same curve.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.agreement import MOST, curves_of, judge, verdict
from benchmarks.ops.__main__ import commit

ALGORITHMS = ("grpo", "ppo", "dapo", "rloo", "dr_grpo")
METRICS = {"dapo": "dynamic_sampling/reward_drawn"}
"""The reward of what was drawn; the one of DAPO's batches is of groups that were chosen for being neither 0 nor 1."""
LONGER: dict[str, dict[str, Any]] = {
    "sft": {"evaluation": {"stop_value": 0.8}},
    **dict.fromkeys(ALGORITHMS, {"train": {"max_steps": 200, "batch_size": 256, "learning_rate": 1.0e-4}}),
    "ppo": {"train": {"max_steps": 480}},
}
"""Over the recipes' stages, which are made to take minutes on two CPU cores and rise by 0.1 to 0.25: on backend trl
there RLOO rose from 0.27 to 0.69 in 190 steps of this, PPO from 0.31 to 0.70, GRPO from 0.28 to 0.51 in 100."""
PACKAGES = ("torch", "triton", "transformers", "trl")
STATE = "recipe.json"


@dataclass(frozen=True)
class Task:
    """One process: a stage of a recipe. `needs`: the folder of the stage whose model it trains."""

    algorithm: str
    backend: str
    seed: int
    stage: dict[str, Any]
    folder: Path
    needs: Path | None = None


def stages_of(algorithm: str, steps: int | None) -> list[dict[str, Any]]:
    """The two stages of the packaged recipe, its defaults within each."""
    from aligntune.core.recipes import over, read_recipe

    config = read_recipe(f"{algorithm}-builtin").config
    found = [over({key: value for key, value in config["defaults"].items() if key != "backend"}, stage)
             for stage in config["stages"]]
    found = [over(stage, LONGER[stage["algorithm"]]) for stage in found]
    found[1] = over(found[1], {"logging": {"logging_steps": 1}})
    return [over(stage, {"train": {"max_steps": steps}}) if steps else stage for stage in found]


def tasks_of(algorithms: Sequence[str], backends: Sequence[str], seeds: int, steps: int | None, folder: Path
             ) -> tuple[list[Task], list[Task]]:
    """The SFT stages, each once a seed, and what follows on them: backends take turns."""
    first: dict[str, Task] = {}
    then: list[Task] = []
    for algorithm in algorithms:
        sft, own = stages_of(algorithm, steps)
        for seed in range(1, seeds + 1):
            key = json.dumps([sft, seed], sort_keys=True)
            before = first.setdefault(key, Task("sft", "trl", seed, sft, folder / f"sft-{len(first)}"))
            then += [Task(algorithm, backend, seed, own, folder / f"{algorithm}-{backend}-{seed}", before.folder)
                     for backend in (backends if seed % 2 else reversed(backends))]
    return list(first.values()), then


def train(task: Task, *, precision: str, threads: int, limit: float) -> str | None:
    """Run the task's process; returns why it failed, or None."""
    from aligntune.core.recipes import over

    stage = task.stage
    if task.needs is not None:
        state = task.needs / STATE
        if not state.is_file() or not (done := json.loads(state.read_text())["stages"]):
            return "its SFT stage failed"
        stage = over(stage, {"model": {"model_name": str(task.needs / done[-1]["result"]["model"])}})
    task.folder.parent.mkdir(parents=True, exist_ok=True)
    recipe, log = task.folder.with_suffix(".yaml"), task.folder.with_suffix(".log")
    recipe.write_text(json.dumps({"stages": [stage]}))  # JSON is YAML
    command = [sys.executable, "-m", "aligntune", "train", str(recipe), f"backend={task.backend}", f"seed={task.seed}",
               f"output_dir={task.folder}", f"precision={precision}"]
    with log.open("w") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=limit, check=False,
                                  env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
        except subprocess.TimeoutExpired:
            return f"not done in {limit:g} s"
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit {code}: {lines[-1][:300] if lines else 'it said nothing'}"


def run_of(task: Task) -> dict[str, Any]:
    """What a finished run logged: {backend, seed, steps, first_step_s, layout, points}.

    Raises:
        LookupError: it logged no reward.
    """
    run = task.folder / f"1-{task.algorithm}"
    metric = METRICS.get(task.algorithm, "reward")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    if not any(metric in line for line in lines):
        raise LookupError(f"{run} logged no {metric}")
    first = lines[0]["time"]
    attested = run / "attestation.json"
    return {
        "backend": task.backend, "seed": task.seed, "steps": lines[-1]["step"], "first_step_s": first,
        "layout": json.loads(attested.read_text()).get("layout") if attested.is_file() else None,
        "points": [[line["step"], round(line["time"] - first, 3), float(f"{line[metric]:.4g}")]
                   for line in lines if metric in line],
    }


def where(task: Task) -> tuple[str, dict[str, str]]:
    """The card and the versions that a finished run wrote down."""
    found = json.loads((task.folder / f"1-{task.algorithm}" / "environment.json").read_text())
    gpus = found.get("gpus") or []
    versions = {name: found["packages"][name] for name in PACKAGES if name in found["packages"]}
    return gpus[0]["name"] if gpus else "CPU", versions


def row_of(algorithm: str, backends: Sequence[str], runs: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]],
           **about: Any) -> dict[str, Any]:
    """An algorithm's row of the report: what ran, and what holds between the backends' curves."""
    runs = sorted(runs, key=lambda run: (backends.index(run["backend"]), run["seed"]))
    return {"algorithm": algorithm, "recipe": f"{algorithm}-builtin", "metric": METRICS.get(algorithm, "reward"),
            "changed": {stage: LONGER[stage] for stage in ("sft", algorithm)}, **about,
            "judgement": judge(curves_of(runs)), "failed": list(failed), "runs": runs}


def dumped(report: dict[str, Any]) -> str:
    """JSON with a run a line."""
    rows = []
    for row in report["rows"]:
        runs = ",\n".join("   " + json.dumps(run) for run in row["runs"])
        head = json.dumps({name: value for name, value in row.items() if name != "runs"})
        rows.append(f'  {head[:-1]}, "runs": [\n{runs}\n  ]}}')
    head = json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1)
    return head[:-2] + ',\n "rows": [\n' + ",\n".join(rows) + "\n ]\n}\n"


def write(path: Path, report: dict[str, Any]) -> None:
    """The report, beside the rows that `path` holds of other algorithms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    here = {row["algorithm"] for row in report["rows"]}
    rows = sorted([*(row for row in old if row["algorithm"] not in here), *report["rows"]],
                  key=lambda row: ALGORITHMS.index(row["algorithm"]))
    aside = path.with_name(path.name + ".part")  # cut while writing, the one of before stays
    aside.write_text(dumped({**report, "rows": rows}))
    aside.replace(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", metavar="algorithm", help=f"of {', '.join(ALGORITHMS)}; all of them")
    parser.add_argument("--backends", default="trl,fast", help="two; the first is the reference")
    parser.add_argument("--seeds", type=int, default=5, help="1 to so many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--steps", type=int, help="of each stage, in place of the recipe's: a rehearsal")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--json", type=Path, help="write rows here")
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    parser.add_argument("--limit", type=float, default=300, help="seconds a run may take")
    parser.add_argument("--keep", type=Path, help="leave the runs' folders and logs here")
    args = parser.parse_args(argv)
    args.algorithms = args.algorithms or list(ALGORITHMS)
    args.backends = args.backends.split(",")
    for given, known in ((args.algorithms, ALGORITHMS), (args.backends, ("trl", "fast"))):
        if strange := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(known)}")
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")
    return args


def main(argv: list[str] | None = None, trainer: Callable[..., str | None] = train) -> int:
    args = parse(argv)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    command = " ".join(("python -m benchmarks.learning", *(sys.argv[1:] if argv is None else argv)))
    told = {"commit": args.commit or commit(), "command": command}
    about = {**told, "precision": args.precision, "at_once": args.jobs, "threads": threads}
    done: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in args.algorithms}
    places: dict[str, Any] = {}

    def note(task: Task, why: str | None) -> None:
        """Keep what came of a run: in the order of the tasks."""
        runs, failed = done[task.algorithm]
        if why is None:
            try:
                runs.append(run_of(task))
                places["device"], places["versions"] = where(task)
            except LookupError as error:
                why = str(error)
        print(f"  {task.algorithm} {task.backend} {task.seed}: {why or 'ok'}", flush=True)
        if why is not None:
            failed.append({"backend": task.backend, "seed": task.seed, "why": why})
        rows = [row_of(name, args.backends, found[0], found[1], **about, **places)
                for name, found in done.items() if found[0]]
        if args.json and rows:
            write(args.json, {**told, **places, "rows": rows})

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        before, then = tasks_of(args.algorithms, args.backends, args.seeds, args.steps, args.keep or Path(folder))
        print(f"{len(before)} SFT runs, then {len(then)} runs; {args.jobs} at once, {threads} threads each", flush=True)

        def work(task: Task) -> str | None:
            return trainer(task, precision=args.precision, threads=threads, limit=args.limit)

        for task, why in zip(before, pool.map(work, before), strict=True):
            print(f"  sft {task.seed}: {why or 'ok'}", flush=True)
        for task, why in zip(then, pool.map(work, then), strict=True):
            note(task, why)
    for name, found in done.items():
        judgement = row_of(name, args.backends, found[0], found[1])["judgement"]
        print(f"{name}: {line(judgement)}")
    return 0 if any(runs for runs, _ in done.values()) else 1


def line(judgement: dict[str, Any]) -> str:
    """The judgement in words."""
    if "why" in judgement:
        return judgement["why"]
    whole, time = judgement["whole"], judgement["by_time"]
    windows = [*judgement["windows"], judgement["last_third"]]
    beyond = sum(one["apart"] > min(MOST, one["chance"]) for one in windows)
    low, high = whole["interval"]
    return (f"{verdict(judgement)}{'' if judgement['learnt'] else ', nothing learnt'}: {whole['difference']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}] over all steps, half as fast {whole['half_pace']:.3f}; {beyond} of "
            f"{len(windows)} windows beyond; at equal seconds "
            + ("not behind" if time["not_behind"] else "behind" if time["behind"] else "not shown"))


if __name__ == "__main__":
    sys.exit(main())
