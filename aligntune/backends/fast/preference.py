"""DPO and IPO over rows end to end: a policy pass and a reference pass, one forward each, and nothing that waits.

TRL's `_compute_loss` reads its metrics from the GPU ten times a micro-batch, before the backward is launched. Of a flat
batch the loss is made here, from `algorithms.dpo`'s forms, and the metrics stay on the GPU until they are logged. The
numbers are TRL's, option by option; padded batches take TRL's own code.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch.nn import functional
from trl.trainer.dpo_trainer import DataCollatorForPreference

from aligntune.algorithms.dpo import FORMS, Pairs
from aligntune.backends.fast.attachment import attachment_of
from aligntune.backends.fast.graph_shapes import planned_tokens
from aligntune.backends.fast.graphs import ReplayedSteps, drops_out, named_outputs
from aligntune.backends.fast.memory import MemoryPlan
from aligntune.backends.fast.optim import EmbeddingRate
from aligntune.backends.fast.packing import attention_padded_because
from aligntune.backends.fast.preference_rows import PairsEndToEnd, Scores, model_inputs
from aligntune.backends.fast.reference import ReferenceFlags
from aligntune.backends.fast.token_count import TokenCount
from aligntune.backends.trl.trainers import DPO
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.backends.fast.attachment import Attachment

_LISTS = ("_metrics", "_stored_metrics")


class FlatPreference(TokenCount, ReplayedSteps):
    """Mixin before a TRL trainer of preferences: with `rows_end_to_end`, its batches are flat, in evaluation too."""

    rows_end_to_end = False
    needs_head = True
    padded_collator: type | None = None
    _theirs: Any = None
    _flags: ReferenceFlags | None = None
    memory: MemoryPlan | None = None

    @property
    def theirs(self: Any) -> Any:
        """The collator that the trainer was built with."""
        return self._theirs if self.rows_end_to_end else self.data_collator

    def flat_collator(self: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes the flat batches of this trainer."""
        raise TypeError(f"{type(self).__name__} names no collator")

    def padded_because(self: Any, attachment: Attachment) -> str | None:
        """Why this trainer's rows cannot lie end to end, or None where they can."""
        if type(self.theirs) is not self.padded_collator:
            return f"{type(self.theirs).__name__} makes the batches"
        if self.compute_metrics is not None:
            return "compute_metrics reads logits"
        if is_peft_model(self.model) and any(one.is_prompt_learning for one in self.model.peft_config.values()):
            return "its adapter puts tokens before the prompt"
        reference = getattr(self, "ref_model", None)
        if reference is None:
            return None
        beside = attachment_of(reference)
        if beside is None or beside.head is None or beside.head.options is None or not beside.head.options.trl:
            return "the reference's head is not ours"
        why = attention_padded_because(beside)
        return None if why is None else f"the reference: {why}"

    def lay_rows(self: Any, why: str | None, wanted: bool | str = "auto", *, eager: str | None = None) -> str:
        """Lay rows end to end unless there is a reason `why` not to; returns how they lie.

        Args:
            eager: why passes are launched and not replayed as graphs; None where they are replayed.

        Raises:
            ConfigError: `wanted` is True and they cannot.
        """
        if wanted is False:
            why = "padding_free is false"
        elif wanted is True and why is not None:
            raise ConfigError(f"data.padding_free = True: {why}")
        # A copy that is waited for leaves the GPU without work until the next forward is launched.
        self.accelerator.dataloader_config.non_blocking = bool(self.args.dataloader_pin_memory)
        self._theirs = self.theirs
        self.data_collator = self.flat_collator() if why is None else self._theirs
        if why is None:
            # A mask is drawn for every token that is computed: shared ones would drop the same for both rows.
            self.data_collator.share = not drops_out(self.model)
        self.rows_end_to_end = why is None
        self.capture = why is None and eager is None
        if why is not None:
            return f"rows: padded, {why}"
        how = "passes replayed as CUDA graphs" if eager is None else f"launched one by one, {eager}"
        return f"rows: end to end, one forward a pass; step: {how}"

    # Passes

    def _score(self: Any, model: Any, flat: dict[str, Any]) -> Scores:
        """One pass of the policy, with gradients where they are on."""
        found = self._answers(model, flat)
        others = {name: value for name, value in found.items() if name not in ("log_probs", "label_mask")}
        return Scores.of(flat, found["log_probs"], others)

    def _answers(self: Any, model: Any, flat: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the model answers of each token, by name; of `scored` with the gradient."""
        inputs, graphs = model_inputs(flat), self._graphs(model)
        return named_outputs(model(**inputs, **self.asks)) if graphs is None else graphs(inputs)

    def _quiet_score(self: Any, model: Any, flat: dict[str, Any], kind: str | None = None) -> Scores:
        """One pass without gradients, for log-probs alone. `kind`: replayed as a graph of that name where passes are.

        It comes before the pass with gradients: a graph's forward is followed by its own backward.
        """
        inputs = model_inputs(flat)
        graphs = None if kind is None else self._graphs(model)
        with torch.no_grad():
            if graphs is not None:
                return Scores.of(flat, graphs.quiet(inputs, kind), {})
            return Scores.of(flat, model(**inputs, fused_lm_head=True).log_probs, {})

    def _reference_score(self: Any, flat: dict[str, Any], policy: Any) -> Scores:
        """One pass of the reference: of its model, or of the policy's with its adapters off (or a copy of them on)."""
        if self.ref_model is not None:
            return self._quiet_score(self.ref_model, flat)
        # Outside of graphs the bare model, as in TRL: what wraps it (DDP) has nothing to exchange.
        with torch.no_grad(), self._as_reference():
            return self._quiet_score(policy if self.capture else self.model, flat, "reference")

    def _precomputed_score(self: Any, flat: dict[str, Any], model: Any) -> Scores:
        """The same before training, of a model that accelerate has not prepared."""
        with torch.no_grad(), self._as_reference(), self.accelerator.autocast():
            return self._quiet_score(model, flat)

    def _as_reference(self: Any) -> contextlib.AbstractContextManager[None]:
        if self.ref_model is not None:
            return contextlib.nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        if self._flags is None or not self._flags.still_of(model):
            self._flags = ReferenceFlags.of(model)
        return self._flags.set()

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's, within the memory that is planned with."""
        step = super().training_step  # type: ignore[misc]
        if self.memory is None or not self.rows_end_to_end:
            return step(model, inputs, num_items_in_batch)
        flat = model_inputs(inputs)
        with self.memory.step(flat["input_ids"].numel(), number=self.state.global_step,
                              most=planned_tokens(flat, capture=self.capture)):
            return step(model, inputs, num_items_in_batch)

    def _precompute_ref_logps(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's, which runs when the trainer is built (the kernels are needed by then) and in `evaluate(rows)`."""
        from aligntune.backends.fast.build import lay_rows
        from aligntune.backends.fast.scripts import attach_trainer

        if self._theirs is None:  # nobody has decided yet how rows lie
            lay_rows(self, attach_trainer(self))
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]

    # Metrics

    def _means(self: Any, sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Sum / count of each name, over all processes; 0 where nothing was counted."""
        both = torch.stack([value.detach().float() for pair in zip(*sums.values(), strict=True) for value in pair])
        both = both.view(2, -1)
        if self.accelerator.num_processes > 1:
            both = self.accelerator.reduce(both, reduction="sum")
        means = both[0] / torch.where(both[1] == 0, 1, both[1])
        return dict(zip(sums, means.unbind(), strict=True))

    def _note_means(self: Any, sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, mean in self._means(sums).items():
            self._metrics[self._mode][name].append(mean)

    @property
    def _mode(self: Any) -> str:
        return "train" if self.model.training else "eval"

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """The one place that reads metrics from the GPU: all of them at once."""
        lists = [values for name in _LISTS for mode in (getattr(self, name, None) or {}).values()
                 for values in mode.values()]
        waiting = [(values, i) for values in lists for i, value in enumerate(values) if torch.is_tensor(value)]
        if waiting:
            read = torch.stack([values[i].double() for values, i in waiting]).tolist()
            for (values, i), value in zip(waiting, read, strict=True):
                values[i] = value
        super().log(logs, start_time)  # type: ignore[misc]


def divergence_scores(log_ratios: torch.Tensor, kind: str, alpha: float) -> torch.Tensor:
    """f'(t) of t = exp(log_ratios), up to a constant, for log t of reverse KL (f-DPO, arXiv 2309.16240, table 1).

    Args:
        kind: TRL's `f_divergence_type`.
        alpha: its `f_alpha_divergence_coef`.
    """
    if kind == "forward_kl":
        return 1 - torch.exp(-log_ratios)
    if kind == "js_divergence":
        return math.log(2) + functional.logsigmoid(log_ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        largest = 11.0 if log_ratios.dtype == torch.float16 else 80.0  # where exp still fits
        powers = torch.exp(((alpha - 1) * log_ratios).float().clamp(max=largest)) - 1
        return powers.to(log_ratios.dtype) * (1 / (alpha - 1))
    return log_ratios


DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class FastDPO(EmbeddingRate, FlatPreference, DPO):
    """TRL's DPOTrainer, for DPO and IPO; rows end to end where the model allows it."""

    padded_collator = DataCollatorForPreference

    def flat_collator(self) -> PairsEndToEnd:
        padded = self.theirs
        return PairsEndToEnd(padded.pad_token_id, padded.max_length, padded.truncation_mode)

    def padded_because(self, attachment: Attachment) -> str | None:
        unknown = [name for name in self.loss_types if name not in FORMS]
        if unknown:
            return f"loss_type {unknown[0]!r} is TRL's alone"
        if self.f_divergence_type not in DIVERGENCES:
            return f"f_divergence_type {self.f_divergence_type!r} is TRL's alone"
        return super().padded_because(attachment)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if "places" not in inputs:
            return super().compute_ref_log_probs(model, inputs)
        chosen, rejected = self._sums(inputs, self._precomputed_score(inputs, model)).chunk(2)
        return chosen, rejected

    def _sums(self, inputs: dict[str, Any], scores: Scores) -> torch.Tensor:
        """(2 x pairs,) log-probs of answers; with `ld_alpha`, what a pair's longer one has beyond the shorter counts
        that much (LD-DPO, arXiv 2409.06411)."""
        if self.ld_alpha is None:
            return scores.log_probs.sum(1)
        shared = inputs["scored"].view(2, -1).amin(0).repeat(2)
        beyond = torch.arange(inputs["columns"], device=shared.device) >= shared[:, None]
        return (scores.log_probs * ~beyond).sum(1) + self.ld_alpha * (scores.log_probs * beyond).sum(1)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "places" not in inputs:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.precompute_ref_logps:
            references = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            references = self._sums(inputs, self._reference_score(inputs, model))
        scores = self._score(model, inputs)
        log_probs = self._sums(inputs, scores)
        log_ratios = log_probs - references
        pairs = self._pairs(inputs, scores, log_probs, references)
        share = self._wpo_weights(inputs, scores) if self.use_weighting else 1.0
        loss = sum((weight * (FORMS[name](pairs) * share).mean()
                    for name, weight in zip(self.loss_types, self.loss_weights, strict=True)),
                   start=log_probs.new_zeros(()))
        self._note(inputs, scores, log_probs.detach(), log_ratios.detach())
        return (loss, scores) if return_outputs else loss

    def _pairs(
        self, inputs: dict[str, Any], scores: Scores, log_probs: torch.Tensor, references: torch.Tensor
    ) -> Pairs:
        def gap(values: torch.Tensor) -> torch.Tensor:
            chosen, rejected = values.chunk(2)
            return chosen - rejected

        chosen, rejected = divergence_scores(
            log_probs - references, self.f_divergence_type, self.f_alpha_divergence_coef).chunk(2)
        chosen_length, rejected_length = inputs["lengths"].clamp(min=1).chunk(2)
        count = len(chosen)
        nll = -scores.log_probs[:count].sum() / inputs["scored"][:count].sum()
        return Pairs(chosen, rejected, chosen_length, rejected_length, gap(log_probs), gap(references), nll, self.beta,
                     self.label_smoothing, self.args.discopop_tau)

    def _wpo_weights(self, inputs: dict[str, Any], scores: Scores) -> torch.Tensor:
        """(pairs,) equation 2 of WPO (arXiv 2406.11827)."""
        aligned = (scores.log_probs.detach() - scores.others["log_sum_sq_probs"]).sum(1)
        chosen, rejected = (aligned / inputs["scored"].clamp(min=1)).exp().chunk(2)
        return chosen * rejected

    def _note(
        self, inputs: dict[str, Any], scores: Scores, log_probs: torch.Tensor, log_ratios: torch.Tensor
    ) -> None:
        """TRL's metrics, under its names."""
        pairs = self._number(len(log_probs) // 2)
        tokens = inputs["scored"].view(2, -1).sum(1)
        rewards = self.beta * log_ratios.view(2, -1)
        sides = {name: value.sum(1).view(2, -1).sum(1) for name, value in scores.others.items()}
        (chosen, rejected), (chosen_log_probs, rejected_log_probs) = rewards.sum(1), log_probs.view(2, -1).sum(1)
        self._note_tokens(inputs["num_tokens"])
        self._note_means({
            "entropy": (sides["entropy"].sum(), tokens.sum()),
            "logits/chosen": (sides["mean_logits"][0], tokens[0]),
            "logits/rejected": (sides["mean_logits"][1], tokens[1]),
            "mean_token_accuracy": (sides["is_top1"][0], tokens[0]),
            "rewards/chosen": (chosen, pairs), "rewards/rejected": (rejected, pairs),
            "rewards/accuracies": ((rewards[0] > rewards[1]).sum(), pairs),
            "rewards/margins": (chosen - rejected, pairs),
            "logps/chosen": (chosen_log_probs, pairs), "logps/rejected": (rejected_log_probs, pairs),
        })

