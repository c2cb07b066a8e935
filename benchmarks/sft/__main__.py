"""SFT on one GPU: backend "fast" beside trl, trl with liger, and unsloth, each at its best setting.

python -m benchmarks.sft                                    all that follows, into benchmarks/results and the docs
python -m benchmarks.sft lora-1b qlora-8b --json FILE       some
python -m benchmarks.sft lora-1b --arms fast,fast-gc        some arms
python -m benchmarks.sft smoke --arms trl,fast              toy sizes, any machine; the times mean nothing
python -m benchmarks.sft lora-1b --arms trl,fast-cold,fast  the time to the first step
python -m benchmarks.sft --longest qlora-8b --json FILE     the longest row that trains (benchmarks.sft.longest)

Arms are those of `aligntune compare`, and so are the processes, the clocks and the statistics: every arm runs --repeats
times, the second time in the other order, from one seed checkpoint and on the same rows. A peer that is not installed
lives in a folder where `pip install --target` put it: --site-liger DIR, --site-unsloth DIR; without it the arm is
skipped with a line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from aligntune.errors import AlignTuneError
from benchmarks import tables
from benchmarks.ahead import Ahead, Job
from benchmarks.ops.__main__ import commit
from benchmarks.sft import roofline
from benchmarks.sft.longest import longest
from benchmarks.sft.workloads import MODELS, WORKLOADS, Workload, recipe, versions_of, write_model, write_rows

PLAIN, RECOMPUTE, AUTO = ({"gradient_checkpointing": how} for how in (False, True, "auto"))
COLD = "fast-cold"
"""Of the time to the first step: every run compiles its kernels, into an empty Triton cache of its own. Arm "fast" then
reads the cache that the run before it filled: what other commands left on the machine tells neither."""
NOT_RUN = "not run: the command ended before"
ASIDE = (COLD, "fast-6gib")
END_TO_END = {"UNSLOTH_PADDING_CHOICE": "padding_free"}
ARMS: dict[str, Arm] = {arm.label: arm for arm in (
    Arm("fast", "fast", PLAIN), Arm("fast-gc", "fast", RECOMPUTE),
    Arm("trl", "trl", PLAIN), Arm("trl-gc", "trl", RECOMPUTE),
    Arm("liger", "trl", PLAIN, "liger"), Arm("liger-gc", "trl", RECOMPUTE, "liger"),
    # Of rows end to end and padded, compiled ones it would choose by an estimate: both are measured.
    Arm("unsloth", "trl", PLAIN, "unsloth", environment=END_TO_END),
    Arm("unsloth-compiled", "trl", PLAIN, "unsloth", environment={"UNSLOTH_PADDING_CHOICE": "padded"}),
    # Its offloading one.
    Arm("unsloth-gc", "trl", AUTO, "unsloth", environment=END_TO_END),
    # What is the default, and the same with less memory than the row would take.
    Arm("fast-auto", "fast", AUTO), Arm("fast-6gib", "fast", {**AUTO, "memory_budget_gib": 6.0}),
    Arm(COLD, "fast", PLAIN),
    Arm("fast-offload", "fast", {"gradient_checkpointing": "offload"}),
    # Of LoRA alone: on other rows it fails, and says why.
    Arm("fast-fp8", "fast", {**PLAIN, "base_precision": "fp8"}),
)}
Runner = Callable[[ArmSpec, Arm], dict[str, Any]]
Reader = Callable[[ArmSpec, dict[str, Any]], dict[str, Any]]


def missing(arm: Arm) -> str | None:
    """Why the arm cannot be run, or None."""
    if arm.peer is None or arm.python is not None or importlib.util.find_spec(PEERS[arm.peer].package):
        return None
    return f"{arm.peer} is not installed (--site-{arm.peer})"


def jobs_of(workload: Workload, arms: Sequence[Arm], model: Path, rows: Path, folder: Path, *, precision: str,
            repeats: int) -> list[Job]:
    """What is run, in order: A B C, C B A, ...; arms that are not here are left out."""
    config, jobs = recipe(workload, str(model), str(rows), precision), []
    cold = any(arm.label == COLD for arm in arms)
    for repeat in range(repeats):
        for arm in (arms if repeat % 2 == 0 else list(reversed(arms))):
            if missing(arm) is not None:
                continue
            if arm.label == COLD or cold and arm.label == "fast":
                cache = str(folder / COLD / f"triton-{repeat if arm.label == COLD else 0}")
                arm = replace(arm, environment={**arm.environment, "TRITON_CACHE_DIR": cache})
            settings = Settings("benchmark", config, {}, a=arm, b=arm)
            spec = spec_of(settings, Run("a", repeat, arm), folder / arm.label, seed=1, online=False, peft=False)
            # All that draw adapters draw the same, also beside arms that do not make their own. Losses tell whether
            # arms train alike; gradients and distributions would be kept for nobody.
            spec = replace(spec, probe=False, gradient_steps=[], draw_adapters=workload.mode != "full")
            jobs.append((spec, arm))
    return jobs


def run_arms(jobs: Sequence[Job], found: dict[str, Any], runner: Runner, *, read: Reader = lambda spec, result: result,
             keep: Callable[[dict[str, Any]], None] = lambda found: None) -> dict[str, list[dict[str, Any]] | str]:
    """Results of each arm's runs by its label, or why there are none.

    Args:
        jobs: what is run, in order; an arm that failed is not run again.
        found: by the label of every arm, a list, or why it is not run; filled, and returned.
        read: makes of a run's result what is kept of it.
        keep: called with what there is after every run: a command that is cut loses the run at hand only.
    """
    for spec, arm in jobs:
        if isinstance(found[arm.label], str):
            continue
        begun, laps = time.monotonic(), ""
        try:
            result = runner(spec, arm)
        except AlignTuneError as error:
            found[arm.label] = f"failed: {str(error).splitlines()[-1].strip()}"[:300]
        else:
            laps = ", ".join(f"{part} {seconds:.1f}" for part, seconds in result.get("laps", {}).items())
            if result["status"] == "ok":
                found[arm.label].append(read(spec, result))
            else:
                found[arm.label] = f"failed: {result['kind']}: {result['message']}"[:300]
        said = found[arm.label] if isinstance(found[arm.label], str) else "ok"
        print(f"  {arm.label} {spec.repeat + 1}: {said} in {time.monotonic() - begun:.1f} s"
              + (f" ({laps})" if laps else ""), flush=True)
        keep(found)
    return found


def entry(
    name: str, arm: Arm, runs: list[dict[str, Any]], reference: list[dict[str, Any]] | None, *, warmup: int
) -> dict[str, Any]:
    """A row of the report. `over_this` is how many times this arm's tokens a second the reference makes."""
    steps = measure.timed_steps(runs, runs, warmup)
    speed, memory, first = measure.arm_speed(runs, steps), measure.arm_memory(runs), runs[0]
    taken = [first["steps"][i] for i in steps]
    found = {
        "row": name, "arm": arm.label, "options": dict(arm.options), "tokens_per_s": speed["tokens_per_second"],
        "step_ms": 1e3 * sum(speed["seconds"]) / len(speed["seconds"]),
        "tokens_per_step": sum(step["tokens"] for step in taken) / len(taken),
        "peak_gib": memory["peak"] / 2**30, "reserved_gib": (memory["peak_reserved"] or 0) / 2**30,
        "first_step_s": min(speed["cold_start"]), "loss_first": first["steps"][0]["loss"],
        "loss_last": first["steps"][-1]["loss"], "losses": [step["loss"] for step in first["steps"]],
        "mfu": speed["mfu"], "phases_s": speed["phases"], "trace": first["trace"], "traced": traced(first),
        "capture_s": speed["capture_seconds"], "laps_s": [one.get("laps") for one in runs],
        "attestation": first["attestation"], "machine": [one["machine"] for one in runs],
        "versions": versions_of(first["environment"]),
    }
    if reference is not None and reference is not runs:
        data = findings.compare_data(reference[0], first, online=False, repacked=False)
        found["data"] = "the same" if data.same else data.findings[0].text
        if data.same:
            found["max_dloss"] = float(abs(losses(first) - losses(reference[0])).max())
        both = measure.timed_steps(runs, reference, warmup)
        pairs = list(zip(runs, reference, strict=False))
        logs = [[measure.log_costs(pair[side], both) for pair in pairs] for side in (0, 1)]
        ratio = throughput_ratio(*logs)
        found["over_this"] = {"ratio": ratio.ratio.as_list(), "noise": ratio.noise, "significant": ratio.significant}
    return found


def traced(run: dict[str, Any]) -> dict[str, Any] | None:
    """What the traced step's rows hold: tokens, and the sum of the squares of their documents' lengths."""
    steps = [step for step in run["steps"] if run["trace"] and step["step"] == run["trace"]["step"]]
    return {name: steps[0][name] for name in ("tokens", "squared")} if steps else None


def line(found: dict[str, Any]) -> str:
    """One line of the printed table."""
    if "why" in found:
        return f"  {found['arm']:18} {found['why']}"
    text = (f"  {found['arm']:18} {found['tokens_per_s']:9,.0f} tok/s {found['step_ms']:8.1f} ms "
            f"{found['peak_gib']:6.2f} GiB (reserved {found['reserved_gib']:6.2f}) first step "
            f"{found['first_step_s']:5.1f} s  loss {found['loss_first']:.4f} -> {found['loss_last']:.4f}")
    if "over_this" in found:
        ratio, low, high = found["over_this"]["ratio"]
        text += f"  reference {ratio:.2f}x [{low:.2f}, {high:.2f}]; data {found['data']}"
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(WORKLOADS)}; all but smoke by default")
    parser.add_argument("--arms", default=",".join(name for name in ARMS if name not in ASIDE),
                        help=f"of {', '.join(ARMS)}; the first is the reference; by default all but {', '.join(ASIDE)}")
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, ceilings and rows here; a "
                        "folder that is there gets a file a row. Where neither rows nor arms are named, that of the "
                        "results by default, and the docs' tables are written anew")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each arm; with 1 no noise is measured")
    parser.add_argument("--site-liger", type=Path)
    parser.add_argument("--site-unsloth", type=Path)
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    parser.add_argument("--limit", type=float, default=240, help="seconds a run may take")
    parser.add_argument("--ahead", action="store_true", help="the next arm imports its packages while one trains; "
                        "takes a core more")
    parser.add_argument("--longest", metavar="ROW", choices=list(WORKLOADS), help="find the longest row that fits")
    parser.add_argument("--minutes", type=float, default=25, help="of --longest: no probe begins that would end later")
    parser.add_argument("--start", type=int, default=65_536, help="of --longest: tokens of the first probe")
    parser.add_argument("--most", type=int, default=1 << 20, help="of --longest: tokens that it does not go beyond")
    parser.add_argument("--probe-steps", type=int, choices=[1, 2], default=2, help="of --longest: 1 where one takes "
                        "minutes; the optimizer's state, which the second finds there, is then not in the peak")
    parser.add_argument("--keep", type=Path, help="leave specs, logs and results of the runs here")
    args = parser.parse_args(argv)
    if args.longest and args.rows:
        parser.error("--longest takes its row itself")
    args.all = into_results(args, args.arms == parser.get_default("arms"), "sft")
    args.rows = [args.longest] if args.longest else args.rows or [name for name in WORKLOADS if name != "smoke"]
    if args.longest and args.arms == parser.get_default("arms"):
        args.arms = "fast-offload"
    args.arms = args.arms.split(",")
    for given, known in ((args.rows, WORKLOADS), (args.arms, ARMS)):
        if strange := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(known)}")
    if {COLD, "fast"} <= set(args.arms) and args.arms.index("fast") < args.arms.index(COLD):
        parser.error(f"--arms: {COLD} comes before fast, which reads the cache that {COLD} filled")
    if args.longest and args.json and args.json.is_dir():
        parser.error("--json: of --longest, a file")
    if args.ahead and COLD in args.arms:
        parser.error(f"--ahead: what {COLD} is for is the time to the first step, imports included")
    return args


def into_results(args: argparse.Namespace, every_arm: bool, name: str) -> bool:
    """Whether a command names nothing, so that what it measures is the results; `--json` is then their folder."""
    wanted = not args.rows and every_arm and args.json is None and getattr(args, "longest", None) is None
    if wanted:
        args.json = tables.RESULTS / name
    return wanted


def bounds(entries: Sequence[dict[str, Any]], ceilings: dict[str, float] | None) -> list[str]:
    """Lines of where a traced step of fast goes: each part's milliseconds, and the least that the card allows."""
    if ceilings is None:
        return []
    return [f"  {one['arm']}: " + ", ".join(f"{part} {ms:.1f}" + (f" of {least:.1f}" if least is not None else "")
                                            for part, ms, least in roofline.parts(one, ceilings)) + " ms"
            for one in entries if one["arm"].startswith("fast") and one.get("trace")]


def of_row(name: str, arms: Sequence[Arm], folder: Path, args: argparse.Namespace, *, gpu: bool, runner: Runner,
           keep: Callable[[list[dict[str, Any]]], None] = lambda entries: None) -> list[dict[str, Any]]:
    """The entries of one row, in the order of the arms; `keep` gets those there are after every run."""
    from aligntune.builtin import load_tokenizer

    workload = WORKLOADS[name]
    model, rows = folder / workload.model, folder / f"{name}.jsonl"
    jobs = jobs_of(workload, arms, model, rows, (args.keep or folder) / name, precision="bf16" if gpu else "fp32",
                   repeats=args.repeats)
    if isinstance(runner, Ahead):
        runner.plan(jobs)
    if not (model / "config.json").exists():
        assert workload.model in MODELS
        write_model(workload.model, model, load_tokenizer("builtin:tiny"), device="cuda" if gpu else "cpu")
        if gpu:
            import torch

            torch.cuda.empty_cache()  # while arms are measured, this process holds nothing but a context
    write_rows(workload, rows)
    print(f"{name}: {workload}", flush=True)
    found = run_arms(jobs, {arm.label: missing(arm) or [] for arm in arms}, runner,
                     keep=lambda now: keep(entries_of(name, arms, now)))
    entries = entries_of(name, arms, found)
    for one in entries:
        print(line(one), flush=True)
    return entries


def entries_of(name: str, arms: Sequence[Arm], found: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry of every arm: what it measured, or why there is nothing."""
    workload, reference = WORKLOADS[name], found[arms[0].label]
    reference = reference if isinstance(reference, list) and reference else None
    return [{"row": name, "arm": arm.label, "why": runs or NOT_RUN} if not runs or isinstance(runs, str) else
            entry(name, arm, runs, reference, warmup=workload.steps - workload.measured)
            for arm in arms for runs in [found[arm.label]]]


def write_report(path: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The report with its rows; where `path` is a folder, the last row's file in it, with the entries of that row."""
    if path.is_dir():
        name = rows[-1]["row"]
        path, rows = path / f"{name}.json", [one for one in rows if one["row"] == name]
    aside = path.with_name(path.name + ".part")  # cut while writing, the one of before stays
    aside.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
    aside.replace(path)


def main(argv: list[str] | None = None, runner: Runner | None = None) -> int:
    args = parse(argv)
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    if not gpu and args.rows != ["smoke"]:
        print("benchmarks need an NVIDIA GPU, and TRITON_INTERPRET unset; 'smoke' runs anywhere", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks.sft", *(sys.argv[1:] if argv is None else argv))),
        "commit": args.commit or commit(), "device": torch.cuda.get_device_name() if gpu else "cpu",
        "repeats": args.repeats,
    }  # fmt: skip
    if gpu:
        from benchmarks.ops.bench import Ceilings

        report["ceilings"] = asdict(Ceilings.measure())
        torch.cuda.empty_cache()
    sites = {"liger": args.site_liger, "unsloth": args.site_unsloth}
    arms = [replace(ARMS[name], python=str(site) if (site := sites.get(ARMS[name].peer or "")) else None)
            for name in args.arms]
    # A probe of --longest has a limit of its own: a step over 300,000 tokens takes minutes.
    given = runner
    runner = runner or (Ahead(args.limit) if args.ahead else functools.partial(in_a_fresh_process, limit=args.limit))
    rows: list[dict[str, Any]] = []

    def write(more: list[dict[str, Any]]) -> None:
        if args.json:
            write_report(args.json, report, [*rows, *more])

    with tempfile.TemporaryDirectory() as folder:
        if args.longest:
            for arm in arms:
                entry_of = functools.partial(longest, args.longest, arm, Path(folder), args, gpu=gpu, runner=given)
                rows.append(entry_of(keep=lambda now: write([now])))
                write([])
            return 0
        with runner if isinstance(runner, Ahead) else contextlib.nullcontext():
            for name in args.rows:
                found = of_row(name, arms, Path(folder), args, gpu=gpu, runner=runner, keep=write)
                rows += found
                write([])
                for text in bounds(found, report.get("ceilings")):
                    print(text, flush=True)
    return max(*(main([*command, *also_given(args)]) for command in also(args.json)), tables.main()) if args.all else 0


def also(folder: Path) -> list[list[str]]:
    """Commands of the results that are no row of all arms: the time to the first step, the longest row that trains."""
    return [["lora-1b", "--arms", f"trl,{COLD},fast", "--json", str(folder / "start.json")],
            ["--longest", "qlora-8b", "--start", "343040", "--json", str(folder / "longest.json")]]


def also_given(args: argparse.Namespace) -> list[str]:
    """What a command says of the machine and the checkout, for the commands that follow it."""
    names = ("site_liger", "site_unsloth", "commit", "repeats", "limit")
    return [word for name in names if (value := getattr(args, name)) is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]


if __name__ == "__main__":
    sys.exit(main())
