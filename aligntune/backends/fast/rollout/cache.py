"""The paged key/value cache: one block of device memory, and who holds which page of it.

Memory stays at its addresses for the life of the pool, because captured graphs read and write there; between rollouts
its contents mean nothing. A page that several completions share (whole pages of their prompt) has several holders.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

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
    """

    def __init__(
        self, *, layers: int, k_heads: int, head_dim: int, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if pages < 2:
            raise ConfigError(f"a cache of {pages} pages holds nothing")
        self.memory = torch.zeros((layers, 2, pages, k_heads, PAGE, head_dim), dtype=dtype, device=device)
        self.layers = [(self.memory[i, 0], self.memory[i, 1]) for i in range(layers)]
        self._holders = [0] * pages
        self._free = list(range(pages - 1, 0, -1))
        self.most_used = 0

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
        source, target = (torch.tensor(side, device=self.memory.device) for side in zip(*pairs, strict=True))
        self.memory.index_copy_(2, target, self.memory.index_select(2, source))
