"""Python's garbage collector, out of the way."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_open, _enabled = 0, False


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in any thread while this is open; when the last that is open ends, as before."""
    global _open, _enabled
    with _lock:
        if not _open:
            _enabled = gc.isenabled()
            gc.disable()
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open and _enabled:
                gc.enable()
