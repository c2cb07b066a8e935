"""The paged key/value cache: one block of device memory, and who holds which page of it.

The memory is there while rows run, and training's in between, when its contents would mean nothing. It comes to lie
elsewhere each time: the kernels of a captured step read where from the device (`ops.decode_attention.Place`). A page
that several completions share (whole pages of their prompt) has several holders.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch

from aligntune.backends.fast.ops.decode_attention import Place
from aligntune.errors import ConfigError

PAGE = 16
"""Tokens a page: a completion wastes half of one on average, and a key head's piece of it is 2 KiB in bf16 at 64."""


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class PagePool:
    """Pages of every layer's keys and values. Page 0 has no holder: rows that are done write there.

    Args:
        layers, k_heads, head_dim: the model's.
        pages: how many, page 0 included.
        dtype, device: of the cache.

    `memory`: (layers, 2, pages, k_heads, PAGE, head_dim); None while the pool has none. `nbytes`: what it takes then.
    """

    def __init__(
        self, *, layers: int, k_heads: int, head_dim: int, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if pages < 2:
            raise ConfigError(f"a cache of {pages} pages holds nothing")
        self._shape = (layers, 2, pages, k_heads, PAGE, head_dim)
        self._anchor = torch.zeros(PAGE, dtype=dtype, device=device)
        self._elements = torch.zeros((layers, 2), dtype=torch.int64, device=device)
        self.nbytes = math.prod(self._shape) * dtype.itemsize
        self.memory: torch.Tensor | None = None
        self._holders = [0] * pages
        self._free = list(range(pages - 1, 0, -1))
        self.most_used = 0

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """While open the pool has memory, which may hold anything.

        Raises:
            torch.OutOfMemoryError: the device has less left.
        """
        stood = self.memory is not None
        try:
            if not stood:
                self.memory = torch.empty(self._shape, dtype=self._anchor.dtype, device=self._anchor.device)
                if self.memory.dtype != torch.float64:  # which no kernel takes
                    self._say_where(self.memory)
            yield
        finally:
            if not stood:
                self.memory = None

    def _say_where(self, memory: torch.Tensor) -> None:
        apart = memory.data_ptr() - self._anchor.data_ptr()
        assert apart % (PAGE * memory.itemsize) == 0
        first, step, line = apart // memory.itemsize, memory.stride(1), self._elements.view(-1)
        torch.arange(first, first + step * len(line), step, out=line)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor, Place]:
        """A layer's pages of keys and of values, (pages, k_heads, PAGE, head_dim) each, and where they lie."""
        assert self.memory is not None
        return self.memory[index, 0], self.memory[index, 1], Place(self._anchor, self._elements[index])

    @property
    def layers(self) -> int:
        """How many the pool is of."""
        return self._shape[0]

    @staticmethod
    def page_bytes(*, layers: int, k_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of a page over all layers."""
        return layers * 2 * k_heads * PAGE * head_dim * dtype.itemsize

    @property
    def capacity(self) -> int:
        """Pages that rows can hold."""
        return len(self._holders) - 1

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages with one holder each; the caller has looked at `free`."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        self.most_used = max(self.most_used, self.capacity - len(self._free))
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One holder more for each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} has no holder"
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder fewer for each page; without any it is free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is dropped twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the contents of pages, (from, to) each, in every layer."""
        if not pairs:
            return
        assert self.memory is not None
        source, target = (torch.tensor(side, device=self.memory.device) for side in zip(*pairs, strict=True))
        self.memory.index_copy_(2, target, self.memory.index_select(2, source))
