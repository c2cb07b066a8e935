"""A reward that costs nothing and differs within every group. Imported by its path, in the arms' interpreters."""

from __future__ import annotations

import zlib
from typing import Any


def drawn(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number in [0, 1) a completion, as good as random: it follows from the token ids."""
    return [zlib.crc32(str(list(map(int, ids))).encode()) / 2**32 for ids in completion_ids]
