"""Records every optimizer step of a trainer from the outside: data, loss, gradients, time by phase, memory.

A callback, and wrappers on the one trainer instance (taken off by `remove`). Nothing here reads a tensor of the device
while steps run: references are kept, and read every `READ_EVERY` steps, where the device is waited for. In between a
trainer may run ahead of the device, as it does in use; a step lasts from the mark that ends the one before to its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import TrainerCallback

from aligntune.compare import batches
from aligntune.compare.peers import plain

SAMPLE = 1 << 18
"""Gradients of more elements are compared on a fixed sample of this many; their norms are of all elements."""

GAPS = 10
"""Times without a kernel that a trace names, the longest ones."""

READ_EVERY = 8
"""Steps on a card between two waits for it; on a CPU there is nothing to wait for, and each step is read as it ends."""

REHEARSAL = "rehearsal"
"""The pass over the longest batch that backend fast makes before the first step, while it gets that step's data."""

METRICS = ("reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio",
           "rewards/accuracies", "rewards/margins", "mean_token_accuracy")


class Timeline:
    """Marks on the device's own clock (CUDA events), or the host's for a model that trains on the CPU."""

    def __init__(self, *, cuda: bool) -> None:
        self.cuda = cuda

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Recorder(TrainerCallback):
    """Watches one trainer.

    Args:
        trainer: a built transformers trainer.
        started: `time.time()` when its process was started; cold start counts from there.
        gradient_steps: optimizer steps whose gradients are kept (before clipping).
        stop_after: end the training after this step; None runs to the end.
        trace_step: the step that is traced by a profiler; None is none.
        read_every: steps between two waits; None is `READ_EVERY` on a card, else 1.
    """

    def __init__(
        self, trainer: Any, *, started: float, gradient_steps: tuple[int, ...] = (1,), stop_after: int | None = None,
        trace_step: int | None = None, read_every: int | None = None,
    ) -> None:
        self.trainer, self.started = trainer, started
        self.gradient_steps, self.stop_after, self.trace_step = gradient_steps, stop_after, trace_step
        self.steps: list[dict[str, Any]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.norms: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.cold_start: float | None = None
        self.rehearsal_seconds: float | None = None
        self.first_documents: list[batches.Document] = []
        self.trace: dict[str, Any] | None = None
        self._profiler: Any = None
        self.before_forward: Callable[[Any, dict[str, Any]], None] | None = None
        self._line = Timeline(cuda=trainer.args.device.type == "cuda")
        self._read_every = read_every or (READ_EVERY if self._line.cuda else 1)
        self._unread: list[_Step] = []
        self._ended: Any = None
        self._undo: list[tuple[Any, str, Any]] = []
        self._seen: dict[str, int] = {}
        self._fresh()

    def _fresh(self) -> None:
        self._spans: list[tuple[str, Any, Any]] = []
        self._inputs: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        self._begin: Any = None
        self._traced = False
        self._optimizer_mark: Any = None

    def _lists(self) -> dict[str, list[Any]]:
        return (getattr(self.trainer, "_metrics", None) or {}).get("train", {})

    # What is put around the trainer

    def install(self) -> None:
        """Wrap the trainer instance; `remove` takes it all off."""
        trainer = self.trainer
        for owner, name, phase in (
            (trainer, "get_batch_samples", "data"), (trainer, "_rehearse", REHEARSAL),
            (trainer, "_prepare_inputs", "prepare"),
            (trainer, "_generate", "rollout"), (trainer, "_calculate_rewards", "reward"),
            (trainer, "compute_loss", "forward"), (trainer.accelerator, "backward", "backward"),
        ):
            if hasattr(owner, name):
                self._wrap(owner, name, self._timed(getattr(owner, name), phase))
        self._wrap(trainer.accelerator, "clip_grad_norm_", self._clipping(trainer.accelerator.clip_grad_norm_))
        self.weights = fingerprint(trainer.model)
        self.memory["weights"] = tensor_bytes([*trainer.model.parameters(), *trainer.model.buffers()])
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            self.memory["reference"] = tensor_bytes([*reference.parameters(), *reference.buffers()])
        handler = trainer.callback_handler
        handler.callbacks.insert(0, self)

    def remove(self) -> None:
        """Leave the trainer as it was."""
        for owner, name, before in reversed(self._undo):
            if before is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before
        self._undo.clear()
        if self in self.trainer.callback_handler.callbacks:
            self.trainer.callback_handler.callbacks.remove(self)

    def _wrap(self, owner: Any, name: str, wrapper: Any) -> None:
        self._undo.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, wrapper)

    def _timed(self, original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if phase == "data":
                self._started_step()
            elif phase == "forward":
                if not self.trainer.model.training:
                    return original(*args, **kwargs)
                self._watch_batch(original, args, kwargs)
            elif phase == "backward":
                self._losses.append(args[0].detach())
            start = self._line.mark()
            try:
                with self._head_measured() if phase == "forward" else contextlib.nullcontext():
                    return original(*args, **kwargs)
            finally:
                self._spans.append((phase, start, self._line.mark()))

        return timed

    @contextlib.contextmanager
    def _head_measured(self) -> Iterator[None]:
        """At the very first forward: how much memory the loss head takes above the decoder's output.

        Only then: a forward that is captured as a graph may not be asked about its memory, and the first never is.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not self._line.cuda or "head" in self.memory or not hasattr(model, "get_decoder"):
            yield
            return
        below: list[int] = []

        def decoded(*_: Any) -> None:
            self._note_peaks()
            torch.cuda.reset_peak_memory_stats()
            below.append(torch.cuda.memory_allocated())

        hook = model.get_decoder().register_forward_hook(decoded)
        try:
            yield
        finally:
            hook.remove()
            if below:
                self.memory["head"] = max(0, torch.cuda.max_memory_allocated() - below[-1])
        self.memory.setdefault("head", 0)

    def _note_peaks(self) -> None:
        """Keep the peaks so far: they are about to be reset, or the run is over."""
        now = {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
        for name, value in now.items():
            self.memory[name] = max(self.memory.get(name, 0), value)

    def finish(self) -> None:
        """Read what only the end knows."""
        self._line.wait()
        self._read()
        if self._line.cuda:
            self._note_peaks()

    def _watch_batch(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        self._inputs.append(batches.keep(inputs))
        self._traced |= torch.autograd._profiler_enabled()
        if self.before_forward is not None:
            self.before_forward(original, inputs)

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            parameters = list(parameters)
            step = self.trainer.state.global_step + 1
            # fp16 gradients are unscaled inside the call: there they are read after it, and the clipping is undone.
            scaled = getattr(self.trainer.accelerator, "scaler", None) is not None
            wanted = step in self.gradient_steps and not any(name.startswith(f"{step}/") for name in self.norms)
            if wanted and not scaled:
                self._keep_gradients(step, 1.0)
            norm = original(parameters, max_norm, *args, **kwargs)
            if wanted and scaled:
                self._keep_gradients(step, max(1.0, (float(norm) + 1e-6) / max_norm) if max_norm > 0 else 1.0)
            self._norm = norm
            return norm

        return clip

    def _keep_gradients(self, step: int, factor: float) -> None:
        for name, parameter in self.trainer.model.named_parameters():
            if not parameter.requires_grad:
                continue
            key = f"{step}/{plain(name)}"
            grad = parameter.grad
            self.norms[key] = 0.0 if grad is None else _norm(grad) * factor
            if grad is None:
                grad = torch.zeros_like(parameter)
            self.gradients[key] = sampled(plain(name), grad.detach()).float().mul(factor).cpu()

    # The steps

    # What ran

    def _start_trace(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._line.cuda else [])]
        self._line.wait()  # else steps before it, that the device is still at, would be in the trace
        self._profiler = profile(activities=activities)
        self._profiler.__enter__()

    def _end_trace(self, step: int) -> None:
        """Names and counts of what the step launched: the card's kernels, or torch's operators on a CPU."""
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        wanted = DeviceType.CUDA if self._line.cuda else DeviceType.CPU
        # Annotated ranges are on the card's line too, and span what it waits for.
        events = [event for event in self._profiler.events() if event.device_type == wanted
                  and not event.is_user_annotation and (self._line.cuda or event.name.startswith("aten::"))]
        self._profiler = None
        names = Counter(event.name for event in events)
        self.trace = {"step": step, "device": "cuda" if self._line.cuda else "cpu", "names": dict(names.most_common()),
                      **(busy([(event.name, event.time_range.start, event.time_range.end) for event in events])
                         if self._line.cuda else {})}
        # A step that is measured would be the one in which Python goes through all that a profiler has left it.
        del events
        gc.collect()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fresh()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started_step()
        self._seen = {name: len(values) for name, values in self._lists().items()}
        if state.global_step + 1 == self.trace_step:
            self._start_trace()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            self.memory["gradients"] = tensor_bytes(grads)
        self._optimizer_mark = self._line.mark()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer_mark is not None:
            self._spans.append(("optimizer", self._optimizer_mark, self._line.mark()))

    def _started_step(self) -> None:
        if self._begin is None:
            self._begin = self._ended if self._ended is not None else self._line.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step = state.global_step
        self._ended = self._line.mark()
        self._unread.append(_Step(
            step, self._begin, self._ended, self._inputs, self._losses, self._norm, self._spans, self._traced,
            _rate(self.trainer), self._new_metrics()))
        self._fresh()
        if self.stop_after is not None and step >= self.stop_after:
            control.should_training_stop = True
        if (self._profiler is not None or step in (1, *self.gradient_steps) or control.should_training_stop
                or step >= state.max_steps or len(self._unread) >= self._read_every):
            self._line.wait()
            self._end_trace(step)
            self._read()
        return control

    def _read(self) -> None:
        """Write down the steps whose tensors were kept; the device has been waited for."""
        if self.cold_start is None and self._unread:
            self.cold_start = time.time() - self.started
            self.memory["optimizer"] = optimizer_bytes(self.trainer.optimizer)
        for one in self._unread:
            found: list[batches.Document] = []
            slots = rows = 0
            for batch in one.inputs:
                found += batches.documents(batch, rows)
                rows += batches.rows_of(batch)
                slots += _slots(batch)
            if not self.first_documents:
                self.first_documents = found
            phases = self._phases(one.spans)
            rehearsed = phases.pop(REHEARSAL, None)
            if rehearsed is not None:
                self.rehearsal_seconds = (self.rehearsal_seconds or 0.0) + rehearsed
            self.steps.append({
                "step": one.step, "loss": float(sum(float(loss) for loss in one.losses)),
                "grad_norm": None if one.norm is None else float(one.norm),
                "seconds": None if one.begin is None else self._line.seconds(one.begin, one.end) - (rehearsed or 0.0),
                "traced": one.traced, "learning_rate": one.rate, "rows": rows, "slots": slots,
                "phases": phases, **batches.sizes(found), "data": batches.fingerprint(found),
                "metrics": {name: sum(float(value) for value in new) / len(new)
                            for name, new in one.metrics.items()},
            })
        self._unread.clear()
        self._ended = None  # what was done here is nobody's step

    def _phases(self, spans: list[tuple[str, Any, Any]]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for phase, start, end in spans:
            totals[phase] = totals.get(phase, 0.0) + self._line.seconds(start, end)
        inner = totals.get("rollout", 0.0) + totals.get("reward", 0.0)
        if "prepare" in totals:
            totals["prepare"] = max(0.0, totals["prepare"] - inner)
        if "data" in totals:
            totals["data"] = max(0.0, totals["data"] - totals.get(REHEARSAL, 0.0))
        return totals

    def _new_metrics(self) -> dict[str, list[Any]]:
        """What the step put into the trainer's lists, as it is: numbers, or tensors of the device."""
        found = {name: values[self._seen.get(name, 0):] for name, values in self._lists().items() if name in METRICS}
        return {name: new for name, new in found.items() if new}


@dataclass
class _Step:
    """A step that has ended and was not read yet."""

    step: int
    begin: Any
    end: Any
    inputs: list[dict[str, Any]]
    losses: list[torch.Tensor]
    norm: Any
    spans: list[tuple[str, Any, Any]]
    traced: bool
    rate: float | None
    metrics: dict[str, list[Any]]


def busy(spans: list[tuple[str, float, float]]) -> dict[str, Any]:
    """Seconds between the first and last of `spans` (name, start, end in microseconds) with and without one, the
    longest times without, and the longest-running names; what overlaps counts once in `busy`, whole in `kernels`."""
    kernels: Counter[str] = Counter()
    gaps: list[tuple[float, str, str]] = []
    working = 0.0
    until, last = -math.inf, ""
    for name, start, end in sorted(spans, key=lambda span: span[1:]):
        kernels[name[:120]] += end - start  # type: ignore[assignment]
        if math.isfinite(until) and start > until:
            gaps.append((start - until, last[:120], name[:120]))
        working += max(0.0, end - max(start, until))
        until, last = max((until, last), (end, name), key=lambda one: one[0])
    return {"busy": working / 1e6, "idle": sum(gap for gap, *_ in gaps) / 1e6,
            "gaps": [{"seconds": gap / 1e6, "after": after, "before": before}
                     for gap, after, before in sorted(gaps, key=lambda one: -one[0])[:GAPS]],
            "kernels": {name: total / 1e6 for name, total in kernels.most_common(40)}}


def sampled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements, or a fixed sample of `SAMPLE` of them that depends on its name and size alone."""
    flat = tensor.reshape(-1)
    if flat.numel() <= SAMPLE:
        return flat
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return flat[torch.randint(flat.numel(), (SAMPLE,), generator=generator).to(flat.device)]


def _norm(tensor: torch.Tensor) -> float:
    # The type is of the sum: a copy of the tensor in it would be the run's peak of memory for a large embedding.
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def fingerprint(model: Any) -> dict[str, Any]:
    """What the weights are when training starts: a number over all names and values, and their types.

    Checksums are of fp32 values; two models stored in different types are not expected to agree.
    """
    total: dict[bool, int] = {True: 0, False: 0}
    dtypes = set()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: plain(item[0])):
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        values = sampled(plain(name), parameter.detach())
        data = values.cpu().float().numpy().tobytes() if values.is_floating_point() else values.cpu().numpy().tobytes()
        total[parameter.requires_grad] = zlib.crc32(data, zlib.crc32(plain(name).encode(),
                                                                     total[parameter.requires_grad]))
    return {"trained": f"{total[True]:08x}", "frozen": f"{total[False]:08x}", "dtypes": sorted(dtypes)}


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the tensors' storages, each storage once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state on any device."""
    inner = getattr(optimizer, "optimizer", optimizer)
    found: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(dict(inner.state))
    return tensor_bytes(found)


def save_gradients(recorder: Recorder, path: Path) -> None:
    """Write the kept gradients; the norms of the whole tensors travel in the arm's JSON."""
    from safetensors.torch import save_file

    if recorder.gradients:
        save_file(recorder.gradients, path)


def _slots(batch: dict[str, Any]) -> int:
    if "prompt_ids" in batch:
        return int(batch["prompt_ids"].numel() + batch["completion_ids"].numel())
    return int(batch["input_ids"].numel())


def _rate(trainer: Any) -> float | None:
    scheduler = getattr(trainer, "lr_scheduler", None)
    return float(scheduler.get_last_lr()[0]) if scheduler is not None else None
