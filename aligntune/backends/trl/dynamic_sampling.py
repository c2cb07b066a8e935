"""DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, equation 11) over TRL's GRPOTrainer.

A prompt whose completions all earn the same reward teaches nothing: its advantages are 0. Here such groups are
replaced by groups of fresh prompts until the generation batch is full, or a bound is reached.

The seam is three methods. `_generate_and_score_completions` first draws groups, round after round, through TRL's own
`_generate` and `_calculate_rewards`; then TRL's version runs once on the groups that were kept, and while it does the
two answer with what was drawn. Log-probs of old policy and reference are thus computed for kept groups alone.

Fresh prompts are a function of the seed and of the number of the micro-step, so a resumed run draws the same ones. In
a run of several processes each sees every group (rewards and rows are gathered), so all decide alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from aligntune.errors import ConfigError

logger = logging.getLogger("aligntune")

SPREAD = 1e-6
"""Rewards of a group that lie closer together than this count as equal."""

# Places in the tuple that TRL's `_generate` returns.
_COMPLETION_IDS, _COMPLETIONS = 1, 3


@dataclass
class _Group:
    """The completions of one prompt: (dataset row, a completion's parts of `_generate`, logged columns) each."""

    rows: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]]
    rewards: torch.Tensor  # (G, reward functions)
    spread: bool

    @property
    def completion_ids(self) -> list[list[int]]:
        return [parts[_COMPLETION_IDS] for _, parts, _ in self.rows]


@dataclass
class _Rollouts:
    """What TRL's method is given: this process's rows, and the rewards of all processes."""

    inputs: list[dict[str, Any]]
    generated: tuple[Any, ...]
    rewards: torch.Tensor


@dataclass
class _Drawn:
    """The groups drawn for one generation batch, of all processes, in order; the first `wanted` are the sampler's."""

    wanted: int
    rounds: int = 0
    groups: list[_Group] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return sum(group.spread for group in self.groups)

    @property
    def missing(self) -> int:
        return max(0, self.wanted - self.kept)

    def next_round(self, unit: int) -> int:
        """How many prompts to draw: as many as fill the batch at the rate so far; a multiple of `unit`."""
        needed = math.ceil(self.missing * len(self.groups) / self.kept) if self.kept else self.wanted
        return min(self.wanted, math.ceil(needed / unit) * unit)

    def batch(self) -> list[_Group]:
        """The sampler's groups, each flat one replaced while there is one with a spread."""
        fresh = (group for group in self.groups[self.wanted :] if group.spread)
        return [group if group.spread else next(fresh, group) for group in self.groups[: self.wanted]]


class DynamicSampling:
    """Mixin before a GRPOTrainer; training batches hold groups whose rewards differ.

    Metrics, of each generation batch: `dynamic_sampling/rounds` of fresh prompts; `/bound_reached`;
    `/drawn_completions`, `/discarded_completions` and `/discarded_tokens`, the price; `/flat_groups`, the share of
    groups drawn that had no spread; `/reward_drawn`, the mean reward of all that was drawn: the model's, where
    `reward` is that of the batch, which leaves out what is always solved or never. `completions/...` are of all drawn.
    """

    dynamic_sampling = False
    max_resample_rounds = 10
    _rollouts: _Rollouts | None = None
    _bound_said = False

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.dynamic_sampling and self.model.training):
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self._rollouts = self._draw_batch(inputs)
        try:
            return super()._generate_and_score_completions(self._rollouts.inputs)  # type: ignore[misc]
        finally:
            self._rollouts = None

    def _generate(self: Any, prompts: list[Any]) -> tuple[Any, ...]:
        if self._rollouts is not None:
            return self._rollouts.generated
        return super()._generate(prompts)  # type: ignore[misc]

    def _calculate_rewards(self: Any, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> torch.Tensor:
        if self._rollouts is not None:
            return self._rollouts.rewards
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids)  # type: ignore[misc]

    def _draw_batch(self: Any, inputs: list[dict[str, Any]]) -> _Rollouts:
        self._check_rows(inputs)
        processes, size = self.accelerator.num_processes, self.num_generations
        unit = processes // math.gcd(size, processes)  # prompts whose completions divide among the processes
        drawn = _Drawn(wanted=len(inputs) * processes // size)
        marks = {key: len(values) for key, values in self._metrics["train"].items()}
        fresh: Iterator[dict[str, Any]] | None = None
        local = inputs
        while True:
            drawn.groups += self._draw_groups(local)
            if not drawn.missing or drawn.rounds == self.max_resample_rounds:
                break
            if fresh is None:
                fresh = self._fresh_rows({_key(group.rows[0][0]) for group in drawn.groups})
            drawn.rounds += 1
            rows = [dict(row) for row in _take(fresh, drawn.next_round(unit)) for _ in range(size)]
            share = len(rows) // processes
            local = rows[self.accelerator.process_index * share :][:share]
        self._log_drawn(drawn, marks)
        return self._share(drawn.batch(), len(inputs))

    def _check_rows(self: Any, inputs: list[dict[str, Any]]) -> None:
        dataset = self.train_dataset
        faults = {
            "a streamed dataset, whose rows cannot be looked up": not hasattr(dataset, "__getitem__"),
            "images": bool({"image", "images"} & inputs[0].keys()),
            "tools, environments or a rollout_func": bool(
                self.tools or self.environment_factories or self.rollout_func),
        }
        for what, there in faults.items():
            if there:
                raise ConfigError(f"loss.dynamic_sampling does not work with {what}; dynamic_sampling=False does")

    def _draw_groups(self: Any, local: list[dict[str, Any]]) -> list[_Group]:
        """Generate and grade completions of this process's rows; the groups of all processes, in order."""
        prompts = [row["prompt"] for row in local]
        generated = self._generate(prompts)
        rewards = self._calculate_rewards(local, prompts, generated[_COMPLETIONS], generated[_COMPLETION_IDS])
        logged = {name: values for name, values in self._pending_extra_logs.items() if len(values) == len(local)}
        self._pending_extra_logs.clear()
        rows = gather_object([
            (row, tuple(part[i] if _per_row(part, len(local)) else part for part in generated),
             {name: values[i] for name, values in logged.items()})
            for i, row in enumerate(local)
        ])
        size = self.num_generations
        # The soft overlong punishment spreads any group whose lengths differ: it is no part of what is asked here.
        tasks = [i for i, function in enumerate(self.reward_funcs) if not getattr(function, "shaping", False)]
        graded = _total(rewards[:, tasks], self.reward_weights[tasks]).view(-1, size)
        low, high = graded.nan_to_num(nan=math.inf).amin(1), graded.nan_to_num(nan=-math.inf).amax(1)
        spread = (high - low > SPREAD).tolist()
        return [_Group(rows[i * size :][:size], rewards[i * size :][:size], spread[i]) for i in range(len(spread))]

    def _fresh_rows(self: Any, seen: set[str]) -> Iterator[dict[str, Any]]:
        """Rows of the dataset in a shuffled order, first those whose prompt is not in `seen`, then all, for ever."""
        shuffle = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self._step)
        while True:
            for index in torch.randperm(len(self.train_dataset), generator=shuffle).tolist():
                row = self.train_dataset[index]
                if _key(row) not in seen:
                    yield row
            seen = set()

    def _share(self: Any, groups: list[_Group], count: int) -> _Rollouts:
        """This process's part of the batch, in the form in which TRL's own methods return it."""
        mine = [row for group in groups for row in group.rows][self.accelerator.process_index * count :][:count]
        for _, _, logged in mine:
            for name, value in logged.items():
                self._pending_extra_logs[name].append(value)
        parts = zip(*(parts for _, parts, _ in mine), strict=True)
        whole = [self._whole(list(values)) for values in parts]
        return _Rollouts([row for row, _, _ in mine], tuple(whole), torch.cat([group.rewards for group in groups]))

    @staticmethod
    def _whole(values: list[Any]) -> Any:
        # No log-probs (None), no extra fields ({}), no tool images ([]): what is no row's own is one for all.
        return values[0] if all(value is None or value in ({}, []) for value in values) else values

    def _log_drawn(self: Any, drawn: _Drawn, marks: dict[str, int]) -> None:
        metrics = self._metrics["train"]
        for key in [key for key in metrics if key.startswith("completions/")]:
            del metrics[key][marks.get(key, 0):]  # one entry a round; the ones below are of all rounds
        trained = sum(len(row) for group in drawn.batch() for row in group.completion_ids)
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        ids = [row for group in drawn.groups for row in group.completion_ids]
        lengths = [len(row) for row in ids]
        ended = [len(row) for row in ids if row[-1] in ends] or [0]
        rewards = _total(torch.cat([group.rewards for group in drawn.groups]), self.reward_weights)
        values = {
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/min_length": min(lengths), "completions/max_length": max(lengths),
            "completions/clipped_ratio": sum(row[-1] not in ends for row in ids) / len(ids),
            "completions/mean_terminated_length": sum(ended) / len(ended),
            "completions/min_terminated_length": min(ended), "completions/max_terminated_length": max(ended),
            "dynamic_sampling/rounds": drawn.rounds,
            "dynamic_sampling/bound_reached": drawn.missing > 0,
            "dynamic_sampling/drawn_completions": len(ids),
            "dynamic_sampling/discarded_completions": len(ids) - drawn.wanted * self.num_generations,
            "dynamic_sampling/discarded_tokens": sum(lengths) - trained,
            "dynamic_sampling/flat_groups": 1 - drawn.kept / len(drawn.groups),
            "dynamic_sampling/reward_drawn": torch.nanmean(rewards).item(),
        }
        for name, value in values.items():
            metrics[name].append(float(value))
        if drawn.missing and not self._bound_said:
            self._bound_said = True
            logger.warning(
                "dynamic sampling: after max_resample_rounds=%d rounds of fresh prompts %d of %d groups still earn "
                "equal rewards; they stay in the batch, with advantage 0 (dynamic_sampling/bound_reached counts)",
                self.max_resample_rounds, drawn.missing, drawn.wanted)


def _per_row(part: Any, count: int) -> bool:
    return isinstance(part, list) and len(part) == count


def _key(row: dict[str, Any]) -> str:
    return repr(row["prompt"])


def _take(rows: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [next(rows) for _ in range(count)]


def _total(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each completion's rewards, NaN where none applies: (completions,)."""
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return total.masked_fill(torch.isnan(rewards).all(dim=1), math.nan)
