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
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from aligntune import create_reward_trainer, create_rl_trainer, create_sft_trainer
from benchmarks.bounds import (
    BF16,
    FIRST,
    FP8,
    QUIET,
    Apart,
    Check,
    Gradients,
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
    ARMS,
    JUDGED,
    LEARNING,
    ONLINE,
    OPTIONS,
    PARTS,
    PASSES,
    PREFERENCE,
    SFT,
    TRUE_LOSS,
    TRUTH,
    Arm,
    Job,
    Plan,
    algorithm_of,
    is_online,
)
from benchmarks.tables import held

PACKAGES = ("torch", "triton", "transformers", "trl", "peft")
TWO_RUNS = "two trl runs in fp32"
SPREAD = 0.02
"""Standard deviation of the drawn B, and of PPO's value head."""
SCORES = 0.2
"""That of a reward model's head: at 0.02 scores differ so little that two trl runs are one to the last bit."""
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
COMMON: dict[str, Any] = {
    "logging_steps": 1, "report_to": "none", "progress": False, "lr_scheduler": "constant", "overwrite": True,
    "gradient_checkpointing": False, "max_grad_norm": 0.0,
}  # fmt: skip
LEARNS: dict[str, Any] = {"batch_size": 16, "max_seq_length": 128, "learning_rate": 1e-3, "max_samples": 256}
"""`builtin:tiny-instruct` on few enough rows to know them after 300 steps."""
RATE = 1e-4
"""Of these methods. At 1e-3 two trl runs in fp32 were 3e-3 apart with Dr. GRPO and 6e-2 with KTO (on a CPU), a bound
that any fault passes; with PPO 2e-2 at one seed and 2e-5 at others."""
SEEDS_APART = 0.4
"""Of an online method, the standard deviation over seeds of how many times as far from fp32 as one trl run in bf16
(sdpa) another (eager) is, over 50 steps: 0.4 to 2.8 times on a CPU, where it is 0.9 to 1.1 with DPO and KTO. A ratio of
probabilities carries what bf16 rounds of both, and Adam's first steps go by signs. Three deviations are allowed for."""


ROUNDED_ENTROPY = 1e-5
"""What rounding leaves of an entropy in fp32, relative: in two trl runs 50 steps left 2e-6 (on a CPU), where one of
100 tokens lies 3e-4 from the next and those that begin completions of one prompt are equal."""


class FirstGradients(TrainerCallback):
    """Keeps the gradients that the first optimizer steps are taken with, not clipped; those of `critic` as one.

    A value head has a bias of one number, and of one number a ratio of two distances says nothing.
    """

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps
        self.critic: torch.nn.Module | None = None
        self.found: list[Gradients] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if len(self.found) < self.steps:
            found = {name.removeprefix("module."): p.grad.detach().double().cpu()
                     for name, p in model.named_parameters() if p.grad is not None}
            if self.critic is not None:
                found["critic"] = torch.cat([p.grad.detach().double().cpu().flatten()
                                             for p in self.critic.parameters() if p.grad is not None])
            self.found.append(found)


def draw_adapters(model: Any, spread: float = SPREAD, *, named: str = "lora_B") -> int:
    """Draws every B, or what else is `named`, from N(0, spread), by the parameter's name alone; returns how many."""
    drawn = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if named in name:
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


@contextmanager
def in_fp64(model: Any) -> Iterator[None]:
    """The model in fp64, and what transformers and TRL would widen to fp32 there: they name that type as they run."""
    named, default = {"float32": torch.float32, "float": torch.float}, torch.get_default_dtype()
    widen = torch.Tensor.float
    model.double()
    torch.set_default_dtype(torch.float64)
    for name in named:
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = widen  # type: ignore[method-assign]
        for name, dtype in named.items():
            setattr(torch, name, dtype)
        torch.set_default_dtype(default)


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
        if given["precision"] == "fp32":
            # TRL stores the adapters of a base in NF4 in bf16, and PEFT then multiplies them in bf16, whatever the
            # base is multiplied in; fast does not. What both are held against is to be fp32.
            for parameter in run.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
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


def choose_as_first(trainer: Any, chosen: list[torch.Tensor], *, first: bool, exact: bool) -> None:
    """Of `top_entropy_quantile`: the tokens that the first arm chooses are those of every arm, as its rollouts are.

    Where two tokens at the quantile are one but for rounding, rounding chooses, of two trl runs as well, and what
    follows is another run. In fp32 (`exact`) no other choice is excused.
    """
    choose, rest = trainer.get_high_entropy_mask, None if first else iter(chosen)

    def turn(entropies: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
        own = choose(entropies, mask, threshold)
        if rest is None:
            chosen.append(own)
            return own
        given = next(rest)
        at = torch.quantile(entropies[mask.bool()].float(), threshold)
        assert not exact or ((entropies[own != given] - at).abs() <= ROUNDED_ENTROPY * at).all(), (
            "this arm chooses tokens of another entropy")
        return given

    trainer.get_high_entropy_mask = turn


def forced(
    algorithm: str, source: Any, rows: Any, arms: Sequence[Arm], *, steps: int, seed: int = 1, kept: int = 0,
    **options: Any,
) -> list[tuple[list[Gradients], Any]]:
    """Runs of an online method on one set of rollouts: the first arm's engine draws them, the others are given them.

    So are the tokens that `top_entropy_quantile` chooses.
    """
    drawn: list[Any] = []
    chosen: list[torch.Tensor] = []
    runs: list[tuple[list[Gradients], Any]] = []
    for number, arm in enumerate(arms):
        given = {**COMMON, **LORA, "batch_size": 8, "num_generations": 4, "max_completion_length": 24,
                 "max_seq_length": 96, "learning_rate": RATE, "gradient_accumulation_steps": 1, "seed": seed,
                 "max_steps": steps, **ONLINE[algorithm], **arm.options, **options}  # fmt: skip
        gradients = FirstGradients(kept)
        with tempfile.TemporaryDirectory() as folder, no_tf32():
            run = create_rl_trainer(source, rows, algorithm=algorithm, backend=arm.backend, output_dir=folder,
                                    reward_functions=[letters], callbacks=[gradients], **given)
            draw_adapters(run.trainer.model)
            gradients.critic = getattr(run.trainer, "critic", None)
            if gradients.critic is not None:
                draw_adapters(gradients.critic)  # of a critic that is a model of its own
                draw_adapters(gradients.critic, named="head")
            generate = run.trainer._generate_single_turn
            rest = iter(drawn) if number else None

            def turn(*args: Any, run: Any = run, generate: Any = generate, rest: Any = rest) -> Any:
                if rest is None:
                    drawn.append(generate(*args))
                found = drawn[-1] if rest is None else next(rest)
                # TRL then shuffles the completions into micro-batches by this generator, which drawing may have used.
                torch.default_generator.manual_seed(1000 * seed + run.trainer.state.global_step)
                return found

            run.trainer._generate_single_turn = turn
            if getattr(run.trainer, "top_entropy_quantile", 1.0) < 1.0:
                choose_as_first(run.trainer, chosen, first=not number, exact=given["precision"] == "fp32")
            run.train()
            witnessed(run)
        assert rest is None or next(rest, None) is None, "as many rollouts on both"
        runs.append((gradients.found, run))
    return runs


def preference(
    algorithm: str, source: Any, rows: Any, arm: Arm, *, steps: int, seed: int = 1, kept: int = 0, **options: Any
) -> tuple[list[Gradients], Any]:
    """A run of a preference method, on the same rows in the same order whatever the arm."""
    given = {**COMMON, **LORA, "batch_size": 8, "max_seq_length": 64, "learning_rate": RATE, "max_samples": 512,
             "seed": seed, "max_steps": steps, **PREFERENCE[algorithm], **arm.options, **options}  # fmt: skip
    gradients = FirstGradients(kept)
    made = create_reward_trainer if algorithm == "reward" else partial(create_rl_trainer, algorithm=algorithm)
    with tempfile.TemporaryDirectory() as folder, no_tf32():
        run = made(source, rows, backend=arm.backend, output_dir=folder, callbacks=[gradients], **given)
        draw_adapters(run.model)
        draw_adapters(run.model, SCORES, named="score")
        with in_fp64(run.model) if arm.fp64 else nullcontext():
            run.train()
        witnessed(run)
    return gradients.found, run


# the runs of a part


@dataclass(frozen=True)
class Ran:
    """What is kept of a run."""

    losses: Mapping[str, Losses]
    """By the name that they are logged under."""
    gradients: Gradients
    """Of the first step of SFT."""
    layout: str
    """How fast laid out its steps; "" on trl."""


def _trained(job: Job, **options: Any) -> list[tuple[list[Gradients], Any]]:
    """(the gradients that were kept, trainer) of each arm."""
    arms = [ARMS[name] for name in job.arms]
    given = {"steps": job.steps, "seed": job.seed, **job.options, **options}
    if is_online(job.part):
        return forced(algorithm_of(job.part), job.source, job.rows, arms, **given)
    if job.part not in SFT:
        return [preference(algorithm_of(job.part), job.source, job.rows, arm, **given) for arm in arms]
    return [sft(arm, job.source, job.rows, **given)[1:] for arm in arms]


def runs_of(job: Job) -> list[Ran]:
    """One of each arm."""
    found = []
    for first, run in _trained(job):
        losses = {key: losses_of(run, key) for key in JUDGED.get(algorithm_of(job.part), ("loss",))}
        assert all(len(each) == job.steps for each in losses.values())
        fast = run.config["backend"] == "fast"
        found.append(Ran(losses, first[0] if first else {}, run.attestation()["layout"] if fast else ""))
    return found


def gradients_of(job: Job) -> Apart:
    """How far those in bf16 are from fp32's; of an online method's rollouts those of the first pass over each."""
    every = PASSES if is_online(job.part) else 1
    kept = {name: gradients[::every] for name, (gradients, _) in
            zip(job.arms, _trained(job, kept=job.steps, learning_rate=1e-12), strict=True)}  # fmt: skip
    return Apart.of(kept["trl"], kept["trl-bf16"], kept["fast-bf16"])


def done(job: Job) -> list[Ran] | Apart:
    if any(ARMS[name].fp64 for name in job.arms):  # modules that are first imported in it would keep its types for good
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            return alone.submit(runs_of, job).result()
    return gradients_of(job) if job.still else runs_of(job)


Later = Callable[[], list[Ran] | Apart]


# what is said of them


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


def judged_all(
    parts: Sequence[str], plan: Plan, pool: Executor | None
) -> tuple[list[Check], dict[str, str], dict[str, Any]]:
    """The checks of all parts, of each that failed why, and what else is reported."""
    checks: list[Check] = []
    failed: dict[str, str] = {}
    more: dict[str, Any] = {"layouts": {}}
    given = begun(done, [job for part in parts for job in plan.jobs(part)], pool)
    for part in parts:
        with Attempt() as attempt:
            found, about = judged(part, {job: later for job, later in given.items() if job.part == part}, plan)
            checks += found
            more["layouts"][part] = about.pop("layouts")
            more |= about
        if attempt.why:
            failed[part] = attempt.why
    return checks, failed, more


def as_row(check: Check) -> dict[str, Any]:
    return {**asdict(check), "holds": check.holds}


def unsettled(checks: Sequence[Check]) -> list[str]:
    """The parts with a bound that does not hold, or that the seeds do not settle."""
    return [*dict.fromkeys(check.part.partition(",")[0] for check in checks
                           if held(as_row(check)) != "yes")]


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


def report(
    checks: Sequence[Check], failed: Mapping[str, str], more: Mapping[str, Any], command: str, at: str | None
) -> dict[str, Any]:
    return {
        "command": command, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": at or commit(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "rows": [as_row(check) for check in checks]
        + [{"part": part, "failed": why, "holds": False} for part, why in failed.items()], **more,
    }  # fmt: skip


def written(found: Mapping[str, Any]) -> str:
    """As JSON, an array of numbers on one line."""
    text = json.dumps(found, indent=1) + "\n"
    return re.sub(r'\[\n[^][{}"]*\]', lambda array: "[" + " ".join(array[0][1:-1].split()) + "]", text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write versions, card, commit, command, figures and bounds here")
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
    folder = Path(tempfile.mkdtemp())
    spawned = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=spawned) if args.workers > 1 else None
    try:
        source = write_model(folder / "model")
        plan = Plan(source, args.steps, args.seeds, args.learn_seeds, args.bf16_seeds, options={"device": args.device})
        checks, failed, more = judged_all(parts, plan, pool)
        again = [part for part in unsettled(checks) if part in OPTIONS]
        if again and args.again > 1:
            print(f"again, over {args.again} seeds: {', '.join(again)}")
            plan = replace(plan, option_seeds=args.again, truth=True)
            found, lost, about = judged_all(again, plan, pool)
            checks = [check for check in checks if check.part.partition(",")[0] not in again] + found
            failed |= lost
            more["layouts"] |= about["layouts"]
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder)
    for check in checks:
        own = "-" if check.own is None else f"{check.own:.2e}"
        print(f"{held(as_row(check))}: {check.part}: {check.what} {check.value:.2e}, "
              f"own {own}, bound {check.bound:.2e}; {check.steps} steps, {check.seeds} seeds")
    for part, why in failed.items():
        print(f"{part}: failed: {why}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m benchmarks.parity", *(argv if argv is not None else sys.argv[1:])])
        args.json.write_text(written(report(checks, failed, more, command, args.commit)))
    return 0 if not failed and all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
