"""What happens beside the steps: metrics.jsonl, progress, Ctrl-C, and the state that a resumed run continues from."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from aligntune.core import checkpoints
from aligntune.core.eval_metrics import Averages
from aligntune.core.run_dir import RunDir
from aligntune.errors import NonFiniteError

END_OF_RUN = "train_runtime"
"""The key that marks the log transformers writes once, when training ends; it goes to summary.json."""


class NothingLeft(Exception):  # noqa: N818 - not an error, it ends a training that is over
    """The checkpoint that training was to resume from is at the last step."""


class AlignTuneState(TrainerCallback, ExportableState):
    """Puts our part into trainer_state.json, the last file of a checkpoint; what writes it is `source`."""

    def __init__(self) -> None:
        self.source: Callable[[], dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.source() if self.source else {}}


assert AlignTuneState.__name__ == checkpoints.STATE_KEY


class Clock:
    """Two counts of seconds that go on across a resume: `wall`, and `training`, without evaluations and saves."""

    def __init__(self) -> None:
        self.wall_before = self.training_before = 0.0
        self._start: float | None = None
        self._idle = self._mark = 0.0
        self._stopped_at = (0.0, 0.0)

    def start(self, wall: float = 0.0, training: float = 0.0) -> None:
        """Go, from what earlier parts of the run took."""
        self.wall_before, self.training_before = wall, training
        self._start, self._idle = time.perf_counter(), 0.0

    def stop(self) -> None:
        self._stopped_at, self._start = (self.wall(), self.training()), None

    def mark(self) -> None:
        """A step is over; what follows until `skip` is not training."""
        self._mark = time.perf_counter()

    def skip(self) -> None:
        now = time.perf_counter()
        self._idle += now - self._mark
        self._mark = now

    def wall(self) -> float:
        return self._stopped_at[0] if self._start is None else self.wall_before + time.perf_counter() - self._start

    def training(self) -> float:
        if self._start is None:
            return self._stopped_at[1]
        return self.training_before + time.perf_counter() - self._start - self._idle


class MetricsLog(TrainerCallback):
    """Writes metrics.jsonl, adds tokens per second, weighs evaluation means, and stops on a loss that is no number.

    Args:
        trainer: the trainer it belongs to.
        run_dir: where the lines go.
        algorithm: its name; "sft" has a loss of tokens.
    """

    def __init__(self, trainer: Trainer, run_dir: RunDir, *, algorithm: str) -> None:
        self.trainer: Any = trainer
        self.run_dir = run_dir
        self.algorithm = algorithm
        self.clock = Clock()
        self.averages = Averages(trainer, per_token=algorithm == "sft")
        self.last: dict[str, float] = {}
        self.last_step = 0
        self.tokens = self.generated = 0.0
        self.first_tokens = self.first_generated = 0.0
        self.first_step = 0
        self._logged = (0.0, 0.0, 0.0)
        self._counter: TokenCounter | None = None
        self.resumed_from: Path | None = None
        self.loss_is_complete = False
        self._loss_from = 0

    # Across a resume

    def snapshot(self) -> dict[str, Any]:
        """What trainer_state.json does not have and an uninterrupted run's next line of metrics.jsonl needs."""
        trainer = self.trainer
        partial = {
            name: {key: [float(value) for value in values] for key, values in getattr(trainer, name)["train"].items()}
            for name in ("_metrics", "_stored_metrics") if getattr(trainer, name, None)
        }
        return {
            "fingerprint": checkpoints.fingerprint(trainer, self.algorithm),
            "wall": self.clock.wall(), "training": self.clock.training(),
            "tokens": self._token_total({}), "generated": self.generated,
            "logged": list(self._logged), "train_tokens": getattr(trainer, "_total_train_tokens", None),
            "micro_steps": getattr(trainer, "_step", None), "loss_sum": trainer._total_loss_scalar,
            "loss_since_log": trainer._tr_loss.item(), "last_logged_step": trainer._globalstep_last_logged,
            "loss_from": self._loss_from,
            "partial": partial,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Continue the sums of the run that wrote `kept` (empty: a checkpoint of plain TRL, sums start here)."""
        trainer = self.trainer
        # An earlier train() of this object may have stopped between two logs, or between two slices of a rollout.
        for name in ("_metrics", "_stored_metrics"):
            if getattr(trainer, name, None):
                getattr(trainer, name)["train"].clear()
        for name, value in (("_step", 0), ("_buffered_inputs", None)):
            if hasattr(trainer, name):
                setattr(trainer, name, value)
        self.tokens, self.generated = kept.get("tokens") or self._token_total({}), kept.get("generated") or 0.0
        self._logged = tuple(kept.get("logged") or (0.0, self.tokens, self.generated))  # type: ignore[assignment]
        if not kept:
            return
        if kept["train_tokens"] is not None:
            trainer._total_train_tokens = kept["train_tokens"]
        if kept["micro_steps"] is not None:
            trainer._step = kept["micro_steps"]
        trainer._total_loss_scalar = kept["loss_sum"]
        trainer._tr_loss.fill_(kept["loss_since_log"])
        trainer._globalstep_last_logged = kept["last_logged_step"]
        for name, lists in kept["partial"].items():
            for key, values in lists.items():
                getattr(trainer, name)["train"][key] = list(values)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, AlignTuneState):
                callback.source = self.snapshot
            if isinstance(callback, ExportableState):
                # transformers looks each one up when it saves, and a checkpoint of plain TRL does not have ours.
                state.stateful_callbacks.setdefault(type(callback).__name__, {})
        kept = state.stateful_callbacks.get(checkpoints.STATE_KEY) or {}
        kept = kept.get("attributes") or {} if state.global_step else {}
        self.loss_is_complete = False
        # A checkpoint of plain TRL does not say what the losses before it were.
        self._loss_from = kept.get("loss_from", state.global_step)
        self.restore(kept)
        self.first_step, self.first_tokens, self.first_generated = state.global_step, self.tokens, self.generated
        self.clock.start(kept.get("wall") or 0.0, kept.get("training") or 0.0)
        if self.resumed_from is not None:
            checkpoints.reload_renamed_weights(self.resumed_from, self.trainer.model)
            if state.global_step >= state.max_steps:
                raise NothingLeft
        if not hasattr(self.trainer, "_total_train_tokens"):
            self._counter = TokenCounter(self.trainer.model, self.tokens)

    def training_loss(self) -> float:
        """The mean loss over all optimizer steps of the run, those before a resume included; NaN if none is known."""
        trainer = self.trainer
        total = trainer._total_loss_scalar + (0.0 if self.loss_is_complete else trainer._tr_loss.item())
        steps = trainer.state.global_step - self._loss_from
        return total / steps if steps else math.nan

    def finish(self) -> None:
        """Training is over, one way or another."""
        if self._counter is not None:
            self.tokens = self._counter.total()
            self._counter.remove()
            self._counter = None
        self.clock.stop()

    # While it runs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.mark()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_in_train:
            self.clock.skip()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.skip()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = {} if logs is None else logs
        if END_OF_RUN in logs:
            # transformers 5.17 divides this run's losses by all steps, later ones leave out those before a resume.
            self.loss_is_complete = True
            logs["train_loss"] = self.training_loss()
            return
        kind = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        if kind == "eval":
            changed = self.averages.amend(logs)
            if state.log_history:
                state.log_history[-1].update(changed)
        else:
            self._add_speed(logs)
            self.last = {**self.last, **{key: value for key, value in logs.items() if isinstance(value, (int, float))}}
            self.last_step = state.global_step
        if state.is_world_process_zero:
            epoch = logs.get("epoch", state.epoch)
            numbers = {key: value for key, value in logs.items() if key not in ("epoch", "step", "kind", "time")}
            seconds = round(self.clock.wall(), 3)
            self.run_dir.append_metrics(
                {"step": state.global_step, "epoch": epoch, "time": seconds, "kind": kind, **numbers}
            )
        _check_finite(logs, state.global_step)

    def _token_total(self, logs: dict[str, Any]) -> float:
        if self._counter is not None:
            return self._counter.total()
        return float(logs.get("num_tokens") or getattr(self.trainer, "_total_train_tokens", 0)
                     or self.trainer.state.num_input_tokens_seen or self.tokens)

    def _add_speed(self, logs: dict[str, Any]) -> None:
        self.tokens = self._token_total(logs)
        lengths = (getattr(self.trainer, "_metrics", None) or {}).get("train", {}).get("completions/mean_length")
        batch = getattr(self.trainer.args, "generation_batch_size", None)
        if lengths and batch:
            # Dynamic sampling draws more completions than it trains on.
            drawn = self.trainer._metrics["train"].get("dynamic_sampling/drawn_completions") or [batch] * len(lengths)
            self.generated += sum(length * count for length, count in zip(lengths, drawn, strict=True))
        now, tokens, generated = self._logged
        self._logged = (self.clock.training(), self.tokens, self.generated)
        seconds = self._logged[0] - now
        if seconds > 0 and self.tokens > tokens:
            logs["tokens_per_second"] = round((self.tokens - tokens) / seconds, 1)
        if seconds > 0 and self.generated > generated:
            logs["generated_tokens_per_second"] = round((self.generated - generated) / seconds, 1)


def _check_finite(logs: dict[str, Any], step: int) -> None:
    loss = logs.get("loss")
    if isinstance(loss, (int, float)) and not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss} at step {step} (gradient norm {logs.get('grad_norm')}); the weights after such a "
            "step are worthless. Resume from the last checkpoint with a lower learning_rate, or look at the rows of "
            "this step"
        )


class TokenCounter:
    """Counts the real tokens that pass through the model with gradients on, for trainers that log no `num_tokens`."""

    def __init__(self, model: Any, start: float) -> None:
        self._start = start
        self._sum: torch.Tensor | None = None
        self._fixed = 0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Reference models and generation run without gradients: the policy's training forward alone is counted.
        if not torch.is_grad_enabled() or not model.training:
            return
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            count = mask.detach().sum()
            self._sum = count if self._sum is None else self._sum + count
        else:
            ids = args[0] if args else kwargs.get("input_ids")
            self._fixed += ids.numel() if isinstance(ids, torch.Tensor) else 0

    def total(self) -> float:
        """Tokens of all processes, taken as alike: one process's count times their number."""
        mine = (float(self._sum) if self._sum is not None else 0.0) + self._fixed
        return self._start + mine * int(os.environ.get("WORLD_SIZE", "1"))

    def remove(self) -> None:
        self._hook.remove()


class Interrupt(TrainerCallback):
    """Ctrl-C: the first ends training after the step, with a checkpoint; the second stops at once."""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.stopped_at: int | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to SIGINT for the block (main thread only; a process told to ignore it goes on ignoring it)."""
        self.asked_at = self.stopped_at = None
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or previous in (signal.SIG_IGN, None):
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked_at is not None:
            # torchrun passes the terminal's Ctrl-C on to workers that the terminal has told already.
            if "TORCHELASTIC_RUN_ID" in os.environ and now - self.asked_at < 3:
                return
            raise KeyboardInterrupt("stopped at once by a second Ctrl-C; nothing was saved for this step")
        self.asked_at = now
        # os.write: a print here could re-enter the very print that the signal interrupted.
        os.write(2, b"\nCtrl-C: finishing this step, then saving a checkpoint; once more stops at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        asked = self.asked_at is not None
        if args.world_size > 1:
            # A rank that stops alone leaves the others waiting in their next collective.
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked:
            self.stopped_at = state.global_step
            control.should_save, control.should_training_stop, control.should_evaluate = True, True, False
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stopped_at is not None:
            control.should_save = control.should_evaluate = False
        return control


def say(text: str) -> None:
    """One line for people, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)
