"""PPO on backend fast: the trl backend's numbers on the same completions, for each critic; what is said of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from aligntune.backends.fast.ppo import FastPPO
from tests.backends.fast.forced import Pair
from tests.backends.fast.rollout.test_trl import built_of
from tests.backends.trl.ppo_cases import job, moved, reward_model, weights
from tests.core.test_trainer import At, give_up

_SLOW = pytest.mark.slow
SMALL: dict[str, Any] = {"num_generations": 1, "num_ppo_epochs": 2, "num_mini_batches": 1, "max_steps": 3,
                         "whiten_advantages": False}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4}


@pytest.mark.parametrize(("critic", "options"), [
    (None, LORA), pytest.param("policy", LORA, marks=_SLOW), pytest.param(None, {}, marks=_SLOW),
    pytest.param("policy", {"entropy_coef": 0.05, "kl_coef": 0.0}, marks=_SLOW),
    pytest.param("reward", LORA | {"kl_estimator": "k3"}, marks=_SLOW),
    pytest.param(None, LORA | {"gradient_accumulation_steps": 2, "batch_size": 2, "entropy_coef": 0.05}, marks=_SLOW),
], ids=str)
def test_steps_are_those_of_the_trl_backend(critic: str | None, options: dict[str, Any], tmp_path: Any) -> None:
    given = SMALL | {"value_model_name": critic} | options
    if critic == "reward":
        given["reward_model_name"] = reward_model()
    pair = Pair("ppo", tmp_path, **given)
    assert isinstance(pair.ours, FastPPO) and len(pair.drawn) == 2  # two steps a rollout
    layout = pair.built.attestation()["layout"]
    whose = "a head on the policy's trunk" if critic is None else "a trunk of their own, rows end to end"
    assert layout.startswith("rows: end to end in log-prob and loss passes; ") and f"; values: {whose}" in layout
    assert "rollouts: our engine" in layout
    for key in ("loss", "loss/policy_avg", "loss/value_avg", "grad_norm", "val/grad_norm", "objective/kl", "val/mean",
                "val/ratio", "policy/approxkl_avg", "entropy", "objective/scores", "val/explained_variance"):
        ours, theirs = pair.logged(key)
        assert ours and ours == pytest.approx(theirs, rel=5e-4, abs=2e-6), key
    # The first pass over a rollout is the policy's that drew it; the second is another's.
    ratio = pair.logged("val/ratio")[0]
    assert ratio[0] == pytest.approx(1, abs=1e-5) and abs(ratio[1] - 1) > 1e-4
    assert pair.logged("loss")[0][0] == pytest.approx(pair.logged("loss")[1][0], abs=1e-6)
    assert min(abs(loss) for loss in pair.logged("loss")[0]) > 1e-3
    apart = pair.logged("sampling/sampling_logp_difference/max")[0]
    assert len(apart) == 2 and 0 < max(apart) < 1e-4
    names = set()
    for name, apart_by, way in pair.weights():
        assert way > 1e-4 and apart_by < 0.02 * way, name
        names.add(name)
    assert "critic.head.weight" in names and ("critic.backbone" in str(names)) == (critic is not None)
    step = pair.built.attestation()["step"]
    assert step["ok"], step["problems"]
    assert bool([line for line in step["summary"] if line.startswith("critic: ")]) == (critic is not None)


def test_values_are_those_of_padded_rows(tmp_path: Any) -> None:
    """Values and their gradients: rows of uneven length, one of them masked out, in slices of 2 and at once."""
    trainer = built_of("fast", "ppo", tmp_path, **SMALL).trainer
    torch.manual_seed(3)
    torch.nn.init.normal_(trainer.critic.head.weight)
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, (prompt, completion) in enumerate(((4, 5), (1, 2), (3, 0))):
        mask[row, 4 - prompt : 4 + completion] = 1
    device = trainer.accelerator.device
    ids, mask = ids.to(device), mask.to(device)
    found = []
    for flat, size in ((True, 3), (True, 2), (False, 3)):
        trainer.rows_end_to_end, trainer._values = flat, None
        trainer.model.zero_grad()
        trainer.critic.zero_grad()
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5, batch_size=size)
        values = trainer._values * mask[:, -5:]
        assert trainer._values.dtype == torch.float32 and values.shape == (3, 5)
        values.square().sum().backward()
        grads = [p.grad.clone() for p in (*trainer.model.model.parameters(), *trainer.critic.parameters())]
        found.append((values.detach(), grads))
    padded, padded_grads = found.pop()
    assert padded.abs().sum() > 1
    for values, grads in found:
        torch.testing.assert_close(values, padded, atol=2e-5, rtol=2e-5)
        for mine, other in zip(grads, padded_grads, strict=True):
            assert other.norm() > 0 and (mine - other).norm() < 1e-4 * other.norm()


def test_a_critic_that_cannot_lie_flat_is_said(tmp_path: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    critic = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=128))
    built = built_of("fast", "ppo", tmp_path, **SMALL, value_model_name=critic)
    told = built.attestation()
    assert "values: a trunk of their own, rows padded, 1 attention modules are not ours" in told["layout"]
    assert any(line.startswith("critic: ") and "eager" in line for line in told["eager"])
    trainer = built.trainer
    assert trainer.rows_end_to_end and not trainer.values_end_to_end
    ids = torch.randint(3, 250, (2, 6)).to(trainer.accelerator.device)
    trainer._values = None
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)
    assert trainer._values.shape == (2, 3)


def test_steps_that_are_left_out_are_not_traced(tmp_path: Any) -> None:
    trainer = built_of("fast", "ppo", tmp_path, **SMALL).trainer
    assert trainer.begins_rollout() and trainer.worth_tracing(last=False)
    trainer._rollout, trainer._position = {}, 1
    assert not trainer.worth_tracing(last=False) and trainer.worth_tracing(last=True)
    trainer._stopped = True
    assert not trainer.worth_tracing(last=True)


@pytest.mark.slow
def test_from_the_factory_to_the_run_folder(tmp_path: Any) -> None:
    """Trains, evaluates, generates; a run that stops between two passes over a rollout goes on bit for bit."""
    options: dict[str, Any] = {
        "backend": "fast", "batch_size": 2, "num_mini_batches": 1, "num_ppo_epochs": 2, "max_steps": 4, "save_steps": 3,
        "max_completion_length": 4, "use_peft": True, "lora_r": 2,
    }
    rows = [{"prompt": f"count to {i}:"} for i in range(8)]
    whole = job(tmp_path / "whole", rows=rows, eval_dataset_name=rows[:2], **options)
    assert whole.train().global_step == 4
    assert whole.evaluate()["eval_rollout/seconds"] > 0
    assert len(whole.generate(["hi", "a longer one"], max_new_tokens=3)) == 2
    told = json.loads((tmp_path / "whole/attestation.json").read_text())
    assert told["step"]["ok"] and told["layout"].endswith("rollouts: our engine, in the model's own memory; "
                                                          "generate: our engine")
    broken = job(tmp_path / "run", rows=rows, eval_dataset_name=rows[:2], **options)
    broken.trainer.add_callback(At(4, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    resumed = job(tmp_path / "run", rows=rows, eval_dataset_name=rows[:2], resume=True, **options)
    assert resumed.train().global_step == 4
    assert not moved(weights(whole.trainer), weights(resumed.trainer))
