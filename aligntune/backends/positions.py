"""Whether a model has positions for the rows that a job trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aligntune.core.resolve import option_table
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.core.resolve import Job


def check_positions(job: Job, model: Any, report: Any) -> None:
    """That no row is longer than a model's positions: learned ones end there; beyond rotary ones it is said.

    Args:
        report: the pre-flight of the rows, or None.

    Raises:
        ConfigError: rows go beyond learned positions; says which length to lower.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    longest, what = _longest(job, report)
    if not isinstance(limit, int) or longest <= limit:
        return
    if _learned(model, limit):
        advice = "max_completion_length or max_seq_length" if job.spec.online else "max_seq_length"
        raise ConfigError(f"{what}, but the model's learned positions end at {limit}: lower {advice}")
    if _unscaled(config):
        job.notices.append(f"{what}: the model's rotary positions end at {limit}, and it was trained on none beyond")


def _longest(job: Job, report: Any) -> tuple[int, str]:
    """The longest row in tokens, by the lengths that were asked for, else by the rows themselves; and what says so."""
    options = job.options
    table, total = option_table(job.spec.name), options.max_seq_length
    # A run's own config.yaml gives every option: a length that is the default was asked for by nobody.
    asked = {name for name in ("max_seq_length", "max_completion_length") if name in vars(options)
             and job.given(name) and getattr(options, name) != table[name].default}
    parts = [part for part in (report, getattr(report, "eval", None)) if part is not None]
    rows = max((length for part in parts for length in part.lengths), default=0)
    if job.spec.online:
        completion = options.max_completion_length if asked else 1
        return min(rows + completion, total), f"prompts of up to {rows} tokens and completions of up to {completion}"
    if "max_seq_length" in asked and not vars(options).get("packing"):  # packed rows keep positions of their own
        return total, f"data.max_seq_length = {total}"
    return min(rows, total), f"rows of up to {min(rows, total)} tokens"


def _learned(model: Any, limit: int) -> bool:
    """Whether there is a table of positions; OPT's has two rows before the first."""
    from torch.nn import Embedding

    tokens = model.get_input_embeddings()
    return any(isinstance(module, Embedding) and module is not tokens and limit <= module.num_embeddings <= limit + 2
               for module in model.modules())


def _unscaled(config: Any) -> bool:
    """Whether positions are rotary, and no scaling is there to stretch them."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [one.get("rope_type", "default") for one in (rope, *rope.values())  # some families have one a kind of layer
             if isinstance(one, dict) and "rope_theta" in one]
    return bool(kinds) and set(kinds) == {"default"}
