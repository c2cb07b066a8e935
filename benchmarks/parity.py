"""Does backend "fast" train the same model as backend "trl"? Runs of both, and every difference beside its bound.

python -m benchmarks.parity --json benchmarks/results/parity.json     on a card
python -m benchmarks.parity --device cpu --steps 3                    toy lengths, any machine; needs TRITON_INTERPRET=1

Runs go through the factories, from one checkpoint whose weights are numbers of bf16 (what is judged is arithmetic, not
the rounding of weights), with LoRA whose B is drawn N(0, 0.02): at 0 no gradient of A could be compared.

Triton's interpreter cuts fp32 to bf16 where a GPU rounds: what a toy run says of bf16 is two to six times too far.

* Yardstick: two trl runs in fp32 that differ in their attention alone (sdpa, eager): one function, rounded in two ways.
  The mean of their differences may be near 0 by luck: it counts as no less than its standard error. Nor does either
  count as less than the rounding of a loss: two runs that agree to its last bit leave a third no room for it.
* Distance of a run in lower precision: root mean square, over all steps and seeds, of its loss less that of the fp32
  run on the same batches; of gradients, for each parameter, the norm of the difference over the norm, over the seeds.
  A ratio of two such norms over n numbers has a standard deviation of 1 / sqrt(n); three of them are allowed for.
* fp8 is held against bf16 twice: trl's, as bf16 on fast is, and fast's own. One run's distance says little: steps of
  Adam enlarge what any rounding began. It is pooled over seeds; a ratio of two pooled distances has a 95 % interval of
  the seeds, drawn anew with both distances of each.
* Two fp32 runs on trl that are not far closer than bf16 brings one are chaotic, and a bound of theirs says nothing: of
  every method they are held against trl in bf16.
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
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from transformers import TrainerCallback

from aligntune import create_rl_trainer, create_sft_trainer
from benchmarks.ops.__main__ import commit

Losses: TypeAlias = torch.Tensor
"""(steps,), fp64."""
Gradients: TypeAlias = dict[str, torch.Tensor]
Found = TypeVar("Found")

YARD, BF16, FP8, FIRST, QUIET = 2.0, 1.25, 1.5, 1e-6, 0.1
"""Bounds: times the yardstick; times trl's own distance; times that in bf16; relative, of one step; the last is
of the measurement itself: two fp32 runs may be this share of bf16's distance apart, or chaos was measured."""
ROUNDING = 2.0**-23
"""What the rounding of fp32 leaves of a loss, relative to its size, or to 1, the size of the terms of one near 0."""
PACKAGES = ("torch", "triton", "transformers", "trl", "peft")
TWO_RUNS = "two trl runs in fp32"
DRAWS = 10_000
SPREAD = 0.02
"""Standard deviation of the drawn B."""


@dataclass(frozen=True)
class Arm:
    """A backend with the options that make it this arm."""

    backend: str
    options: Mapping[str, Any]


ARMS = {
    "trl": Arm("trl", {"precision": "fp32", "attn_implementation": "sdpa"}),
    "trl-eager": Arm("trl", {"precision": "fp32", "attn_implementation": "eager"}),
    "fast": Arm("fast", {"precision": "fp32"}),
    "trl-bf16": Arm("trl", {"precision": "bf16", "attn_implementation": "sdpa"}),
    "fast-bf16": Arm("fast", {"precision": "bf16"}),
    "fast-fp8": Arm("fast", {"precision": "bf16", "base_precision": "fp8"}),
}
LEARNING = ("trl", "trl-bf16", "fast-bf16", "fast-fp8")
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
COMMON: dict[str, Any] = {
    "logging_steps": 1, "report_to": "none", "progress": False, "lr_scheduler": "constant", "overwrite": True,
    "gradient_checkpointing": False, "max_grad_norm": 0.0,
}  # fmt: skip
LEARNS: dict[str, Any] = {"batch_size": 16, "max_seq_length": 128, "learning_rate": 1e-3, "max_samples": 256}
"""`builtin:tiny-instruct` on few enough rows to know them after 300 steps."""
ONLINE: dict[str, dict[str, Any]] = {
    "grpo": {"num_iterations": 2}, "dapo": {"num_iterations": 2}, "rloo": {"num_iterations": 2},
    # At 1e-3 two trl runs in fp32 were 3e-3 apart, a bound that any fault passes.
    "dr_grpo": {"num_iterations": 2, "beta": 0.04, "learning_rate": 1e-4},
    "ppo": {"num_generations": 1, "num_ppo_epochs": 2, "num_mini_batches": 1},
}  # fmt: skip
"""Two passes over each rollout: on the first the ratio is 1, and a loss may be near 0."""
PREFERENCE: dict[str, dict[str, Any]] = {
    # KTO at 1e-3: two trl runs in fp32 on a CPU were 6e-2 apart; 6e-8 at 1e-4.
    "dpo": {"beta": 0.1}, "kto": {"beta": 0.1, "learning_rate": 1e-4}, "orpo": {"beta": 0.1},
}  # fmt: skip
"""The reference of the first two is the policy without its adapters, whose B is drawn: no loss begins at log 2."""
HELD = ("fast", "trl", "trl-eager", "trl-bf16")
"""The arms of these methods; of the online ones the first draws what all are given."""
PARTS = ("sft", *ONLINE, *PREFERENCE)
JUDGED = {"ppo": "loss/policy_avg"}
"""Where it is not the loss: PPO's is nearly all the value's, which a head of zeros makes of the rewards alone."""


@dataclass(frozen=True)
class Check:
    """One bound. `own` is what it is a multiple of: the yardstick, or the distance of another run."""

    part: str
    what: str
    value: float
    own: float | None
    bound: float
    steps: int
    seeds: int
    interval: tuple[float, float] | None = None
    """Of value over own: 95 %, over seeds."""

    @property
    def holds(self) -> bool:
        return self.own != 0 and self.value <= self.bound  # False of NaN, and of two runs that are one


class FirstGradients(TrainerCallback):
    """Keeps the gradients that the first optimizer steps are taken with, not clipped."""

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps
        self.found: list[Gradients] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if len(self.found) < self.steps:
            self.found.append({name.removeprefix("module."): p.grad.detach().double().cpu()
                               for name, p in model.named_parameters() if p.grad is not None})


def draw_adapters(model: Any, spread: float = SPREAD) -> int:
    """Draws every B from N(0, spread), by the parameter's name alone; returns how many."""
    drawn = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("module.").encode()))
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
                drawn += 1
    return drawn


def write_model(folder: Path, model: Any = None) -> str:
    """`builtin:tiny-instruct`, or `model`, in fp32 with every weight a number of bf16; beside its tokenizer."""
    from aligntune.builtin import load_model, load_tokenizer

    model = load_model("tiny-instruct") if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


@contextmanager
def no_tf32() -> Iterator[None]:
    """Products of fp32 in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def losses_of(run: Any, key: str = "loss") -> Losses:
    """What the run logged of each step."""
    logged = [entry[key] for entry in run.trainer.state.log_history if key in entry]
    return torch.tensor(logged, dtype=torch.float64)


def sft(
    arm: Arm, source: Any, rows: Any, *, steps: int, seed: int = 1, kept: int = 1, **options: Any
) -> tuple[Losses, list[Gradients], Any]:
    """Losses of each step, gradients of the first `kept`, and the trainer, of one SFT run."""
    gradients = FirstGradients(kept)
    given = {**COMMON, **LEARNS, **LORA, "max_steps": steps, "seed": seed, **arm.options, **options}
    with tempfile.TemporaryDirectory() as folder, no_tf32():
        run = create_sft_trainer(source, rows, backend=arm.backend, output_dir=folder, callbacks=[gradients], **given)
        draw_adapters(run.model)
        run.train()
        witnessed(run)
    return losses_of(run), gradients.found, run


def witnessed(run: Any) -> None:
    """A fast run whose kernels did not run proves nothing."""
    if run.config["backend"] == "fast":
        step = run.attestation()["step"]
        assert step is not None and not step["problems"], step


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward that tells nearly all completions apart."""
    return [float(len(set(str(text)))) + 0.01 * len(str(text)) for text in completions]


def forced(
    algorithm: str, source: Any, rows: Any, arms: Sequence[Arm], *, steps: int, seed: int = 1, **options: Any
) -> list[Any]:
    """Runs of an online method on one set of rollouts: the first arm's engine draws them, the others are given them."""
    drawn: list[Any] = []
    runs: list[Any] = []
    for number, arm in enumerate(arms):
        given = {**COMMON, **LORA, "batch_size": 8, "num_generations": 4, "max_completion_length": 24,
                 "max_seq_length": 96, "learning_rate": 1e-3, "gradient_accumulation_steps": 1, "seed": seed,
                 "max_steps": steps, **ONLINE[algorithm], **arm.options, **options}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, no_tf32():
            run = create_rl_trainer(source, rows, algorithm=algorithm, backend=arm.backend, output_dir=folder,
                                    reward_functions=[letters], **given)
            draw_adapters(run.trainer.model)
            generate = run.trainer._generate_single_turn
            rest = iter(drawn) if number else None

            def turn(*args: Any, generate: Any = generate, rest: Any = rest) -> Any:
                if rest is not None:
                    return next(rest)
                drawn.append(generate(*args))
                return drawn[-1]

            run.trainer._generate_single_turn = turn
            run.train()
            witnessed(run)
        assert rest is None or next(rest, None) is None, "as many rollouts on both"
        runs.append(run)
    return runs


def preference(algorithm: str, source: Any, rows: Any, arm: Arm, *, steps: int, seed: int = 1, **options: Any) -> Any:
    """A run of a preference method, on the same rows in the same order whatever the arm."""
    given = {**COMMON, **LORA, "batch_size": 8, "max_seq_length": 64, "learning_rate": 1e-3, "max_samples": 512,
             "seed": seed, "max_steps": steps, **PREFERENCE[algorithm], **arm.options, **options}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, no_tf32():
        run = create_rl_trainer(source, rows, algorithm=algorithm, backend=arm.backend, output_dir=folder, **given)
        draw_adapters(run.model)
        run.train()
        witnessed(run)
    return run


# bounds


def within_yardstick(part: str, trl: Sequence[Losses], other: Sequence[Losses], fast: Sequence[Losses]) -> list[Check]:
    """Largest and mean signed difference of the losses over the seeds, each against twice that of two trl runs.

    The mean of the two is no less than its standard error, rms / sqrt(steps). Where the two are not one run, the rms
    is no less than `ROUNDING`, and the largest than twice that.
    """
    yard = [y - x for x, y in zip(trl, other, strict=True)]
    ours = [y - x for x, y in zip(trl, fast, strict=True)]
    steps, seeds = len(trl[0]), len(trl)
    largest = [max(float(d.abs().max()) for d in apart) for apart in (yard, ours)]
    signed = [max(float(d.mean().abs()) for d in apart) for apart in (yard, ours)]
    rounding = ROUNDING * max(1.0, *(float(x.abs().max()) for x in trl)) if largest[0] else 0.0
    largest[0] = max(largest[0], 2 * rounding)
    signed[0] = max(signed[0], max(rms(yard), rounding) / math.sqrt(steps))
    return [Check(part, what, value, own, YARD * own, steps, seeds) for what, (own, value) in
            (("max |loss difference|", largest), ("|mean signed difference|", signed))]


def first_loss(part: str, trl: Sequence[Losses], fast: Sequence[Losses], bound: float = FIRST) -> Check:
    """The first step's loss, relative to its size."""
    value = max(float((y[0] - x[0]).abs() / x[0].abs()) for x, y in zip(trl, fast, strict=True))
    return Check(part, "loss of one step, relative", value, None, bound, 1, len(trl))


def rms(apart: Sequence[Losses]) -> float:
    return float(torch.cat(list(apart)).pow(2).mean().sqrt())


def distance(
    part: str, truth: Sequence[Losses], own: Sequence[Losses], found: Sequence[Losses], times: float, whose: str = ""
) -> Check:
    """How far losses are from those in fp32, against how far another run's (`whose`) are."""
    theirs, ours = ([rms([x - t]) for x, t in zip(run, truth, strict=True)] for run in (own, found))
    return pooled(part, theirs, ours, times, steps=len(truth[0]), whose=whose)


def pooled(part: str, own: Sequence[float], found: Sequence[float], times: float, *, steps: int, whose: str) -> Check:
    """`distance` of each seed's."""
    theirs, ours = (np.square(np.asarray(each)) for each in (own, found))
    drawn = np.random.default_rng(0).integers(0, len(ours), size=(DRAWS, len(ours)))
    interval = None
    if len(ours) > 1 and theirs.all():
        low, high = np.quantile(np.sqrt(ours[drawn].sum(1) / theirs[drawn].sum(1)), [0.025, 0.975])
        interval = float(low), float(high)
    value, against = (math.sqrt(each.mean()) for each in (ours, theirs))
    what = "rms of loss - fp32 loss" + (f", {whose}" if whose else "")
    return Check(part, what, value, against, times * against, steps, len(ours), interval)


def gradient_distances(truth: Sequence[Gradients], found: Sequence[Gradients]) -> dict[str, float]:
    """Of each parameter: the norm of (gradient - true gradient) over the true one's, over the batches."""
    distances = {}
    assert truth[0]
    for name in truth[0]:
        size = math.sqrt(sum(float(batch[name].pow(2).sum()) for batch in truth))
        assert size > 1e-7, f"the reference gradient of {name} is 0"
        apart = sum(float((x[name] - t[name]).pow(2).sum()) for x, t in zip(found, truth, strict=True))
        distances[name] = math.sqrt(apart) / size
    assert all(x.keys() == truth[0].keys() for x in (*found, *truth))
    return distances


def gradients_apart(
    part: str, truth: Sequence[Gradients], own: Sequence[Gradients], found: Sequence[Gradients], times: float = BF16
) -> list[Check]:
    """Every parameter's gradient; the check that is reported first is the one with the least room."""
    theirs, ours = gradient_distances(truth, own), gradient_distances(truth, found)
    chance = {name: 1 + 3 / math.sqrt(len(truth) * gradient.numel()) for name, gradient in truth[0].items()}
    checks = [Check(part, f"first-step gradient of {name}", ours[name], theirs[name],
                    times * theirs[name] * chance[name], 1, len(truth)) for name in truth[0]]
    return sorted(checks, key=lambda check: -check.value / check.bound)


# the report


@dataclass(frozen=True)
class _Job:
    """One SFT run, or the runs of one other method, as a process of a pool is given it."""

    name: str
    seed: int
    steps: int
    source: str
    rows: Any
    options: Mapping[str, Any]


def _sft_job(job: _Job) -> tuple[Losses, list[Gradients], str]:
    losses, gradients, run = sft(ARMS[job.name], job.source, job.rows, steps=job.steps, seed=job.seed, **job.options)
    assert len(losses) == job.steps
    return losses, gradients, run.attestation()["layout"] if ARMS[job.name].backend == "fast" else ""


def _held_job(job: _Job) -> list[Losses]:
    arms = [ARMS[name] for name in HELD]
    if job.name in ONLINE:
        runs = forced(job.name, job.source, job.rows, arms, steps=job.steps, **job.options)
    else:
        runs = [preference(job.name, job.source, job.rows, arm, steps=job.steps, **job.options) for arm in arms]
    return [losses_of(run, JUDGED.get(job.name, "loss")) for run in runs]


def _each(work: Callable[[_Job], Found], jobs: Sequence[_Job], pool: Executor | None) -> Iterator[tuple[_Job, Found]]:
    """What each job comes to, in order; in a pool several run at once and share the card."""
    return zip(jobs, (pool.map if pool else map)(work, jobs), strict=True)


def sft_checks(
    source: str, *, seeds: int, yard_steps: int, learn_steps: int, learn_seeds: int = 1, pool: Executor | None = None,
    rows: Any = "builtin:pydoc", say: Any = print, device: str = "auto", **options: Any
) -> tuple[list[Check], dict[str, Any]]:
    """The yardstick over `seeds`; runs that learn, in fp32, bf16 and with a base in fp8, over `learn_seeds`."""
    given = {"device": device, **options}
    jobs = []
    for seed in range(1, max(seeds, learn_seeds) + 1):
        for name in ARMS:
            learns = name in LEARNING and seed <= learn_seeds or name == "trl-eager" and seed == 1
            if learns or seed <= seeds and name != "fast-fp8":
                jobs.append(_Job(name, seed, learn_steps if learns else yard_steps, source, rows, given))
    lost: dict[str, list[Losses]] = {name: [] for name in ARMS}
    grads: dict[str, list[Gradients]] = {name: [] for name in ARMS}
    layouts = {}
    for job, (losses, gradients, layout) in _each(_sft_job, jobs, pool):
        lost[job.name].append(losses)
        grads[job.name] += gradients
        if layout:
            layouts[job.name] = layout
        say(f"  {job.name}, seed {job.seed}: {float(losses[0]):.4f} -> {float(losses[-1]):.4f}")
    short = {name: [x[:yard_steps] for x in found[:seeds]] for name, found in lost.items()}
    learnt = {name: found[:learn_seeds] for name, found in lost.items()}
    first = {name: found[:seeds] for name, found in grads.items()}
    checks = [
        first_loss("sft, fp32", short["trl"], short["fast"]),
        *within_yardstick("sft, fp32", short["trl"], short["trl-eager"], short["fast"]),
        distance("sft, bf16", short["trl"], short["trl-bf16"], short["fast-bf16"], BF16),
        distance("sft, bf16", learnt["trl"], learnt["trl-bf16"], learnt["fast-bf16"], BF16),
        gradients_apart("sft, bf16", first["trl"], first["trl-bf16"], first["fast-bf16"])[0],
        *(distance("sft, fp8 base", learnt["trl"], learnt[f"{backend}-bf16"], learnt["fast-fp8"], FP8,
                   f"against bf16 on {backend}") for backend in ("trl", "fast")),
        distance(f"sft, {TWO_RUNS}", learnt["trl"][:1], learnt["trl-bf16"][:1], learnt["trl-eager"][:1],
                 QUIET),
    ]
    tenth = max(1, learn_steps // 10)
    fell = [float(part.mean()) for part in (lost["trl"][0][:tenth], lost["trl"][0][-tenth:])]
    curves = {name: [[round(float(x), 6) for x in run] for run in found] for name, found in lost.items()}
    apart = {name: [rms([run - true]) for run, true in zip(learnt[name], learnt["trl"], strict=True)]
             for name in LEARNING if name != "trl"}  # fmt: skip
    coarse = gradient_distances(grads["trl"][:learn_seeds], grads["fast-fp8"])
    return checks, {"fell": fell, "losses": curves, "apart": apart, "fp8_gradients": coarse, "layouts": layouts,
                    "parameters": len(grads["trl"][0])}  # fmt: skip


def rl_checks(
    source: str, *, steps: int, algorithms: Iterable[str] = (*ONLINE, *PREFERENCE), pool: Executor | None = None,
    say: Any = print, **options: Any
) -> list[Check]:
    """Losses of fast within the yardstick of two trl runs: on the completions that fast drew, or on the same pairs."""
    prompts = [{"prompt": f"What is {i} plus {3 * i % 7}?"} for i in range(64)]
    checks = []
    jobs = [_Job(name, 1, steps, source, prompts if name in ONLINE else "builtin:arithmetic-preference", options)
            for name in algorithms]  # fmt: skip
    for job, (fast, trl, other, low) in _each(_held_job, jobs, pool):
        assert len(fast) == len(trl) == steps and float(trl.abs().max()) > 1e-4
        part = f"{job.name}, fp32" + (", forced rollouts" if job.name in ONLINE else "")
        checks += within_yardstick(part, [trl], [other], [fast])
        checks.append(distance(f"{job.name}, {TWO_RUNS}", [trl], [low], [other], QUIET))
        say(f"  {job.name}: losses up to {float(trl.abs().max()):.4f}")
    return checks


def report(checks: Sequence[Check], more: Mapping[str, Any], command: str, at: str | None) -> dict[str, Any]:
    return {
        "command": command, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": at or commit(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "rows": [{**asdict(check), "holds": check.holds} for check in checks], **more,
    }  # fmt: skip


def written(found: Mapping[str, Any]) -> str:
    """As JSON, an array of numbers on one line."""
    text = json.dumps(found, indent=1) + "\n"
    return re.sub(r'\[\n[^][{}"]*\]', lambda array: "[" + " ".join(array[0][1:-1].split()) + "]", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, figures and bounds here")
    parser.add_argument("--steps", type=int, default=300, help="of the learning run; the yardstick takes 100 at most")
    parser.add_argument("--seeds", type=int, default=2, help="of the yardstick and of the first-step gradients")
    parser.add_argument("--learn-seeds", type=int, default=12, help="of the learning run")
    parser.add_argument("--workers", type=int, default=1, help="runs at once: they share the card")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the default")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if strange := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(PARTS)}")
    folder = Path(tempfile.mkdtemp())
    checks: list[Check] = []
    more: dict[str, Any] = {}
    spawned = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=spawned) if args.workers > 1 else None
    try:
        source = write_model(folder / "model")
        toy = {"batch_size": 2, "max_seq_length": 48} if args.steps < 10 else {}
        if "sft" in parts:
            checks, more = sft_checks(source, seeds=args.seeds, yard_steps=min(100, args.steps),
                                      learn_steps=args.steps, learn_seeds=args.learn_seeds, pool=pool,
                                      device=args.device, **toy)  # fmt: skip
        checks += rl_checks(source, steps=min(50, args.steps), device=args.device, pool=pool,
                            algorithms=[name for name in PARTS[1:] if name in parts])  # fmt: skip
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder)
    for check in checks:
        own = "-" if check.own is None else f"{check.own:.2e}"
        print(f"{'ok  ' if check.holds else 'OVER'} {check.part}: {check.what} {check.value:.2e}, own {own}, "
              f"bound {check.bound:.2e}; {check.steps} steps, {check.seeds} seeds")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m benchmarks.parity", *(argv if argv is not None else sys.argv[1:])])
        args.json.write_text(written(report(checks, more, command, args.commit)))
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
