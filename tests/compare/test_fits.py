"""The search for what fits, with a card that is made up; and the rows that are filled."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

import aligntune
from aligntune.compare.arm import ArmSpec, outcome, too_little_memory
from aligntune.compare.fits import fill, largest, require_card
from aligntune.compare.protocol import in_this_process
from aligntune.compare.settings import Settings, read_arm
from aligntune.errors import BackendUnavailableError, ComparisonError, ConfigError, GpuMemoryError


def search(tmp_path: Path, limit: int, *, start: int, option: str = "batch", arm: str = "trl,batch_size=99"
           ) -> tuple[Any, list[int]]:
    asked: list[int] = []

    def card(spec: Any, _: Any) -> dict[str, Any]:
        name = {"batch": "batch_size", "context": "max_seq_length"}[option]
        value = spec.overrides[name]
        assert spec.fill and spec.overrides["max_steps"] == 3 and spec.overrides["packing"] is False
        asked.append(value)
        return {"status": "ok"} if value <= limit else {"status": "out of memory"}

    settings = Settings("x", {}, {"max_seq_length": 64}, read_arm(arm), read_arm("trl"))
    found = largest(settings, settings.a, "a", option, tmp_path, start=start, seed=0, runner=card, say=lambda _: None)
    return found["value"], asked


@pytest.mark.parametrize(("limit", "start", "least"), [(37, 8, 35), (1, 8, 1), (100, 1, 94), (5, 64, 5), (64, 64, 64)])
def test_the_largest_that_fits(limit: int, start: int, least: int, tmp_path: Path) -> None:
    found, asked = search(tmp_path, limit, start=start)
    assert least <= found <= limit
    assert len(asked) == len(set(asked)) < 20


def test_context_nothing_and_everything(tmp_path: Path) -> None:
    assert search(tmp_path, 0, start=4)[0] is None
    assert search(tmp_path, 10**9, start=1000)[0] == 1000 * 4
    assert 2800 <= search(tmp_path, 3000, start=512, option="context")[0] <= 3000


@pytest.mark.parametrize(("error", "wanted"), [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (RuntimeError("CUDA error: out of memory"), True), (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (GpuMemoryError("step 1: the GPU's memory ran out"), True), (ConfigError("out of memory? no: a typo"), False),
    (RuntimeError("out of resource: shared memory, Required: 300000"), False), (RuntimeError("shape mismatch"), False),
])
def test_memory_runs_out_in_more_than_one_place(error: Exception, wanted: bool) -> None:
    assert too_little_memory(error) is wanted


def test_an_arm_of_too_many_rows_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm's own training runs out, as torch says it on a card, with more than 5 rows."""
    compute_loss = SFTTrainer.compute_loss

    def scarce(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", scarce)
    config = {"algorithm": "sft", "model": {"model_name": "builtin:tiny"},
              "data": {"dataset_name": "builtin:arithmetic", "max_samples": 8, "max_seq_length": 32}}
    settings = Settings("x", config, {}, read_arm("trl"), read_arm("trl"))
    found = largest(settings, settings.a, "a", "batch", tmp_path, start=4, seed=0, runner=in_this_process,
                    say=lambda _: None)
    assert found == {"value": 5, "tried": {4: True, 5: True, 6: False, 8: False}, "ended": None}
    options = {"backend": "trl", "batch_size": 6, "output_dir": str(tmp_path / "run")}
    failed = outcome(ArmSpec("a", "a", 0, config, options, str(tmp_path), 0, probe=False))
    assert (failed["kind"], failed["exit_code"]) == ("GpuMemoryError", 11) and "batch_size" in failed["message"]


def test_another_error_is_no_answer(tmp_path: Path) -> None:
    settings = Settings("x", {}, {}, read_arm("trl"), read_arm("trl"))
    said: list[str] = []

    def card(spec: Any, _: Any) -> dict[str, Any]:
        if (value := spec.overrides["batch_size"]) == 6:
            raise ComparisonError("arm 'a' ended; log.txt:\n  the last words")
        return {"status": "ok"} if value < 6 else {"status": "error", "kind": "DataError", "message": "no rows"}

    search_from = functools.partial(largest, settings, settings.a, "a", "batch", tmp_path, seed=0, say=said.append)
    assert search_from(start=2, runner=card) == {
        "value": 4, "tried": {2: True, 4: True}, "ended": "arm 'trl': DataError: no rows"}
    assert search_from(start=6, runner=card) == {"value": None, "tried": {}, "ended": "the last words"}
    assert said[-1] == "a: the search ends: the last words"


def test_without_a_card_the_question_has_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligntune.compare.run.cards", list)
    with pytest.raises(ConfigError, match="there is no card here"):
        aligntune.compare("sft-builtin", b="trl", fits="batch", output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="'batch' or 'context'"):
        require_card("memory", cards=1, algorithm="sft")
    with pytest.raises(ConfigError, match="not for grpo"):
        require_card("batch", cards=1, algorithm="grpo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fast runs here")
def test_an_arm_that_cannot_run_here_is_told_before_the_other_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="fast"):
        aligntune.compare("sft-builtin", b="fast", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_filled_rows_are_all_of_the_longest_length(tmp_path: Path) -> None:
    trainer = aligntune.create_sft_trainer("builtin:tiny", "builtin:arithmetic", backend="trl", max_steps=3,
                                           batch_size=2, max_seq_length=40, max_samples=8, output_dir=tmp_path / "run")
    fill(trainer)
    rows = trainer.trainer.train_dataset
    assert len(rows) == 6 and {len(row["input_ids"]) for row in rows} == {40}
    assert rows[0]["input_ids"] != rows[1]["input_ids"] and rows[0]["labels"] == rows[0]["input_ids"]
