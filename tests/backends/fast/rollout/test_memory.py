"""How much memory the cache of a rollout takes where nobody says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from aligntune.backends.fast.rollout import RolloutEngine
from aligntune.backends.fast.rollout.cache import PAGE
from aligntune.backends.fast.rollout.engine import too_small_because
from aligntune.errors import ConfigError
from tests.backends.fast.rollout.test_engine import mini


def test_the_cache_takes_a_share_of_what_is_free(monkeypatch):
    """Of what the driver has, and of what torch holds and does not use; pages of 6 KiB, in each of which 16 tokens."""
    model, card, page = mini(), torch.device("cuda", 3), 6144
    room = {"free": 100 * page, "reserved": 70 * page, "allocated": 50 * page, "share": 1.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room["free"] * (device == card), 1000 * page))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: room["share"])
    for name in ("reserved", "allocated"):
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda device, name=name: room[name] * (device == card))
    assert too_small_because(model, max_len=10**9) is None  # nothing bounds a CPU's
    engine = RolloutEngine(model, max_batch=64, max_len=64)
    narrow = RolloutEngine(model, max_batch=2, max_len=64)
    fixed = RolloutEngine(model, max_batch=64, max_len=64, memory_gib=11 * page / 2**30)
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=card)]))
    # 30% of 100 + 70 - 50 pages, which hold 34 pages and 2; what rows need, where that is less; what was asked for.
    assert [one._new_pool().capacity + 1 for one in (engine, narrow, fixed)] == [36, 2 * 4 + 2, 11]
    room["share"] = 1 / 8  # of the card's 1,000 pages, of which 50 are taken
    assert engine._new_pool().capacity + 1 == 22
    room["share"] = 1.0
    assert too_small_because(model, max_len=34 * PAGE) is None
    assert too_small_because(model, max_len=34 * PAGE + 1) == (
        "one row of 545 tokens needs 0.217 MiB, 0.211 MiB of cache are there; set rollout_memory_gib or shorten it")
    room |= {"free": 0, "reserved": 60 * page}
    with pytest.raises(ConfigError, match=r"rollout memory: one row of 64 tokens needs 0\.0352 MiB, 0\.0176 MiB"):
        engine._new_pool()
