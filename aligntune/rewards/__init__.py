"""Rewards: functions f(prompts, completions, completion_ids, **columns) that give one number a completion.

By name `exact_match`, `math` and `format`; your own with `register`, as a callable, or as "module:function". Importing
this package imports neither torch nor SymPy.
"""

from aligntune.rewards.guard import guard
from aligntune.rewards.resolve import REWARDS, check_columns, get_reward, register, resolve_rewards

__all__ = ["REWARDS", "check_columns", "get_reward", "guard", "register", "resolve_rewards"]
