"""One program far down a grid, and flat buffers that long: shows a wrapped int32 offset without running the rest."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.runtime import interpreter


@contextmanager
def first_program(first: int) -> Iterator[None]:
    """Interpreted launches inside see `program_id(0)` count from `first`."""
    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx

    def shifted(x: int, y: int, z: int) -> None:
        plain(x, y, z)
        builder.grid_idx = (x + first, y, z)

    builder.set_grid_idx = shifted
    try:
        yield
    finally:
        builder.set_grid_idx = plain


def far_flat(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A zero buffer of `numel` elements on the CPU whose pages are committed only where something is written.

    As many bytes again lie before it, so that a wrapped offset finds zeros there and not an unmapped page.
    """
    # Python 3.11 does not export MAP_NORESERVE (0x4000), without which the kernel may refuse more than its RAM.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    memory = mmap.mmap(-1, 2 * numel * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)[numel:]
