"""What an evaluation reports, by algorithm: a mistyped name of a metric is told before anything is loaded.

The names are those of transformers, TRL and our own trainers, without their `eval_`.
"""

from __future__ import annotations

import difflib
from typing import Any

from aligntune.errors import ConfigError, unknown

_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens",
           "aux_loss")
_PAIRS = tuple(f"{what}/{which}" for what in ("rewards", "logps", "logits") for which in ("chosen", "rejected"))
_ODDS = (*_PAIRS, "rewards/accuracies", "rewards/margins", "nll_loss")
_DPO = (*_PAIRS, "rewards/accuracies", "rewards/margins", "entropy", "mean_token_accuracy")
_OFFLINE: dict[str, tuple[str, ...]] = {
    "sft": ("perplexity", "mean_token_accuracy", "entropy"),
    "reward": ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"),
    "dpo": _DPO, "ipo": _DPO, "kto": (*_PAIRS, "rewards/margins", "kl", "entropy"),
    "cpo": _ODDS, "simpo": _ODDS, "orpo": (*_ODDS, "log_odds_ratio", "log_odds_chosen"),
}
_LENGTHS = tuple(f"completions/{which}_{what}" for what in ("length", "terminated_length")
                 for which in ("mean", "min", "max"))
_ONLINE = ("reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", *_LENGTHS, "completions/clipped_ratio")
_PARTS = ("rewards/", "clip_ratio/", "sampling/", "rollout/", "tools/", "vespo/", "objective/", "val/", "policy/",
          "loss/", "dynamic_sampling/")
_FORMS = ("policy_loss", "entropy_coef", "cispo_clip_ratio")


def check_metric_names(job: Any) -> None:
    """The job's `stop_metric`, and `metric_for_best_model` among its `trainer_options`.

    Nothing is said of online runs with rewards of the user's own: these may log metrics under any name.

    Raises:
        ConfigError: one of them is all but one that an evaluation of this algorithm reports; names those that it does.
    """
    best = "metric_for_best_model"
    named = {"evaluation.stop_metric": job.options.stop_metric,
             f"train.trainer_options.{best}": job.options.trainer_options.get(best)}
    known = [*_ALWAYS, *_OFFLINE.get(job.spec.name, _ONLINE)]
    faults = []
    for option, metric in named.items():
        if not isinstance(metric, str):
            continue
        name = metric.removeprefix("eval_")
        if job.spec.online and (name.startswith(_PARTS) or name in _FORMS or not _ours_alone(job)):
            continue
        # One that is like none of them may be a later version's, or a user's own.
        if name not in known and difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            faults.append(unknown(option, name, known))
    if faults:
        raise ConfigError.from_faults(faults)


def _ours_alone(job: Any) -> bool:
    """Whether every reward function is one of the package's."""
    from aligntune.rewards import REWARDS

    entries = [entry.get("name") if isinstance(entry, dict) else entry for entry in job.options.reward_functions or []]
    return all(entry in REWARDS and str(REWARDS.entry(entry).target).startswith("aligntune.") for entry in entries)
