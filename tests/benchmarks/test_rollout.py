"""The rollout benchmark: whose captures a row tells of, what a release costs beside them, and the table of both."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from aligntune.backends.fast import rollout
from benchmarks import rollout as benchmark
from benchmarks import tables
from tests.backends.fast.minis import build


def test_a_row_tells_what_captures_and_a_release_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is captured: the first call of an engine, and the first after a release, say that they did."""

    class Capturing(rollout.RolloutEngine):
        calls = released = 0
        fresh = True

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            found = super().generate(*args, **kwargs)
            type(self).calls += 1
            # Each call is longer than the one before it, and one that captures by half a second.
            found.stats.seconds = self.calls + 0.5 * self.fresh
            found.stats.captures, found.stats.capture_seconds = 2 * self.fresh, 0.5 * self.fresh
            self.fresh = False
            return found

        def release(self) -> None:
            type(self).released += 1
            self.fresh = True
            super().release()

    monkeypatch.setattr(rollout, "RolloutEngine", Capturing, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prompts = benchmark.prompts_of(2, 5, 101)
    entry = benchmark.measure_ours(build("llama"), prompts, argparse.Namespace(memory_gib=0.01, base="bf16"), rows=4,
                                   new=6, bandwidth=None)
    assert (Capturing.calls, Capturing.released) == (7, 3)
    assert (entry["first_call_s"], entry["seconds"], entry["tokens"]) == (1.5, 3.0, 4 * 6)
    assert (entry["captures"], entry["capture_seconds"], entry["later_captures"]) == (2, 0.5, 0)
    assert entry["after_release_s"] == pytest.approx(6.5, abs=0.1)
    assert (entry["after_release_captures"], entry["after_release_capture_s"]) == (2, 0.5)
    assert entry["graphs_gib"] == 0 < entry["cache_gib"]
    assert entry["log_prob_difference_max"] < 1e-4
    line = benchmark.line({"what": "fast, batch 4"} | entry)
    assert "first 1.5 s, 2 captures 0.5 s, 0 later, none: " in line and line.endswith("GiB 6.50 s"), line


def test_the_bytes_of_a_step_are_those_of_the_base_as_it_lies_there() -> None:
    """A smoke model's products: the linears of its layers, and the head; of the embedding a step reads few rows."""
    models = {base: benchmark.model_of("smoke", "cpu", lora=False, base=base) for base in ("bf16", "nf4", "full")}
    found = {base: benchmark.bound_ms(model, 0, 0.0, 1e3, base=base) for base, model in models.items()}
    linears = sum(p.numel() for name, p in models["bf16"].named_parameters()
                  if name.split(".")[-2] in benchmark.TARGETS)
    assert found["full"] == found["bf16"] > 4 * linears > 0  # all in fp32, on a CPU
    # Half a byte a number, and for 64 of them one of scale.
    assert found["bf16"] - found["nf4"] == pytest.approx((4 - 1 / 2 - 1 / 64) * linears, rel=0.01)
    cache = {base: benchmark.bound_ms(models["bf16"], 3, 5.0, 1e3, base=base) - found["bf16"] for base in models}
    assert cache["bf16"] == pytest.approx(2 * cache["full"]) and cache["full"] > 0, "in 16 bits under autocast"


def test_the_table_shows_a_release_where_it_was_measured() -> None:
    theirs = {"what": "generate, batch 8", "tokens_per_second": 100.0, "seconds": 1.0}
    ours = {"what": "fast, batch 8", "tokens_per_second": 4000.0, "seconds": 0.44, "step_ms": 1.5, "bound_ms": 0.8,
            "of_bound": 0.53, "log_prob_difference_mean": 0.02, "cache_gib": 0.1, "peak_gib": 2.9}
    report = {"rows": [theirs, ours], "torch": "2.11", "ceilings": {"bytes_per_s": 3e12}, "device": "a card",
              "command": "c", "commit": "0" * 40}
    assert "release" not in tables.rollout(report)
    report["rows"] = [theirs, ours | {"after_release_s": 1.2, "graphs_gib": 0.31}]
    lines = tables.rollout(report).splitlines()
    assert lines[0].endswith("| peak GiB | a call, s | after a release, s | graphs GiB |")
    assert lines[2].endswith("| - | - | - | - |") and lines[3].endswith("| 2.9 | 0.44 | 1.20 | 0.31 |")
