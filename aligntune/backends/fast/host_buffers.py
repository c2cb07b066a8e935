"""Pinned buffers in host memory: inputs of layers wait there for their backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PIECE = 1 << 26
"""Bytes of a pinned buffer at most: torch rounds each up to a power of two, a layer's 2.6 GiB to 4."""
HOST_SHARE = 0.9
"""Of the host memory that is free when the first input is kept, what inputs may take."""


def host_room() -> int | None:
    """Bytes of host memory that this process could still take, within its control group; None where nothing tells."""
    def number(path: str, name: str | None = None) -> int | None:
        try:
            lines = Path(path).read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        words = [line.split() for line in lines]
        found = next((line[-1 if name is None else 1] for line in words if name is None or line[0] == name), "")
        return int(found) if found.isdigit() else None

    available = number("/proc/meminfo", "MemAvailable:")
    rooms = [] if available is None else [available << 10]
    limit, used = number("/sys/fs/cgroup/memory.max"), number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        rooms.append(limit - used + (number("/sys/fs/cgroup/memory.stat", "inactive_file") or 0))
    return max(0, min(rooms)) if rooms else None


@dataclass
class HostBuffers:
    """Pinned buffers for layer inputs, copied out and back on a stream of their own while layers are computed.

    Two inputs at most are on their way out, and one on its way back: those are what the GPU holds besides the input of
    the layer at hand. Buffers are lent by size and used again. On a CPU, where there is nothing to move, an input is
    cloned into them. `room`: bytes that may still be allocated; None until the first is.

    What a CUDA graph was captured with is `captured`, and lent to captures alone from then on: between the replays of
    a forward and its backward a launched step would write over the inputs that wait there, and one that never comes to
    its backward would give memory away that replays write to. Graphs share it as they share their memory pool.
    """

    free: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    captured: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    leaving: list[tuple[torch.Tensor, torch.cuda.Event]] = field(default_factory=list)
    stream: torch.cuda.Stream | None = None
    room: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HostBuffers, ()  # a copied or pickled model has its own

    def out(self, tensor: torch.Tensor) -> Waiting | None:
        """Start the copy of a contiguous `tensor`. None: the host is full."""
        hosts = self._lend(tensor)
        if hosts is None:
            return None
        shelf = self._shelves(tensor.device)[0]
        waiting = Waiting(self, hosts, shelf, tensor.shape, tensor.dtype, tensor.device)
        pairs = list(_pieces(hosts, tensor))
        if not tensor.is_cuda:
            for place, piece in pairs:
                place.copy_(piece)
            return waiting
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        self.settle(keep=1)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for place, piece in pairs:
                place.copy_(piece, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        # Held until the copy is over: the allocator knows of the other stream's reading by nothing else.
        self.leaving.append((tensor, event))
        return waiting

    def _lend(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Buffers that hold the tensor's bytes together, all but the last of `PIECE`."""
        whole, rest = divmod(tensor.nbytes, PIECE)
        sizes = [PIECE] * whole + ([1 << (rest - 1).bit_length()] if rest else [])
        shelves = self._shelves(tensor.device)
        ready = {size: sum(len(shelf.get(size, ())) for shelf in shelves) for size in sizes}
        new = sum(size * max(0, sizes.count(size) - count) for size, count in ready.items())
        if self.room is None:
            found = host_room()
            self.room = float("inf") if found is None else HOST_SHARE * found
        if new > self.room:
            return None
        self.room -= new
        lent = []
        for size in sizes:
            held = next((shelf[size] for shelf in shelves if shelf.get(size)), None)
            lent.append(held.pop() if held else torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda))
        return lent

    def _shelves(self, device: torch.device) -> list[dict[int, list[torch.Tensor]]]:
        """Where buffers are taken from, in this order; the first is where they are given back to."""
        return [self.captured, self.free] if capturing(device) else [self.free]

    def settle(self, *, keep: int = 0) -> None:
        """Let the computing stream wait for all copies out but the last `keep`, and let go of what they read."""
        while len(self.leaving) > keep:
            _, event = self.leaving.pop(0)
            torch.cuda.current_stream().wait_event(event)

    def back(self, waiting: Waiting) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start the copy back; the tensor is there once the event, if any, has been waited for."""
        tensor = torch.empty(waiting.shape, dtype=waiting.dtype, device=waiting.device)
        event = None
        if self.stream is None:
            for place, piece in _pieces(waiting.hosts, tensor):
                piece.copy_(place)
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for place, piece in _pieces(waiting.hosts, tensor):
                    piece.copy_(place, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
        waiting.give_back()
        return tensor, event


def _pieces(hosts: list[torch.Tensor], tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each buffer's used bytes, and the bytes of the contiguous `tensor` that belong there."""
    data, start = tensor.view(-1).view(torch.uint8), 0
    for host in hosts:
        piece = data[start : start + host.nbytes]
        yield host[: piece.nbytes], piece
        start += piece.nbytes


@dataclass(eq=False)
class Waiting:
    """The input of a layer in host memory, and then on its way back.

    Its place is given back to the `shelf` when it leaves, or when nobody waits for it any more: a forward may never
    come to its backward. Copies into that place are all on one stream, the next one behind those of before.
    """

    buffers: HostBuffers
    hosts: list[torch.Tensor]
    shelf: dict[int, list[torch.Tensor]]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    fetched: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
    taken: bool = False

    def give_back(self) -> None:
        """Let others have the place."""
        hosts, self.hosts = self.hosts, []
        for host in hosts:
            self.shelf.setdefault(host.nbytes, []).append(host)

    __del__ = give_back

    def fetch(self) -> None:
        """Start the copy back, unless it was started."""
        if self.fetched is None and not self.taken:
            self.fetched = self.buffers.back(self)

    def take(self) -> torch.Tensor:
        """The input, when it is there; its place in host memory is lent to others then.

        Raises:
            RuntimeError: it was taken before.
        """
        self.fetch()
        if self.fetched is None:
            raise RuntimeError("a second backward through an offloaded layer: its input is gone with the first")
        tensor, event = self.fetched
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        self.fetched, self.taken = None, True
        return tensor


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
