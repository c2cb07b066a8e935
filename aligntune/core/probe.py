"""A recipe's probe: held-out prompts answered greedily and scored by a reward, before training and after."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aligntune.core.options import infos, option
from aligntune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from aligntune.core.trainer import AlignTrainer


@dataclass
class Probe:
    """What is asked, and how answers are scored."""

    dataset_name: str = option("", "Prompts with what the reward reads; the same forms as a job's dataset_name.",
                               objects="a datasets.Dataset or a list of dicts")
    dataset_config: str | None = option(None, "Configuration name of a hub dataset.")
    split: str | None = option(None, "Its split; null is train, or the only one.")
    max_samples: int | None = option(200, "The first N prompts; null is all.", ge=1)
    column_mapping: dict[str, Any] | None = option(None, "{column in the file: column that is meant}.")
    system_prompt: str | None = option(None, "System turn put before prompts that have none.")
    reward: str = option("exact_match", "The reward that scores an answer; the mean over the prompts is told.")
    max_new_tokens: int = option(256, "Longest answer in tokens.", ge=1)
    batch_size: int = option(32, "Prompts answered together.", ge=1)

    def __str__(self) -> str:
        split = f"[{self.split}]" if self.split else ""
        source = self.dataset_name if isinstance(self.dataset_name, str) else "rows"
        return f"{self.reward.rpartition(':')[2]} on {source}{split}"

    def request(self) -> Any:
        """What the data layer is asked for."""
        from aligntune.data import DataRequest

        shared = ("dataset_config", "split", "max_samples", "column_mapping", "system_prompt")
        return DataRequest(algorithm="the probe", takes="prompts", dataset=self.dataset_name,
                           max_seq_length=2**31, **{name: getattr(self, name) for name in shared})

    def rows(self, tokenizer: Any) -> Any:
        """The prompts and the columns that the reward reads.

        Raises:
            DataError: they cannot be read, or are not prompts.
        """
        from aligntune.data import prepare

        return prepare(self.request(), tokenizer).train

    def score(self, trainer: AlignTrainer, rows: Any) -> dict[str, float]:
        """Mean score of the greedy answers of the trainer's model, and how many there were.

        With several processes each answers its share; all of them get the mean over all.
        """
        from aligntune.core.rules import world_size

        here = rows.select(range(int(os.environ.get("RANK", 0)), len(rows), world_size()))
        scores = self._scores(trainer, here) if len(here) else []
        if world_size() > 1:
            from accelerate.utils import gather_object

            scores = gather_object(scores)
        return {"score": sum(scores) / len(scores), "prompts": len(scores)}

    def _scores(self, trainer: AlignTrainer, rows: Any) -> list[float]:
        from aligntune.rewards import resolve_rewards

        prompts = list(rows["prompt"])
        texts = trainer.generate(prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        turns = isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if turns else texts
        ids = [trainer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
        (reward,), _ = resolve_rewards([self.reward], None)
        scores = reward(prompts=prompts, completions=completions, completion_ids=ids, **columns)
        return [float(score) for score in scores if score is not None]


def read_probe(written: Any, overrides: Mapping[str, Any], faults: list[str]) -> Probe | None:
    """The probe of a recipe, with its `probe.name` overrides; `probe=null` turns it off.

    What is wrong with it is added to `faults`.
    """
    own = {key.removeprefix("probe."): value for key, value in overrides.items() if key.startswith("probe.")}
    written = overrides.get("probe", written)
    if written is None and not own:
        return None
    if not isinstance(written, Mapping | None):
        faults.append(f"probe = {written!r}: a mapping is wanted, or null for none")
        return None
    known = {row.name: row for row in infos(Probe, "probe")}
    values: dict[str, Any] = {}
    for name, value in {**(written or {}), **own}.items():
        if name not in known:
            close = nearest(str(name), known)
            faults.append(f"probe.{name}: unknown option" + (f"; did you mean 'probe.{close}'?" if close else
                                                             f"; valid: {', '.join(known)}"))
            continue
        rows = name == "dataset_name" and (isinstance(value, list) or hasattr(value, "column_names"))
        values[name], fault = (value, None) if rows else known[name].check(value)
        faults += [fault] if fault else []
    if not values.get("dataset_name"):
        faults.append("probe.dataset_name: none given; held-out prompts are wanted")
    _check_reward(values.get("reward"), faults)
    return Probe(**values)


def _check_reward(name: Any, faults: list[str]) -> None:
    if isinstance(name, str):
        from aligntune.rewards import resolve_rewards

        try:
            resolve_rewards([name], build=False)
        except ConfigError as error:
            faults.append(f"probe.reward: {error}")
