"""Gradients of token-level losses made in the head's forward, where its weight trains and its logits do not fit.

Log-probs first and the loss after costs such a head four products a token (logits, logits again, dX, dW); where the
derivative of the loss is known token by token, three. Where the logits fit the budget they are kept, and where the
weight is frozen dX is made in the forward anyway: three and two products, with nothing to gain.

The trainer's own code still computes the loss and the metrics, out of the log-probs of that forward; only the gradient
comes from the rule. In the first such pass whose gradient is not 0 the two are compared: a version of TRL whose loss is
another one is caught, and goes on with log-probs first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aligntune.algorithms.policy_gradient import clipped_surrogate, kl_k3
from aligntune.backends.fast.online import Flat

logger = logging.getLogger("aligntune")


@dataclass(frozen=True)
class TokenRule:
    """A loss that is a sum over tokens: `loss_of(log_probs, entropy, **per_token)`, elementwise.

    `per_token`: tensors of the shape of the log-probs, constants of the loss. `entropy`: whether the loss reads it.
    """

    loss_of: Callable[..., torch.Tensor]
    per_token: dict[str, torch.Tensor]
    entropy: bool = False

    def laid(self, flat: Flat) -> TokenRule:
        """For rows that lie end to end: constants (rows, columns) where the head has their tokens, (1, T)."""
        return TokenRule(self.loss_of, {name: flat.laid(value) for name, value in self.per_token.items()}, self.entropy)

    def gradients(self, log_probs: torch.Tensor, entropies: torch.Tensor) -> list[torch.Tensor | None]:
        """Of the sum, to log-probs and entropies."""
        inputs = [log_probs.detach().requires_grad_(), entropies.detach().requires_grad_()]
        loss = self.loss_of(inputs[0], inputs[1] if self.entropy else None, **self.per_token)
        return list(torch.autograd.grad(loss.sum(), inputs, allow_unused=True))


class TokenGradients:
    """Mixin before `FlatLogProbs` and a trainer whose loss is a sum over tokens; a subclass says which: `_token_rule`.

    `in_forward`: passes whose gradient was made in the forward.
    """

    in_forward = 0
    _token_rule_holds: bool | None = None  # None: not compared yet

    def _token_rule(self, inputs: dict[str, Any]) -> TokenRule | None:
        """The loss of these inputs in training, or None where it is not known token by token."""
        return None

    def makes_token_gradients(self: Any) -> bool:
        """Whether passes can have their gradients made in the forward, where their logits do not fit."""
        weight = self.model.get_output_embeddings().weight
        # The loss scale of fp16 comes with the backward: without it small gradients would be 0.
        return self._token_rule_holds is not False and self.rows_end_to_end and weight.requires_grad and (
            not self.args.fp16)

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        wanted = self.model.training and torch.is_grad_enabled() and self.makes_token_gradients()
        self._rule, self._made = self._token_rule(inputs) if wanted else None, None
        rule = self._rule
        try:
            loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._rule = None
        if rule is None or self._made is None:
            return loss
        (made, leaves), self._made = self._made, None
        if self._token_rule_holds is None:
            self._token_rule_holds = _equal(loss, leaves, rule)
            if self._token_rule_holds is False:
                logger.warning("this trainer's loss is not the one that is known here token by token: its gradients "
                               "are made after the forward")
                return super()._compute_loss(model, inputs)  # type: ignore[misc]
        self.in_forward += 1
        return loss + (made - made.detach())


def _equal(loss: torch.Tensor, leaves: list[torch.Tensor], rule: TokenRule) -> bool | None:
    """Whether the gradients of the loss that was computed are the rule's, to rounding.

    None where they tell nothing: all are 0, as where every reward is the same, or one is not finite.
    """
    theirs = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    zero, told = torch.zeros_like(leaves[0]), False
    for found, expected in zip(theirs, rule.gradients(*leaves), strict=True):
        found, expected = (zero if each is None else each for each in (found, expected))
        apart, size = float((found - expected).abs().max()), float(expected.abs().max())
        if not math.isfinite(apart):
            return None
        if apart > 1e-4 * size:
            return False
        told = told or size > 0
    return True if told else None


class GRPOTokenGradients(TokenGradients):
    """For TRL's GRPOTrainer: the loss types grpo, bnpo, dr_grpo and dapo at token-level ratios."""

    def _token_rule(self: Any, inputs: dict[str, Any]) -> TokenRule | None:
        args = self.args
        others = (
            self.importance_sampling_level != "token", self.top_entropy_quantile < 1, self.use_vllm,
            getattr(self, "off_policy_mask_threshold", None) is not None, "tool_mask" in inputs,
            getattr(self, "_entropy_bonus_enabled", False), self.aux_loss_enabled,
        )
        weight = self._token_weights(inputs)
        if any(others) or weight is None:
            return None
        advantages = inputs["advantages"]
        given = {"old": inputs.get("old_per_token_logps"), "reference": inputs.get("ref_per_token_logps"),
                 "advantages": (advantages if advantages.dim() == 2 else advantages[:, None]).expand_as(weight),
                 "weight": weight}
        low, high, delta, beta = self.epsilon_low, self.epsilon_high, args.delta, self.beta
        unbiased = args.use_bias_correction_kl

        def loss_of(
            log_probs: torch.Tensor, entropy: None, *, advantages: torch.Tensor, weight: torch.Tensor,
            old: torch.Tensor | None = None, reference: torch.Tensor | None = None,
        ) -> torch.Tensor:
            ratio = (log_probs - (log_probs.detach() if old is None else old)).exp()
            loss = clipped_surrogate(ratio, advantages, epsilon=low, epsilon_high=high, delta=delta)
            if beta and reference is not None:
                kl = kl_k3(log_probs, reference)
                loss = loss + beta * (kl * ratio if unbiased else kl)
            return loss * weight

        return TokenRule(loss_of, {name: value for name, value in given.items() if value is not None})

    def _token_weights(self: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """What the loss type multiplies each token's loss by: (rows, columns)."""
        mask, parts = inputs["completion_mask"].float(), self.current_gradient_accumulation_steps
        if self.loss_type == "grpo":
            return mask / mask.sum(-1, keepdim=True).clamp(min=1) / (len(mask) * parts)
        if self.loss_type == "bnpo":
            return mask / (mask.sum().clamp(min=1) * parts)
        if self.loss_type == "dr_grpo":
            return mask / (len(mask) * self.max_completion_length * parts)
        if self.loss_type == "dapo":
            items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            return mask / (items * parts / self.args.steps_per_generation)
        return None
