"""Recording a CUDA graph so that nothing of the rest of the process ends it; what cannot be, and where it reads.

A capture ends with an error where a call is made meanwhile that CUDA cannot record: memory that is freed, a module that
is unloaded, a graph of before that is destroyed. Python's collector makes such calls when it finds a cycle that holds
one, at any moment and in any thread; other threads make them in their own affairs (a data loader's pins memory).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aligntune.backends.fast import families
from aligntune.backends.fast.rollout.rope import length_limit
from aligntune.core.garbage import uncollected


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, *, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """What runs within is recorded in `graph`: no garbage is collected, and what other threads call is not looked at.

    Args:
        pool: of the memory that the graph writes to, from `torch.cuda.graph_pool_handle`.
        stream: to record on.
    """
    with uncollected(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        yield


def waits_because(base: Any) -> str | None:
    """Why a forward of a transformers model waits for the GPU, which a capture does not outlast; None where none does.

    That of rows of any length: a rollout keeps to those for which a rotary embedding has no choice.
    """
    limit = length_limit(base.config.get_text_config())
    if limit is None:
        return router_waits_because(base)
    return f"its rotary embedding of type {limit[0]!r} chooses by the longest row, and waits for its length"


def router_waits_because(base: Any) -> str | None:
    """Why the routed experts of a transformers model cannot be captured; None where they can, or there are none."""
    config = base.config.get_text_config()
    family = families.family_of(config.model_type)
    if family is None or family.mlp != "experts":
        return None
    experts = getattr(config, "_experts_implementation", "eager")
    if experts not in ("grouped_mm", "batched_mm"):
        return f"routed experts run as {experts!r}, which waits for the router"
    dtype = base.get_input_embeddings().weight.dtype
    if experts == "grouped_mm" and dtype != torch.bfloat16:  # torch then loops over the groups, on the CPU
        return f"torch's grouped product waits for the router in {str(dtype).removeprefix('torch.')}"
    return None


class Addresses:
    """Where a model's tensors lie. A graph reads them there, also when a parameter has long got another place.

    Places are read anew each time (a 4-bit parameter that moves is another object afterwards), modules are not: those
    that come later are in no graph.
    """

    def __init__(self, model: Any) -> None:
        held = [(tensors, name) for module in model.modules() for tensors in (module._parameters, module._buffers)
                for name, tensor in tensors.items() if tensor is not None]
        self._plain = [(tensors, name) for tensors, name in held if not hasattr(tensors[name], "quant_state")]
        self._four_bits = [(tensors, name) for tensors, name in held if hasattr(tensors[name], "quant_state")]

    def trained(self) -> list[bool]:
        return [tensors[name].requires_grad for tensors, name in self._plain]

    def now(self) -> list[int]:
        # Params4bit answers `data_ptr` through Python: ten times as long.
        with torch._C.DisableTorchFunctionSubclass():
            found = [tensors[name].data_ptr() for tensors, name in self._plain]
            for tensors, name in self._four_bits:
                state = tensors[name].quant_state
                parts = [tensors[name], state.absmax, state.code]
                if state.nested:
                    parts += [state.offset, state.state2.absmax, state.state2.code]
                found += [part.data_ptr() for part in parts]
        return found
