"""Scores of a staged recipe's run as a committed result: `python -m benchmarks.recipes RUN_DIR`, then the tables.

A run of the same recipe and seed takes the place of an earlier one. Scores only: how long a run takes depends on what
else the machine does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.ops.__main__ import commit
from benchmarks.tables import RESULTS

PACKAGES = ("torch", "transformers", "trl")


def result(run: Path) -> tuple[str, dict[str, Any]]:
    """(recipe, {seed, probe, scores, steps}) of a finished run's folder."""
    written = json.loads((run / "recipe.json").read_text())
    stages = [(stage["result"], stage["config"]) for stage in written["stages"]]
    first = stages[0][0]
    scores = {"before": first["probe_before"], **{f"after {done['algorithm']}": done["probe_after"]
                                                  for done, _ in stages}}
    steps = {done["algorithm"]: done["global_step"] for done, _ in stages}
    return written["recipe"], {"seed": stages[0][1]["seed"], "probe": written["probe"], "scores": scores,
                               "steps": steps}


def environment(run: Path) -> dict[str, str]:
    """Versions of what computed, as the run wrote them down."""
    last = json.loads((run / "recipe.json").read_text())["stages"][-1]["result"]["output_dir"]
    packages = json.loads((run / last / "environment.json").read_text())["packages"]
    return {name: packages[name] for name in PACKAGES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run of a recipe with stages")
    parser.add_argument("--device", default="CPU", help="what computed")
    args = parser.parse_args()
    recipe, row = result(args.run)
    path = RESULTS / "recipes" / f"{recipe}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = sorted([*(old for old in rows if old["seed"] != row["seed"]), row], key=lambda each: each["seed"])
    report = {"command": f"aligntune train {recipe} seed=SEED", "device": args.device, "commit": commit(),
              "versions": environment(args.run), "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
