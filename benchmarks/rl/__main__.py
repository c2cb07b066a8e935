"""Preference and online methods on one GPU: backend "fast" beside trl and unsloth, whole steps, rollouts within them.

python -m benchmarks.rl                                         every row, into benchmarks/results and the docs
python -m benchmarks.rl dpo-1b --arms fast,fast-gc,trl-gc       one row, some arms
python -m benchmarks.rl grpo-1b --arms fast,unsloth --site-unsloth DIR --repeats 1
python -m benchmarks.rl smoke-grpo --arms trl,fast              toy sizes, any machine; the times mean nothing

Arms are those of `aligntune compare`, and so are the processes, the clocks and the statistics: every arm runs --repeats
times, the second time in the other order, from one seed checkpoint, on the same rows and with one trivial reward. An
arm that waits seconds for each step runs few of them (`workloads.py` says how many); the ratio pairs the last measured
steps of two arms. A peer that is not installed lives in a folder where `pip install --target` put it:
--site-unsloth DIR; without it the arm is skipped with a line. An arm that fails, or is not done in time, is a line too.

Rows: dpo-1b, ipo-1b, kto-1b, orpo-1b, simpo-1b, cpo-1b, reward-1b, 8 pairs a step; the reference, where there is one,
is the model with its adapter off. grpo-1b, rloo-1b, dr_grpo-1b, ppo-1b, dapo-1b: 8 prompts with 8 completions of 256
tokens a step, one optimizer step a rollout; dapo would draw groups anew that earn equal rewards, and none do. grpo-4b:
up to 1,024 tokens of uneven lengths, 8 micro-steps of 8 completions a step.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aligntune.compare import findings, measure
from aligntune.compare.arm import ArmSpec
from aligntune.compare.parity import losses
from aligntune.compare.peers import PEERS
from aligntune.compare.protocol import Run, in_a_fresh_process, spec_of
from aligntune.compare.settings import Arm, Settings
from aligntune.compare.stats import throughput_ratio
from benchmarks import tables
from benchmarks.ahead import Ahead, Job
from benchmarks.ops.__main__ import commit
from benchmarks.rl.workloads import WORKLOADS, Workload, recipe, write_policy, write_rows
from benchmarks.sft.__main__ import NOT_RUN, PLAIN, RECOMPUTE, Runner, into_results, missing, run_arms, write_report
from benchmarks.sft.workloads import versions_of

CONTINUOUS = {"trainer_options": {"use_transformers_continuous_batching": True}}
# Run where they are named: not part of every table.
ASIDE = ("fast-8gib",)
ARMS: dict[str, Arm] = {arm.label: arm for arm in (
    Arm("fast", "fast", PLAIN), Arm("fast-gc", "fast", RECOMPUTE),
    # As many layers as 8 GiB ask for, the rollouts' cache included.
    Arm("fast-8gib", "fast", {"gradient_checkpointing": "auto", "memory_budget_gib": 8.0}),
    Arm("trl", "trl", PLAIN), Arm("trl-gc", "trl", RECOMPUTE),
    # transformers' continuous batching in place of generate; its cache leaves little for activations
    Arm("trl-cb", "trl", RECOMPUTE | CONTINUOUS),
    Arm("unsloth", "trl", PLAIN, "unsloth"),
    Arm("unsloth-gc", "trl", {"gradient_checkpointing": "auto"}, "unsloth"),  # its offloading one
)}
LOGGED = {"rollout/seconds": "seconds", "rollout/tokens_per_second": "tokens_per_s",
          "sampling/sampling_logp_difference/mean": "log_prob_difference_mean",
          "sampling/sampling_logp_difference/max": "log_prob_difference_max"}


def unfit(workload: Workload, arm: Arm) -> str | None:
    """Why the arm has nothing to measure in the row, or None."""
    if arm.label == "trl-cb" and not workload.online:
        return f"{workload.algorithm} generates nothing"
    lacks = PEERS[arm.peer].lacks if arm.peer is not None else {}
    if workload.algorithm in lacks:
        return f"{arm.peer}: {lacks[workload.algorithm]}"
    return missing(arm)


def spec_for(workload: Workload, arm: Arm, repeat: int, *, model: Path, rows: Path, folder: Path, precision: str
             ) -> ArmSpec:
    """What the process of one run is told."""
    steps, _ = workload.steps_of(arm.label)
    settings = Settings("benchmark", recipe(workload, str(model), str(rows), precision, steps=steps), {}, a=arm, b=arm)
    spec = spec_of(settings, Run("a", repeat, arm), folder / arm.label, seed=1, online=False, peft=False)
    # A trace of a rollout by generate is a million launches, and takes longer to read than all steps take.
    role = "timed" if workload.online else spec.role
    return replace(spec, probe=False, draw_adapters=True, gradient_steps=[], role=role)


def jobs_of(workload: Workload, arms: Sequence[Arm], *, repeats: int, **where: Any) -> list[Job]:
    """What is run, in order: A B C, C B A, ...; arms that have nothing to measure are left out."""
    return [(spec_for(workload, arm, repeat, **where), arm) for repeat in range(repeats)
            for arm in (arms if repeat % 2 == 0 else list(reversed(arms))) if unfit(workload, arm) is None]


def with_log(spec: ArmSpec, result: dict[str, Any]) -> dict[str, Any]:
    """A run's result, with what it logged."""
    return result | {"log": logged(Path(spec.folder) / "run" / "metrics.jsonl")}


def logged(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's own log that tell of a training step; none where there is no log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if "loss" in line and "step" in line]


def rollouts(runs: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> dict[str, Any]:
    """Rollouts of the measured steps (indices): on the arm's clock, and as the trainer logs its own, where it does."""
    taken = [one["steps"][i] for one in runs for i in steps]
    seconds, tokens = sum(step["phases"].get("rollout", 0.0) for step in taken), sum(step["learnt"] for step in taken)
    drawn = sum(step["documents"] for step in taken)
    found: dict[str, Any] = {
        "seconds": seconds / len(taken), "tokens": tokens / len(taken), "mean_length": tokens / drawn,
        "tokens_per_s": tokens / seconds if seconds else None,
    }
    wanted = {i + 1 for i in steps}
    lines = [line for one in runs for line in one["log"] if line["step"] in wanted]
    own = {ours: [line[theirs] for line in lines if theirs in line] for theirs, ours in LOGGED.items()}
    found["logged"] = {name: max(values) if name.endswith("max") else sum(values) / len(values)
                       for name, values in own.items() if values}
    return found


def against(found: dict[str, Any], runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], *,
            warmup: tuple[int, int], online: bool) -> None:
    """Add what holds between an arm and the reference: the same data, how far losses are apart, the ratio of speeds."""
    first, other = reference[0], runs[0]
    count = min(len(first["steps"]), len(other["steps"]))
    first, other = ({**one, "steps": one["steps"][:count]} for one in (first, other))
    data = findings.compare_data(first, other, online=online, repacked=False)
    found["data"] = "the same" if data.same else data.findings[0].text
    if data.same and not online:
        found["max_dloss"] = float(abs(losses(other) - losses(first)).max())
    # Arms run other numbers of steps online: the last ones that both measured are paired.
    indices = [measure.timed_steps(some, some, skip) for some, skip in zip((runs, reference), warmup, strict=True)]
    if not online:
        indices = [sorted(set(indices[0]) & set(indices[1]))] * 2
    last = min(map(len, indices))
    if not last:
        return
    pairs = list(zip(runs, reference, strict=False))
    logs = [[measure.log_costs(pair[side], indices[side][-last:]) for pair in pairs] for side in (0, 1)]
    ratio = throughput_ratio(*logs)
    found["over_this"] = {"ratio": ratio.ratio.as_list(), "noise": ratio.noise, "significant": ratio.significant,
                          "pairs": last * len(pairs)}  # of one pair of steps the interval says nothing


def entry(name: str, arm: Arm, runs: list[dict[str, Any]], reference: list[dict[str, Any]] | None,
          reference_arm: str) -> dict[str, Any]:
    """A row of the report. `over_this` is how many times this arm's tokens a second the reference makes.

    A token is one of a prompt or a completion, padding left out; `tokens_per_s` is of whole steps.
    """
    workload = WORKLOADS[name]
    warmup = tuple(total - measured for total, measured in map(workload.steps_of, (arm.label, reference_arm)))
    steps = measure.timed_steps(runs, runs, warmup[0])
    if not steps:
        return {"row": name, "arm": arm.label, "why": "failed: no step is left to be timed"}
    speed, memory, first = measure.arm_speed(runs, steps), measure.arm_memory(runs), runs[0]
    taken = [first["steps"][i] for i in steps]
    found = {
        "row": name, "arm": arm.label, "options": dict(arm.options), "tokens_per_s": speed["tokens_per_second"],
        "step_ms": {quantile: 1e3 * value for quantile, value in speed["step_seconds"].items()},
        "steps": len(first["steps"]), "measured": len(steps),
        "tokens_per_step": sum(step["tokens"] for step in taken) / len(taken),
        "peak_gib": memory["peak"] / 2**30, "reserved_gib": (memory["peak_reserved"] or 0) / 2**30,
        "first_step_s": min(speed["cold_start"]), "losses": [step["loss"] for step in first["steps"]],
        "phases_s": speed["phases"], "capture_s": speed["capture_seconds"], "trace": first["trace"],
        "attestation": first["attestation"], "machine": [one["machine"] for one in runs],
        "laps_s": [one.get("laps") for one in runs],
        "versions": versions_of(first["environment"]),
    }
    if workload.online:
        found["rollout"] = rollouts(runs, steps)
        found["metrics"] = [step["metrics"] for step in first["steps"]]
    if reference is not None and reference is not runs:
        against(found, runs, reference, warmup=(warmup[0], warmup[1]), online=workload.online)
    return found


def line(found: dict[str, Any]) -> str:
    """One line of the printed table."""
    if "why" in found:
        return f"  {found['arm']:12} {found['why']}"
    step = found["step_ms"]
    text = (f"  {found['arm']:12} {step['p50']:9.1f} ms [{step['p10']:.1f}, {step['p90']:.1f}] "
            f"{found['tokens_per_s']:9,.0f} tok/s {found['peak_gib']:6.2f} GiB (reserved {found['reserved_gib']:6.2f}) "
            f"first step {found['first_step_s']:5.1f} s  loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}")
    if "rollout" in found and found["rollout"]["tokens_per_s"]:
        rollout = found["rollout"]
        text += (f"  rollout {rollout['seconds']:.2f} s, {rollout['tokens_per_s']:,.0f} tok/s, "
                 f"mean length {rollout['mean_length']:.0f}")
        if "log_prob_difference_mean" in rollout["logged"]:
            text += f", |dlogp| {rollout['logged']['log_prob_difference_mean']:.1e}"
    if "over_this" in found:
        ratio, low, high = found["over_this"]["ratio"]
        within = f"[{low:.2f}, {high:.2f}]" if found["over_this"]["pairs"] > 1 else "(one step)"
        text += f"  reference {ratio:.2f}x {within}; data {found['data']}"
    if "max_dloss" in found:
        text += f"; losses within {found['max_dloss']:.1e}"
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row",
                        help=f"of {', '.join(WORKLOADS)}; all but those of smoke by default")
    parser.add_argument("--arms", default=",".join(arm for arm in ARMS if arm not in ASIDE),
                        help=f"of {', '.join(ARMS)}; the first is the reference; all but {', '.join(ASIDE)}")
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, ceilings and rows here; a "
                        "folder that is there gets a file a row. Where neither rows nor arms are named, that of the "
                        "results by default, and the docs' tables are written anew")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each arm; with 1 no noise is measured")
    parser.add_argument("--site-unsloth", type=Path)
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    parser.add_argument("--limit", type=float, help="seconds a run may take; by default what the row says")
    parser.add_argument("--ahead", action="store_true", help="the next arm imports its packages while one trains; "
                        "takes a core more")
    parser.add_argument("--keep", type=Path, help="leave specs, logs and results of the runs here")
    args = parser.parse_args(argv)
    args.all = into_results(args, args.arms == parser.get_default("arms"), "rl")
    args.rows = args.rows or [name for name in WORKLOADS if not name.startswith("smoke")]
    args.arms = args.arms.split(",")
    for given, known in ((args.rows, WORKLOADS), (args.arms, ARMS)):
        if strange := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(known)}")
    return args


def entries_of(name: str, arms: Sequence[Arm], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An entry of every arm: what it measured, or why there is nothing."""
    reference = found[arms[0].label]
    reference = reference if isinstance(reference, list) and reference else None
    return [{"row": name, "arm": arm.label, "why": runs or NOT_RUN} if not runs or isinstance(runs, str) else
            entry(name, arm, runs, reference, arms[0].label) for arm in arms for runs in [found[arm.label]]]


def of_row(name: str, arms: Sequence[Arm], folder: Path, args: argparse.Namespace, *, gpu: bool, runner: Runner | None,
           keep: Callable[[list[dict[str, Any]]], None] = lambda entries: None) -> list[dict[str, Any]]:
    """The entries of one row, in the order of the arms; `keep` gets those there are after every run."""
    from aligntune.builtin import load_tokenizer

    workload = WORKLOADS[name]
    model, rows = folder / f"{workload.model}-{workload.stops}", folder / f"{name}.jsonl"
    limit = args.limit or workload.limit
    here = [arm for arm in arms if unfit(workload, arm) is None]
    jobs = jobs_of(workload, arms, model=model, rows=rows, folder=(args.keep or folder) / name,
                   precision="bf16" if gpu else "fp32", repeats=args.repeats)
    if isinstance(runner, Ahead):
        runner.limit = limit
        runner.plan(jobs)
    if not (model / "config.json").exists():
        write_policy(workload, model, load_tokenizer("builtin:tiny"), device="cuda" if gpu else "cpu")
        if gpu:
            import torch

            torch.cuda.empty_cache()  # while arms are measured, this process holds nothing but a context
    write_rows(workload, rows)
    print(f"{name}: {workload}\n  at most {len(here) * args.repeats * limit:.0f} s: {len(here)} arms x {args.repeats} "
          f"runs x {limit:g} s", flush=True)
    found = run_arms(jobs, {arm.label: unfit(workload, arm) or [] for arm in arms},
                     runner or functools.partial(in_a_fresh_process, limit=limit), read=with_log,
                     keep=lambda now: keep(entries_of(name, arms, now)))
    entries = entries_of(name, arms, found)
    for one in entries:
        print(line(one), flush=True)
    return entries


def main(argv: list[str] | None = None, runner: Runner | None = None) -> int:
    args = parse(argv)
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    if not gpu and not all(name.startswith("smoke") for name in args.rows):
        print("benchmarks need an NVIDIA GPU, and TRITON_INTERPRET unset; rows of smoke run anywhere", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks.rl", *(sys.argv[1:] if argv is None else argv))),
        "commit": args.commit or commit(), "device": torch.cuda.get_device_name() if gpu else "cpu",
        "repeats": args.repeats,
    }  # fmt: skip
    if gpu:
        from benchmarks.ops.bench import Ceilings

        report["ceilings"] = asdict(Ceilings.measure())
        torch.cuda.empty_cache()
    sites = {"unsloth": args.site_unsloth}
    arms = [replace(ARMS[name], python=str(site) if (site := sites.get(ARMS[name].peer or "")) else None)
            for name in args.arms]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def write(more: list[dict[str, Any]]) -> None:
        if args.json:
            write_report(args.json, report, [*rows, *more])

    with tempfile.TemporaryDirectory() as folder:
        if runner is None and args.ahead:
            runner = Ahead()
        with runner if isinstance(runner, Ahead) else contextlib.nullcontext():
            for name in args.rows:
                rows += of_row(name, arms, Path(folder), args, gpu=gpu, runner=runner, keep=write)
                write([])
    return tables.main() if args.all else 0


if __name__ == "__main__":
    sys.exit(main())
