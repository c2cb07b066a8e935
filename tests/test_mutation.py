"""The mutation script breaks what it says it breaks, and nothing else."""

from __future__ import annotations

import ast
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
        tree = ast.parse(one.source)
        assert ast.dump(tree) != ast.dump(ast.parse(SOURCE))
        assert "SCALE = 2 * 3" in one.source and "x + y." in one.source and "len(x) + 1 > 0" in one.source


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
