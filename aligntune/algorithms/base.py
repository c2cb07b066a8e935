"""What an algorithm declares: its options, its published defaults, the data it trains on, its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Takes = Literal["sft", "preference", "prompts", "unpaired", "reward"]

EVERY_DIFFERS = (
    "num_epochs 1 (TRL's default is 3)",
    "optimizer 'adamw', which is optim 'adamw_torch' (TRL's default is 'adamw_torch_fused': here 'adamw_fused')",
    "gradient_checkpointing 'auto': False on a CPU; on a GPU on, with backend fast in as many layers as memory asks "
    "(TRL's default is True everywhere)",
    "precision follows the device: bf16 False on a CPU, which trains in fp32 (TRL's default is True everywhere)",
)
"""What differs from TRL's own defaults in each algorithm; told once here."""

ONLINE_DIFFERS = (
    "lr_scheduler 'constant_with_warmup' (TRL's default is 'linear')",
    "max_completion_length 256 (TRL's default is 512)",
)
"""The same of each online algorithm."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmSpec:
    """One algorithm, as data.

    Args:
        name: the registered name.
        title: the name in words.
        paper: where it was published.
        options: dataclass of its own options (the YAML section `loss`); defaults are the published constants.
        defaults: its defaults for common options, by flat name; they yield to config and arguments.
        takes: the dataset shape it trains on.
        online: it generates completions while it trains.
        needs_reward: it wants reward functions or a reward model.
        reference: it may compare with a frozen reference model.
        groups: an online method that compares the completions of one prompt, so that it wants two or more.
        without: common options that it does not take.
        differs: each difference of the published algorithm from TRL's own defaults, a sentence each; what differs in
            every algorithm stands in `EVERY_DIFFERS` and `ONLINE_DIFFERS`.
    """

    name: str
    title: str
    paper: str
    options: type
    takes: Takes
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    online: bool = False
    needs_reward: bool = False
    reference: bool = False
    groups: bool = True
    without: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    @property
    def differences(self) -> tuple[str, ...]:
        """`differs`, then what differs from TRL's own defaults in every algorithm of its kind."""
        return self.differs + EVERY_DIFFERS + (ONLINE_DIFFERS if self.online else ())


ONLINE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"learning_rate": 1e-6, "batch_size": 8, "num_generations": 8, "max_completion_length": 256, "max_seq_length": 1024,
     "lr_scheduler": "constant_with_warmup", "logging_steps": 1}
)
"""The scale of online methods, the same for each; published constants of a loss stand in its own options."""
