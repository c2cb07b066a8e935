"""A reward that costs nothing and differs within every group. Imported by its path, in the arms' interpreters."""

from __future__ import annotations

import hashlib
from typing import Any


def drawn(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number in [0, 1) a completion, as good as random: it follows from the token ids."""
    digests = (hashlib.blake2b(str(list(map(int, ids))).encode(), digest_size=4).digest() for ids in completion_ids)
    return [int.from_bytes(digest, "big") / 2**32 for digest in digests]
