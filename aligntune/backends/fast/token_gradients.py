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

from aligntune.algorithms.policy_gradient import kl_k3, token_losses
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
    """Mixin before `FlatLogProbs` and a trainer whose loss may be a sum over tokens.

    A subclass says which sum, in `_token_rule(inputs)`, and under which settings, in `_covers_loss`. `in_forward`:
    passes whose gradient was made in the forward.
    """

    in_forward = 0
    _token_rule_holds: bool | None = None  # None: not compared yet

    def _covers_loss(self: Any) -> bool:
        """Whether the loss of these settings is the one that `_token_rule` tells: no router's, in any case."""
        return not self.aux_loss_enabled

    def makes_token_gradients(self: Any) -> bool:
        """Whether passes have their gradients made in the forward, where their logits do not fit."""
        weight = self.model.get_output_embeddings().weight
        # The loss scale of fp16 comes with the backward: without it small gradients would be 0.
        return self._covers_loss() and self._token_rule_holds is not False and self.rows_end_to_end and (
            weight.requires_grad and not self.args.fp16)

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


def _completions(trainer: Any, inputs: dict[str, Any], mask: torch.Tensor) -> Any:
    return mask.sum(-1, keepdim=True).clamp(min=1) * len(mask)


def _window(trainer: Any, inputs: dict[str, Any], mask: torch.Tensor) -> Any:
    items = inputs["num_items_in_batch"].clamp(min=1)  # of the whole rollout
    return items / trainer.accelerator.num_processes / trainer.args.steps_per_generation


_DIVISORS: dict[str, Callable[[Any, dict[str, Any], torch.Tensor], Any]] = {
    "grpo": _completions, "sapo": _completions, "dapo": _window, "cispo": _window,
    "bnpo": lambda trainer, inputs, mask: mask.sum().clamp(min=1),
    "dr_grpo": lambda trainer, inputs, mask: len(mask) * trainer.max_completion_length,
}
"""Loss types that are sums over tokens, and what they divide a token's loss by in a step of one micro-batch."""


class GRPOTokenGradients(TokenGradients):
    """For TRL's GRPOTrainer: the loss types of `_DIVISORS` at token-level ratios."""

    def _covers_loss(self: Any) -> bool:
        # The first three read a whole completion or micro-batch before a token's derivative is known.
        others = (self.importance_sampling_level != "token", self.top_entropy_quantile < 1,
                  getattr(self, "off_policy_mask_threshold", None) is not None,
                  getattr(self, "_entropy_bonus_enabled", False))
        return super()._covers_loss() and self.loss_type in _DIVISORS and not any(others)

    def _token_rule(self: Any, inputs: dict[str, Any]) -> TokenRule:
        args, advantages, weight = self.args, inputs["advantages"], self._token_weights(inputs)
        given = {"old": inputs.get("old_per_token_logps"), "reference": inputs.get("ref_per_token_logps"),
                 "sampled": inputs.get("importance_sampling_ratio"),  # of an engine whose log-probs are corrected
                 "advantages": advantages if advantages.dim() == 2 else advantages[:, None], "weight": weight}
        options = {"loss_type": self.loss_type, "epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high,
                   "delta": args.delta, "sapo_temperatures": (args.sapo_temperature_pos, args.sapo_temperature_neg)}
        beta, unbiased = self.beta, args.use_bias_correction_kl

        def loss_of(
            log_probs: torch.Tensor, entropy: None, *, advantages: torch.Tensor, weight: torch.Tensor,
            old: torch.Tensor | None = None, reference: torch.Tensor | None = None,
            sampled: torch.Tensor | None = None,
        ) -> torch.Tensor:
            old = log_probs.detach() if old is None else old
            # The head hands over (T,), which would be advantages of completions.
            loss = token_losses(log_probs[None], old[None], advantages[None], weight[None], **options)[0]
            loss = loss if sampled is None else loss * sampled
            if beta and reference is not None:
                kl = kl_k3(log_probs, reference)
                loss = loss + beta * (kl * (log_probs - old).exp() if unbiased else kl)
            return loss * weight

        return TokenRule(loss_of, {name: value.expand_as(weight) for name, value in given.items() if value is not None})

    def _token_weights(self: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """What the loss type multiplies each token's loss by: (rows, columns)."""
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).float()
        return mask / (_DIVISORS[self.loss_type](self, inputs, mask) * self.current_gradient_accumulation_steps)
