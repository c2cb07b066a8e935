"""Training stops, with a checkpoint, once an evaluation is good enough."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aligntune import ConfigError, create_reward_trainer, create_rl_trainer, create_sft_trainer
from aligntune.algorithms import ALGORITHMS
from aligntune.core.backend_factory import check_names
from aligntune.core.early_stop import StopAt
from aligntune.core.eval_names import check_metric_names
from aligntune.core.resolve import resolve
from tests.core import tiny

ROWS = [{"prompt": "say", "completion": " ab"} for _ in range(16)]


@pytest.mark.parametrize(("metric", "value", "logged", "stops"), [
    ("reward", 0.5, {"eval_loss": 1.0, "eval_reward": 0.5}, True),
    ("reward", 0.5, {"eval_loss": 1.0, "eval_reward": 0.4}, False),
    ("loss", 0.5, {"eval_loss": 0.6}, False), ("loss", 0.5, {"eval_loss": 0.5}, True),
    ("loss", 0.5, {"loss": 0.1}, False),
])
def test_when_it_stops(metric: str, value: float, logged: dict, stops: bool) -> None:
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    StopAt(metric, value).on_log(None, None, control, logged)  # type: ignore[arg-type]
    assert (control.should_training_stop, control.should_save) == (stops, stops)


def test_a_run_stops_before_its_last_step_and_leaves_a_checkpoint(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "backend": "trl", "tokenizer_name": tiny.tokenizer(), "max_steps": 60, "batch_size": 8, "learning_rate": 1e-2,
        "report_to": "none", "eval_dataset_name": ROWS[:4], "eval_steps": 2, "stop_metric": "mean_token_accuracy",
        "stop_value": 0.99,
    }
    trainer = create_sft_trainer(tiny.llama(), ROWS, output_dir=str(tmp_path / "a"), **options)
    steps = trainer.train().global_step
    assert 2 <= steps < 60
    assert (tmp_path / "a" / f"checkpoint-{steps}" / "trainer_state.json").is_file()


def test_a_metric_that_an_evaluation_lacks_is_told_then() -> None:
    with pytest.raises(ConfigError, match="unknown evaluation.stop_metric 'acc'; valid: loss, mean_token_accuracy"):
        StopAt("acc", 1.0).on_log(None, None, None, {"eval_loss": 1.0, "eval_mean_token_accuracy": 0.5})  # type: ignore[arg-type]


def stopping(algorithm: str, metric: str, **options: Any) -> Any:
    rewards = {"reward_functions": ["exact_match"]} if ALGORITHMS.load(algorithm).needs_reward else {}
    return resolve({"model_name": "m", "dataset_name": "d", "algorithm": algorithm, "val_split_ratio": 0.1,
                    "eval_steps": 2, "stop_metric": metric, "stop_value": 0.5, **rewards, **options})


def test_a_mistyped_metric_is_told_before_anything_is_read() -> None:
    for algorithm, wrong, right in (
        ("sft", "mean_token_acuracy", "mean_token_accuracy"), ("dpo", "rewards/accuracy", "rewards/accuracies"),
        ("reward", "accuracies", "accuracy"), ("grpo", "rewards", "reward"),
        ("orpo", "log_odd_ratio", "log_odds_ratio"),
    ):
        for name in (wrong, f"eval_{wrong}"):
            with pytest.raises(ConfigError, match=f"unknown evaluation.stop_metric '{wrong}'; did you mean '{right}'"):
                check_names(stopping(algorithm, name))
            check_names(stopping(algorithm, name), [object()])  # callbacks may log what they like
        check_names(stopping(algorithm, f"eval_{right}"))
    for others in ({"reward_functions": [lambda **columns: [0.0]]}, {"reward_functions": ["tests.mine:reward"]}):
        check_metric_names(stopping("grpo", "share_of_sorted", **others))  # TRL hands rewards a `log_metric`
    check_names(stopping("grpo", "rewards/exact_match/mean"))
    check_names(stopping("sft", "bleu"))  # nothing like it is known: a later version may have it
    with pytest.raises(ConfigError, match="did you mean 'loss'"):
        create_sft_trainer("/no/such/model", "/no/such/data", backend="trl", val_split_ratio=0.1, eval_steps=1,
                           stop_metric="lose", stop_value=1.0)


def test_a_mistyped_metric_of_the_best_model_is_told_as_early() -> None:
    def job(metric: Any, algorithm: str = "sft", **options: Any) -> Any:
        fields = {"load_best_model_at_end": True, "metric_for_best_model": metric}
        rewards = {"reward_functions": ["exact_match"]} if algorithm == "grpo" else {}
        return resolve({"model_name": "m", "dataset_name": "d", "algorithm": algorithm, "val_split_ratio": 0.1,
                        "eval_steps": 2, "save_steps": 2, "trainer_options": fields, **rewards, **options})

    for name in ("mean_token_acuracy", "eval_mean_token_acuracy"):
        with pytest.raises(ConfigError, match="unknown train.trainer_options.metric_for_best_model "
                                              "'mean_token_acuracy'; did you mean 'mean_token_accuracy'"):
            check_names(job(name))
        check_names(job(name), [object()])
    with pytest.raises(ConfigError, match="metric_for_best_model 'rewards'; did you mean 'reward'"):
        check_names(job("rewards", "grpo"))
    for name in ("loss", "eval_perplexity", "bleu", None):
        check_names(job(name))
    with pytest.raises(ConfigError, match="2 faults") as caught:
        check_names(job("eval_lose", stop_metric="perplexty", stop_value=2.0))
    assert [fault.split(";")[0] for fault in caught.value.faults] == [
        "unknown evaluation.stop_metric 'perplexty'",
        "unknown train.trainer_options.metric_for_best_model 'lose'"]


@pytest.mark.parametrize("algorithm", [
    name if name in ("sft", "kto", "orpo", "grpo") else pytest.param(name, marks=pytest.mark.slow)
    for name in ALGORITHMS.names()])
@pytest.mark.parametrize("backend", ["trl", pytest.param("fast", marks=pytest.mark.slow)])
def test_every_name_that_an_evaluation_reports_is_known(algorithm: str, backend: str, tmp_path: Any) -> None:
    if (backend, algorithm) == ("fast", "gspo"):
        return
    spec = ALGORITHMS.load(algorithm)
    rewards = {"reward_functions": ["exact_match"], "beta": 0.1} if spec.needs_reward else {}
    rows = {"prompts": [{"prompt": "say", "answer": "ab"}], "sft": ROWS[:1],
            "unpaired": [{"prompt": "say", "completion": " a", "label": label} for label in (True, False)]}.get(
                spec.takes, [{"prompt": "say", "chosen": " ab", "rejected": " b"}])
    make = {"sft": create_sft_trainer, "reward": create_reward_trainer}.get(algorithm, create_rl_trainer)
    options = {"algorithm": algorithm} if make is create_rl_trainer else {}
    if algorithm == "ppo":
        rewards.pop("beta")
    model = tiny.scorer() if algorithm == "reward" else tiny.llama()
    run = make(model, rows * 8, output_dir=str(tmp_path), tokenizer_name=tiny.tokenizer(), backend=backend,
               eval_dataset_name=rows * 8, eval_batch_size=8, max_steps=1, progress=False, max_seq_length=64,
               report_to="none", **({"max_completion_length": 4} if spec.online else {}), **options, **rewards)
    found = {name for name in run.evaluate() if name.startswith("eval_")}
    assert "eval_loss" in found and len(found) > 4
    for name in found:
        check_metric_names(stopping(algorithm, name))
