"""Runs a packaged builtin recipe and commits what came of it: `python -m benchmarks.recipes NAME [--seed N]`.

The row of a seed takes the place of an earlier one: scores of the probe (of a recipe without one: what it logged of
held-out rows), steps, tokens a second, the logged history of the last stage's algorithm, and two times. `cpu_s` is
what the run computed, summed over its `threads`; threads that wait for each other count too, so OMP_NUM_THREADS=1
measures the work. `wall_s` depends on what else the machine did: two threads belong on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.curves import CURVES
from benchmarks.ops.__main__ import commit
from benchmarks.tables import RESULTS

PACKAGES = ("torch", "transformers", "trl")


def train(name: str, *, seed: int, folder: Path) -> dict[str, float]:
    """Runs the recipe in a process of its own: {cpu_s, wall_s}, start and probes included.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "aligntune", "train", name, f"seed={seed}", f"output_dir={folder}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": round(cpu, 1), "wall_s": round(time.monotonic() - start, 1)}


def result(run: Path) -> dict[str, Any]:
    """{seed, scores, steps, tokens_per_s, history} of a finished run's folder, and the probe where there was one."""
    last = _summary(_last(run))
    algorithm = last["algorithm"]
    history = history_of(_last(run), algorithm)
    if not (run / "recipe.json").exists():
        config = _yaml(run / "config.yaml")
        held_out = {name: points for name, points in history.items() if name.startswith("eval_")}
        scores = {f"{name} at step {step}": value for name, points in held_out.items()
                  for step, value in (points[0], points[-1])}  # fmt: skip
        return {"seed": config["seed"], "scores": scores, "steps": {algorithm: last["steps"]},
                "tokens_per_s": {algorithm: last["tokens_per_second"]}, "history": history}  # fmt: skip
    written = json.loads((run / "recipe.json").read_text())
    done = [stage["result"] for stage in written["stages"]]
    scores = {"before": done[0]["probe_before"], **{f"after {each['algorithm']}": each["probe_after"] for each in done}}
    return {"seed": written["stages"][0]["config"]["seed"], "probe": written["probe"], "scores": scores,
            "steps": {each["algorithm"]: each["global_step"] for each in done},
            "tokens_per_s": {each["algorithm"]: _summary(_folder(run, each))["tokens_per_second"] for each in done},
            "history": history}  # fmt: skip


def _summary(stage: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage / "summary.json").read_text())
    return found


def _folder(run: Path, done: dict[str, Any]) -> Path:
    folder = Path(done["output_dir"])
    return folder if folder.is_absolute() else run / folder


def _yaml(path: Path) -> dict[str, Any]:
    from aligntune.core.resolve import read_config

    return read_config(path)


def _last(run: Path) -> Path:
    """The folder of the last stage; the run's own where it has none."""
    if not (run / "recipe.json").exists():
        return run
    return _folder(run, json.loads((run / "recipe.json").read_text())["stages"][-1]["result"])


def history_of(stage: Path, algorithm: str) -> dict[str, list[list[float]]]:
    """{metric: [[step, value], ...]} of what the algorithm's page draws, to 4 significant digits."""
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    names = [name for panel in CURVES[algorithm] for name in panel.metrics]
    return {name: [[each["step"], float(f"{each[name]:.4g}")] for each in records if name in each] for name in names}


def environment(stage: Path) -> dict[str, str]:
    """Versions of what computed, as the run wrote them down."""
    packages = json.loads((stage / "environment.json").read_text())["packages"]
    return {name: packages[name] for name in PACKAGES}


def write(name: str, row: dict[str, Any], versions: dict[str, str]) -> Path:
    """The row in the recipe's results file."""
    path = RESULTS / "recipes" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = sorted([*(old for old in rows if old["seed"] != row["seed"]), row], key=lambda each: each["seed"])
    head = {"command": f"aligntune train {name} seed=SEED", "device": "CPU", "commit": commit(), "versions": versions}
    lines = ",\n".join("  " + json.dumps(each) for each in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a packaged recipe: ALGORITHM-builtin, quickstart")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        times = train(args.name, seed=args.seed, folder=run)
        row = result(run) | times | {"threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
        print(write(args.name, row, environment(_last(run))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
