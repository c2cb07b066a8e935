"""Our PPO trainer with fast's engine, and with policy and critic reading rows that lie end to end.

The state before a token of a completion is read where the token's log-prob is: at the token before it. So a value takes
the place of a log-prob in the padded result, and a critic on the policy's trunk costs no forward of its own.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer

from aligntune.algorithms.policy_gradient import clipped_surrogate
from aligntune.backends.fast.attachment import attach
from aligntune.backends.fast.online import FlatLogProbs
from aligntune.backends.fast.optim import EmbeddingRate
from aligntune.backends.fast.packing import attention_padded_because
from aligntune.backends.fast.rollout.trl import ScoredRollouts
from aligntune.backends.fast.steps import QuickSteps
from aligntune.backends.fast.token_gradients import TokenGradients, TokenRule
from aligntune.backends.trl.ppo import PPOTrainer
from aligntune.backends.trl.ppo_critic import OwnCritic, backbone_of, last_hidden_states

if TYPE_CHECKING:
    from aligntune.backends.fast.attachment import Attachment
    from aligntune.backends.fast.rollout.engine import Rollout


class FlatValues:
    """Mixin before a PPOTrainer: with `values_end_to_end`, values are read from the rows that log-probs are read from.

    It takes effect where `rows_end_to_end` does.
    """

    values_end_to_end = False

    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:
        def run() -> Any:
            return super(FlatValues, self)._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

        if self._values is not None or not (self.rows_end_to_end and self.values_end_to_end):
            return run()
        self.critic.train(self.model.training)
        self._values = torch.empty(0)  # PPOTrainer reads none then
        own = isinstance(self.critic, OwnCritic)
        policy = backbone_of(self.accelerator.unwrap_model(model))
        reads: contextlib.AbstractContextManager[list[torch.Tensor]] = (
            contextlib.nullcontext([]) if own else last_hidden_states(policy))
        with self.accelerator.autocast(), reads as seen:
            found = run()
            if own:
                seen = [self.critic.backbone(**flat.trunk_inputs).last_hidden_state for flat in self.flats]
            values = [flat.padded(self.critic.values(hidden)) for flat, hidden in zip(self.flats, seen, strict=True)]
        self._values = torch.cat(values)
        return found


class PPOTokenGradients(TokenGradients):
    """For our PPOTrainer: the policy's loss and the entropy bonus; the critic's has a graph of its own."""

    def _token_rule(self: Any, inputs: dict[str, Any]) -> TokenRule:
        mask = inputs["loss_mask"]
        given = {"advantages": inputs["advantages"], "old": inputs["old_log_probs"],
                 "weight": mask.float() / self._items * self.accelerator.num_processes}
        if "importance_sampling_ratio" in inputs:
            given["sampled"] = inputs["importance_sampling_ratio"].expand_as(mask)
        epsilon, bonus = self.args.cliprange, self.args.entropy_coef

        def loss_of(
            log_probs: torch.Tensor, entropy: torch.Tensor | None, *, advantages: torch.Tensor, old: torch.Tensor,
            weight: torch.Tensor, sampled: torch.Tensor | None = None,
        ) -> torch.Tensor:
            loss = clipped_surrogate((log_probs - old).exp(), advantages, epsilon=epsilon)
            loss = loss if sampled is None else loss * sampled
            return (loss if entropy is None else loss - bonus * entropy) * weight

        return TokenRule(loss_of, given, entropy=bool(bonus))


class FastPPO(EmbeddingRate, ScoredRollouts, PPOTokenGradients, FlatValues, PPOTrainer, FlatLogProbs, QuickSteps,
              GRPOTrainer):
    """Our PPOTrainer; completions come from our engine, log-probs and values from rows end to end."""

    def begins_rollout(self) -> bool:
        """Whether the next micro-step generates."""
        return self._rollout is None or self._position >= self._micro_steps

    def worth_tracing(self, *, last: bool) -> bool:
        """As for every rollout; a step that `target_kl` leaves out runs nothing."""
        return self.begins_rollout() or (last and not self._stopped)

    def _handed(self, rollout: Rollout) -> Any:
        return super()._handed(rollout), None


def attach_critic(trainer: FastPPO, *, strict: bool = False) -> tuple[Attachment | None, str]:
    """Attach the trunk of a critic that has one, let its rows lie as the policy's do; returns how they lie.

    Raises what `attach` raises.
    """
    if not isinstance(trainer.critic, OwnCritic):
        trainer.values_end_to_end = True
        return None, "values: a head on the policy's trunk, read in its passes"
    attachment = attach(trainer.critic.backbone, strict=strict)
    why = "as the policy's" if not trainer.rows_end_to_end else attention_padded_because(attachment)
    trainer.values_end_to_end = why is None
    return attachment, "values: a trunk of their own, rows " + ("end to end" if why is None else f"padded, {why}")
