"""The critic of PPO: a value head on the policy's trunk, or a model of its own.

Both give the value of the state before each token of a completion: the hidden state at the token before it, through a
linear head in fp32. A fresh head is zero, so that training starts from values of 0 and not from noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def backbone_of(model: Any) -> nn.Module:
    """The trunk of a model, adapters or not: what turns ids into hidden states."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return base.base_model


def value_head(hidden_size: int, device: torch.device | str, *, bias: bool = True) -> nn.Linear:
    """A linear map to one number, fp32, all zero."""
    head = nn.Linear(hidden_size, 1, bias=bias, device=device, dtype=torch.float32)
    for value in head.parameters():
        nn.init.zeros_(value)
    return head


class Critic(nn.Module):
    """Reads values while `run` computes log-probs.

    Args:
        head: maps hidden states to values.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def read(
        self, run: Callable[[], Any], policy: Any, input_ids: Tensor, attention_mask: Tensor, length: int,
        batch_size: int,
    ) -> tuple[Any, Tensor]:
        """What `run()` returns, and values (batch, length) of the last `length` tokens.

        Args:
            run: computes the log-probs of these very ids with `policy`, in chunks of `batch_size` rows.
            policy: the model without what distributed training wraps around it.
            input_ids, attention_mask: (batch, seq).
        """
        with last_hidden_states(backbone_of(policy)) as seen:
            result = run()
        return result, torch.cat([self._values(hidden, length) for hidden in seen])

    def _values(self, hidden: Tensor, length: int) -> Tensor:
        return self.values(hidden[:, -length - 1:-1])

    def values(self, hidden: Tensor) -> Tensor:
        """Values (batch, seq) of hidden states (batch, seq, hidden), in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name to parameter of all that learns: what a checkpoint holds."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


class OwnCritic(Critic):
    """A critic with a trunk of its own.

    Args:
        model: a causal language model, or a sequence-classification model whose single `score` becomes the head.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        score = getattr(base, "score", None)
        size, device = base.config.get_text_config().hidden_size, next(base.parameters()).device
        if isinstance(score, nn.Linear) and score.out_features == 1:
            head = value_head(size, device, bias=score.bias is not None)
            head.load_state_dict(score.state_dict())
        else:
            head = value_head(size, device)
        super().__init__(head)
        self.backbone = backbone_of(model)

    def read(
        self, run: Callable[[], Any], policy: Any, input_ids: Tensor, attention_mask: Tensor, length: int,
        batch_size: int,
    ) -> tuple[Any, Tensor]:
        """As `Critic.read`; the values come from a forward of its own, without the policy."""
        result = run()
        parts = []
        for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True):
            hidden = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            parts.append(self._values(hidden, length))
        return result, torch.cat(parts)


@contextlib.contextmanager
def last_hidden_states(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last hidden state of every forward of `backbone` in the block."""
    seen: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()
