"""What an algorithm declares: its options, its published defaults, the data it trains on, its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Takes = Literal["sft", "preference", "prompts", "unpaired", "reward"]


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
        differs: each difference of the published algorithm from TRL's own defaults, a sentence each.
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


ONLINE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"learning_rate": 1e-6, "batch_size": 8, "num_generations": 8, "max_completion_length": 256, "max_seq_length": 1024,
     "lr_scheduler": "constant_with_warmup", "logging_steps": 1}
)
"""The scale of online methods, the same for each; published constants of a loss stand in its own options."""
