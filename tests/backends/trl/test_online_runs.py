"""Online methods from the factory to the run folder: resume, evaluation, generation, LoRA, QLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune import ConfigError, create_rl_trainer
from tests.backends.trl.test_quantized import plain  # noqa: F401  a model wide enough for 4 bits
from tests.core import tiny
from tests.core.test_trainer import At, give_up, lines, same, weights

ALGORITHMS = ("rloo", "grpo", "gspo", "dapo", "dr_grpo")
ROWS = [{"prompt": f"count to {i}:", "answer": str(i)} for i in range(16)]
HELD_OUT = [{"prompt": f"count down from {i}:", "answer": str(i)} for i in range(6)]


def letters(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Different for most completions, the same for all of some prompts."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [1.0 if "3" in str(prompt) else float(len(set(text))) for prompt, text in zip(prompts, texts, strict=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def make(algorithm: str, source: Any, path: Path, **options: Any) -> Any:
    small: dict[str, Any] = {
        "backend": "trl", "reward_functions": [letters], "output_dir": str(path), "max_steps": 8, "batch_size": 8,
        "num_generations": 4, "max_completion_length": 6, "max_seq_length": 64, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none",
    }
    return create_rl_trainer(source, ROWS, algorithm=algorithm, **(small | options))


def run_of(path: Path) -> list[dict[str, Any]]:
    drop = ("step_time", "profiling", "generated_tokens_per_second", "tokens_per_second")
    return [{key: value for key, value in record.items() if not key.startswith(drop)} for record in lines(path)]


# One algorithm for each kind of thing that a checkpoint must hold: log-probs of a rollout's policy (rloo), a rollout
# under way (gspo), what dynamic sampling draws (dapo).
QUICK = {("rloo", False), ("gspo", False), ("dapo", True)}
MATRIX = [pytest.param(name, adapters, marks=() if (name, adapters) in QUICK else pytest.mark.slow,
                       id=f"{name}-{'lora' if adapters else 'full'}")
          for name in ALGORITHMS for adapters in (False, True)]


@pytest.mark.parametrize(("algorithm", "adapters"), MATRIX)
def test_a_run_that_was_cut_goes_on_bit_for_bit(algorithm: str, adapters: bool, model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_steps": 3, "use_peft": adapters, "beta": 0.05}
    if adapters:
        options["lora_r"] = 4
    whole = make(algorithm, model, tmp_path / "whole", **options)
    start = weights(whole.trainer)
    whole.train()
    broken = make(algorithm, model, tmp_path / "run", **options)
    broken.trainer.add_callback(At(5, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    resumed = make(algorithm, model, tmp_path / "run", resume=True, **options)
    assert resumed.train().global_step == 8
    assert same(weights(whole.trainer), weights(resumed.trainer))
    assert not same(weights(whole.trainer), start)
    records = run_of(tmp_path / "whole")
    assert records == run_of(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(record["grad_norm"] > 1e-3 for record in records[4:])
    assert (tmp_path / "run/checkpoint-3/rollout_0.pth").is_file() == (algorithm == "gspo")
    if algorithm == "dapo":
        assert sum(record["dynamic_sampling/rounds"] for record in records[4:]) > 0


@pytest.mark.parametrize("algorithm", [
    name if name in ("rloo", "dapo") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS])
def test_evaluate_and_generate(algorithm: str, model: str, tmp_path: Path) -> None:
    trainer = make(algorithm, model, tmp_path, eval_dataset_name=HELD_OUT, eval_batch_size=8, max_steps=2, beta=0.1)
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_reward", "eval_completions/mean_length", "eval_kl", "eval_rewards/letters/mean"} <= metrics.keys()
    assert 0 < metrics["eval_rewards/letters/mean"] <= 6
    assert metrics["eval_kl"] != 0
    assert not any("dynamic_sampling" in key for key in metrics)
    texts = trainer.generate(["count to 3:", "count to 12:"], max_new_tokens=5)
    assert len(texts) == 2 and texts == trainer.generate(["count to 3:", "count to 12:"], max_new_tokens=5)
    assert trainer.generate(["count to 3:"], max_new_tokens=5)[0] == texts[0]


@pytest.mark.parametrize("algorithm", [
    name if name == "rloo" else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS])
def test_qlora_on_cpu(algorithm: str, plain: str, tmp_path: Path) -> None:  # noqa: F811
    trainer = make(algorithm, plain, tmp_path, quantization="nf4", use_peft=True, lora_r=4, max_steps=2, beta=0.1)
    assert "Linear4bit" in {type(module).__name__ for module in trainer.model.modules()}
    before = weights(trainer.trainer)
    assert trainer.train().global_step == 2
    moved = {name for name, value in weights(trainer.trainer).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_what_dynamic_sampling_throws_away_is_in_the_count_of_generated_tokens(model: str, tmp_path: Path) -> None:
    made: list[int] = []

    def counted(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        made.extend(len(ids) for ids in completion_ids)
        return letters(prompts, completions)

    trainer = make("dapo", model, tmp_path, reward_functions=[counted], max_steps=4)
    trainer.train()
    records = run_of(tmp_path)
    thrown = sum(record["dynamic_sampling/discarded_tokens"] for record in records)
    kept = trainer.trainer.state.max_steps * 8
    assert thrown > 0 and len(made) == kept + sum(r["dynamic_sampling/discarded_completions"] for r in records)
    import json

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["generated_tokens"] == pytest.approx(sum(made))
    assert any("soft overlong punishment: the last 1 of 6 tokens" in notice for notice in summary["notices"])


def test_a_reward_clip_range_is_two_numbers_in_order(model: str, tmp_path: Path) -> None:
    assert make("rloo", model, tmp_path / "a", reward_clip_range=[-1, 1]).trainer.reward_clip_range == [-1, 1]
    for wrong in ([1.0], [2.0, 1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ConfigError, match="reward_clip_range.*two numbers"):
            make("rloo", model, tmp_path / "b", reward_clip_range=wrong)
