"""The PPO trainer: what moves, what a rollout holds, minibatches, early stop, critics, evaluation."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from aligntune import create_rl_trainer
from aligntune.backends.trl.ppo_config import PPOConfig
from aligntune.errors import ConfigError
from tests.backends.trl.ppo_cases import PROMPTS, distinct, job, moved, reward_model, weights
from tests.core import tiny


@pytest.mark.parametrize("critic", [None, "policy", "reward"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_policy_and_critic_learn_and_nothing_else(critic: str | None, adapters: bool, tmp_path: Any) -> None:
    options: dict[str, Any] = {"use_peft": True, "lora_r": 4} if adapters else {}
    if critic == "reward":
        options["reward_model_name"] = reward_model()
    run = job(tmp_path, value_model_name=critic, **options)
    trainer = run.trainer
    before = weights(trainer)
    out = run.train()
    assert out.global_step == 6 and math.isfinite(out.training_loss)
    changed = moved(before, weights(trainer))
    policy = {name for name in changed if not name.startswith("critic.")}
    assert policy and {name for name in before if name.startswith("critic.head")} <= changed
    assert all("lora_" in name for name in policy) == adapters
    trunk = {name for name in changed if name.startswith("critic.backbone")}
    assert bool(trunk) == (critic is not None)
    assert all("lora_" in name for name in trunk) or not adapters
    if critic == "reward":
        assert torch.equal(before["critic.head.weight"], trainer.reward_funcs[0].model.score.weight)
    logged = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    assert len(logged) == 2 and logged[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(logged[1]["objective/kl"]) > 1e-4
    for name in ("policy/clipfrac_avg", "val/clipfrac_avg", "val/explained_variance", "val/ratio", "entropy",
                 "completions/mean_length", "reward", "objective/scores", "objective/kl_coef", "val/grad_norm"):
        assert name in logged[1], name
    assert logged[0]["val/ratio"] == pytest.approx(1, abs=1e-5) and logged[0]["policy/approxkl_avg"] < 1e-9


def test_model_dataset_and_reward_are_enough(tmp_path: Any) -> None:
    rows = [{"prompt": f"count to {i}:"} for i in range(8)]
    run = create_rl_trainer(tiny.llama(), rows, algorithm="ppo", reward_functions=[distinct],
                            tokenizer_name=tiny.tokenizer(), output_dir=str(tmp_path), max_steps=1)
    assert run.config.backend == "trl" and run.trainer.args.num_generations == 1
    assert run.train().global_step == 1


def test_preference_data_give_prompts_at_batch_size_one(tmp_path: Any) -> None:
    turns = "\n\nHuman: What is {}?\n\nAssistant:"
    rows = [{"chosen": turns.format(i) + f" It is {i}.", "rejected": turns.format(i) + " No."} for i in range(6)]
    scorer = reward_model()
    folder = tmp_path / "scorer"
    scorer.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    run = job(tmp_path / "run", rows=rows, reward_model_name=str(folder), batch_size=1, num_mini_batches=1,
              num_ppo_epochs=1, max_steps=3, tokenizer_name=tiny.tokenizer())
    assert run.train().global_step == 3
    logged = [entry["reward"] for entry in run.trainer.state.log_history if "reward" in entry]
    assert len(logged) == 3 and len(set(logged)) == 3
    assert "rewards/scorer/mean" in run.trainer.state.log_history[0]


def cut(trainer: Any) -> None:
    """Have completions end after 1 to 5 tokens, as their prompt says."""
    plain = trainer._generate_single_turn

    def generate(prompt_ids: Any, *args: Any) -> Any:
        completions, extra = plain(prompt_ids, *args)
        return [ids[:1 + ask[-2] % 5] for ids, ask in zip(completions, prompt_ids, strict=True)], extra

    trainer._generate_single_turn = generate


def test_a_rollout_is_what_the_equations_say(tmp_path: Any) -> None:
    """Log-probs, values and KL by plain forwards of single rows; rewards and advantages by sums."""
    beta, gamma, lam = 0.3, 0.9, 0.8
    run = job(tmp_path, kl_coef=beta, gamma=gamma, lam=lam, whiten_advantages=False, value_model_name="policy",
              missing_eos_penalty=0.25, max_steps=4)
    trainer = run.trainer
    torch.manual_seed(1)
    with torch.no_grad():  # policy and critic apart from the reference
        for value in (*trainer.model.parameters(), *trainer.critic.parameters()):
            value.add_(0.05 * torch.randn_like(value))
    cut(trainer)
    trainer.model.train()
    trainer._prepare_inputs([PROMPTS[i] for i in range(4)])
    rollout = trainer._rollout
    lengths = rollout["loss_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 2
    errors, targets = [], []
    tokenizer = trainer.processing_class
    for row in range(4):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        answer = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()]
        ids, length = torch.cat([prompt, answer])[None], len(answer)
        with torch.no_grad():
            old, reference = (
                torch.log_softmax(model(ids).logits[0, len(prompt) - 1:-1].float(), -1).gather(1, answer[:, None])[:, 0]
                for model in (trainer.model, trainer.ref_model))
            hidden = trainer.critic.backbone(ids).last_hidden_state[0, len(prompt) - 1:-1]
            values = (hidden @ trainer.critic.head.weight[0] + trainer.critic.head.bias).tolist()
        text = tokenizer.decode(answer, skip_special_tokens=True)
        score = distinct([], [text])[0] - 0.25 * (int(answer[-1]) != tokenizer.eos_token_id)
        rewards = (-beta * (old - reference)).tolist()
        rewards[-1] += score
        padded = [*values, 0.0]
        for t in range(length):
            advantage = sum((gamma * lam) ** (k - t) * (rewards[k] + gamma * padded[k + 1] - padded[k])
                            for k in range(t, length))
            assert rollout["advantages"][row, t].item() == pytest.approx(advantage, abs=2e-4)
            assert rollout["returns"][row, t].item() == pytest.approx(advantage + values[t], abs=2e-4)
            errors.append(advantage)
            targets.append(advantage + values[t])
        torch.testing.assert_close(rollout["old_log_probs"][row, :length], old, atol=1e-4, rtol=1e-4)
        assert not rollout["advantages"][row, length:].any()
    assert (old - reference).abs().max() > 1e-3
    logged = {name: numbers[-1] for name, numbers in trainer._metrics["train"].items()}
    explained = 1 - statistics.pvariance(errors) / statistics.pvariance(targets)
    assert abs(explained) > 1e-2
    assert logged["val/explained_variance"] == pytest.approx(explained, abs=1e-3)
    assert logged["completions/mean_length"] == pytest.approx(statistics.mean(lengths))


@pytest.mark.parametrize("critic", [None, "policy"])
def test_accumulation_does_not_change_a_step(critic: str | None, tmp_path: Any) -> None:
    """One minibatch of 4 in one piece and in 4: the same tokens count the same, although lengths differ."""
    ends = {"trainer_options": {"generation_kwargs": {"do_sample": False}}}

    def ragged(completions: list, completion_ids: list, **columns: Any) -> list[float]:
        return [len(set(ids)) for ids in completion_ids]

    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        run = job(tmp_path / str(batch), batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=2,
                  num_mini_batches=1, reward_functions=[ragged], value_model_name=critic, lr_scheduler="constant",
                  optimizer="sgd", max_grad_norm=0.0, **ends)
        cut(run.trainer)
        before = weights(run.trainer)
        run.train()
        lengths = run.trainer._rollout["loss_mask"].sum(1).tolist()
        assert len(set(lengths)) > 1
        after = weights(run.trainer)
        found.append({name: after[name] - before[name] for name in moved(before, after)})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, step in found[0].items():
        torch.testing.assert_close(found[1][name], step, atol=1e-6, rtol=1e-3)


def test_gradients_of_the_critic_do_not_pile_up(tmp_path: Any) -> None:
    """Transformers clears the gradients of its own model only."""
    run = job(tmp_path, max_steps=3)
    run.train()
    assert all(value.grad is None for value in run.trainer.critic.parameters())


def test_beyond_target_kl_the_rest_of_the_passes_changes_nothing(tmp_path: Any) -> None:
    from tests.core.test_trainer import At

    seen: dict[int, dict[str, torch.Tensor]] = {}
    run = job(tmp_path, target_kl=1e-6, max_steps=8, weight_decay=0.1, learning_rate=1e-2)
    for step in range(1, 9):
        run.trainer.add_callback(At(step, lambda control, step=step: seen.update({step: weights(run.trainer)})))
    run.train()
    # Steps 1 and 5 start a rollout, where the KL is 0; steps 2 and 6 are beyond the limit and the last that count.
    skipped = [entry.get("policy/skipped") for entry in run.trainer.state.log_history[:8]]
    assert skipped == [0, 0, 1, 1, 0, 0, 1, 1]
    assert moved(seen[1], seen[2]) and not moved(seen[2], seen[3]) and not moved(seen[3], seen[4])
    assert moved(seen[4], seen[5]) and not moved(seen[6], seen[8])


def test_each_pass_takes_every_row_once_in_an_order_of_its_own(tmp_path: Any) -> None:
    trainer = job(tmp_path, batch_size=1, num_mini_batches=8, num_ppo_epochs=3).trainer
    passes = [[int(row) for at in range(8) for row in trainer._rows(8 * index + at)] for index in range(3)]
    assert all(sorted(order) == list(range(8)) for order in passes)
    assert passes[0] != passes[1] != passes[2]


def test_the_adaptive_coefficient_moves_by_the_rule(tmp_path: Any) -> None:
    run = job(tmp_path, kl_control="adaptive", kl_goal=0.5, kl_coef=0.2, max_steps=12, learning_rate=5e-3)
    run.train()
    logged = [entry for entry in run.trainer.state.log_history if "objective/kl" in entry]
    assert logged[0]["objective/kl_coef"] == pytest.approx(0.2)
    for now, later in zip(logged, logged[1:], strict=False):
        error = min(max(now["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert later["objective/kl_coef"] == pytest.approx(now["objective/kl_coef"] * (1 + 0.1 * error), rel=1e-6)
    assert len({entry["objective/kl_coef"] for entry in logged}) == 3


def test_completions_without_a_reward_teach_nothing(tmp_path: Any) -> None:
    def some(completions: list, answer: list, **columns: Any) -> list[float | None]:
        return [None if int(number) % 2 else 1.0 for number in answer]

    run = job(tmp_path, reward_functions=[some], max_steps=4)
    run.trainer.model.train()
    run.trainer._prepare_inputs([PROMPTS[i] for i in range(4)])
    rollout = run.trainer._rollout
    assert rollout["loss_mask"][0].any() and not rollout["loss_mask"][[1, 3]].any()
    assert not rollout["advantages"][[1, 3]].any()
    assert run.train().global_step == 4


def test_without_kl_there_is_no_reference(tmp_path: Any) -> None:
    run = job(tmp_path, kl_coef=0.0, max_steps=2)
    assert run.trainer.ref_model is None
    run.train()
    assert run.trainer.state.log_history[0]["objective/kl"] == 0


@pytest.mark.parametrize("critic", [None, "policy"])
def test_the_reference_under_lora_is_the_policy_with_adapters_off(critic: str | None, tmp_path: Any) -> None:
    run = job(tmp_path, use_peft=True, lora_r=4, value_model_name=critic)
    trainer, seen = run.trainer, []
    assert trainer.ref_model is None, "no second model"
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_" in name:
                value.add_(0.2 * torch.randn_like(value))
    plain = trainer._estimate
    trainer._estimate = lambda rollout: seen.append(rollout) or plain(rollout)
    trainer.model.train()
    trainer._prepare_inputs([PROMPTS[i] for i in range(4)])
    (rollout,) = seen
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    length, counted = rollout["completion_ids"].size(1), rollout["completion_mask"].bool()

    def log_probs() -> torch.Tensor:
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1:-1]
        return logits.log_softmax(-1).gather(2, rollout["completion_ids"][..., None])[..., 0][counted]

    with torch.no_grad(), trainer.model.disable_adapter():
        reference = log_probs()
    torch.testing.assert_close(rollout["ref_per_token_logps"][counted], reference, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(rollout["old_per_token_logps"][counted], log_probs(), atol=1e-5, rtol=1e-5)
    assert (rollout["old_per_token_logps"][counted] - reference).abs().max() > 1e-2


def test_entropy_bonus_raises_entropy(tmp_path: Any) -> None:
    last = []
    for weight in (0.0, 1.0):
        run = job(tmp_path / str(weight), entropy_coef=weight, vf_coef=0.0, reward_functions=[zero], max_steps=8,
                  learning_rate=1e-2)
        run.train()
        last.append(run.trainer.state.log_history[-2]["entropy"])
    assert last[1] > last[0] + 0.05


def zero(completions: list, **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_evaluation_changes_nothing(tmp_path: Any) -> None:
    run = job(tmp_path, eval_dataset_name=PROMPTS[:5], max_steps=2, eval_batch_size=2, kl_control="adaptive")
    before, coefficient = weights(run.trainer), run.trainer.kl_coef
    metrics = run.evaluate()
    assert not moved(before, weights(run.trainer)) and run.trainer.kl_coef == coefficient
    assert {"eval_loss", "eval_reward", "eval_kl", "eval_objective/kl", "eval_entropy"} <= metrics.keys()
    assert metrics["eval_reward"] > 0
    assert run.train().global_step == 2
    texts = run.generate(["count to 3:", "count to 12:"], max_new_tokens=5)
    assert texts[0] and len(texts) == 2 and texts[0] != texts[1]
    assert texts == run.generate(["count to 3:", "count to 12:"], max_new_tokens=5)
    assert texts[0] == run.generate(["count to 3:"], max_new_tokens=5)[0]


def test_options_reach_the_trainer(tmp_path: Any) -> None:
    args = job(tmp_path, num_generations=2, gradient_accumulation_steps=3, cliprange=0.3, lam=0.9, gamma=0.99,
               value_learning_rate=5e-4, kl_estimator="k3").trainer.args
    assert (args.num_generations, args.steps_per_generation, args.generation_batch_size) == (2, 6, 12)
    assert (args.cliprange, args.lam, args.gamma, args.kl_estimator) == (0.3, 0.9, 0.99, "k3")
    run = job(tmp_path / "b", value_learning_rate=5e-4, weight_decay=0.1, max_steps=1)
    run.train()
    rates = [(group["initial_lr"], group["weight_decay"]) for group in run.trainer.optimizer.param_groups]
    assert rates == [(1e-3, 0.1), (1e-3, 0.0), (5e-4, 0.1), (5e-4, 0.0)]


def test_a_second_train_starts_with_a_rollout_of_its_own(tmp_path: Any) -> None:
    run = job(tmp_path, max_steps=3)  # ends within a rollout
    run.train()
    assert (run.trainer._position, run.trainer._rollouts) == (3, 1)
    run.train()
    assert (run.trainer._position, run.trainer._rollouts) == (3, 1)


def test_faults_are_told(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="num_iterations: ppo does not take this option"):
        job(tmp_path, num_iterations=2)
    with pytest.raises(ConfigError, match="must divide the 4 completions of a rollout"):
        job(tmp_path, num_generations=3)
    with pytest.raises(ConfigError, match="there is no reward_model_name to copy"):
        job(tmp_path, value_model_name="reward")
    with pytest.raises(ConfigError, match="must be an integer >= 2"):
        create_rl_trainer("m", "d", algorithm="grpo", reward_functions=[distinct], num_generations=1)
    with pytest.raises(ValueError, match="beta is set by kl_coef"):
        PPOConfig(str(tmp_path), beta=0.5, bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="^importance_sampling_level = 'sequence': PPO does not read it; its loss has"):
        PPOConfig(str(tmp_path), importance_sampling_level="sequence", bf16=False, use_cpu=True)
    with pytest.raises(ConfigError, match="the critic reads the policy's ids"):
        job(tmp_path, value_model_name=tiny.llama(vocab_size=100))


@pytest.mark.parametrize("backend", ["trl", "fast"])
@pytest.mark.parametrize(("field", "value", "words"), [
    ("importance_sampling_level", "sequence", "one form, of each token's own"), ("loss_type", "vespo", "one form"),
    ("epsilon", 0.1, "cliprange is what clips"), ("epsilon", 0.2, "cliprange"), ("top_entropy_quantile", 0.3, "every"),
    ("off_policy_mask_threshold", 0.1, "every token"), ("use_adaptive_entropy", True, "entropy_coef is its weight"),
    ("scale_rewards", "none", "whiten_rewards"), ("use_bias_correction_kl", False, "its KL is in the reward"),
])  # fmt: skip
def test_what_grpo_reads_and_ppo_does_not(
    field: str, value: Any, words: str, backend: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=f"train.trainer_options.{field}: PPO does not read it; .*{words}"):
        job(tmp_path, backend=backend, trainer_options={field: value})


def test_a_copy_of_the_config_is_no_fault(tmp_path: Any) -> None:
    args = PPOConfig(str(tmp_path), cliprange=0.1, bf16=False, use_cpu=True)
    assert dataclasses.replace(args, learning_rate=1e-5).cliprange == 0.1


def test_a_named_critic_that_trains_whole_keeps_its_precision(tmp_path: Any) -> None:
    """Beside a policy whose adapters came with it, the critic has none."""
    stored = tiny.llama(seed=1)
    stored.save_pretrained(tmp_path / "critic")
    policy = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    run = job(tmp_path / "run", policy, precision="bf16", device="cpu", value_model_name=str(tmp_path / "critic"))
    trunk = dict(run.trainer.critic.backbone.named_parameters())
    assert all(torch.equal(value, trunk[name]) and trunk[name].requires_grad
               for name, value in stored.model.named_parameters())


@pytest.mark.parametrize("critic", [None, "policy"])
def test_the_critic_learns_what_the_prompt_tells(critic: str | None, tmp_path: Any) -> None:
    """Scores follow from the prompt alone: values come to explain most of the returns' variance."""

    def parity(answer: list, **columns: Any) -> list[float]:
        return [2.0 * (int(number) % 2) for number in answer]

    run = job(tmp_path, reward_functions=[parity], batch_size=16, num_mini_batches=1, num_ppo_epochs=4, max_steps=60,
              learning_rate=1e-3, value_learning_rate=1e-2, vf_coef=1.0, kl_coef=0.0, cliprange_value=None,
              value_model_name=critic, max_completion_length=3)
    run.train()
    explained = [entry["val/explained_variance"] for entry in run.trainer.state.log_history
                 if "val/explained_variance" in entry]
    assert abs(explained[0]) < 1e-6 and explained[-1] > 0.5
