"""ORPO, CPO and SimPO over rows end to end: log-probs through the head, where TRL builds all logits.

TRL cuts these trainers at the numbers of a row: its `odds_ratio_loss` and `cpo_loss` run as they are.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import is_peft_model
from trl.trainer.utils import add_fused_lm_head

from aligntune.backends.fast.optim import EmbeddingRate
from aligntune.backends.fast.preference import FlatPreference
from aligntune.backends.fast.preference_rows import LabelledPairsEndToEnd, Scores
from aligntune.backends.trl.offline import CPO, ORPO

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.cpo.cpo_trainer import DPODataCollatorWithPadding


class _ReferenceFree(EmbeddingRate, FlatPreference):
    """Mixin before TRL's experimental trainers of pairs.

    `logits/chosen` and `logits/rejected` are means over the answers' tokens, as in DPO; TRL's are here over every
    position of the padded batch, prompts and padding among them.
    """

    padded_collator = DPODataCollatorWithPadding
    prompts_too = False

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_fused_lm_head(base, outputs=("log_probs", "mean_logits"))

    def flat_collator(self: Any) -> LabelledPairsEndToEnd:
        return LabelledPairsEndToEnd(self.theirs.pad_token_id, self.prompts_too)

    def get_batch_loss_metrics(self: Any, model: Any, batch: dict[str, Any], train_eval: str = "train") -> Any:
        if "places" not in batch:
            return super().get_batch_loss_metrics(model, batch, train_eval)  # type: ignore[misc]
        scores = self._score(model, batch)
        answers = scores.mask & (
            torch.arange(batch["columns"], device=scores.mask.device) >= batch["prompt_scored"][:, None])
        counts = batch["scored"] - batch["prompt_scored"]
        sums = (scores.log_probs * answers).sum(1)
        loss, rewards, log_probs, more = self._loss(batch, scores, sums, counts)
        pairs = self._number(len(rewards[0]))
        logits = ((scores.others["mean_logits"] * answers).sum(1).view(2, -1).sum(1), counts.view(2, -1).sum(1))
        (chosen, rejected), (chosen_log_probs, rejected_log_probs) = rewards, log_probs.detach().view(2, -1)
        one = self._number(1)
        means = self._means({
            "rewards/chosen": (chosen.sum(), pairs), "rewards/rejected": (rejected.sum(), pairs),
            "rewards/accuracies": ((chosen > rejected).sum(), pairs),
            "rewards/margins": ((chosen - rejected).sum(), pairs),
            "logps/rejected": (rejected_log_probs.sum(), pairs), "logps/chosen": (chosen_log_probs.sum(), pairs),
            "logits/rejected": (logits[0][1], logits[1][1]), "logits/chosen": (logits[0][0], logits[1][0]),
            **{name: (value, one) for name, value in more.items()},
        })  # fmt: skip
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{name}": mean for name, mean in means.items()}

    def _loss(self: Any, batch: dict[str, Any], scores: Scores, sums: torch.Tensor, counts: torch.Tensor) -> Any:
        """(loss, (chosen, rejected) rewards, (2 x pairs,) log-probs as they are logged, further metrics)."""
        raise TypeError(f"{type(self).__name__} has no loss over flat rows")

    def _chosen_nll(self: Any, batch: dict[str, Any], scores: Scores) -> torch.Tensor:
        """The mean over the scored tokens of chosen rows."""
        pairs = len(batch["scored"]) // 2
        return -scores.log_probs[:pairs].sum() / batch["scored"][:pairs].sum()


class FastORPO(_ReferenceFree, ORPO):
    """TRL's ORPOTrainer; rows end to end where the model allows it."""

    prompts_too = True

    def _loss(self, batch: dict[str, Any], scores: Scores, sums: torch.Tensor, counts: torch.Tensor) -> Any:
        log_probs = sums / counts
        losses, chosen, rejected, ratio, log_odds = self.odds_ratio_loss(*log_probs.chunk(2))
        nll = self._chosen_nll(batch, scores)
        more = {"nll_loss": nll, "log_odds_ratio": ratio, "log_odds_chosen": log_odds}
        return nll - losses.mean(), (chosen, rejected), log_probs, more


class FastCPO(_ReferenceFree, CPO):
    """TRL's CPOTrainer, for CPO and SimPO; rows end to end where the model allows it."""

    def _loss(self, batch: dict[str, Any], scores: Scores, sums: torch.Tensor, counts: torch.Tensor) -> Any:
        log_probs = sums / counts if self.loss_type in ("ipo", "simpo") else sums
        losses, chosen, rejected = self.cpo_loss(*log_probs.chunk(2))
        nll = self._chosen_nll(batch, scores) if self.cpo_alpha else sums.new_zeros(())
        return losses.mean() + self.cpo_alpha * nll, (chosen, rejected), log_probs, {"nll_loss": nll}
