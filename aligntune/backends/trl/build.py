"""Builds a TRL trainer from a resolved job and prepared data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aligntune.algorithms.dapo import overlong_buffer
from aligntune.backends._compat import warn_untested
from aligntune.backends.base import Built, Prepared
from aligntune.backends.loading import Precision, load_model, lora_config, precision_of, steps_lost
from aligntune.backends.positions import check_positions
from aligntune.backends.trl.dynamic_sampling import DynamicSampling
from aligntune.backends.trl.options import trl_config
from aligntune.backends.trl.ppo_build import value_model
from aligntune.backends.trl.reward_model import load_reward_model
from aligntune.backends.trl.trainers import TRAINERS, reference_from_memory
from aligntune.core.model_hygiene import copy_model, detach_backends, forget_patched_forward, forget_reference_adapter
from aligntune.core.rules import world_size
from aligntune.errors import BackendUnavailableError, ConfigError, DataError
from aligntune.rewards.overlong import SoftOverlong

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aligntune.core.resolve import Job


def build(job: Job, prepared: Prepared, *, trainers: Mapping[str, type] = TRAINERS) -> Built:
    """A TRL trainer for the job; TRL's own code trains, saves and evaluates.

    A process that sees several GPUs trains on one of them: most of TRL's trainers refuse nn.DataParallel's replicas,
    and the others break in them.

    Args:
        job: what is asked for.
        prepared: the tokenizer and the rows.
        trainers: the trainer class of each algorithm.

    Raises:
        ConfigError, DataError: what the job asks for and TRL would do otherwise, in silence, or not at all.
        BackendUnavailableError: TRL wants a package that is not installed.
    """
    warn_untested()
    precision = precision_of(job)
    job.notices.append(f"precision: {precision.why}")
    model = load_model(job, precision, scores=job.spec.takes == "reward")
    check_positions(job, model, prepared.report)
    # Another trainer's patched forward would stay under this one's, and follow that trainer's model.
    detach_backends(model)
    forget_patched_forward(model)
    if forget_reference_adapter(model):
        job.notices.append("the adapter 'ref', the reference of an earlier trainer, is removed from the model")
    rewards = _rewards(job, precision, prepared.tokenizer) if job.spec.online else []
    args = trl_config(job, precision, eval_rows=len(prepared.eval) if prepared.eval is not None else 0)
    if args.n_gpu > 1:
        job.notices.append(f"{args.n_gpu} GPUs: this process trains on {args.device} alone; `aligntune launch RECIPE`, "
                           "torchrun and accelerate launch start one process a GPU")
        args._n_gpu = 1  # which batch sizes are multiplied by, and which asks for replicas
    if job.spec.name == "dapo":
        _overlong(job, args, rewards)
    peft_config = lora_config(job, model)
    if peft_config is None and (lost := steps_lost(model, args.learning_rate)):
        job.notices.append(lost)
    kwargs: dict[str, Any] = {
        "model": model, "args": args, "train_dataset": prepared.train, "eval_dataset": prepared.eval,
        "processing_class": prepared.tokenizer, "peft_config": peft_config,
    }
    reference: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if job.spec.name == "sft" and job.options.packing:
        kwargs["train_dataset"] = _packed(job, prepared.train)
    elif job.spec.reference and not job.spec.online:
        if job.spec.takes == "unpaired":
            job.notices += _unpaired_notices(job, prepared.train)
        kwargs["ref_model"] = _reference(job, model, precision, peft_config is not None)
    elif job.spec.online:
        _enough_prompts(args, prepared.train)
        kwargs["reward_funcs"] = rewards
        if job.spec.name == "ppo":
            kwargs["value_model"] = value_model(job, model, precision, peft_config, rewards)
        if args.beta and peft_config is None and not hasattr(model, "peft_config"):
            reference = reference_from_memory(model, args)
    try:
        with reference:
            trainer = trainers[job.spec.name](**kwargs)
    except (ValueError, NotImplementedError, ImportError) as error:
        theirs = next(kind for kind in trainers[job.spec.name].__mro__ if not kind.__module__.startswith("aligntune"))
        typed = BackendUnavailableError if isinstance(error, ImportError) else ConfigError
        raise typed(f"{theirs.__name__}: {error}") from error
    if isinstance(trainer, DynamicSampling):
        trainer.dynamic_sampling = job.options.dynamic_sampling
        trainer.max_resample_rounds = job.options.max_resample_rounds
    return Built(trainer, notices=[])


def _overlong(job: Job, args: Any, rewards: list[Any]) -> None:
    """Add DAPO's punishment of long completions to the rewards."""
    longest, weight = job.options.max_completion_length, job.options.overlong_penalty_factor
    buffer = overlong_buffer(job.options.overlong_buffer_len, longest)
    if buffer > longest:
        raise ConfigError(f"loss.overlong_buffer_len = {buffer}: must be at most max_completion_length = {longest}")
    if buffer and weight:
        rewards.append(SoftOverlong(longest, buffer))
        args.reward_weights = [*args.reward_weights, weight]
        job.notices.append(f"soft overlong punishment: the last {buffer} of {longest} tokens of a completion cost up "
                           f"to {weight:g} of its reward")


def _packed(job: Job, rows: Any) -> Any:
    from trl import pack_dataset

    packed = pack_dataset(rows.select_columns(["input_ids", "labels"]), job.options.max_seq_length, "bfd")
    tokens = sum(len(ids) for ids in rows["input_ids"])
    share = math.ceil(len(packed) / world_size())  # a step ends with the epoch, whether it is full or not
    step = min(job.options.batch_size * job.options.gradient_accumulation_steps, share)
    job.notices.append(
        f"packing: {_count(len(rows), 'row')} of {_count(tokens, 'token')} fill {_count(len(packed), 'sequence')} of "
        f"up to {job.options.max_seq_length}; a step of {_count(step, 'sequence')} holds about "
        f"{len(rows) * step / len(packed):.1f} rows and {tokens * step / len(packed):.0f} tokens a device"
    )
    return packed


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _unpaired_notices(job: Job, rows: Any) -> list[str]:
    """What KTO's user should know of the rows: the weights that their labels ask for, a last batch without a KL."""
    options, notices = job.options, []
    good = sum(rows["label"])
    bad = len(rows) - good
    if not good or not bad:
        notices.append(f"all {len(rows)} completions are labelled {'good' if good else 'bad'}: nothing pulls the other "
                       "way")
    elif not 1 <= (ratio := options.desirable_weight * good / max(options.undesirable_weight * bad, 1e-9)) <= 4 / 3:
        notices.append(
            f"{good} good and {bad} bad completions: desirable_weight x good is {ratio:.2g} times undesirable_weight x "
            f"bad, and 1 to 1.33 is advised: desirable_weight {options.undesirable_weight * bad / good:.3g} to "
            f"{4 / 3 * options.undesirable_weight * bad / good:.3g} would be"
        )
    if options.loss_type == "kto" and len(rows) % options.batch_size == 1:
        notices.append("the last batch of an epoch has one row, whose mismatched completion is its own")
    return notices


def _reference(job: Job, model: PreTrainedModel, precision: Precision, adapters: bool) -> Any:
    """The reference model, from memory; None where TRL takes the base with adapters off."""
    source = job.options.ref_model_name
    if source is not None and not isinstance(source, str):
        if source is model:
            return copy_model(source)
        detach_backends(source)
        return source
    if source is not None:
        import copy

        other = copy.copy(job)
        other.options = copy.copy(job.options)
        other.options.model_name, other.options.model_revision = source, None
        return load_model(other, precision)
    if adapters or hasattr(model, "peft_config") or job.options.precompute_ref_log_probs:
        return None
    return copy_model(model)


def _rewards(job: Job, precision: Precision, tokenizer: Any) -> list[Any]:
    """Reward functions, then the reward model; their weights go back into the job, one each."""
    from aligntune.rewards import resolve_rewards

    given, weights = list(job.options.reward_functions or []), job.options.reward_function_weights
    model = job.options.reward_model_name
    functions, own = resolve_rewards(given, weights[: len(given)] if weights else None)
    last = [] if model is None else [weights[-1] if weights else 1.0]
    job.set("reward_function_weights", [*map(float, own or [1.0] * len(functions)), *last])
    return [*functions, *([load_reward_model(job, precision, tokenizer)] if model is not None else [])]


def _enough_prompts(args: Any, rows: Any) -> None:
    """TRL's sampler drops what does not fill a round of generation: too few prompts would be zero steps."""
    needed = args.generation_batch_size // args.num_generations
    if len(rows) < needed:
        raise DataError(
            f"{len(rows)} prompts, but one round of generation takes {needed} "
            f"(batch_size {args.per_device_train_batch_size} x {args.steps_per_generation} micro-steps x processes, "
            f"{args.num_generations} completions each): give more prompts or a smaller batch_size"
        )
