"""AlignTrainer: what the factories return, the same for every backend and algorithm."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from aligntune.core import checkpoints, generation, plots, saving
from aligntune.core.callbacks import AlignTuneState, Interrupt, MetricsLog, NothingLeft, say
from aligntune.core.model_hygiene import keep_4bit_layout, kept_mode
from aligntune.core.out_of_memory import explain
from aligntune.core.progress import Progress, describe, duration
from aligntune.core.rules import NO_EVALUATION
from aligntune.core.run_dir import RunDir, on_main_process
from aligntune.errors import ConfigError, DataError, GpuMemoryError

if TYPE_CHECKING:
    from aligntune.backends.base import Generator


class AlignTrainer:
    """Trains, evaluates, generates and saves; leaves a run directory.

    Args:
        trainer: a finished transformers Trainer (TRL's, or one built on it).
        config: the resolved configuration, kept as `.config`.
        run_dir: where the run is written; the trainer's `output_dir` becomes this folder.
        tokenizer: the tokenizer of the model.
        backend, algorithm: their names.
        attestation: returns what ran, for `.attestation()` and attestation.json.
        data_report: text for data_report.md (a string, or an object whose `str` is the text).
        online: whether the method generates its own completions (reward.png, generated tokens).
        resume: what `train()` does when it is not told: False, True (newest complete checkpoint) or a path.
        system_prompt: the one that training put before each conversation; `generate` does the same.
        progress: True for a bar where stderr is a terminal; False for plain lines.
        config_yaml: text for config.yaml; None leaves what is there.
        notices: choices made on the user's behalf, said when training starts and kept in summary.json.
        generator: generates in the place of transformers, for the options that it has.
    """

    def __init__(
        self, trainer: Trainer, *, config: Any, run_dir: RunDir, tokenizer: Any, backend: str, algorithm: str,
        attestation: Callable[[], Mapping[str, Any]] | None = None, data_report: Any = None,
        online: bool | None = None, resume: bool | str | os.PathLike[str] = False, system_prompt: str | None = None,
        progress: bool = True, config_yaml: str | None = None, notices: Sequence[str] = (),
        generator: Generator | None = None,
    ) -> None:
        self.trainer: Any = trainer
        self.config = config
        self.run_dir = run_dir
        self.tokenizer = tokenizer
        self.backend, self.algorithm = backend, algorithm
        self.online = hasattr(trainer.args, "num_generations") if online is None else online
        self._attestation, self._data_report = attestation, data_report
        self._resume, self._system_prompt = resume, system_prompt
        self._config_yaml, self._notices, self._generator = config_yaml, list(notices), generator
        trainer.args.output_dir = str(run_dir.path)
        # transformers would put the mean of earlier losses in place of a NaN, and leave NaN rows out of an evaluation.
        trainer.args.logging_nan_inf_filter = False
        keep_4bit_layout(trainer.model)
        self._metrics = MetricsLog(trainer, run_dir, algorithm=algorithm)
        self._progress = Progress(self._metrics, bar=progress)
        self._interrupt = Interrupt()
        self._install_callbacks()

    def _install_callbacks(self) -> None:
        handler = self.trainer.callback_handler
        for callback in list(handler.callbacks):
            if isinstance(callback, (ProgressCallback, PrinterCallback)):
                handler.callbacks.remove(callback)
            elif isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(self.run_dir.tensorboard)
        # Behind transformers' flow control, whose decisions Ctrl-C overrules; before the trackers, which log what
        # the metrics log adds.
        handler.callbacks[1:1] = [AlignTuneState(), self._metrics, self._interrupt, self._progress]

    @property
    def model(self) -> Any:
        """The model being trained, without what distributed training wraps around it."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.trainer.is_world_process_zero()

    def attestation(self) -> dict[str, Any]:
        """What runs this training: backend, algorithm, trainer class, and what the backend knows of its kernels."""
        kind = next(cls for cls in type(self.trainer).__mro__ if not cls.__module__.startswith("aligntune"))
        found = {
            "backend": self.backend, "algorithm": self.algorithm,
            "trainer": f"{kind.__module__}.{kind.__qualname__}", "model": type(self.model).__name__,
            "steps": self.trainer.state.global_step,
        }
        return {**found, **(dict(self._attestation()) if self._attestation is not None else {})}

    # Training

    def train(
        self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None, trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the end; the run directory holds the outcome, whatever it is.

        A first Ctrl-C ends training after the step at hand: a checkpoint is saved, summary.json says "interrupted",
        and KeyboardInterrupt is raised. A second one stops at once.

        Args:
            resume_from_checkpoint: True continues from the newest complete checkpoint, a path from that one; None is
                what the trainer was made with (`resume`), False starts anew.

        Returns:
            transformers' TrainOutput: `global_step`, `training_loss` (the mean over all steps of the run, those
            before a resume included), `metrics`.

        Raises:
            CheckpointError: no such checkpoint, unfinished, or of another run.
            NonFiniteError: a logged loss is NaN or infinite.
            GpuMemoryError: the GPU's memory ran out; names what would lower it.
            KeyboardInterrupt: Ctrl-C, after the checkpoint.
        """
        wanted = self._resume if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = self._checkpoint(wanted)
        self._prepare_folder(checkpoint)
        outcome = _Outcome(str(checkpoint) if checkpoint else None)
        try:
            with self._interrupt.installed(), no_bars():
                outcome.output = self._run(checkpoint, trial, ignore_keys_for_eval)
            steps = self.trainer.state.global_step
            stopped = self._interrupt.stopped_at is not None and steps < self.trainer.state.max_steps
            outcome.status = "interrupted" if stopped else "finished"
        except KeyboardInterrupt:
            outcome.status = "interrupted"
            raise
        finally:
            self._finish(outcome)
        if outcome.status == "interrupted":
            raise KeyboardInterrupt(
                f"stopped at step {steps} of {self.trainer.state.max_steps}; "
                f"train(resume_from_checkpoint=True) goes on from {self.run_dir.path}/checkpoint-{steps}"
            )
        if self._interrupt.asked_at is not None:
            raise KeyboardInterrupt(f"Ctrl-C came with the last step: training is complete, in {self.run_dir.path}")
        return outcome.output

    def _checkpoint(self, wanted: Any) -> Path | None:
        if wanted is None or wanted is False:
            return None
        path = Path(on_main_process(lambda: str(checkpoints.resolve(wanted, self.run_dir.path))))
        checkpoints.check_fits(path, self.trainer, checkpoints.fingerprint(self.trainer, self.algorithm))
        return path

    def _prepare_folder(self, checkpoint: Path | None) -> None:
        if not self.is_main:
            return
        step = checkpoints.step_of(checkpoint) if checkpoint else 0
        run = self.run_dir
        if checkpoint is not None:
            run.cut_metrics(step)
        elif (aside := run.set_metrics_aside()) is not None:
            say(f"training starts anew in {run.path}: the lines of before are in {aside.name}")
        for line in (*checkpoints.clear_after(run.path, step), *self._notices):
            say(line)
        if self._config_yaml is not None:
            run.write_config(self._config_yaml)
        run.write_environment()
        if self._data_report is not None:
            run.write_data_report(str(self._data_report))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _run(self, checkpoint: Path | None, trial: Any, ignore_keys: list[str] | None) -> TrainOutput:
        self._metrics.resumed_from = checkpoint
        try:
            output = self.trainer.train(
                resume_from_checkpoint=str(checkpoint) if checkpoint else None, trial=trial,
                ignore_keys_for_eval=ignore_keys,
            )
        except torch.OutOfMemoryError as error:
            raise GpuMemoryError(explain(self.trainer, self.config, error)) from error
        except NothingLeft:
            # transformers would train one step beyond the end, or report a loss of 0.
            self.trainer.is_in_train = False
            say(f"nothing left to train: {checkpoint} is at the last step")
            metrics = {"train_loss": self._metrics.training_loss()}
            return TrainOutput(self.trainer.state.global_step, metrics["train_loss"], metrics)
        loss = self._metrics.training_loss()
        return TrainOutput(output.global_step, loss, {**output.metrics, "train_loss": loss})

    def _finish(self, outcome: _Outcome) -> None:
        self._metrics.finish()
        self._progress.close()
        if not self.is_main:
            return
        run, ended_by = self.run_dir, sys.exc_info()[1]
        try:
            run.write_attestation(self.attestation())
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            if ended_by is None:
                raise
            say(f"attestation.json is not written: {type(error).__name__}: {error}")  # `ended_by` is what is raised
        drawn = plots.draw(run.read_metrics(), run.path, title=f"{self.algorithm} on {run.path.name}",
                           online=self.online)
        summary = self._summary(outcome)
        run.write_summary(summary)
        plotted = f"; {', '.join(path.name for path in drawn)}" if drawn else ""
        last, logged = describe(self._metrics.last), self._metrics.last_step
        if last and logged != summary["steps"]:
            last += f" (logged at step {logged})"
        say(f"{outcome.status}: step {summary['steps']} of {summary['max_steps']} in "
            f"{duration(summary['wall_seconds'])}{last and ', '}{last}; run in {run.path}{plotted}")

    def _summary(self, outcome: _Outcome) -> dict[str, Any]:
        metrics, state = self._metrics, self.trainer.state
        clock, last = metrics.clock, metrics.last
        seconds = clock.training() - clock.training_before
        error = sys.exc_info()[1]
        complete = checkpoints.complete_checkpoints(self.run_dir.path)
        summary: dict[str, Any] = {
            "status": outcome.status, "error": f"{type(error).__name__}: {error}" if error is not None else None,
            "backend": self.backend, "algorithm": self.algorithm,
            "steps": state.global_step, "max_steps": state.max_steps, "epochs": state.epoch,
            "final_loss": last.get("loss"), "training_loss": outcome.output.training_loss if outcome.output else None,
            "tokens": metrics.tokens, "tokens_per_second": _rate(metrics.tokens - metrics.first_tokens, seconds),
            "wall_seconds": round(clock.wall() - clock.wall_before, 3), "training_seconds": round(seconds, 3),
            "wall_seconds_with_earlier_parts": round(clock.wall(), 3),
            "peak_memory": peak_memory(), "resumed_from": outcome.resumed_from,
            "checkpoint": str(complete[-1]) if complete else None,
            "notices": self._notices, "last_log": last,
            "train_metrics": outcome.output.metrics if outcome.output else {},
        }
        if self.online:
            made = metrics.generated - metrics.first_generated
            summary |= {"final_reward": last.get("reward"), "generated_tokens": metrics.generated,
                        "generated_tokens_per_second": _rate(made, seconds)}
        return summary

    # Using the model

    def evaluate(self) -> dict[str, float]:
        """Metrics on the evaluation data, by their names in transformers and TRL (`eval_...`).

        sft: `eval_loss` (mean over all supervised tokens), `eval_perplexity`, `eval_mean_token_accuracy`.
        dpo: `eval_loss`, `eval_rewards/accuracies`, `eval_rewards/margins`, ...
        Online methods: `eval_reward`, `eval_completions/mean_length`, ... on completions sampled for the held-out
        prompts, and `eval_kl` where the method has a reference (beta > 0).

        Means are over rows (tokens for sft): the batch size does not change them.

        Raises:
            DataError: there is no evaluation data; names the options that give some.
        """
        rows = self.trainer.eval_dataset
        if rows is None or (hasattr(rows, "__len__") and not len(rows)):
            raise DataError(
                f"evaluate(): {'no evaluation data' if rows is None else 'the evaluation data has no rows'}. "
                f"{NO_EVALUATION}"
            )
        with kept_mode(self.trainer.model):
            return dict(self.trainer.evaluate())

    def generate(
        self, prompts: Any, *, raw: bool = False, system_prompt: str | None = None, batch_size: int = 8,
        seed: int | None = None, **sampling: Any,
    ) -> list[str]:
        """Completions of `prompts`, in their order; greedy unless a sampling option is given.

        On backend fast they come from its engine, where that runs the model and has the options; otherwise from
        transformers, and it is said.

        Args:
            prompts: a string, a list of strings, one conversation (a list of {"role", "content"}) or a list of those.
                A string is a user turn of the chat template, if the tokenizer has one. A conversation that ends with
                an assistant turn is continued inside it.
            raw: continue strings as they are, without the template.
            system_prompt: put before each conversation that has none; default: the one of the training.
            batch_size: prompts generated together (transformers pads them on the left).
            seed: seed of the sampling; the global random state is then left as it was.
            sampling: `max_new_tokens` (default 256, or what the model's positions leave), `temperature` (0 is
                greedy), `top_p`, `top_k`, `stop_strings`, ...: transformers' names. The sampling habits of the
                checkpoint's own generation_config are not used.

        Raises:
            ConfigError: an unknown or impossible sampling option; names the nearest.
            DataError: something that is not a prompt, or an empty one.
        """
        model = self.model
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise ConfigError(f"generate(): a {type(model).__name__} does not generate text")
        plain = raw or not self.tokenizer.chat_template
        if system_prompt is None and not plain:
            system_prompt = self._system_prompt
        return generation.generate(
            model, self.tokenizer, prompts, raw=raw, system_prompt=system_prompt, batch_size=batch_size, seed=seed,
            generator=self._generator, **sampling,
        )

    def save_model(self, path: str | os.PathLike[str], merge_adapters: bool = False) -> Path:
        """Save the model and its tokenizer to the folder `path`, whole or not at all; other files there stay.

        Args:
            path: a folder; with a model in it, that model's files are replaced.
            merge_adapters: False saves adapters alone (a model without adapters: all of it). True adds them to the
                base, saves the whole, reads it back from disk and compares its logits on a few texts with the live
                model's. A 4-bit base is saved in its compute type.

        Raises:
            ConfigError: `path` cannot take it, or the base's quantisation cannot be merged.
            CheckpointError: what was read back is not the trained model; nothing was saved.
        """
        target = Path(path).expanduser().absolute()
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            if merge_adapters:
                raise ConfigError("merge_adapters: not with a sharded model; save the adapters and merge them after")
            self.trainer.save_model(str(target), _internal_call=True)
            return target

        def write() -> str:
            with no_bars():
                check = saving.save(self.model, self.tokenizer, target, merge_adapters=merge_adapters)
            if check is not None:
                return f"saved to {target}, read back and compared: {check}"
            return f"saved to {target}"

        said = on_main_process(write)
        if self.is_main:
            say(said)
        return target

    def push_to_hub(
        self, repo_id: str, *, merge_adapters: bool = False, private: bool | None = None, token: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Save the model as `save_model` does, upload it to the hub repository `repo_id`, and return its address.

        Args:
            private: whether a repository made by this call is private; None is the account's default.
            token: a hub token; None takes the one that is logged in.

        Raises:
            ConfigError: not a repository id, or what `save_model` raises.
            AlignTuneError: the hub refused; keeps its reason.
        """
        saving.check_repo_id(repo_id)
        return on_main_process(lambda: saving.push(
            self.model, self.tokenizer, repo_id, merge_adapters=merge_adapters, private=private, token=token,
            commit_message=commit_message))

    def __repr__(self) -> str:
        return f"AlignTrainer({self.algorithm!r}, backend={self.backend!r}, run_dir={str(self.run_dir.path)!r})"


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """transformers without a progress bar for each file it writes or reads, for the block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass
class _Outcome:
    """How one call of train() went."""

    resumed_from: str | None
    status: str = "failed"
    output: TrainOutput | None = None


def peak_memory() -> dict[str, int]:
    """Peaks in bytes: this process's resident set since it started, and torch's GPU memory since training began.

    Where backend fast plans recompute by memory, since the first step began: that step is measured by itself.
    """
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peaks |= {"gpu_allocated_bytes": torch.cuda.max_memory_allocated(),
                  "gpu_reserved_bytes": torch.cuda.max_memory_reserved()}
    return peaks


def _rate(amount: float, seconds: float) -> float | None:
    return round(amount / seconds, 1) if amount > 0 and seconds > 0 else None
