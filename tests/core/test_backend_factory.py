"""The factories end to end: every row is trained or reported, and what the user gives or gets by default arrives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback

from aligntune import create_reward_trainer, create_rl_trainer, create_sft_trainer
from aligntune.algorithms import ALGORITHMS
from aligntune.backends.base import Backend, supports
from aligntune.backends.fast.support import BACKEND as FAST
from aligntune.backends.trl.support import BACKEND as TRL
from aligntune.errors import ConfigError, DataError, NonFiniteError, RewardError
from tests.core import tiny

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it trains in bf16")


def letters(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def made(algorithm: str, rows: list[dict], folder: Path, **options: Any) -> Any:
    """A trainer of the algorithm from its own factory, on a tiny model."""
    spec = ALGORITHMS.load(algorithm)
    given: dict[str, Any] = {"backend": "trl", "tokenizer_name": tiny.tokenizer(), "output_dir": str(folder),
                             "report_to": "none", "batch_size": 4, "max_seq_length": 64}
    if spec.online:
        given |= {"reward_functions": [letters], "num_generations": 2, "max_completion_length": 4}
    given |= options
    if algorithm == "sft":
        return create_sft_trainer(tiny.llama(), rows, **given)
    if algorithm == "reward":
        return create_reward_trainer(tiny.scorer(), rows, **given)
    return create_rl_trainer(tiny.llama(), rows, algorithm=algorithm, **given)


ROWS = {
    "sft": (tiny.text_rows, {"text": None}),
    "prompts": (tiny.prompts, {"prompt": ""}),
    **dict.fromkeys(("preference", "reward", "unpaired"), (tiny.pairs, {"prompt": "x", "chosen": "y"})),
}


@pytest.mark.parametrize(("backend", "algorithm"), [
    (backend, algorithm) for backend in (TRL, FAST) for algorithm in ALGORITHMS.names() if supports(backend, algorithm)
], ids=lambda value: getattr(value, "name", value))
def test_rows_in_are_rows_trained_and_rows_reported(backend: Backend, algorithm: str, tmp_path: Path) -> None:
    make, bad = ROWS[ALGORITHMS.load(algorithm).takes]
    rows = [*make(8).to_list()[:5], bad, *make(8).to_list()[5:]]
    trainer = made(algorithm, rows, tmp_path, on_bad_row="skip", backend=backend.name)
    report = str(trainer._data_report)
    counts = re.search(r"(\d+) read = (\d+) trained \+ (\d+) bad(?:; (\d+) examples)?", report)
    assert counts, report
    read, trained, left_out, examples = (int(count) if count else None for count in counts.groups())
    assert (read, trained, left_out) == (9, 8, 1)
    assert "* list: row 5: " in report.partition("Bad rows")[2], report
    # A pair makes two examples of KTO: a wanted one and an unwanted one.
    assert examples == (16 if algorithm == "kto" else None)
    assert len(trainer.trainer.train_dataset) == (examples or trained)


@pytest.mark.parametrize(("callbacks", "told"), [
    ([EarlyStoppingCallback, 3], "callbacks[1] = 3"), (EarlyStoppingCallback(), "callbacks = <"),
    ([int], "callbacks[0]"),
])
def test_callbacks_of_another_type_are_told_at_creation(callbacks: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        create_sft_trainer(tiny.llama(), [{"text": "x"}], tokenizer_name=tiny.tokenizer(), callbacks=callbacks,
                           output_dir=str(tmp_path / "run"))
    assert str(caught.value).startswith(told) and "transformers.TrainerCallback" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", [TRL.name, FAST.name])
def test_a_field_that_trl_has_not_is_told_before_anything_is_read(backend: str) -> None:
    with pytest.raises(ConfigError, match="trainer_options.vllm_mod: GRPOConfig has no such .* mean 'vllm_mode'"):
        create_rl_trainer("/no/such/model", "/no/such/data", algorithm="grpo", backend=backend, rollout_engine="hf",
                          reward_functions=[letters], trainer_options={"vllm_mod": "server"})


@pytest.mark.parametrize("backend", [TRL.name, FAST.name])
def test_columns_that_rewards_need_are_asked_for_before_anything_is_written(backend: str, tmp_path: Path) -> None:
    def leveled(prompts: list, completions: list, level: list, **columns: Any) -> list[float]:
        raise AssertionError("called")

    rows = [row | {"levels": 1, "answer": "4"} for row in tiny.prompts(4).to_list()]
    folder, told = tmp_path / "run", "'leveled' needs the column 'level', which the dataset does not .*: answer, full"
    with pytest.raises(DataError, match=told):
        made("grpo", rows, folder, reward_functions=[letters, leveled], backend=backend)
    held_out = [{"prompt": row["prompt"]} for row in rows]
    with pytest.raises(DataError, match="'exact_match' reads .* which the evaluation data does not have"):
        made("grpo", rows, folder, reward_functions=["exact_match"], eval_dataset_name=held_out, backend=backend)
    rows = [row | {"level": 1} for row in rows]
    with pytest.raises(DataError, match="none beside the prompt"):
        made("rloo", rows, folder, reward_functions=[leveled], backend=backend,
             trainer_options={"remove_unused_columns": True})
    assert not folder.exists()
    if backend == TRL.name:
        assert made("ppo", rows, folder, reward_functions=[leveled, "exact_match"])


def test_fields_that_ask_for_evaluation_are_taken_where_there_is_some(tmp_path: Path) -> None:
    rows = tiny.text_rows(8).to_list()
    options = {"save_steps": 1, "trainer_options": {"load_best_model_at_end": True}}
    trainer = made("sft", rows, tmp_path, eval_dataset_name=rows[:2], eval_steps=1, **options)
    assert trainer.trainer.args.load_best_model_at_end
    with pytest.raises(ConfigError, match="requires the save and eval strategy to match"):
        made("sft", rows, tmp_path, **options)


def test_a_reward_class_is_built_once(tmp_path: Path) -> None:
    built = []

    class Letters:
        def __init__(self) -> None:
            built.append(self)

        __call__ = staticmethod(letters)

    made("grpo", tiny.prompts(4).to_list(), tmp_path, reward_functions=[Letters])
    assert len(built) == 1


def test_trial_and_ignored_keys_reach_the_inner_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made("sft", tiny.text_rows(8).to_list(), tmp_path, max_steps=1,
                   eval_dataset_name=tiny.text_rows(2).to_list(), eval_steps=1)
    inner, trial, seen = trainer.trainer, object(), {}
    train, evaluate = inner.train, inner.evaluate

    def training(**given: Any) -> Any:
        seen.update(given)
        return train(**{**given, "trial": None})  # transformers knows Optuna's and Ray's trials only

    def evaluating(*args: Any, **given: Any) -> Any:
        seen["evaluate"] = given["ignore_keys"]
        return evaluate(*args, **given)

    monkeypatch.setattr(inner, "train", training)
    monkeypatch.setattr(inner, "evaluate", evaluating)
    trainer.train(trial=trial, ignore_keys_for_eval=["past_key_values"])
    assert seen["trial"] is trial
    assert seen["ignore_keys_for_eval"] == seen["evaluate"] == ["past_key_values"]


@NO_GPU
def test_the_precision_is_said_and_tensorboard_is_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    trainer = create_sft_trainer(tiny.llama(), tiny.text_rows(4).to_list(), backend="trl", output_dir=str(folder),
                                 tokenizer_name=tiny.tokenizer(), max_seq_length=64, batch_size=4, max_steps=1)
    trainer.train()
    assert "precision: fp32 on CPU" in capsys.readouterr().err.splitlines()
    events = list(folder.rglob("events.out.tfevents*"))
    assert events and all(path.stat().st_size > 100 for path in events)


@pytest.mark.parametrize(("fault", "error", "told"), [
    ("raise", RewardError, "raised ZeroDivisionError: division by zero"),
    ("nan", NonFiniteError, "returned nan"),
])
def test_a_reward_that_goes_wrong_names_its_row(fault: str, error: type, told: str, tmp_path: Path) -> None:
    batches: list[list[str]] = []

    def broken(prompts: list, completions: list, **columns: Any) -> list[float]:
        batches.append(prompts)
        if fault == "raise" and "count to 1:" in prompts:
            return [1 / 0]
        return [float("nan") if prompt == "count to 1:" else 1.0 for prompt in prompts]

    trainer = made("grpo", tiny.prompts(2).to_list(), tmp_path, reward_functions=[broken], max_steps=1,
                   tokenizer_name=tiny.tokenizer(template=None))
    with pytest.raises(error) as caught:
        trainer.train()
    message, batch = str(caught.value), batches[0]
    assert len(batch) == 4 and batch.count("count to 1:") == 2
    row = batch.index("count to 1:")
    assert "reward 'broken'" in message and told in message
    assert f"row {row} of the batch of 4 (prompt 'count to 1:'" in message
    assert '"status": "failed"' in (tmp_path / "summary.json").read_text()
