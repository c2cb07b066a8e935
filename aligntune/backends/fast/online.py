"""Log-probs of sampled completions with rows end to end: the padding of a batch of uneven completions is not computed.

TRL pads prompts on the left and completions on the right, and hands the batch to one method that returns the log-prob
of every completion token. Here the tokens that the mask keeps are laid end to end, the head scores those of the
completions, and the numbers are put back where TRL expects them; padding gets 0, as TRL's own head gives it.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch

from aligntune.backends.fast.graphs import drops_out
from aligntune.backends.fast.memory import MemoryPlan, idle_in_pools, scores_held
from aligntune.backends.fast.packing import IGNORED
from aligntune.backends.fast.shared_prompts import KEYS, segments_of, shared_of
from aligntune.backends.fast.steps import QuickSteps

_BUCKET = 64
_FOR_THE_HEAD = ("labels", "shift_labels", "kept")


@dataclass
class Flat:
    """A padded batch, flat. `inputs`: keywords of the model. `places` (T,): where token t's output goes in the padded
    (rows * kept columns) result, and one past its end for outputs that nobody asked for."""

    inputs: dict[str, Any]
    places: torch.Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor, columns: int, *, share: bool = False) -> Flat:
        """Of (rows, L) ids and a mask whose ones are one run in each row; outputs of the last `columns` are wanted.

        Args:
            share: prompts that several rows begin with are computed once, where that spares enough.
        """
        rows = len(input_ids)
        segments = segments_of(input_ids, attention_mask, columns) if share else None
        if segments is not None:
            input_ids, attention_mask = segments.ids, segments.mask
        width = input_ids.shape[1]
        lengths = attention_mask.sum(dim=1)
        completions = attention_mask[:, width - columns :].sum()
        longest, total, completed = torch.stack((lengths.max(), lengths.sum(), completions)).tolist()
        # The order of equal keys stays: first the tokens, row by row.
        index = torch.argsort(attention_mask.flatten(), descending=True, stable=True)[:total]
        row, column = index // width, index % width
        ids = input_ids.flatten()[index]
        cu_seq_lens = torch.zeros(len(input_ids) + 1, dtype=torch.int32, device=ids.device)
        cu_seq_lens[1:] = lengths.cumsum(0)
        position_ids = torch.arange(total, device=ids.device) - cu_seq_lens.long()[row]
        # Token t scores token t + 1, where that is of the same row and of the completion.
        scored = torch.zeros(total, dtype=torch.bool, device=ids.device)
        scored[:-1] = (row[1:] == row[:-1]) & (column[1:] >= width - columns)
        shift_labels = torch.where(scored, ids.roll(-1), IGNORED)
        given = row if segments is None else row - segments.prompts  # no prompt's segment scores a token
        places = torch.where(scored, given * columns + column + 1 - (width - columns), rows * columns)
        inputs = {
            "input_ids": ids[None], "labels": shift_labels.roll(1)[None], "shift_labels": shift_labels[None],
            "position_ids": position_ids[None], "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest, "max_length_k": longest, "use_cache": False,
            # A mask of width 0 is the sign that our attention reads.
            "attention_mask": ids.new_empty((1, 1, 1, 0), dtype=torch.bool),
        }
        if segments is not None:
            inputs |= dict(zip(KEYS, shared_of(segments), strict=True))
            inputs["position_ids"] = (position_ids + segments.before[row])[None]
        size = max(1, -(-completed // _BUCKET)) * _BUCKET
        if size < total:  # the head leaves the prompts out
            inputs["kept"] = torch.nonzero_static(scored, size=size, fill_value=-1).view(-1)
        return cls(inputs, places, rows, columns)

    @property
    def trunk_inputs(self) -> dict[str, Any]:
        """Keywords of a model without a head."""
        return {name: value for name, value in self.inputs.items() if name not in _FOR_THE_HEAD}

    def laid(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, columns) values where the outputs that they belong to are, (1, T); 0 elsewhere."""
        return torch.cat((values.flatten(), values.new_zeros(1)))[self.places][None]

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """(1, T) outputs as (rows, columns); their gradient finds its way back."""
        whole = values.new_zeros(self.rows * self.columns + 1).scatter(0, self.places, values[0])
        return whole[:-1].view(self.rows, self.columns)


@dataclass
class LossPassPlan(MemoryPlan):
    """`MemoryPlan` for the loss passes of an online trainer: what rollouts hold meanwhile is no room for them.

    That is what their graphs' pools hold idle: it is reserved, and yet for nobody else, so it is taken off what is
    free. Their cache is given back when a rollout ends.
    """

    _idle: int = 0

    def _settle(self) -> None:
        super()._settle()
        self._idle = idle_in_pools()

    def reach(self) -> float:
        return super().reach() - (0 if self.budget is not None else self._idle)


class FlatLogProbs(QuickSteps):
    """Mixin before a GRPOTrainer or RLOOTrainer: with `rows_end_to_end`, log-prob and loss passes compute no padding.

    With `memory` the pass of a loss recomputes as many layers as it says; passes without gradients recompute nothing.
    `flats`: how the rows of the last such pass lay, a micro-batch each; empty after a padded one.
    """

    rows_end_to_end = False
    memory: LossPassPlan | None = None
    _unplanned: contextlib.ExitStack | None = None  # of a training step whose loss pass is to come
    flats: tuple[Flat, ...] = ()
    _rule: Any = None  # a `TokenRule` of the loss that this pass is for
    _made: Any = None  # its loss with the gradient, and the log-probs and entropies that hold none

    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int,
        batch_size: int | None = None, compute_entropy: bool = False, **other: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        asked = {name for name, value in other.items() if value is not None and value is not False}
        self.flats = ()
        if not self.rows_end_to_end or asked:  # images, or the router's loss
            self._plan_pass(input_ids.numel(), scores_held(self.model, input_ids.shape[-1]))
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size,
                compute_entropy=compute_entropy, **other)
        log_probs, entropies = [], []
        size = batch_size or len(input_ids)
        self.flats = tuple(
            Flat.of(input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep,
                    share=not self._drops_out) for start in range(0, len(input_ids), size))
        self._plan_pass(sum(flat.inputs["input_ids"].numel() for flat in self.flats))
        ruled = self._rule is not None and compute_entropy
        assert not ruled or len(self.flats) == 1, "a loss that the head makes is of the whole batch"
        for flat in self.flats:
            rule = {"token_rule": self._rule.laid(flat)} if ruled else {}
            with self.accelerator.autocast():
                outputs = model(**flat.inputs, fused_lm_head=True, **rule)
            log_probs.append(flat.padded(outputs.log_probs))
            if compute_entropy:  # a reference model's head has none
                entropies.append(flat.padded(outputs.entropy))
            if rule and not outputs.log_probs.requires_grad:
                # The gradient is in the loss; who computes a loss out of the numbers may differentiate it to these.
                log_probs[-1], entropies[-1] = log_probs[-1].requires_grad_(), entropies[-1].requires_grad_()
                self._made = outputs.loss, [log_probs[-1], entropies[-1]]
                return log_probs[-1], entropies[-1], None
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's; the plan of its loss pass holds until the backward is done."""
        step = super().training_step  # type: ignore[misc]
        if self.memory is None:
            return step(model, inputs, *args, **kwargs)
        with contextlib.ExitStack() as plans:
            self._unplanned = plans
            try:
                return step(model, inputs, *args, **kwargs)
            finally:
                self._unplanned = None

    @functools.cached_property
    def _drops_out(self: Any) -> bool:
        """Whether masks are drawn: a prompt's would be the same for all its rows if they shared it."""
        return drops_out(self.model)

    def _plan_pass(self: Any, tokens: int, length: int = 0) -> None:
        """Before a pass of so many tokens: where it is the one with gradients of a training step, plan its layers."""
        plans = self._unplanned
        if plans is None or not torch.is_grad_enabled():
            return
        self._unplanned = None  # a step has one such pass; one that is run again takes the same plan
        plans.enter_context(self.memory.step(tokens, number=self.state.global_step, length=length))
