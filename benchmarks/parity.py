"""Does backend "fast" train the same model as backend "trl"? Runs of both, and every difference beside its bound.

python -m benchmarks.parity --json benchmarks/results/parity.json     on a card
python -m benchmarks.parity --parts options --json benchmarks/results/parity-options.json
python -m benchmarks.parity --device cpu --steps 3                    toy lengths, any machine; needs TRITON_INTERPRET=1

Runs go through the factories, from one checkpoint whose weights are numbers of bf16 (what is judged is arithmetic, not
the rounding of weights), with LoRA whose B is drawn N(0, 0.02): at 0 no gradient of A could be compared. So are PPO's
value head, at 0 of which no gradient of a value would reach the policy, and a reward model's, which no checkpoint has.

SFT trains adapters, all weights, and adapters on a base in NF4. fp8 is held against bf16 twice: trl's, as bf16 on fast
is, and fast's own. What the bounds are is in `benchmarks.bounds`.

Triton's interpreter cuts fp32 to bf16 where a GPU rounds: what a toy run says of bf16 is two to six times too far.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.bounds import (
    BF16,
    FIRST,
    FP8,
    QUIET,
    Apart,
    Check,
    Losses,
    distance,
    first_loss,
    gradient_distances,
    gradient_over_batches,
    gradients_apart,
    rms,
    within_yardstick,
)
from benchmarks.jobs import Attempt, begun
from benchmarks.ops.__main__ import commit
from benchmarks.parity_parts import (
    LEARNING,
    OPTIONS,
    PARTS,
    SFT,
    TRUE_LOSS,
    TRUTH,
    Job,
    Plan,
    is_online,
)
from benchmarks.parity_runs import SEEDS_APART, Later, Ran, done, write_model
from benchmarks.tables import held

PACKAGES = ("torch", "triton", "transformers", "trl", "peft")
TWO_RUNS = "two trl runs in fp32"

def judged(
    part: str, given: Mapping[Job, Later], plan: Plan, say: Callable[[str], Any] = print
) -> tuple[list[Check], dict[str, Any]]:
    """Every bound of a part, and what else is reported of it, once all its jobs are done."""
    runs: dict[str, list[Ran]] = {}
    apart: list[Apart] = []
    for job in given:
        found = given[job]()
        if isinstance(found, Apart):
            apart.append(found)
            continue
        for name, run in zip(job.arms, found, strict=True):
            runs.setdefault(name, []).append(run)
            told = "; ".join(f"{float(each[0]):.4f} -> {float(each[-1]):.4f}" for each in run.losses.values())
            say(f"  {part}, {name}, seed {job.seed}: {told}")
    more = {"layouts": {name: found[0].layout for name, found in runs.items() if found[0].layout}}
    short = {name: [replace(run, losses={key: x[:plan.yard_steps] for key, x in run.losses.items()}) for run in found]
             for name, found in runs.items()}
    checks = held_checks(part, short, apart)
    if part != "sft":
        return [*checks, *quiet_checks(part, runs)], more
    learnt, about = learning(runs, plan)
    return [*checks, *learnt], more | about


def _of(runs: Mapping[str, Sequence[Ran]], key: str) -> dict[str, list[Losses]]:
    return {name: [run.losses[key] for run in found] for name, found in runs.items()}


def held_checks(part: str, runs: Mapping[str, Sequence[Ran]], apart: Sequence[Apart]) -> list[Check]:
    """fast in fp32 within the yardstick, and in bf16 as near to fp32 as trl is: losses, and the gradients that are.

    Each over the seeds that all its arms ran; of a method's options there are no losses in bf16.
    """
    told = ", forced rollouts" if is_online(part) else ""
    fine = _common(runs, "trl", "trl-eager", "fast")
    rounded = _common(runs, "trl", "trl-bf16", "fast-bf16") if "fast-bf16" in runs else {}
    exact, coarse = [], []
    for key in runs["trl"][0].losses:
        which, lost = "" if key == "loss" else key, _of(fine, key)
        assert float(lost["trl"][0].abs().max()) > 1e-4
        if part in SFT:
            exact.append(first_loss(f"{part}, fp32", lost["trl"], lost["fast"], FIRST))
        exact += within_yardstick(f"{part}, fp32{told}", lost["trl"], lost["trl-eager"], lost["fast"], which)
        if TRUTH in runs:
            true = _of(runs, key)[TRUTH]
            exact += [distance(f"{part}, fp32", true, own, lost["fast"], BF16, run, what=TRUE_LOSS)
                      for run, own in (("", lost["trl"]), ("against trl, eager", lost["trl-eager"]))]
        if rounded:
            chance, near = 3 * SEEDS_APART / math.sqrt(len(rounded["trl"])), _of(rounded, key)
            coarse.append(distance(f"{part}, bf16{told}", near["trl"], near["trl-bf16"], near["fast-bf16"],
                                   BF16 * (1 + chance * is_online(part)), which))
    if apart:
        coarse.append(gradient_over_batches(f"{part}, bf16{told}", apart))
    if part in SFT:
        first = {name: [run.gradients for run in found] for name, found in rounded.items()}
        coarse.append(gradients_apart(f"{part}, bf16", first["trl"], first["trl-bf16"], first["fast-bf16"])[0])
    return [*exact, *coarse]


def _common(runs: Mapping[str, Sequence[Ran]], *names: str) -> dict[str, Sequence[Ran]]:
    """Of some arms the runs of the seeds that all of them have."""
    seeds = min(len(runs[name]) for name in names)
    return {name: runs[name][:seeds] for name in names}


def quiet_checks(part: str, runs: Mapping[str, Sequence[Ran]]) -> list[Check]:
    """Of the measurement: that trl's two runs in fp32 are not chaotic."""
    checks = []
    for key in runs["trl"][0].losses:
        lost = _of(_common(runs, "trl", "trl-bf16", "trl-eager"), key)
        checks.append(distance(f"{part}, {TWO_RUNS}", lost["trl"], lost["trl-bf16"], lost["trl-eager"], QUIET,
                               "" if key == "loss" else key))
    return checks


def learning(runs: Mapping[str, Sequence[Ran]], plan: Plan) -> tuple[list[Check], dict[str, Any]]:
    """The runs that learn, in fp32, bf16 and with a base in fp8, over their seeds."""
    learnt = {name: found[:plan.learn_seeds] for name, found in _of(runs, "loss").items()}
    checks = [
        distance("sft, bf16", learnt["trl"], learnt["trl-bf16"], learnt["fast-bf16"], BF16),
        *(distance("sft, fp8 base", learnt["trl"], learnt[f"{backend}-bf16"], learnt["fast-fp8"], FP8,
                   f"against bf16 on {backend}") for backend in ("trl", "fast")),
        *quiet_checks("sft", {name: found[:1] for name, found in runs.items()}),
    ]
    tenth = max(1, plan.steps // 10)
    fell = [float(part.mean()) for part in (learnt["trl"][0][:tenth], learnt["trl"][0][-tenth:])]
    curves = {name: [[round(float(x), 6) for x in run] for run in found] for name, found in learnt.items()}
    apart = {name: [rms([run - true]) for run, true in zip(learnt[name], learnt["trl"], strict=True)]
             for name in LEARNING if name != "trl"}  # fmt: skip
    first = {name: [run.gradients for run in found[:plan.learn_seeds]] for name, found in runs.items()}
    return checks, {"fell": fell, "losses": curves, "apart": apart, "parameters": len(first["trl"][0]),
                    "fp8_gradients": gradient_distances(first["trl"], first["fast-fp8"])}  # fmt: skip


def measured(part: str, plan: Plan) -> tuple[list[Check], dict[str, Any]]:
    """`judged`, of runs made here."""
    return judged(part, begun(done, plan.jobs(part), None), plan)


@dataclass(frozen=True)
class Judged:
    """What came of a part."""

    checks: list[Check]
    failed: str
    """Why there are no checks; "" where there are."""
    more: Mapping[str, Any]

    def rows(self, part: str) -> list[dict[str, Any]]:
        return [as_row(check) for check in self.checks] or [{"part": part, "failed": self.failed, "holds": False}]


def judged_each(parts: Sequence[str], plan: Plan, pool: Executor | None) -> Iterator[tuple[str, Judged]]:
    """Part by part, as each one's runs are done: all are on their way, those of the first part first."""
    given = {part: begun(done, plan.jobs(part), pool) for part in parts}
    for part in parts:
        found: tuple[list[Check], dict[str, Any]] = ([], {})
        with Attempt() as attempt:
            found = judged(part, given[part], plan)
        yield part, Judged(found[0], attempt.why, found[1])


def as_row(check: Check) -> dict[str, Any]:
    return {**asdict(check), "holds": check.holds}


def unsettled(found: Mapping[str, Judged]) -> list[str]:
    """The parts with a bound that does not hold, or that the seeds do not settle."""
    return [part for part, each in found.items() if any(held(as_row(check)) != "yes" for check in each.checks)]


def no_nf4_because(device: str) -> str | None:
    """Why no base in NF4 can be made here, or None."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device=where), quant_type="nf4", compress_statistics=True))
    except (ImportError, AttributeError, OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


# the report


def report(found: Mapping[str, Judged], command: str, at: str | None, before: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds: of these parts what was found, of others what it held, beside how they were measured."""
    about = {"command": command, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
             "commit": at or commit(),
             "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}}
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in before.get("rows", ()):
        rows.setdefault(row["part"].partition(",")[0], []).append(row)
    rows |= {part: each.rows(part) for part, each in found.items()}
    earlier, told = [], set(found)
    for one in [*before.get("earlier", ()), {**{name: before.get(name) for name in about}, "parts": [*rows]}]:
        if parts := [part for part in one["parts"] if part not in told]:
            earlier.append({**one, "parts": parts})
            told |= {*parts}
    more = {name: value for name, value in before.items() if name not in {*about, "rows", "earlier", "layouts"}}
    layouts = dict(before.get("layouts", {}))
    for part, each in found.items():
        more |= {name: value for name, value in each.more.items() if name != "layouts"}
        layouts[part] = each.more.get("layouts", {})
    order = [part for part in (*PARTS, *OPTIONS) if part in rows]
    return {**about, **({"earlier": earlier} if earlier else {}), "rows": [row for part in order for row in rows[part]],
            "layouts": {part: layouts[part] for part in order if part in layouts}, **more}  # fmt: skip


def written(found: Mapping[str, Any]) -> str:
    """As JSON, an array of numbers on one line."""
    text = json.dumps(found, indent=1) + "\n"
    return re.sub(r'\[\n[^][{}"]*\]', lambda array: "[" + " ".join(array[0][1:-1].split()) + "]", text)


def write(path: Path, found: Mapping[str, Judged], command: str, at: str | None) -> None:
    """Into the file, beside the parts that it holds; cut while it is written, the one of before stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {}
    aside = path.with_name(path.name + ".part")
    aside.write_text(written(report(found, command, at, before)))
    aside.replace(path)


def tell(part: str, each: Judged) -> None:
    for check in each.checks:
        own = "-" if check.own is None else f"{check.own:.2e}"
        print(f"{held(as_row(check))}: {check.part}: {check.what} {check.value:.2e}, "
              f"own {own}, bound {check.bound:.2e}; {check.steps} steps, {check.seeds} seeds", flush=True)
    if each.failed:
        print(f"{part}: failed: {each.failed}", flush=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, figures and bounds "
                        "here, part by part; others that the file holds stay")
    parser.add_argument("--steps", type=int, default=300,
                        help="of the learning run; yardsticks of SFT take 100 at most, other methods 50")
    parser.add_argument("--seeds", type=int, default=2, help="of all but the learning run, and SFT in bf16")
    parser.add_argument("--learn-seeds", type=int, default=12, help="of the learning run")
    parser.add_argument("--bf16-seeds", type=int, help="of SFT's yardstick in bf16; default: twice --learn-seeds")
    parser.add_argument("--again", type=int, default=6, metavar="SEEDS",
                        help="of a method with options, where its one seed keeps no bound or settles none; a "
                        "preference method's are then also held against trl in fp64; 1: none")
    parser.add_argument("--workers", type=int, default=1, help="runs at once: they share the card")
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}; default: all of these that the device can run. "
                        f"And methods with options, `options` for all of them: {','.join(OPTIONS)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    args = parser.parse_args(argv)
    args.bf16_seeds = 2 * args.learn_seeds if args.bf16_seeds is None else args.bf16_seeds
    if args.parts is not None:
        args.parts = [name for one in args.parts.split(",") for name in (OPTIONS if one == "options" else [one])]
        if strange := sorted(set(args.parts) - {*PARTS, *OPTIONS}):
            parser.error(f"unknown: {', '.join(strange)}; there are {', '.join((*PARTS, 'options', *OPTIONS))}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    parts = [name for name in (*PARTS, *OPTIONS) if name in (PARTS if args.parts is None else args.parts)]
    if args.parts is None and (why := no_nf4_because(args.device)):
        parts.remove("sft-nf4")
        print(f"sft-nf4 is left out: {why}")
    command = " ".join(["python -m benchmarks.parity", *(argv if argv is not None else sys.argv[1:])])
    found: dict[str, Judged] = {}

    def run(parts: Sequence[str], plan: Plan) -> None:
        for part, each in judged_each(parts, plan, pool):
            found[part] = each
            tell(part, each)
            if args.json:
                write(args.json, found, command, args.commit)

    folder = Path(tempfile.mkdtemp())
    spawned = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=spawned) if args.workers > 1 else None
    try:
        source = write_model(folder / "model")
        plan = Plan(source, args.steps, args.seeds, args.learn_seeds, args.bf16_seeds, options={"device": args.device})
        run(parts, plan)
        again = [part for part in unsettled(found) if part in OPTIONS]
        if again and args.again > 1:
            print(f"again, over {args.again} seeds: {', '.join(again)}")
            run(again, replace(plan, option_seeds=args.again, truth=True))
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder)
    return 0 if all(not each.failed and all(check.holds for check in each.checks) for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
