"""The main job on real-looking files: three schemas, two families, Python and command line, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from aligntune import create_rl_trainer, create_sft_trainer
from tests.core import tiny

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    ))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model with its tokenizer, on disk as from a hub."""
    folder = tmp_path_factory.mktemp(request.param)
    (tiny.llama(max_position_embeddings=512) if request.param == "llama" else qwen3()).save_pretrained(folder)
    tiny.tokenizer(template=CHAT).save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def alpaca(path: Path) -> str:
    return write(path, [{"instruction": f"Add {i} and one.", "input": "" if i % 2 else f"number {i}",
                         "output": f"It is {i + 1}."} for i in range(16)])


def hh_rlhf(path: Path) -> str:
    def talk(last: str) -> str:
        return f"\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: Say more.\n\nAssistant: {last}"

    return write(path, [{"chosen": talk(f"Gladly, {i}."), "rejected": talk("No" + "." * (i % 3 + 1))}
                        for i in range(16)])


def gsm8k(path: Path) -> str:
    return write(path, [{"question": f"Tom has {i} apples and buys 2. How many?",
                         "answer": f"He has {i}+2=<<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"} for i in range(16)])


def spread(prompts: list, completions: list, answer: list, **columns: Any) -> list[float]:
    """Reads the reference answer, and differs between completions of one prompt."""
    assert all(str(value) for value in answer)
    return [float(len({*str(completion)})) for completion in completions]


REWARDS_FILE = """
def letters(completions, answer, **columns):
    assert all(answer)
    return [float(len({*str(completion)})) for completion in completions]
"""
JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (alpaca, {}),
    "dpo": (hh_rlhf, {"beta": 0.3}),
    "grpo": (gsm8k, {"reward_functions": [spread], "num_generations": 4, "max_completion_length": 6,
                     "max_seq_length": 200, "beta": 0.1}),
}
SMALL = {"backend": "trl", "max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "report_to": "none",
         "logging_steps": 1, "save_steps": 2, "max_seq_length": 256}


def trainer_for(algorithm: str, model: Any, data: str, folder: Path, **options: Any) -> Any:
    given = {**SMALL, **JOBS[algorithm][1], "output_dir": str(folder), **options}
    if algorithm == "sft":
        return create_sft_trainer(model, data, **given)
    return create_rl_trainer(model, data, algorithm=algorithm, **given)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", list(JOBS))
def test_a_job_from_python_is_trained_resumed_and_used(
    algorithm: str, adapters: bool, checkpoint: str, tmp_path: Path
) -> None:
    data = JOBS[algorithm][0](tmp_path / "data.jsonl")
    options: dict[str, Any] = {"use_peft": True, "lora_r": 4} if adapters else {}
    trainer = trainer_for(algorithm, checkpoint, data, tmp_path / "run", **options)
    out = trainer.train()
    assert out.global_step == 3
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "environment.json", "attestation.json", "metrics.jsonl", "loss.png", "data_report.md",
            "summary.json", "checkpoint-2", "checkpoint-3"} <= names
    assert ("reward.png" in names) == (algorithm == "grpo")
    resumed = trainer_for(algorithm, checkpoint, data, tmp_path / "run", max_steps=4, resume=True, **options).train()
    assert resumed.global_step == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line.get("kind") == "train" and "loss" in line]
    assert steps == [1, 2, 3, 4]
    assert len(trainer.generate(["Hello."], max_new_tokens=4)) == 1
    trainer.save_model(tmp_path / "saved", merge_adapters=adapters)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert sum(p.numel() for p in again.parameters()) > 10_000


@pytest.mark.parametrize("algorithm", list(JOBS))
def test_the_same_job_from_the_command_line(
    algorithm: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aligntune.cli import main

    recipe = {**SMALL, **JOBS[algorithm][1], "algorithm": algorithm, "model_name": checkpoint,
              "dataset_name": JOBS[algorithm][0](tmp_path / "data.jsonl")}
    if algorithm == "grpo":
        (tmp_path / "rewards.py").write_text(REWARDS_FILE)
        recipe["reward_functions"] = [f"{tmp_path / 'rewards.py'}:letters"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    arguments = ["train", str(tmp_path / "recipe.yaml"), "train.max_steps=2", f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr("sys.argv", ["aligntune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    # At step 1 policy and reference are equal, so a gradient of GRPO comes from rewards that differ in a group.
    assert steps[0]["grad_norm"] > 1e-4
    assert algorithm != "grpo" or steps[0]["reward_std"] > 0


def test_old_calls_work(checkpoint: str, tmp_path: Path) -> None:
    """batch_size=1 for dpo; grpo from model, data and one function, nothing else."""
    pairs = hh_rlhf(tmp_path / "pairs.jsonl")
    small = {"max_steps": 1, "report_to": "none", "backend": "trl"}
    out = create_rl_trainer(checkpoint, pairs, algorithm="dpo", batch_size=1, output_dir=str(tmp_path / "a"), **small)
    assert out.train().global_step == 1
    out = create_rl_trainer(checkpoint, gsm8k(tmp_path / "q.jsonl"), algorithm="grpo", reward_functions=[spread],
                            max_completion_length=4, max_seq_length=128, output_dir=str(tmp_path / "b"), **small)
    assert out.train().global_step == 1
