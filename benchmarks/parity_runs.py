"""The runs that `benchmarks.parity` judges: of SFT, of online methods on one set of rollouts, of preference methods."""

from __future__ import annotations

import multiprocessing
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from aligntune import create_reward_trainer, create_rl_trainer, create_sft_trainer
from benchmarks.bounds import (
    Apart,
    Gradients,
    Losses,
)
from benchmarks.parity_parts import (
    ARMS,
    JUDGED,
    ONLINE,
    PASSES,
    PREFERENCE,
    SFT,
    Arm,
    Job,
    algorithm_of,
    is_online,
)

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
