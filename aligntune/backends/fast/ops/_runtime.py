"""What every Triton op shares: the table of kernels, the device check, and the row view that kernels walk.

An op never falls back. Where its kernel cannot run it raises; the torch twin is another function, `<op>_reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from aligntune.errors import BackendUnavailableError, ConfigError

# Triton decides when a kernel is decorated, so the answer is taken once: setting the variable later does nothing.
_INTERPRETING = bool(triton.knobs.runtime.interpret)

# Where no GPU is present (the interpreter, compile checks) grids are sized as for an H100.
SM_COUNT_WITHOUT_GPU = 132

# name -> launchable kernel; the name is also the one that a profiler trace shows.
KERNELS: dict[str, Any] = {}


def interpreting() -> bool:
    """True where TRITON_INTERPRET=1 was set before Triton was imported: kernels then run in numpy, on any device."""
    return _INTERPRETING


def kernel(fn: Callable[..., Any] | None = None, **jit_options: Any) -> Any:
    """`triton.jit`, plus an entry in `KERNELS`; use as `@kernel` or `@kernel(do_not_specialize=[...])`.

    Helpers that are only called from kernels stay plain `@triton.jit`. Raises ValueError for a name already taken.
    """
    if fn is None:
        return functools.partial(kernel, **jit_options)
    name = fn.__name__
    if name in KERNELS and KERNELS[name].fn.__module__ != fn.__module__:
        raise ValueError(f"two kernels are named {name!r}: in {KERNELS[name].fn.__module__} and in {fn.__module__}")
    launchable = triton.jit(fn, **jit_options)
    if _INTERPRETING:
        # An interpreted launch leaves nothing in a profiler trace; this leaves the name the GPU would have left.
        launchable.add_pre_run_hook(functools.partial(_record_launch, name))
    KERNELS[name] = launchable
    return launchable


def _record_launch(name: str, *_args: Any, **_kwargs: Any) -> None:
    with torch.profiler.record_function(name):
        pass


def require_device(*tensors: torch.Tensor | None) -> None:
    """Raise BackendUnavailableError unless every tensor is where a kernel can read it; None is skipped.

    And ConfigError for float64: kernels compute in fp32, and would say nothing of it.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            raise ConfigError("a Triton kernel was given float64, and computes in fp32: attach(model) anew leaves "
                              "modules of that type to torch, and model.float() is what kernels compute with")
        if not _INTERPRETING and not tensor.is_cuda:
            raise BackendUnavailableError(
                f"a Triton kernel was given a tensor on {str(tensor.device)!r}: backend 'fast' needs an NVIDIA GPU. "
                "Use backend='trl' on this machine, or set TRITON_INTERPRET=1 before Python starts (for tests only: "
                "about 1000x slower)."
            )


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which launches go to `tensor`'s GPU: Triton uses the current device, whatever it is given."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@functools.cache
def _sm_count(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_sms(tensor: torch.Tensor | None = None) -> int:
    """Streaming multiprocessors of `tensor`'s GPU (of the current one for None); 132 where there is no GPU."""
    if tensor is not None and not tensor.is_cuda or not torch.cuda.is_available():
        return SM_COUNT_WITHOUT_GPU
    return _sm_count(torch.cuda.current_device() if tensor is None else tensor.device.index)


@functools.cache
def _shared_memory(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).shared_memory_per_block_optin)


def shared_memory(tensor: torch.Tensor) -> int:
    """Bytes of shared memory that a program may take on `tensor`'s GPU; an H100's where there is no GPU."""
    return _shared_memory(tensor.device.index) if tensor.is_cuda else 227 * 1024


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, and 1 for n <= 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def cdiv(numerator: int, denominator: int) -> int:
    """Ceiling of a quotient of non-negative integers."""
    return -(-numerator // denominator)


def has_rows(x: torch.Tensor) -> bool:
    """True if the last dimension is contiguous; any other stride is fine, 0 included."""
    return x.shape[-1] <= 1 or x.stride(-1) == 1


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View `(..., H)` as `(T, H)` with one row stride, which may be anything (0 included); copies only where it must.

    A tensor that `sum().backward()` expanded from one number has last stride 0: one row of it is copied, not all.
    The result may share memory with `x` and must not be written to.
    """
    if not has_rows(x):
        leading = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        if x.numel() and not any(leading):
            row = x[(0,) * (x.dim() - 1)].contiguous()
            return row.expand(x.numel() // x.shape[-1], x.shape[-1])
        x = x.contiguous()
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
