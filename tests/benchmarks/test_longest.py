"""The search for the longest row: few probes, a true answer, and what every probe said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligntune.errors import ComparisonError
from benchmarks.sft import __main__ as benchmark
from benchmarks.sft.longest import TOLERANCE, following

GIB = 2**30


def straight(tokens: int) -> float:
    return 6 * GIB + tokens * 100_000


def search(
    limit: int, *, memory: float | None, bytes_of: Any = straight, start: int = 65_536, most: int = 1 << 20
) -> Any:
    probes: list[dict[str, Any]] = []
    while (tokens := following(probes, start=start, most=most, memory=memory)) is not None:
        assert tokens not in [one["tokens"] for one in probes] and 0 < tokens <= max(most, start)
        fits = tokens <= limit
        probes.append({"tokens": tokens, "fits": fits} | ({"peak_bytes": bytes_of(tokens)} if fits else {}))
        assert len(probes) < 30
    return probes


def best(probes: Any) -> int:
    return max((one["tokens"] for one in probes if one["fits"]), default=0)


@pytest.mark.parametrize("limit", [700, 5_000, 65_535, 65_536, 100_000, 342_733, 612_345])
@pytest.mark.parametrize("memory", [None, 80 * GIB])
def test_what_is_found_is_within_two_percent(limit: int, memory: float | None) -> None:
    """Also where the card's memory says something else than what fits."""
    probes = search(limit, memory=memory, bytes_of=straight)
    assert best(probes) <= limit < best(probes) * (1 + TOLERANCE) + 256
    assert len(probes) < 16


def test_a_straight_line_takes_few_probes() -> None:
    limit = int((0.97 * 80 * GIB - 6 * GIB) / 100_000)
    probes = search(limit, memory=80 * GIB, bytes_of=straight)
    assert [one["tokens"] for one in probes[:2]] == [65_536, 131_072]
    assert best(probes) > limit * 0.98 and len(probes) <= 6 < len(search(limit, memory=None, bytes_of=straight))


def test_it_ends_where_it_was_told_to() -> None:
    assert best(search(1 << 30, memory=None, most=200_000)) == 200_000
    assert best(search(10, memory=None)) == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Out of memory, a process that dies and a length that fits, each in the report as it came."""
    out, asked = tmp_path / "out.json", []

    def run(spec: Any, arm: Any) -> dict[str, Any]:
        tokens = spec.overrides["max_seq_length"]
        asked.append((arm.label, tokens, json.loads(out.read_text())["rows"][-1]["longest"] if out.exists() else None))
        assert spec.fill and not spec.probe and spec.config["batch_size"] == 1 and spec.config["max_steps"] == 2
        config = json.loads((Path(spec.config["model_name"]) / "config.json").read_text())
        assert config["max_position_embeddings"] == 4000 and config["hidden_size"] == 64
        if tokens > 2000:
            raise ComparisonError("arm ended with exit code -9 and no result; log:\n  Killed")
        if tokens > 1500:
            return {"status": "out of memory", "kind": "OutOfMemoryError", "message": "no room"}
        step = {"seconds": tokens / 100, "loss": 2.0, "tokens": tokens}
        return {"status": "ok", "memory": {"peak_allocated": tokens << 20, "peak_reserved": tokens << 21},
                "steps": [step | {"seconds": 99.0}, step], "attestation": None,
                "environment": {"python": "3.12", "packages": {"torch": "2", "numpy": "1"}}}

    args = ["--longest", "smoke", "--start", "600", "--most", "4000", "--json", str(out)]
    assert benchmark.main(args, run) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert [tokens for _, tokens, _ in asked][:3] == [600, 1200, 2400] and asked[2][2] == 1200
    assert {label for label, *_ in asked} == {"fast-offload"}
    assert 1500 * 0.8 < row["longest"] <= 1500 and row["peak_gib"] == row["longest"] / 1024
    assert row["step_s"] == row["longest"] / 100 and row["stopped"] is None and row["row"] == "smoke, longest"
    assert row["probes"][0]["versions"] == {"python": "3.12", "torch": "2"}
    why = [one["why"] for one in row["probes"] if not one["fits"]]
    assert why[0].endswith("Killed") and "out of memory: OutOfMemoryError: no room" in why
    assert "tokens: 1.17 GiB (reserved 2.34), 12.0 s a step" in capsys.readouterr().out


def test_no_probe_begins_that_there_is_no_time_for(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def run(spec: Any, arm: Any) -> dict[str, Any]:
        raise AssertionError

    assert benchmark.main(["--longest", "smoke", "--minutes", "0", "--json", str(out)], run) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["longest"] is None and row["probes"] == [] and "no time for 65,536 tokens" in row["stopped"]
