"""The mutation script breaks what it says it breaks, and nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests import mutation
from tests.mutation import TARGETS, mutants

SOURCE = '''
"""1 + 1 in words."""
SCALE = 2 * 3


def loss(x, mask, beta: float = 1 - 0.5):
    """x + y."""
    assert len(x) + 1 > 0, f"{1 + 1}"
    if not len(x) < 3:
        raise ValueError("a" + "b")
    kl = -(x[1:] - x[0]) * mask
    return kl.sum() / mask.mean() + beta
'''


def test_each_kind_breaks_its_places() -> None:
    found = {(one.kind, one.before, one.after) for one in mutants(SOURCE)}
    assert found == {
        ("sign", "kl.sum() / mask.mean() + beta", "kl.sum() / mask.mean() - beta"),
        ("sign", "-(x[1:] - x[0])", "x[1:] - x[0]"), ("sign", "x[1:] - x[0]", "x[1:] + x[0]"),
        ("scale", "-(x[1:] - x[0]) * mask", "-(x[1:] - x[0]) / mask"),
        ("scale", "kl.sum() / mask.mean()", "kl.sum() * mask.mean()"),
        ("off by one", "len(x) < 3", "len(x) <= 3"), ("off by one", "1:", "1 + 1:"), ("off by one", "x[0]", "x[1]"),
        ("dropped term", "x[1:] - x[0]", "x[1:]"), ("dropped term", "kl.sum() / mask.mean() + beta",
                                                   "kl.sum() / mask.mean()"),
        ("mean for sum", "kl.sum", "kl.mean"), ("mean for sum", "mask.mean", "mask.sum"),
    }
    for one in mutants(SOURCE):
        broken = one.source(SOURCE)
        assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(SOURCE))
        assert one.after in broken and broken.count("\n") == ast.unparse(ast.parse(SOURCE)).count("\n")
        assert "SCALE = 2 * 3" in broken and "x + y." in broken and "len(x) + 1 > 0" in broken


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_there(target: str) -> None:
    path, tests = TARGETS[target]
    assert len(list(mutants((mutation.ROOT / path).read_text(), target))) >= 5
    assert all((mutation.ROOT / test).exists() for test in tests)


@pytest.mark.mutation
def test_a_broken_mask_is_noticed(tmp_path: Path) -> None:
    folder = mutation.copy_of_the_package(tmp_path)
    one = next(one for one in mutants((mutation.ROOT / TARGETS["compare_batches"][0]).read_text(), "compare_batches")
               if one.kind == "off by one")
    assert mutation.run_tests(folder, TARGETS["compare_batches"][1], seconds=300)
    assert mutation.check_mutant(folder, one, seconds=300)


def test_a_draw_takes_as_many_of_each_target_and_the_same_ones_again() -> None:
    targets = ["dpo", "compare_gradients", "kto"]
    found = mutation.drawn(targets, 20, seed=3)
    assert [len(found[target]) for target in targets] == [7, 7, 6]
    assert found == mutation.drawn(targets, 20, seed=3) != mutation.drawn(targets, 20, seed=4)
    assert found["dpo"] == mutation.drawn(["dpo"], 7, seed=3)["dpo"]
    everything = mutation.drawn(targets, None, seed=3)
    assert all(set(found[target]) < set(everything[target]) for target in targets)
    assert mutation.drawn(["compare_gradients"], 10**6, seed=0).keys() == {"compare_gradients"}


def test_the_report_adds_up() -> None:
    found = mutation.drawn(["dpo"], 5, seed=0)["dpo"]
    one = mutation.section("dpo", found, found[:2], seed=0)
    assert (one["tried"], one["killed"], one["seed"]) == (5, 3, 0) and one["mutants"] > 20
    assert all(line.startswith("aligntune/algorithms/dpo.py:") and "  ->  " in line for line in one["survivors"])
    report = mutation.totals({"dpo": one, "kto": {"tried": 3, "killed": 3}})
    assert (report["tried"], report["killed"], report["share"]) == (8, 6, 0.75)
    committed = json.loads(mutation.REPORT.read_text())
    assert mutation.totals(committed["targets"]) == committed


def test_the_committed_report_is_of_every_target_and_its_tests() -> None:
    committed = json.loads(mutation.REPORT.read_text())
    assert {name: (one["file"], tuple(one["tests"])) for name, one in committed["targets"].items()} == TARGETS
    assert committed["share"] >= 0.8 and all(one["tried"] >= 4 for one in committed["targets"].values())
    for one in committed["targets"].values():
        assert len(one["survivors"]) == one["tried"] - one["killed"]
