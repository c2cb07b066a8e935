"""Progress for people: a bar on a terminal, one plain line a log anywhere else; on the main process only."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch
from transformers import TrainerCallback

from aligntune.core.callbacks import END_OF_RUN, MetricsLog, say

SHOWN = (
    ("loss", "loss"), ("reward", "reward"), ("kl", "kl"), ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"), ("eval_loss", "eval loss"), ("eval_perplexity", "perplexity"),
    ("eval_mean_token_accuracy", "token accuracy"), ("eval_reward", "eval reward"), ("eval_kl", "eval kl"),
    ("eval_rewards/accuracies", "eval accuracy"), ("eval_rewards/margins", "eval margin"),
)
"""Logged keys that a line shows, where they are there, and the words for them."""


def duration(seconds: float) -> str:
    """h:mm:ss"""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def memory_now() -> float:
    """Memory in use, in GiB: what torch has reserved on the GPU, or the resident set of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_reserved() / 2**30
    return _process(os.getpid()).memory_info().rss / 2**30


@functools.lru_cache(maxsize=1)
def _process(pid: int) -> Any:
    """Kept: to make one reads when the process began, which takes longer than all else that a log does."""
    import psutil

    return psutil.Process(pid)


def describe(logs: dict[str, Any]) -> str:
    """The numbers of `SHOWN` that are in `logs`."""
    return "  ".join(
        f"{words} {logs[key]:.4g}" for key, words in SHOWN if isinstance(logs.get(key), (int, float))
    )


def speed(logs: dict[str, Any]) -> str:
    """Tokens per second: generated ones where the method generates, else all that were trained on."""
    for key, words in (("generated_tokens_per_second", "generated tok/s"), ("tokens_per_second", "tok/s")):
        if key in logs:
            return f"{logs[key]:,.0f} {words}"
    return ""


class Progress(TrainerCallback):
    """Stands in for transformers' progress and printer callbacks on one trainer.

    Args:
        metrics: the log whose clock tells how long a step takes.
        bar: True for a bar where stderr is a terminal; False for plain lines always.
    """

    def __init__(self, metrics: MetricsLog, *, bar: bool = True) -> None:
        self._metrics = metrics
        self._bar = bar
        self._live: Any = None
        self._task: Any = None
        self._drawn = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._bar:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        if not (console.is_terminal or console.is_jupyter):
            return
        self._live = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=30),
            TextColumn("{task.fields[numbers]}"), TextColumn("[cyan]{task.fields[speed]}"),
            TextColumn("[magenta]{task.fields[memory]}"), TextColumn("[green]{task.fields[left]}"),
            console=console, refresh_per_second=4,
        )
        self._task = self._live.add_task(
            "train", total=state.max_steps, completed=state.global_step, numbers="", speed="", memory="", left="")
        self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live is not None:
            now = time.monotonic()
            fields = {"left": f"{self._left(state)} left"}
            if now - self._drawn > 1:  # reading the resident set of the process at each step would cost small models
                self._drawn = now
                fields["memory"] = f"{memory_now():.2f} GiB"
            self._live.update(self._task, completed=state.global_step, **fields)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or END_OF_RUN in logs:
            return
        numbers = describe(logs)
        if any(key.startswith("eval_") for key in logs):
            self._print(f"step {state.global_step}  evaluation: {numbers}")
        elif self._live is not None:
            self._live.update(self._task, numbers=numbers, speed=speed(logs))
        else:
            parts = [f"step {state.global_step}/{state.max_steps}", numbers, speed(logs), f"{memory_now():.2f} GiB",
                     f"{self._left(state)} left"]
            say("  ".join(part for part in parts if part))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self, state: Any) -> str:
        done = state.global_step - self._metrics.first_step
        seconds = self._metrics.clock.wall() - self._metrics.clock.wall_before
        # A run that is resumed with fewer steps than it has is past its end.
        return duration(seconds / done * max(0, state.max_steps - state.global_step)) if done > 0 else "?"

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            say(line)
