"""KTO over rows end to end: three forwards a micro-batch in the place of TRL's four, and nothing that waits.

The policy scores the rows with gradients and the mismatched completions without; the reference scores both in one pass.
The loss is a row's own, so good and bad rows need not be sorted apart, for which TRL waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from aligntune.backends.fast.attachment import Attachment
from aligntune.backends.fast.optim import EmbeddingRate
from aligntune.backends.fast.preference import FlatPreference
from aligntune.backends.fast.preference_rows import Scores, UnpairedEndToEnd
from aligntune.backends.trl.offline import KTO

SIDES = ("chosen", "rejected")


class FastKTO(EmbeddingRate, FlatPreference, KTO):
    """TRL's KTOTrainer; rows end to end where the model allows it."""

    padded_collator = DataCollatorForUnpairedPreference

    def flat_collator(self) -> UnpairedEndToEnd:
        return UnpairedEndToEnd(self.theirs.pad_token_id, self.theirs.max_length)

    def padded_because(self, attachment: Attachment) -> str | None:
        if self.loss_type not in ("kto", "apo_zero_unpaired"):
            return f"loss_type {self.loss_type!r} is TRL's alone"
        return super().padded_because(attachment)

    def compute_ref_log_probs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if "places" not in inputs:
            return super().compute_ref_log_probs(model, inputs)
        return self._of_both(inputs, self._precomputed_score(inputs.get("both", inputs), model))

    def _of_both(self, inputs: dict[str, Any], scores: Scores) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the completions, and of the mismatched ones where the pass had those."""
        log_probs = scores.log_probs.sum(1)
        rows = len(inputs["label"])
        return log_probs[:rows], log_probs[rows:] if self.calculate_KL else None

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "places" not in inputs:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.precompute_ref_logps:
            references, mismatched = inputs["ref_logps"], inputs.get("ref_KL_logps")
        else:
            references, mismatched = self._of_both(inputs, self._reference_score(inputs.get("both", inputs), model))
        kl = torch.zeros((), device=references.device)
        if self.calculate_KL:
            assert mismatched is not None
            kl = (self._quiet_score(model, inputs["KL"], "policy").log_probs.sum(1) - mismatched).mean()
            kl = self.accelerator.gather_for_metrics(kl).mean().clamp(min=0)
        scores = self._score(model, inputs)
        log_probs = scores.log_probs.sum(1)
        log_ratios = log_probs - references
        good = inputs["label"]
        if self.loss_type == "kto":  # equation 7
            value = torch.where(good, log_ratios - kl, kl - log_ratios)
            losses = 1 - torch.sigmoid(self.beta * value)
        else:  # APO-zero, unpaired (arXiv 2408.06266, equation 7)
            kept = torch.sigmoid(self.beta * log_ratios)
            losses = torch.where(good, 1 - kept, kept)
        loss = (torch.where(good, self.desirable_weight, self.undesirable_weight) * losses).nanmean()
        self._note(inputs, scores, log_probs.detach(), log_ratios.detach(), kl)
        return (loss, scores) if return_outputs else loss

    def _note(
        self, inputs: dict[str, Any], scores: Scores, log_probs: torch.Tensor, log_ratios: torch.Tensor,
        kl: torch.Tensor,
    ) -> None:
        """TRL's metrics, under its names: none of a side that the batch lacks."""
        metrics = self._metrics[self._mode]
        metrics["kl"].append(kl)
        self._note_tokens(inputs["num_tokens"])
        tallies = inputs["tallies"]
        if self.accelerator.num_processes > 1:  # a wait, for TRL's sake: a mean over nothing is not logged
            mine = torch.tensor(tallies, device=log_probs.device)
            tallies = self.accelerator.reduce(mine, reduction="sum").tolist()
        rows, tokens = dict(zip(SIDES, tallies[:2], strict=True)), dict(zip(SIDES, tallies[2:], strict=True))
        entropy, mean_logits = (scores.others[name].sum(1) for name in ("entropy", "mean_logits"))
        scored = inputs["scored"]
        sums = {"entropy": (entropy.sum(), scored.sum())}
        for side, own in zip(SIDES, (inputs["label"], ~inputs["label"]), strict=True):
            if tokens[side]:
                sums[f"logits/{side}"] = ((mean_logits * own).sum(), (scored * own).sum())
            if rows[side]:
                of_rows = torch.where(own, torch.stack([self.beta * log_ratios, log_probs]), 0).nansum(1)
                sums[f"rewards/{side}"], sums[f"logps/{side}"] = ((one, own.sum()) for one in of_rows)
        means = self._means(sums)
        if all(rows.values()):
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        for name, mean in means.items():
            metrics[name].append(mean)
