"""TRL's online trainers with our engine behind the one method that generates.

Everything after it is TRL's: rewards, advantages, the loss. The loss takes its old log-probabilities from the trainer's
own forward: those of the engine, which come the way that vLLM's come, are kept from it and decide nothing. They are
held against the trainer's instead, for as long as the policy is the one that drew them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from aligntune.backends.fast.memory import GIB, MemoryPlan
from aligntune.backends.fast.rollout.engine import (
    SHARE_OF_FREE,
    Rollout,
    RolloutEngine,
    cannot_run_because,
    too_small_because,
)
from aligntune.backends.fast.rollout.sampling import Sampling, stops_of
from aligntune.backends.trl.generation_kwargs import STOPS
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Trainer

MOST_ROWS = 256
"""Rows that run at once, where a round of generation has more."""
_ENDED = -1
"""No token's id: among a trainer's `eos_token_ids` it stands for every `LastToken`."""
_DIFFERENCE = "sampling/sampling_logp_difference"
MODELS_OWN: Mapping[str, Any] = {
    "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": None, "dola_layers": None, "guidance_scale": 1.0,
    "constraints": None, "force_words_ids": None, "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "remove_invalid_values": False, "watermarking_config": None,
    "stop_strings": None, "max_time": None,
}
"""Fields of a model's own `generation_config` that change what `generate` draws and that TRL does not set, each with
the value beside None that asks for nothing."""


def engine_cannot_because(trainer: Trainer, *, max_len: int) -> str | None:
    """Why this trainer's completions, of rows up to `max_len`, cannot come from our engine, or None where they can."""
    why = cannot_run_because(trainer.model, max_len=max_len) or sharded_because(trainer)
    if why is not None:
        return why
    if trainer.use_vllm or trainer.use_transformers_continuous_batching:
        return "TRL was told to generate with another engine"
    given = trainer.args.generation_kwargs or {}
    if others := sorted(set(given) - {*STOPS}):
        return f"generation_kwargs {others} are transformers' options"
    own = getattr(trainer.model, "generation_config", None)
    asked = [name for name, neutral in MODELS_OWN.items()
             if name not in given and getattr(own, name, None) not in (None, neutral)]
    return f"the model's generation_config sets {', '.join(asked)}, which only transformers reads" if asked else None


def stops_given(trainer: Trainer) -> list[str]:
    """Which ends of completions are given that our engine alone takes."""
    return [name for name in STOPS if (trainer.args.generation_kwargs or {}).get(name) is not None]


def cache_cannot_because(trainer: Trainer, *, max_len: int, memory_gib: float | None) -> str | None:
    """Why the cache of an engine that can run here holds no row of `max_len` tokens; None where it does.

    All processes call it, and say the same: one that generated in another way than the rest would keep them waiting.
    """
    gib = share_of_budget(getattr(trainer, "memory", None)) if memory_gib is None else memory_gib
    why = too_small_because(trainer.model, max_len=max_len, memory_gib=gib, autocast=autocast_of(trainer))
    return next((one for one in gather_object([why]) if one is not None), None)


def sharded_because(trainer: Trainer) -> str | None:
    """Who spreads this trainer's weights over processes, or None where each has them all."""
    kind = str(getattr(trainer.accelerator.distributed_type, "value", ""))
    return f"{kind} shards the weights" if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") else None


class LastToken(int):
    """The token with which a stop string, or a stop token of `generation_kwargs`, ended a completion.

    TRL takes a completion for cut off unless its last token is one of `eos_token_ids`.
    """

    __slots__ = ()
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return (type(other) is int and other == _ENDED) or int(self) == other


class FastRollouts:
    """Mixin before a GRPOTrainer: with `rollouts_on` called, completions come from our engine.

    Metrics: `sampling/sampling_logp_difference/mean` and `/max`, |log-prob when drawn - log-prob when trained| of a
    rollout's tokens but those that are masked, where any are left; `rollout/tokens_per_second`, `rollout/seconds`.
    """

    rollout_engine: RolloutEngine | None = None
    _engine_options: dict[str, Any] | None = None
    _sampled: tuple[torch.Tensor, torch.Tensor] | None = None
    # (optimizer step, number within it) of the last rollout, in training (True) and in evaluation.
    _drawn_at: Mapping[bool, tuple[int, int]] = MappingProxyType({})

    def rollouts_on(self: Any, *, max_len: int, memory_gib: float | None = None, **options: Any) -> None:
        """Generate with our engine from now on; `options` are those of `RolloutEngine`.

        Raises:
            ConfigError: it cannot run here; says why.
        """
        why = engine_cannot_because(self, max_len=max_len) or cache_cannot_because(
            self, max_len=max_len, memory_gib=memory_gib)
        if why is not None:
            raise ConfigError(f"rollout.rollout_engine = 'fast': {why}; 'hf' generates with transformers")
        self._engine_options = {"max_len": max_len, "memory_gib": memory_gib} | options
        if stops_given(self):
            self.eos_token_ids = [*self.eos_token_ids, _ENDED]

    def begins_rollout(self: Any) -> bool:
        """Whether the next micro-step generates."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    def worth_tracing(self, *, last: bool) -> bool:
        """Whether the next micro-step shows what runs: one that only learns shows neither engine nor reference."""
        return last or self.begins_rollout()

    def _generate_single_turn(
        self: Any, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._engine_options is None:
            return super()._generate_single_turn(  # type: ignore[misc]
                prompt_ids, images, multimodal_fields, *args, **kwargs)
        if images or multimodal_fields:
            raise ConfigError("rollout.rollout_engine = 'fast' generates from text alone; 'hf' takes images")
        if self.rollout_engine is None:
            # An evaluation may come first, with fewer rows than training will have.
            round_of_training = self.args.generation_batch_size // self.accelerator.num_processes
            rows = min(MOST_ROWS, max(len(prompt_ids), round_of_training))
            options = {"max_batch": rows, "autocast": autocast_of(self)} | self._engine_options
            if options["memory_gib"] is None:
                options["memory_gib"] = share_of_budget(getattr(self, "memory", None))
            self.rollout_engine = RolloutEngine(self.model, self._tokenizer, **options)
        # TRL repeats a prompt for each of its completions; next to each other they share a prefill.
        groups = [(ids, len(list(same))) for ids, same in itertools.groupby(prompt_ids)]
        rollout = self.rollout_engine.generate(
            [ids for ids, _ in groups], num_generations=[count for _, count in groups], sampling=self._sampling())
        if not self.state.global_step:
            # What the first optimizer step makes, and keeps, would come to lie in the cache's block.
            torch.cuda.empty_cache()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["rollout/seconds"].append(rollout.stats.seconds)
        metrics["rollout/tokens_per_second"].append(rollout.stats.to_dict()["tokens_per_second"])
        for ids, why in zip(rollout.completion_ids, rollout.finish_reasons, strict=True):
            if why == "stop" and ids[-1] not in self.eos_token_ids:
                ids[-1] = LastToken(ids[-1])
        return self._handed(rollout)

    def _handed(self, rollout: Rollout) -> Any:
        """A rollout in the form in which TRL's method returns it."""
        return rollout.completion_ids, rollout.log_probs

    def _sampling(self: Any) -> Sampling:
        args, step, training = self.args, self.state.global_step, self.model.training
        at, calls = self._last_drawn()
        drawn = (step, calls + 1 if at == step else 0)
        self._drawn_at = {**self._drawn_at, training: drawn}
        # A function of the step, so that a resumed run draws what it would have drawn, whether or not an evaluation
        # came with the checkpoint; no process draws another's.
        stops = stops_of(args.generation_kwargs or {})
        stops["stop_token_ids"] += tuple(self.eos_token_ids)
        stream = random.Random(f"{args.seed}/{training}/{drawn}/{self.accelerator.process_index}")
        return Sampling(
            max_new_tokens=self.max_completion_length, temperature=self.temperature, top_k=self.top_k or 0,
            top_p=self.top_p, min_p=self.min_p, repetition_penalty=self.repetition_penalty,
            seed=stream.getrandbits(62), **stops,
        )

    def _last_drawn(self: Any) -> tuple[int, int]:
        """Of this mode's rollouts; the step is -1 where there was none."""
        return self._drawn_at.get(self.model.training, (-1, 0))

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        """TRL's; where a rollout outlives an optimizer step, it is scored here by the policy that drew it."""
        rollout = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        old, drawn = (rollout.get(name) for name in ("old_per_token_logps", "sampling_per_token_logps"))
        if self._engine_options is not None and old is not None and drawn is not None:
            self._log_difference(old, drawn, _mask_of(rollout))
        return rollout

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        drawn = inputs.get("sampling_per_token_logps")
        compared = "old_per_token_logps" in inputs
        if drawn is not None and not compared and self.state.global_step == self._last_drawn()[0]:
            self._sampled = (drawn, _mask_of(inputs))
        if self._engine_options is not None:
            # `off_policy_mask_threshold` would mask by them; with transformers' generation TRL masks by its own.
            inputs = {name: value for name, value in inputs.items() if name != "sampling_per_token_logps"}
        try:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._sampled = None

    def _get_per_token_logps_and_entropies(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        if self._sampled is not None:
            drawn, mask = self._sampled
            self._sampled = None
            self._log_difference(found[0].detach(), drawn, mask)
        return found

    def _log_difference(self: Any, trained: torch.Tensor, drawn: torch.Tensor, mask: torch.Tensor) -> None:
        apart = (trained - drawn).abs().masked_fill(mask == 0, 0.0)
        found = torch.stack((apart.sum(), mask.sum().to(apart.dtype), apart.max()))
        found = self.accelerator.gather(found[None])
        total, tokens = found[:, :2].sum(0).tolist()
        if tokens:  # 0 of no token would read as a perfect agreement
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics[f"{_DIFFERENCE}/mean"].append(total / tokens)
            metrics[f"{_DIFFERENCE}/max"].append(found[:, 2].max().item())


class ScoredRollouts(FastRollouts):
    """`FastRollouts` for a trainer whose first pass over a rollout is that of the policy that drew it (RLOO, PPO).

    There the log-probs of the engine are held against those of that pass.
    """

    _unscored: list[list[float]] | None = None

    def _handed(self, rollout: Rollout) -> Any:
        self._unscored = rollout.log_probs
        return rollout.completion_ids

    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if self._unscored is not None:
            rows, self._unscored = self._unscored, None
            drawn = torch.zeros(len(rows), logits_to_keep)
            for row, values in zip(drawn, rows, strict=True):
                row[: len(values)] = torch.tensor(values)
            mask = attention_mask[:, -logits_to_keep:]
            self._log_difference(found[0].detach(), drawn.to(mask.device), mask)
        return found


def _mask_of(inputs: dict[str, Any]) -> torch.Tensor:
    """Of the tokens that a policy drew and is scored on: TRL masks truncated completions on demand, and tools' text."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def share_of_budget(plan: MemoryPlan | None) -> float | None:
    """GiB for the cache of a trainer whose steps have a budget, the share that it takes of what is free elsewhere."""
    if plan is None or plan.budget is None:
        return None
    return max(0.0, SHARE_OF_FREE * (plan.budget - torch.cuda.memory_allocated()) / GIB)


def autocast_of(trainer: Any) -> torch.dtype | None:
    """What training runs under, where the weights are of another type than it computes in.

    Norms count too: TRL's CPO and ORPO keep those of a 4-bit base in fp32, whose layers have no fp32 weights to meet
    them with. Adapters do not: they are cast as they are read.
    """
    wanted = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
    read = [trainer.model.get_input_embeddings().weight]
    read += [p for name, p in trainer.model.named_parameters() if p.ndim == 1 and "norm" in name]
    return wanted if any(weight.dtype != wanted for weight in read) else None
