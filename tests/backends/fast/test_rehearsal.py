"""The longest batch first: that memory runs out at once, and that a run is the same with the pass and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from aligntune.backends.fast import rehearsal
from aligntune.backends.fast.rehearsal import lengths_of, longest_batch
from aligntune.backends.fast.trainers import FastSFT
from tests.backends.fast.test_rows_end_to_end import rows, run, trainer_of

# Of 24 rows a few are long: no batch of the first steps is as long as the longest of all draws.
UNEVEN = tuple(60 if i in (17, 18, 20) else 3 + i % 4 for i in range(24))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Flat lengths of the passes before a first step, which a CPU makes too."""
    found: list[int] = []
    real = rehearsal.rehearse

    def rehearse(*args: Any, **kwargs: Any) -> int | None:
        tokens = real(*args, **kwargs)
        found.append(-1 if tokens is None else tokens)
        return tokens

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    monkeypatch.setattr(rehearsal, "wanted", lambda trainer: True)
    return found


def test_lengths_are_the_table_s() -> None:
    data = rows((5, 11, 3, 1))
    assert lengths_of(data).tolist() == [5, 11, 3, 1]  # type: ignore[union-attr]
    assert lengths_of(data.select([3, 1])).tolist() == [1, 11]  # type: ignore[union-attr]
    assert lengths_of(data.shuffle(seed=1)).tolist() == [len(ids) for ids in data.shuffle(seed=1)["input_ids"]]  # type: ignore[union-attr]
    assert lengths_of(data.with_format("numpy").filter(lambda row: len(row["input_ids"]) > 3)).tolist() == [5, 11]  # type: ignore[union-attr]
    assert lengths_of(data.with_transform(lambda batch: batch)) is None
    assert lengths_of(data.remove_columns("input_ids")) is None and lengths_of([{"input_ids": [1]}]) is None
    assert lengths_of(data.to_iterable_dataset()) is None


def test_the_longest_of_the_drawn() -> None:
    lengths = np.array([1, 2, 3, 1000])
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = longest_batch(lengths, size=2, batches=1000)
    assert lengths[found].sum() == 2000
    assert lengths[longest_batch(lengths, size=3, batches=1)].sum() <= 3000
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


@pytest.mark.parametrize("options", [
    pytest.param({}, id="full", marks=pytest.mark.slow),
    pytest.param({"gradient_accumulation_steps": 2, "max_steps": 3}, id="accumulated", marks=pytest.mark.slow),
    pytest.param({"use_peft": True, "lora_dropout": 0.3, "lora_r": 4, "optimizer": "adamw"}, id="dropout"),
])
def test_a_run_is_the_same_with_the_pass_and_without(
    options: dict[str, Any], passes: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, weights, log = run(trainer_of("fast", "llama", tmp_path, rows(UNEVEN), **options))
    assert len(passes) == 1 and passes[0] >= 100
    monkeypatch.setattr(rehearsal, "wanted", lambda trainer: False)
    plain_losses, plain_weights, plain_log = run(trainer_of("fast", "llama", tmp_path, rows(UNEVEN), **options))
    assert len(passes) == 1
    assert losses == plain_losses and losses[0] > 1
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    for entry, plain in zip(log, plain_log, strict=True):
        assert {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name} \
            == {name: value for name, value in plain.items() if "runtime" not in name and "per_second" not in name}


def test_rows_of_about_one_length_need_no_pass(passes: list[int], tmp_path: Any) -> None:
    run(trainer_of("fast", "llama", tmp_path, rows((20,) * 12)))
    assert passes == [-1]


def test_memory_that_does_not_suffice_shows_before_the_first_step(
    passes: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    compute_loss = FastSFT.compute_loss

    def scarce(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FastSFT, "compute_loss", scarce)
    built = trainer_of("fast", "llama", tmp_path, rows(UNEVEN))
    with caplog.at_level("INFO"), pytest.raises(torch.OutOfMemoryError):
        built.trainer.train()
    assert built.trainer.state.global_step == 0 and "the longest batch first: 4 rows, " in caplog.text
    assert all(p.grad is None for p in built.trainer.model.parameters())


def test_what_watches_a_run_does_not_see_the_pass(passes: list[int], tmp_path: Any) -> None:
    built = trainer_of("fast", "llama", tmp_path, rows(UNEVEN))
    seen = []
    compute_loss = built.trainer.compute_loss
    built.trainer.compute_loss = lambda *args, **kwargs: (seen.append(1), compute_loss(*args, **kwargs))[1]
    built.trainer.train()
    assert passes[0] >= 100 and len(seen) == 2


def test_a_subset_of_columns_is_enough(passes: list[int], tmp_path: Any) -> None:
    data = rows(UNEVEN)
    without = Dataset.from_list([{"input_ids": ids} for ids in data["input_ids"]])
    run(trainer_of("fast", "llama", tmp_path, without))
    assert passes[0] >= 100
