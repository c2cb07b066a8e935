"""Reward models over rows end to end: one forward, of whose scores each row's last one is taken.

TRL's trainer pads, and transformers scores every position before it keeps one a row. The product with one column costs
as much at every position as at few: the gradient of the hidden states is as long either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl.trainer.reward_trainer import DataCollatorForPreference

from aligntune.backends.fast.attachment import attachment_of
from aligntune.backends.fast.lora import instance_forward
from aligntune.backends.fast.optim import EmbeddingRate
from aligntune.backends.fast.packing import attention_padded_because, noise_padded_because
from aligntune.backends.fast.preference import FlatPreference
from aligntune.backends.fast.preference_rows import ScoredPairsEndToEnd
from aligntune.backends.trl.offline import Reward

if TYPE_CHECKING:
    from aligntune.backends.fast.attachment import Attachment


@functools.cache
def _scoring_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    plain_forward = cls.forward

    @functools.wraps(plain_forward)  # the Trainer reads the signature
    def forward(self: nn.Module, *args: Any, score_tokens: bool = False, **kwargs: Any) -> Any:
        if not score_tokens:
            return plain_forward(self, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        device = hidden.device.type
        # A cast of the head's weight that autocast keeps would be an older step's where graphs replay what reads it.
        with torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False):
            return SequenceClassifierOutputWithPast(logits=self.score(hidden).squeeze(-1))

    return forward


def score_every_token(attachment: Attachment) -> str | None:
    """Let `model(..., score_tokens=True)` answer `logits` (1, T) of a flat batch; returns why it cannot, or None.

    Sets `forward` on the instance, through which wrappers (PEFT, DDP) see the call, until `detach`; without
    `score_tokens` the model answers as ever.
    """
    model = attachment.model
    cls: Any = type(model)
    if not isinstance(model, GenericForSequenceClassification) or \
            cls.forward is not GenericForSequenceClassification.forward:
        return f"{cls.__name__} has a score head of its own kind"
    found = instance_forward(model)
    if found is not None and getattr(found, "__func__", None) is not _scoring_forward(cls):
        return "another forward was set on the model"
    if found is None:
        bound = MethodType(_scoring_forward(cls), model)  # type: ignore[arg-type]
        model.__dict__["forward"] = bound
        attachment.decisions.append(("score", "scores of every token", None))
        attachment.undo.append(functools.partial(_take_off, model, bound))  # a copy's undo holds the copy
        if score_every_token not in attachment.also:
            attachment.also.append(score_every_token)
    return None


def _take_off(model: nn.Module, bound: Any) -> None:
    # Under accelerate's mixed precision ours stays, below it, and only passes calls on.
    if model.__dict__.get("forward") is bound:
        del model.__dict__["forward"]


class FastReward(EmbeddingRate, FlatPreference, Reward):
    """TRL's RewardTrainer; rows end to end where the model allows it."""

    padded_collator = DataCollatorForPreference
    needs_head = False
    asks: Mapping[str, Any] = {"score_tokens": True}
    scored = "logits"

    def flat_collator(self) -> ScoredPairsEndToEnd:
        attachment = attachment_of(self.model)
        assert attachment is not None
        # The id that transformers looks for, whatever the collator pads with.
        return ScoredPairsEndToEnd(attachment.model.config.get_text_config().pad_token_id)

    def padded_because(self, attachment: Attachment) -> str | None:
        if type(self.theirs) is not self.padded_collator:
            return f"{type(self.theirs).__name__} makes the batches"
        if attachment.model.config.get_text_config().pad_token_id is None:
            return "the model has no padding token, by which it finds a row's last"
        return (noise_padded_because(self) or attention_padded_because(attachment)
                or score_every_token(attachment))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "last_tokens" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores = self._answers(model, inputs)["logits"][0, inputs.get("once", inputs)["last_tokens"]]
        chosen, rejected = scores.chunk(2)
        margins = chosen - rejected
        loss = -functional.logsigmoid(margins - inputs["margin"] if "margin" in inputs else margins).mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * ((chosen + rejected) ** 2).mean()
        self._note(inputs, scores.detach(), margins.detach())
        return (loss, SequenceClassifierOutputWithPast(logits=scores[:, None])) if return_outputs else loss

    def _note(self, inputs: dict[str, Any], scores: torch.Tensor, margins: torch.Tensor) -> None:
        """TRL's metrics, under its names."""
        metrics = self._metrics[self._mode]
        self._note_tokens(inputs["num_tokens"])
        every = self.accelerator.gather(scores)
        count = self._number(len(margins))
        means = self._means({"accuracy": ((margins > 0).sum(), count), "margin": (margins.sum(), count)})
        means |= {"min_reward": every.min(), "mean_reward": every.mean(), "max_reward": every.max()}
        for name, mean in means.items():
            metrics[name].append(mean)
