"""Records every optimizer step of a trainer from the outside: data, loss, gradients, time by phase, memory.

A callback, and wrappers on the one trainer instance (taken off by `remove`). Nothing here reads a tensor of the device
while a step runs: references are kept, and read after the step's end, where the device is waited for anyway.
"""

from __future__ import annotations

import contextlib
import functools
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import TrainerCallback

from aligntune.compare import batches

SAMPLE = 1 << 18
"""Gradients of more elements are compared on a fixed sample of this many; their norms are of all elements."""

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
        trace_step: the step that is traced by a profiler, for arms that do not trace one themselves; None is none.
    """

    def __init__(
        self, trainer: Any, *, started: float, gradient_steps: tuple[int, ...] = (1,), stop_after: int | None = None,
        trace_step: int | None = None,
    ) -> None:
        self.trainer, self.started = trainer, started
        self.gradient_steps, self.stop_after, self.trace_step = gradient_steps, stop_after, trace_step
        self.steps: list[dict[str, Any]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.norms: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.cold_start: float | None = None
        self.first_documents: list[batches.Document] = []
        self.trace: dict[str, Any] | None = None
        self._profiler: Any = None
        self.before_forward: Callable[[Any, dict[str, Any]], None] | None = None
        self._line = Timeline(cuda=trainer.args.device.type == "cuda")
        self._undo: list[tuple[Any, str, Any]] = []
        self._seen: dict[str, int] = {}
        self._fresh()

    def _fresh(self) -> None:
        self._spans: list[tuple[str, Any, Any]] = []
        self._inputs: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        self._begin: float | None = None
        self._traced = False
        self._optimizer_mark: Any = None

    def _lists(self) -> dict[str, list[Any]]:
        return (getattr(self.trainer, "_metrics", None) or {}).get("train", {})

    # What is put around the trainer

    def install(self) -> None:
        """Wrap the trainer instance; `remove` takes it all off."""
        trainer = self.trainer
        for owner, name, phase in (
            (trainer, "get_batch_samples", "data"), (trainer, "_prepare_inputs", "prepare"),
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
                self._begin = time.perf_counter()
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
            key = f"{step}/{plain_name(name)}"
            grad = parameter.grad
            self.norms[key] = 0.0 if grad is None else float(grad.detach().double().norm()) * factor
            if grad is None:
                grad = torch.zeros_like(parameter)
            self.gradients[key] = sampled(plain_name(name), grad.detach()).float().mul(factor).cpu()

    # The steps

    # What ran

    def _start_trace(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._line.cuda else [])]
        self._profiler = profile(activities=activities)
        self._profiler.__enter__()

    def _end_trace(self, step: int) -> None:
        """Names and counts of what the step launched: the card's kernels, or torch's operators on a CPU."""
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        wanted = DeviceType.CUDA if self._line.cuda else DeviceType.CPU
        names = Counter(event.name for event in self._profiler.events() if event.device_type == wanted)
        if not self._line.cuda:
            names = Counter({name: count for name, count in names.items() if name.startswith("aten::")})
        self._profiler = None
        self.trace = {"step": step, "device": "cuda" if self._line.cuda else "cpu", "names": dict(names.most_common())}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fresh()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._begin is None:
            self._begin = time.perf_counter()
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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._line.wait()
        now = time.perf_counter()
        self._end_trace(state.global_step)
        if self.cold_start is None:
            self.cold_start = time.time() - self.started
            self.memory["optimizer"] = optimizer_bytes(self.trainer.optimizer)
        found: list[batches.Document] = []
        slots = rows = 0
        for batch in self._inputs:
            found += batches.documents(batch, rows)
            rows += batches.rows_of(batch)
            slots += _slots(batch)
        if not self.first_documents:
            self.first_documents = found
        self.steps.append({
            "step": state.global_step, "loss": float(sum(float(loss) for loss in self._losses)),
            "grad_norm": None if self._norm is None else float(self._norm),
            "seconds": now - self._begin if self._begin is not None else None, "traced": self._traced,
            "learning_rate": _rate(self.trainer), "rows": rows, "slots": slots, "phases": self._phases(),
            **batches.sizes(found), "data": batches.fingerprint(found), "metrics": self._metrics(),
        })
        self._fresh()
        if self.stop_after is not None and state.global_step >= self.stop_after:
            control.should_training_stop = True
        return control

    def _phases(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for phase, start, end in self._spans:
            totals[phase] = totals.get(phase, 0.0) + self._line.seconds(start, end)
        inner = totals.get("rollout", 0.0) + totals.get("reward", 0.0)
        if "prepare" in totals:
            totals["prepare"] = max(0.0, totals["prepare"] - inner)
        return totals

    def _metrics(self) -> dict[str, float]:
        found = {}
        for name, values in self._lists().items():
            new = values[self._seen.get(name, 0):]
            if name in METRICS and new:
                found[name] = sum(float(value) for value in new) / len(new)
        return found


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def sampled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements, or a fixed sample of `SAMPLE` of them that depends on its name and size alone."""
    flat = tensor.reshape(-1)
    if flat.numel() <= SAMPLE:
        return flat
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return flat[torch.randint(flat.numel(), (SAMPLE,), generator=generator).to(flat.device)]


def fingerprint(model: Any) -> dict[str, Any]:
    """What the weights are when training starts: a number over all names and values, and their types.

    Checksums are of fp32 values; two models stored in different types are not expected to agree.
    """
    total: dict[bool, int] = {True: 0, False: 0}
    dtypes = set()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: plain_name(item[0])):
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        values = sampled(plain_name(name), parameter.detach())
        data = values.cpu().float().numpy().tobytes() if values.is_floating_point() else values.cpu().numpy().tobytes()
        total[parameter.requires_grad] = zlib.crc32(data, zlib.crc32(plain_name(name).encode(),
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
