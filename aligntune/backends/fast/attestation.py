"""What ran: kernel names and counts from a profiler trace of one step, held against what the attachment promises.

On a GPU the trace's CUDA kernels are counted, graph replays included. Triton's interpreter leaves no kernels in
a trace; there each interpreted kernel opens a `record_function` of its name at the launch itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from aligntune.backends.fast import ledger
from aligntune.backends.fast.ops._runtime import KERNELS, interpreting
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.backends.fast.attachment import Attachment, Line


# Under these names PEFT keeps a module and its trained copies, of which one runs.
_ALTERNATIVES = frozenset(("original_module", "modules_to_save"))


@dataclass(frozen=True)
class Attestation:
    """One step of one attached model.

    `kernels`: name -> launches in the trace; `promised`: name -> the least number that the table promises for the calls
    of this step. `replayed`: no Python forward ran, graphs were replayed. `problems`: promises that the trace does not
    bear out. `lines`: the attachment's report at that time.
    """

    interpreter: bool
    device: str
    backward: bool
    replayed: bool
    kernels: dict[str, int]
    promised: dict[str, int]
    problems: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """True if every promise was kept; lines that say "eager" are no broken promises."""
        return not self.problems

    @property
    def eager(self) -> tuple[str, ...]:
        """The lines of the report that say what does not run through an op, and why."""
        return tuple(str(line) for line in self.lines if line.eager)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return {**asdict(self), "ok": self.ok, "summary": [str(line) for line in self.lines]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        where = f"{self.device}, Triton's interpreter" if self.interpreter else self.device
        rows = [f"{name}: {count} (promised {self.promised.get(name, 0)})" for name, count in self.kernels.items()]
        verdict = ["every promise was kept"] if self.ok else [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([f"kernels in one step, on {where}:", *rows, *map(str, self.lines), *verdict])


def attest(
    attachment: Attachment, step: Callable[[], Any], *, beside: Mapping[str, Attachment] = MappingProxyType({})
) -> Attestation:
    """Run `step` once, traced, and say what ran.

    Args:
        attachment: what `attach` returned for the model that `step` trains.
        step: forward and backward of one step (an optimizer step may follow); it is run exactly once.
        beside: attachments of other models that every step runs, by what they are called in the report.
    Raises:
        ConfigError: the attachment is strict, and a promise was broken or something ran eager.
    """
    if ledger.attesting():
        raise RuntimeError("a step is being attested already; attest one at a time")
    with ledger.writing() as promises:
        observed, backward = trace(step)
    replayed = not promises.entries
    if replayed and not promises.replays:
        promises = _static([attachment, *beside.values()])
    promised = promises.launches(backward=backward)
    problems = [
        f"{kernel}: the table promises {least} launches in this step, the trace shows {observed[kernel]}"
        for kernel, least in sorted(promised.items())
        if observed[kernel] < least
    ]
    problems += _untouched(attachment, promises)
    problems += [f"{name}: {text}" for name, other in beside.items() for text in _untouched(other, promises)]
    result = Attestation(
        interpreter=interpreting(),
        device=_device(attachment.model),
        backward=backward,
        replayed=replayed,
        kernels=dict(sorted(observed.items())),
        promised=dict(sorted(promised.items())),
        problems=tuple(problems),
        lines=report_of(attachment, beside),
    )
    if attachment.strict and (result.problems or result.eager):
        raise ConfigError.from_faults([*result.problems, *result.eager], where="the attested step (strict=True)")
    return result


def trace(step: Callable[[], Any]) -> tuple[Counter[str], bool]:
    """Launches of our kernels during `step`, by name, and whether a backward ran in it."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    observed: Counter[str] = Counter()
    backward = False
    for name, on_gpu in _recorded(profiler):
        if on_gpu and (kind := ledger.attention_kernel(name)) is not None:
            observed[kind] += 1
        elif (name in KERNELS and (on_gpu or interpreting())) or (name in ledger.NODES and not on_gpu):
            observed[name] += 1
        elif name.startswith("autograd::engine::evaluate_function"):
            backward = True
    # A replayed graph runs no autograd engine: there a backward shows as the backward's own kernels.
    return observed, backward or any("backward" in name for name in observed)


def _recorded(profiler: profile) -> Iterator[tuple[str, bool]]:
    """(name, whether the GPU ran it) of every event."""
    results: Any = getattr(profiler.profiler, "kineto_results", None)
    if hasattr(results, "events"):  # as recorded: torch's own list takes 40 us an event, seconds for a whole rollout
        for event in results.events():
            yield event.name(), event.device_type() == DeviceType.CUDA
    else:
        for event in profiler.events():
            yield event.name, event.device_type == DeviceType.CUDA


def report_of(attachment: Attachment, beside: Mapping[str, Attachment]) -> tuple[Line, ...]:
    """The lines of an attachment, and those of others under their names."""
    others = [replace(line, modules=f"{name}: {line.modules}") for name, other in beside.items()
              for line in other.report]
    return (*attachment.report, *others)


def _static(attachments: list[Attachment]) -> ledger.Ledger:
    """Where no forward ran and no capture left its promises (someone else's graph): one call of each module."""
    promises = ledger.Ledger()
    for patch in (patch for attachment in attachments for patch in attachment.patches):
        for op in patch.static_ops:
            promises.entries[id(patch.module), op] = ledger.Entry(calls=1, with_grad=0)
    return promises


def _untouched(attachment: Attachment, promises: ledger.Ledger) -> list[str]:
    """Modules that have an op and did not use it, by path."""
    called = promises.modules()
    problems = []
    for patch in attachment.patches:
        if not patch.in_place():
            problems.append(f"{patch.path}: its forward has been replaced since attach; attach again")
        elif (
            patch.static_ops
            and id(patch.module) not in called
            and not _ALTERNATIVES.intersection(patch.path.split("."))
        ):
            problems.append(f"{patch.path}: did not call {', '.join(patch.static_ops)} in this step")
    return problems


def _device(model: torch.nn.Module) -> str:
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cuda":
        return str(parameter.device) if parameter is not None else "none"
    return torch.cuda.get_device_name(parameter.device)
