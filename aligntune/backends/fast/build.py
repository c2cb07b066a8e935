"""Builds a fast trainer: TRL's trainer for the job, with our kernels under its model and a witness of what runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from torch.utils.data import IterableDataset
from trl import SFTTrainer

from aligntune.backends.base import Built, Prepared
from aligntune.backends.fast.attachment import Attachment, attachment_of, base_model
from aligntune.backends.fast.attestation import attest, report_of
from aligntune.backends.fast.fp8_base import quantize_base
from aligntune.backends.fast.graphs import eager_because
from aligntune.backends.fast.memory import GIB, MemoryPlan
from aligntune.backends.fast.online import FlatLogProbs, LossPassPlan
from aligntune.backends.fast.ppo import FastPPO, attach_critic
from aligntune.backends.fast.preference import FlatPreference
from aligntune.backends.fast.recompute import install, recompute_asked, recompute_of, recomputes, remove
from aligntune.backends.fast.rollout.engine import described
from aligntune.backends.fast.rollout.serve import of_trainer
from aligntune.backends.fast.rollout.trl import (
    FastRollouts,
    cache_cannot_because,
    engine_cannot_because,
)
from aligntune.backends.fast.scripts import attach_trainer, detach_trainer
from aligntune.backends.fast.token_gradients import TokenGradients
from aligntune.backends.fast.trainers import FAST_TRAINERS, FastSFT, padded_because
from aligntune.backends.fast.updates import by_torch_because
from aligntune.backends.trl.build import build as build_trl
from aligntune.backends.trl.generation_kwargs import cannot_end, ends_given
from aligntune.core.rules import unread
from aligntune.errors import AlignTuneError, ConfigError

if TYPE_CHECKING:
    from transformers import Trainer

    from aligntune.backends.fast.attestation import Attestation
    from aligntune.core.resolve import Job

logger = logging.getLogger("aligntune")

WITNESSED_STEP = 3
"""The optimizer step whose first micro-step is traced: the first compiles kernels, the second may capture graphs."""


def build(job: Job, prepared: Prepared) -> Built:
    """A fast trainer for the job; TRL's own code computes the loss, our ops compute its parts.

    Raises:
        ConfigError: `strict=True` and a module, or a rollout, would run eager; every such module is named. Or the
            rollout engine that was asked for cannot run. Or `embedding_learning_rate` is given and no embedding trains.
            Or `base_precision="fp8"` cannot be had.
    """
    offloads = _made_to_offload(job)  # which TRL's build takes off, as it does all that is ours
    built = build_trl(job, prepared, trainers=FAST_TRAINERS)
    try:
        return _with_kernels(job, prepared, built, offloads=offloads)
    except AlignTuneError:
        detach_trainer(built.trainer)  # the model may be the caller's own object
        raise


def _made_to_offload(job: Job) -> bool:
    """Whether the layers of the job's model object were made to offload, and no option says otherwise."""
    if isinstance(job.options.model_name, str) or job.given("gradient_checkpointing"):
        return False
    made = recompute_of(base_model(job.options.model_name))
    return made is not None and made.offload and job.options.memory_budget_gib is None


def _with_kernels(job: Job, prepared: Prepared, built: Built, *, offloads: bool) -> Built:
    """TRL's trainer as it was built, with our kernels and our ways around the step."""
    if job.options.embedding_learning_rate is not None:
        built.notices.append(built.trainer.train_embeddings_at(job.options.embedding_learning_rate))
    base = quantize_base(built.trainer, job.options.base_precision)
    if base:
        built.notices.append(base)
    attachment = attach_trainer(built.trainer, strict=job.options.strict)
    if offloads:
        install(attachment.model, offload=True)
    recomputed = recompute_layers(built.trainer, attachment, budget_gib=job.options.memory_budget_gib,
                                  wanted=None if offloads else job.options.gradient_checkpointing)
    if offloads and recompute_of(attachment.model) is not None:
        job.set("gradient_checkpointing", "offload")
        built.notices.append("gradient_checkpointing: 'offload', as the model was made")
    layout = lay_rows(built.trainer, attachment, vars(job.options).get("padding_free", "auto")) + f"; {recomputed}"
    layout += f"; {base}" if base else ""
    beside, values = _beside(built.trainer, strict=job.options.strict)
    layout += f"; {values}" if values else ""
    if isinstance(built.trainer, TokenGradients) and built.trainer.makes_token_gradients():
        layout += "; loss: gradients in the forward where its logits do not fit"
    if isinstance(built.trainer, FastRollouts):
        layout += f"; rollouts: {_rollouts(job, built)}"
    layout += steps_of(built.trainer)
    generator = None
    if built.trainer.model.can_generate():
        options = vars(job.options)
        generator, what = of_trainer(built.trainer, prepared.tokenizer, wanted=options.get("rollout_engine", "auto"),
                                     memory_gib=options.get("rollout_memory_gib"))
        layout += f"; generate: {what}"
        if generator is None:
            built.notices.append(f"generate: {what}")
    witness = Witness(built.trainer, attachment, layout, beside)
    return Built(built.trainer, attestation=witness.report, notices=built.notices, generator=generator)


def steps_of(trainer: Trainer) -> str:
    """Who makes the optimizer's steps of a model on a GPU, as the last part of a layout line."""
    if not next(trainer.model.parameters()).is_cuda:
        return ""
    if trainer.optimizer is not None or getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
        return "; optimizer: as it was given"
    why = by_torch_because(trainer)
    return "; optimizer: " + ("AdamW in one launch" if why is None else f"torch's launches, {why}")


def recompute_layers(
    trainer: Trainer, attachment: Attachment, *, wanted: bool | str | None = None, budget_gib: float | None = None
) -> str:
    """Have our function recompute the layers of a trainer that recomputes; returns what is recomputed.

    Args:
        wanted: True recomputes every layer, "offload" keeps their inputs in host memory, "auto" plans by memory where
            the model is on a GPU and is True elsewhere. None: as the model was made (`FastLanguageModel`). Nothing is
            recomputed where neither the trainer nor a layer of the model asks for it.
        budget_gib: what "auto" plans with, in GiB at the peak of a step; None is what is free.
    Raises:
        ConfigError: "offload" or a budget was asked for and cannot be had.
    """
    args, model = trainer.args, attachment.model
    unplanned = _unplanned_because(trainer, model, wanted)
    if budget_gib is not None and unplanned:
        raise ConfigError(f"memory_budget_gib = {budget_gib:g}: {unplanned}; leave it out")
    made = recompute_of(model)
    offload = wanted == "offload" or (wanted is None and made is not None and made.offload)
    if not (args.gradient_checkpointing or recomputes(model)):
        return "activations: kept"
    why = None
    if args.gradient_checkpointing_kwargs:
        why = "gradient_checkpointing_kwargs are given"
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        why = "the model is sharded"
    recompute = install(model, offload=offload) if why is None else None
    if recompute is None:
        remove(model)
        why = why or "the model has no layers that ask how to run"
        if wanted == "offload" or budget_gib is not None:
            raise ConfigError(f"gradient_checkpointing = {wanted!r}: {why}")
        return f"activations: recomputed by torch's function, {why}"
    if unplanned is None:
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        budget = None if budget_gib is None else int(budget_gib * GIB)
        plan = LossPassPlan if isinstance(trainer, FlatLogProbs) else MemoryPlan
        trainer.memory = plan(  # type: ignore[attr-defined]
            recompute, budget, gradients, _head_bytes(model), args.gradient_accumulation_steps > 1)
        return "activations: recomputed as memory asks"
    where = ", their inputs in host memory" if recompute.offload else ""
    return f"activations: recomputed in every layer{where}"


def _head_bytes(model: Module) -> tuple[int, int]:
    """Of a head that trains: the fp32 sum of its weight's gradient, half of it in the gradient's place, and that."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return (4 * weight.numel(), weight.nbytes) if weight is not None and weight.requires_grad else (0, 0)


def _unplanned_because(trainer: Trainer, model: Module, wanted: bool | str | None) -> str | None:
    """Why nothing plans by memory which layers a step of this trainer recomputes, or None where something does."""
    if not isinstance(trainer, FastSFT | FlatPreference | FlatLogProbs):
        ours = "FastSFTTrainer's" if isinstance(trainer, SFTTrainer) else "those of a factory's trainer"
        return f"nothing plans {type(trainer).__name__}'s steps by memory; {ours} are planned"
    if wanted != "auto" or not next(model.parameters()).is_cuda:
        return "gradient_checkpointing='auto' on a GPU plans with it"
    return None


def recompute_as_asked(trainer: Trainer, attachment: Attachment) -> str | None:
    """`recompute_layers` as the arguments of a trainer ask, where they say how; returns what is recomputed then.

    Raises what `recompute_asked` and `recompute_layers` raise.
    """
    how, budget_gib = recompute_asked(trainer.args), getattr(trainer.args, "memory_budget_gib", None)
    if how is None and budget_gib is None:
        return None
    return recompute_layers(trainer, attachment, wanted=how, budget_gib=budget_gib)


def lay_rows(trainer: Trainer, attachment: Attachment, wanted: bool | str = "auto") -> str:
    """Lay the rows of a trainer's batches end to end where they can be; returns how they lie.

    Raises:
        ConfigError: `wanted` is True and they cannot.
    """
    why: str | None
    if isinstance(trainer, FlatPreference):
        why = _dispatched(trainer) or (padded_because(trainer, attachment) if trainer.needs_head else None)
        return trainer.lay_rows(why or trainer.padded_because(attachment), wanted, eager=eager_because(trainer))
    if isinstance(trainer, FlatLogProbs):
        why = padded_because(trainer, attachment)
        trainer.rows_end_to_end = why is None
        return "rows: " + ("end to end in log-prob and loss passes" if why is None else f"padded, {why}")
    if not isinstance(trainer, FastSFT):
        why = "this trainer's batches are TRL's"
    elif wanted is False:
        why = "padding_free is false"
    elif type(trainer.data_collator) is not trainer.padded_collator:
        why = f"{type(trainer.data_collator).__name__} makes the batches"
    else:
        why = _dispatched(trainer) or padded_because(trainer, attachment)
    # A batch is copied from pinned memory while the step before it runs; a copy that is waited for leaves the GPU
    # without work for as long as it takes to launch the next forward (4 ms of 112 with graphs of a 1B model).
    trainer.accelerator.dataloader_config.non_blocking = bool(trainer.args.dataloader_pin_memory)
    if why is None:
        trainer.rows_end_to_end = True
        eager = eager_because(trainer)
        trainer.capture = eager is None
        how = "forward and backward replayed as CUDA graphs" if eager is None else f"launched one by one, {eager}"
        return f"rows: end to end, one attention launch; step: {how}"
    if wanted is True:
        raise ConfigError(f"data.padding_free = True: {why}")
    # TRL takes the attention mask away from packed rows, whatever padding_free is.
    packed = getattr(trainer.data_collator, "padding_free", False)
    return f"rows: {'end to end, as TRL lays packed ones and not by ours' if packed else 'padded'}, {why}"


def _dispatched(trainer: Trainer) -> str | None:
    """Why accelerate would cut a flat batch up: it hands out what the first process read, so many of each tensor."""
    wanted = trainer.accelerator.dataloader_config.dispatch_batches
    if wanted is None:
        wanted = isinstance(trainer.train_dataset, IterableDataset)
    return "dispatch_batches hands out rows that one process has read" if wanted else None


def _beside(trainer: Any, *, strict: bool) -> tuple[dict[str, Attachment], str]:
    """Attachments of what a trainer runs beside its policy, and how the critic's rows lie."""
    found, how = {}, ""
    reference = getattr(trainer, "ref_model", None)
    every_step = isinstance(trainer, FlatPreference) and not getattr(trainer, "precompute_ref_logps", False)
    if (isinstance(trainer, FastRollouts) or every_step) and reference is not None:
        found["reference"] = attachment_of(reference)
    if isinstance(trainer, FastPPO):
        critic, how = attach_critic(trainer, strict=strict)
        found["critic"] = critic
    return {name: one for name, one in found.items() if one is not None}, how


def _rollouts(job: Job, built: Built) -> str:
    """Set the engine that the job asks for on an online trainer, and say which it is."""
    trainer: Any = built.trainer
    wanted = job.options.rollout_engine
    if wanted in ("hf", "vllm"):
        return f"{wanted}, as was asked for"
    if wanted == "auto" and trainer.use_vllm:
        return "vllm, as was asked for"
    cache = {"max_len": job.options.max_seq_length, "memory_gib": job.options.rollout_memory_gib}
    why = engine_cannot_because(trainer, max_len=cache["max_len"]) or cache_cannot_because(trainer, **cache)
    if why is not None and (ends := ends_given(job, trainer.args)):
        raise cannot_end(ends[0], why)
    if wanted == "auto" and why is not None:
        if job.options.strict:
            raise ConfigError(f"rollout.rollout_engine = 'auto' with model.strict = True: {why}; rollout_engine='hf' "
                              "generates with transformers, strict=False takes what runs")
        built.notices.append(f"rollouts: hf, {why}")
        return f"hf, {why}"
    trainer.rollouts_on(**cache)
    if wanted == "auto" and (idle := unread(job.options.trainer_options)):
        built.notices.append(f"rollouts: our engine; nothing reads {', '.join(idle)} of trainer_options "
                             "(rollout_engine='hf' does)")
    return f"{described(trainer.model)}, in the model's own memory"


class Witness:
    """Traces one training step of a trainer, once, and keeps what ran.

    It takes the place of `training_step` on the trainer instance until that step is done, and then is gone.
    """

    def __init__(
        self, trainer: Trainer, attachment: Attachment, layout: str, beside: Mapping[str, Attachment] | None = None
    ) -> None:
        self.attachment, self.beside = attachment, dict(beside or {})
        self.layout = layout
        self.result: Attestation | None = None
        self._trainer = trainer
        self._step = trainer.training_step
        trainer.training_step = self._watch  # type: ignore[method-assign]

    def _watch(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer
        last = trainer.state.max_steps <= trainer.state.global_step + 1
        early = trainer.state.global_step < WITNESSED_STEP and not last
        beside = dict(self.beside)
        if early or (isinstance(trainer, FastRollouts) and not trainer.worth_tracing(last=last)):
            return self._step(*args, **kwargs)
        if isinstance(trainer, FastRollouts) and not trainer.begins_rollout():
            beside.pop("reference", None)
        del trainer.training_step
        returned: list[Any] = []
        self.result = attest(
            self.attachment, lambda: returned.append(self._step(*args, **kwargs)), beside=beside)
        for problem in self.result.problems:
            logger.warning("attestation: %s", problem)
        return returned[0]

    def report(self) -> dict[str, Any]:
        """What attestation.json holds: the build-time table, and the traced step once there has been one."""
        found = report_of(self.attachment, self.beside)
        lines = [str(line) for line in found]
        eager = [str(line) for line in found if line.eager]
        step = self.result.to_dict() if self.result is not None else None
        memory = getattr(self._trainer, "memory", None)
        planned = {} if memory is None else {"memory": str(memory)}
        return {"backend": "fast", "modules": lines, "eager": eager, "layout": self.layout, **planned, "step": step}
