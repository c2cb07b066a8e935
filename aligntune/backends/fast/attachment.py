"""`attach` puts our ops under a model, `detach` takes them out again: per instance, listed in one table.

Nothing is patched at class or module level. What is set, and on which module, stands in `Attachment.patches`; what each
kind of module got, and why the rest stays eager, stands in `Attachment.report`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aligntune.backends.fast import fp8_base, head, plan, recompute
from aligntune.backends.fast.forwards import KEY, OURS, Spec
from aligntune.backends.fast.lora import slot
from aligntune.backends.fast.ops._runtime import interpreting
from aligntune.core.model_hygiene import ATTACHMENT
from aligntune.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from aligntune.backends.fast.attestation import Attestation

RECORD = ATTACHMENT
_SLOTS = ("forward", "_old_forward")


@dataclass(frozen=True)
class Line:
    """One row of the report: all modules of one path pattern that got the same answer."""

    modules: str
    op: str
    reason: str | None
    count: int

    @property
    def eager(self) -> bool:
        return self.reason is not None

    def __str__(self) -> str:
        if self.reason is not None:
            whose = "" if self.reason.startswith("TRL's own") else "eager, "
            return f"{self.modules}: {whose}{self.reason}"
        return f"{self.modules}: {self.op} (x{self.count})"


@dataclass
class Patch:
    """One instance attribute that was set. `original` is what it held before; None where the class's forward ran."""

    module: nn.Module
    path: str
    forward: Callable[..., Any]
    original: Callable[..., Any] | None
    spec: Spec
    op: str
    static_ops: tuple[str, ...]

    def in_place(self) -> bool:
        if getattr(self.forward, "__func__", None) is type(self.module).forward:
            return False  # a pickled model: its bound methods came back as the class's own
        return any(self.module.__dict__.get(name) is self.forward for name in _SLOTS)

    def undo(self) -> None:
        """Put back what was there; where something else has been put on top since, that stays."""
        state = self.module.__dict__
        state.pop(KEY, None)
        for name in _SLOTS:
            if state.get(name) is not self.forward:
                continue
            if self.original is not None:
                state[name] = self.original
            elif name == "forward":
                del state[name]
            else:  # accelerate's hook calls this attribute: it must hold something
                state[name] = MethodType(type(self.module).forward, self.module)


@dataclass
class Attachment:
    """What `attach` did to one model."""

    model: nn.Module
    strict: bool
    patches: list[Patch] = field(default_factory=list)
    decisions: list[tuple[str, str, str | None]] = field(default_factory=list)
    head: head.Head | None = None
    # What else was set on the model, how it is set on a model that is looked at anew, and how it is taken off.
    also: list[Callable[[Attachment], Any]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def attached(self) -> bool:
        """True while the forwards that were set are still in place."""
        return bool(self.patches) and all(patch.in_place() for patch in self.patches)

    @property
    def report(self) -> list[Line]:
        """The table of modules: op, or eager and why; with calls that had to run eager since `attach`."""
        rows = list(self.decisions)
        rows += [
            (patch.path, patch.op, f"{calls} calls since attach: {reason}")
            for patch in self.patches
            for reason, calls in patch.spec.eager.items()
        ]
        if self.head is not None:
            rows.append(("head", *self.head.describe(self.model)))
        return _lines(rows)

    def attest(self, step: Callable[[], Any]) -> Attestation:
        """Run `step` once under a profiler and hold what ran against what the table promises."""
        from aligntune.backends.fast.attestation import attest

        return attest(self, step)

    def detach(self) -> None:
        """Undo every patch. The forward that TRL put on the instance stays where TRL put it."""
        self._reset()
        self.also = []
        recompute.remove(self.model)
        fp8_base.remove(self.model)

    def _reset(self) -> None:
        for patch in reversed(self.patches):
            patch.undo()
        if self.head is not None:
            self.head.remove(self.model)
        for undo in self.undo:
            undo()
        _strip_copies(self.model)
        self.patches, self.decisions, self.head, self.undo = [], [], None, []
        self.model.__dict__.pop(RECORD, None)

    def __str__(self) -> str:
        return "\n".join(str(line) for line in self.report)


def _strip_copies(model: nn.Module) -> None:
    """Take our forwards off copies of attached modules (PEFT's `modules_to_save` makes some), which no patch lists."""
    for module in model.modules():
        spec: Spec | None = module.__dict__.get(KEY)
        if spec is None or spec.of == id(module):
            continue
        state = module.__dict__
        for name in _SLOTS:
            if getattr(state.get(name), "__func__", None) in OURS:
                Patch(module, "", state[name], None, spec, "", ()).undo()
        state.pop(KEY, None)


def _lines(rows: list[tuple[str, str, str | None]]) -> list[Line]:
    grouped: dict[tuple[str, str, str | None], int] = {}
    for path, op, reason in rows:
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path), op, reason)
        grouped[key] = grouped.get(key, 0) + 1
    return [Line(*key, count) for key, count in grouped.items()]


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under DDP, `torch.compile` and PEFT wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model (or of the model under its wrappers), or None."""
    return base_model(model).__dict__.get(RECORD)


def attach(model: nn.Module, *, strict: bool = False) -> Attachment:
    """Put our ops under `model`: a transformers causal language model, bare, under PEFT, or prepared by accelerate.

    Sets `forward` on module instances, and nothing else; the numbers stay, up to rounding. Attaching again looks at the
    model anew (adapters may have come, a trainer may have put its own head on top) and returns the same attachment.

    Args:
        model: on any device; its forwards run on an NVIDIA GPU (or in Triton's interpreter).
        strict: a module that no kernel covers is an error.
    Raises:
        BackendUnavailableError: there is no CUDA device and TRITON_INTERPRET=1 is not set.
        ConfigError: `strict`, and something stays eager; every such line is listed, and nothing is attached.
    """
    _require_backend()
    base = base_model(model)
    record: Attachment = base.__dict__.get(RECORD) or Attachment(base, strict)
    record._reset()  # how layers are recomputed, and a base in fp8, are the trainer's business, and stay
    record.strict = strict
    with ExitStack() as undone:
        undone.callback(record.detach)  # an error leaves nothing behind
        for path, module in base.named_modules():
            if path.endswith(".base_layer"):  # the adapter around it is what is called
                continue
            decision = plan.decide(module)
            if decision is None:
                continue
            record.decisions.append((path, decision.op, decision.reason))
            if decision.forward is not None:
                record.patches.append(_patch(module, path, decision, strict))
        record.head = head.install(base, strict=strict)
        for again in list(record.also):
            again(record)
        if strict:
            _refuse_eager(record)
        undone.pop_all()
    base.__dict__[RECORD] = record
    return record


def detach(model: nn.Module) -> None:
    """Undo `attach`: every method is, by identity, what it was; a model that is not attached is left alone."""
    record = attachment_of(model)
    if record is not None:
        record.detach()


def _patch(module: nn.Module, path: str, decision: plan.Decision, strict: bool) -> Patch:
    name = slot(module)
    assert decision.forward is not None and decision.spec is not None
    decision.spec.strict, decision.spec.of = strict, id(module)
    bound = MethodType(decision.forward, module)
    patch = Patch(
        module=module,
        path=path,
        forward=bound,
        original=module.__dict__.get(name),
        spec=decision.spec,
        op=decision.op,
        static_ops=decision.static_ops,
    )
    module.__dict__[name] = bound
    module.__dict__[KEY] = decision.spec
    return patch


def _refuse_eager(record: Attachment) -> None:
    faults = [str(line) for line in record.report if line.eager]
    if faults:
        raise ConfigError.from_faults(faults, where="attach(strict=True): these would run eager")


def _require_backend() -> None:
    if not interpreting() and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "attach: PyTorch sees no CUDA device here, and the ops of backend 'fast' are GPU kernels. Run on a machine "
            "with an NVIDIA GPU and a CUDA build of PyTorch, use backend='trl', or set TRITON_INTERPRET=1 before "
            "Python starts (for tests only: about 1000x slower)."
        )
