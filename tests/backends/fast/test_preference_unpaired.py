"""KTO on rows end to end gives TRL's loss, gradients and metrics."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from tests.backends.fast.preference_steps import assert_same_step, both_steps, ids

LENGTHS = ((3, 4), (1, 1), (5, 7), (2, 3), (4, 2), (6, 1), (1, 8), (3, 5))


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def unpaired(label: Any = lambda i: i % 3 > 0, lengths: Any = LENGTHS) -> Dataset:
    return Dataset.from_list([
        {"prompt_ids": ids(i, prompt), "completion_ids": ids(i + 50, completion), "label": label(i)}
        for i, (prompt, completion) in enumerate(lengths)
    ])  # fmt: skip


@pytest.mark.parametrize(("loss_type", "adapters"), [
    ("kto", True), slow("kto", False), slow("apo_zero_unpaired", True), slow("apo_zero_unpaired", False)])
def test_a_step(loss_type: str, adapters: bool, tmp_path: Any) -> None:
    options = {"loss_type": loss_type, "beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.4,
               "size": -0.2 if adapters else 0.1}
    ours, theirs, layout = both_steps("kto", tmp_path, rows=unpaired(), use_peft=adapters, **options)
    assert layout.startswith("rows: end to end, one forward a pass")
    assert_same_step(ours, theirs)
    assert abs(theirs[2]["rewards/margins"]) > 1e-3
    # The policy is likelier than its reference on other rows' completions, or z_0 would be 0.
    assert theirs[2]["kl"] > 0.1 or loss_type != "kto"


@pytest.mark.parametrize("good", [True, slow(False)])
def test_rows_of_one_label(good: bool, tmp_path: Any) -> None:
    ours, theirs, _ = both_steps("kto", tmp_path, rows=unpaired(lambda _: good), use_peft=True, beta=0.3)
    assert_same_step(ours, theirs)
    assert ("rewards/rejected" in theirs[2]) != good and "rewards/margins" not in theirs[2]
