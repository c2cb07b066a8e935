"""AlignTrainer on preference and online trainers: metrics, evaluation, resume."""

from __future__ import annotations

import json

import pytest
import torch
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from aligntune.core.model_hygiene import copy_model
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from tests.core import tiny
from tests.core.test_trainer import At, ctrl_c, give_up, lines, same, weights

SHARED = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "seed": 3,
          "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-2, "disable_tqdm": True, "max_steps": 4}


def wrap(trainer, path, algorithm):
    return AlignTrainer(trainer, config={}, run_dir=RunDir(path), tokenizer=trainer.processing_class, backend="trl",
                        algorithm=algorithm, progress=False)


def dpo(path, *, batch=4, **options):
    model = tiny.llama()
    args = DPOConfig(output_dir=str(path), per_device_train_batch_size=2, per_device_eval_batch_size=batch, beta=0.5,
                     max_length=64, **(SHARED | options))
    return DPOTrainer(model=model, ref_model=copy_model(model), args=args, train_dataset=tiny.pairs(8),
                      eval_dataset=tiny.pairs(5), processing_class=tiny.tokenizer(template=None))


def digits(completions, **columns):
    return [sum(character.isdigit() for character in text) / 10 for text in completions]


def online(path, kind="grpo", **options):
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    args = config(output_dir=str(path), per_device_train_batch_size=4, per_device_eval_batch_size=4, num_generations=2,
                  max_completion_length=6, beta=0.1, **(SHARED | options))
    model = tiny.llama()
    model.save_pretrained(path.parent / "base")
    model.config._name_or_path = str(path.parent / "base")
    return trainer(model=model, args=args, reward_funcs=digits, train_dataset=tiny.prompts(8),
                   eval_dataset=tiny.prompts(5).select([0, 1, 2, 3]), processing_class=tiny.tokenizer(template=None))


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_dpo_evaluation_counts_each_pair_once(tmp_path, batch):
    trainer = dpo(tmp_path, batch=batch)
    run = wrap(trainer, tmp_path, "dpo")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    metrics = run.evaluate()
    each = []
    for row in range(5):
        trainer.eval_dataset, kept = trainer.eval_dataset.select([row]), trainer.eval_dataset
        one = trainer.evaluate()
        trainer.eval_dataset = kept
        each.append([one[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")])
    means = torch.tensor(each).mean(0).tolist()
    assert 0 < means[1] < 1, "the pairs must differ for the weights to matter"
    got = [metrics[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")]
    assert got == pytest.approx(means, abs=1e-5)
    assert "eval_perplexity" not in metrics


def test_dpo_leaves_its_rewards_and_resumes_bit_for_bit(tmp_path):
    whole = dpo(tmp_path / "whole")
    wrap(whole, tmp_path / "whole", "dpo").train()
    broken = dpo(tmp_path / "run")
    broken.add_callback(At(3, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        wrap(broken, tmp_path / "run", "dpo").train()
    resumed = dpo(tmp_path / "run")
    wrap(resumed, tmp_path / "run", "dpo").train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed)) and lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert all("rewards/accuracies" in record and "rewards/margins" in record for record in lines(tmp_path / "run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["tokens"] > 0 and "final_reward" not in summary


def test_an_online_run_leaves_its_reward_and_counts_what_it_generated(tmp_path):
    trainer = online(tmp_path / "run")
    run = wrap(trainer, tmp_path / "run", "grpo")
    run.train()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all({"reward", "kl", "completions/mean_length"} <= record.keys() for record in records)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    made = sum(4 * record["completions/mean_length"] for record in records)  # 4 completions a step
    assert summary["generated_tokens"] == pytest.approx(made)
    assert 0 < summary["generated_tokens"] < summary["tokens"]
    assert summary["final_reward"] == records[-1]["reward"]
    assert (tmp_path / "run/reward.png").stat().st_size > 5000
    metrics = run.evaluate()
    assert {"eval_reward", "eval_kl", "eval_completions/mean_length"} <= metrics.keys()
    assert 0 <= metrics["eval_reward"] <= 0.6 and metrics["eval_kl"] > 1e-4
    assert trainer.model.training


@pytest.mark.parametrize(("kind", "options"), [
    ("grpo", {}), ("rloo", {}),
    ("grpo", {"steps_per_generation": 4, "save_steps": 1, "logging_steps": 3, "max_steps": 8}),
], ids=["grpo", "rloo", "between two rollouts"])
def test_online_methods_resume(tmp_path, kind, options):
    whole = online(tmp_path / "whole", kind, **options)
    wrap(whole, tmp_path / "whole", kind).train()
    broken = online(tmp_path / "run", kind, **options)
    broken.add_callback(At(3, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        wrap(broken, tmp_path / "run", kind).train()
    resumed = online(tmp_path / "run", kind, **options)
    out = wrap(resumed, tmp_path / "run", kind).train(resume_from_checkpoint=True)
    assert out.global_step == whole.state.global_step and resumed._step == whole._step
    drop = ("step_time", "profiling")
    records = [[{k: v for k, v in record.items() if not k.startswith(drop)} for record in lines(tmp_path / name)]
               for name in ("whole", "run")]
    assert [record["step"] for record in records[0]] == [record["step"] for record in records[1]]
    if not options:  # a rollout that is under way is not in a checkpoint: it is sampled again
        assert same(weights(whole), weights(resumed)) and records[0] == records[1]


def test_ctrl_c_between_two_slices_of_a_rollout_goes_on_in_the_same_process(tmp_path):
    trainer = online(tmp_path / "run", steps_per_generation=4, save_steps=100, max_steps=8)
    trainer.callback_handler.callbacks.insert(0, At(2, ctrl_c))
    run = wrap(trainer, tmp_path / "run", "grpo")
    rollouts, plain = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (rollouts.append(trainer._step), plain(inputs))[1]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    trainer.callback_handler.callbacks.pop(0)
    assert run.train(resume_from_checkpoint=True).global_step == 8
    assert [record["step"] for record in lines(tmp_path / "run")] == list(range(1, 9))
    assert rollouts == [0, 2, 4]  # what was left of the first rollout is not in the checkpoint
