"""Our engine behind `AlignTrainer.generate` and the CLI: the options of transformers' `generate`, the same tokens.

Options that the engine has no equal of are declined by name; whoever asked takes transformers then, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from aligntune.backends.fast.attachment import attach, base_model
from aligntune.backends.fast.rollout.engine import (
    RolloutEngine,
    cannot_run_because,
    described,
    too_long_because,
    too_small_because,
)
from aligntune.backends.fast.rollout.rope import length_limit
from aligntune.backends.fast.rollout.sampling import Sampling, stops_of
from aligntune.backends.fast.rollout.trl import autocast_of, sharded_because

if TYPE_CHECKING:
    from transformers import Trainer

SERVED = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_strings",
          "eos_token_id")
NEUTRAL: dict[str, Any] = {"min_new_tokens": 0, "typical_p": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
"""Values of other options that ask for nothing."""
_TOP_K = 50
"""What transformers' sampling takes where nothing is said."""
_LEAST_LEN = 256


class EngineGenerator:
    """Completions of token ids by our engine, which is kept between calls.

    Args:
        model: as `RolloutEngine` takes it.
        tokenizer: its tokenizer, for stop strings.
        trainer: the one that trains `model`, if any: its engine is used where it is long enough, and ours gives its
            memory back for the length of a training.
        memory_gib: as `RolloutEngine` takes it.

    Raises:
        ConfigError: the engine cannot run this model; says why.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, trainer: Trainer | None = None, memory_gib: float | None = None
    ) -> None:
        self.model, self.tokenizer, self.trainer, self.memory_gib = model, tokenizer, trainer, memory_gib
        self._engine: RolloutEngine | None = None
        # Allocates nothing yet; refuses what it cannot run.
        RolloutEngine(model, tokenizer, max_len=self._up_to(_LEAST_LEN))
        if trainer is not None:
            trainer.add_callback(_GivesBack(self))

    def declines(self, options: Mapping[str, Any], longest: int) -> str | None:
        """Which of these options are transformers' alone, in words, or why it cannot go on from `longest` tokens."""
        others = [name for name, value in options.items()
                  if name not in SERVED and value is not None and NEUTRAL.get(name, ...) != value]
        if others:
            return f"{', '.join(sorted(others))}: the engine has no such option"
        return too_long_because(self.model, longest + options["max_new_tokens"])

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], options: Mapping[str, Any], *, batch_size: int, seed: int | None
    ) -> list[list[int]]:
        """A completion of each prompt, its stop token included.

        Args:
            prompt_ids: token ids without padding.
            options: transformers' names, `max_new_tokens` among them; `declines` has let them pass.
            batch_size: rows that run together; more wait.
            seed: of the sampling; None draws one from torch's global generator.
        """
        sampling = sampling_of(options, seed)
        needed = max(map(len, prompt_ids)) + sampling.max_new_tokens
        try:
            return self._at(needed, batch_size).generate(prompt_ids, sampling=sampling).completion_ids
        finally:
            if self.trainer is not None and self.trainer.is_in_train:
                self.release()

    def release(self) -> None:
        """Give the memory of our own engine back."""
        self._engine = None

    def _up_to(self, length: int) -> int:
        """`length`, or the longest row that the model's rotary embedding lets the engine run."""
        limit = length_limit(base_model(self.model).config)
        return length if limit is None else min(length, limit[1])

    def _at(self, needed: int, rows: int) -> RolloutEngine:
        own = getattr(self.trainer, "rollout_engine", None)
        for engine in (own, self._engine):
            if engine is not None and engine.max_len >= needed and (engine is own or engine.max_batch >= rows):
                return engine
        self._engine = None  # before the next takes its memory
        autocast = None if self.trainer is None else autocast_of(self.trainer)
        # The next call, a little longer, finds its graphs captured.
        length = max(needed, self._up_to(max(_LEAST_LEN, 1 << (needed - 1).bit_length())))
        self._engine = RolloutEngine(self.model, self.tokenizer, max_batch=rows, max_len=length,
                                     memory_gib=self.memory_gib, autocast=autocast)
        return self._engine


def sampling_of(options: Mapping[str, Any], seed: int | None) -> Sampling:
    """transformers' options as the engine's, with transformers' defaults.

    Raises:
        ConfigError: a value that cannot be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    shared: dict[str, Any] = {
        "max_new_tokens": given["max_new_tokens"], "repetition_penalty": given.get("repetition_penalty", 1.0),
        **stops_of(given),
    }
    if not given.get("do_sample"):
        return Sampling(temperature=0.0, **shared)
    drawn = int(torch.randint(2**62, ())) if seed is None else seed % 2**63
    return Sampling(
        temperature=given.get("temperature", 1.0), top_k=given.get("top_k", _TOP_K), top_p=given.get("top_p", 1.0),
        min_p=given.get("min_p"), seed=drawn, **shared)


def of_trainer(
    trainer: Any, tokenizer: Any, *, wanted: str = "auto", memory_gib: float | None = None
) -> tuple[EngineGenerator | None, str]:
    """What generates for a trainer, and that in words; None is transformers.

    Args:
        wanted, memory_gib: the job's `rollout_engine` and `rollout_memory_gib`.
    """
    if wanted in ("hf", "vllm"):
        return None, f"transformers, for rollout_engine is {wanted!r}"
    why = cannot_run_because(trainer.model) or sharded_because(trainer)
    if why is None and memory_gib is not None:
        why = too_small_because(
            trainer.model, max_len=_LEAST_LEN, memory_gib=memory_gib, autocast=autocast_of(trainer))
    if why is not None:
        return None, f"transformers, for {why}"
    return EngineGenerator(trainer.model, tokenizer, trainer=trainer, memory_gib=memory_gib), described(trainer.model)


def of_model(model: Any, tokenizer: Any) -> EngineGenerator:
    """What generates with a model that was loaded for use; on a GPU our kernels are attached to it.

    Raises:
        ConfigError: the engine cannot run this model; says why.
    """
    generator = EngineGenerator(model, tokenizer)
    if next(model.parameters()).is_cuda:
        attach(model)
    return generator


class _GivesBack(TrainerCallback):
    """Training gets the memory that generating before it has taken."""

    def __init__(self, generator: EngineGenerator) -> None:
        self.generator = generator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.generator.release()
