"""DAPO's dynamic sampling and token-level loss: what replaces flat groups, what it costs, when it stops."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune.errors import ConfigError
from aligntune.rewards.overlong import SoftOverlong
from tests.backends.trl.test_build import longest, parameters, trainer_of
from tests.core import tiny

ROOT = Path(__file__).parents[3]


def number(prompt: str) -> int:
    return int(re.findall(r"\d+", prompt)[0])


def spread_unless(flat: Any) -> Any:
    """A reward that is 1, 2, 3, 4 over a group, and 1 throughout for prompts of which `flat(number)`."""
    def reward(prompts: list[str], completions: list, **columns: Any) -> list[float]:
        return [1.0 if flat(number(prompt)) else 1.0 + place % 4 for place, prompt in enumerate(prompts)]
    return reward


def dapo(path: Any, reward: Any = longest, **options: Any) -> Any:
    return trainer_of("dapo", path, **({"reward_functions": [reward], "batch_size": 8, "overlong_buffer_len": 0}
                                       | options))


def draw(trainer: Any, numbers: list[int]) -> tuple[list[int], dict[str, Any], dict[str, list[float]]]:
    """One generation batch from these prompts: the prompts in it, the batch, and the metrics."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    before = {key: len(values) for key, values in trainer._metrics["train"].items()}
    out = trainer._generate_and_score_completions([{"prompt": f"count to {n}:"} for n in numbers for _ in range(4)])
    texts = trainer.processing_class.batch_decode(out["prompt_ids"], skip_special_tokens=True)
    shown = [number(text) for text in texts]
    metrics = {key: values[before.get(key, 0):] for key, values in trainer._metrics["train"].items()}
    return shown, out, metrics


def test_where_every_group_has_a_spread_it_is_trl_bit_for_bit(tmp_path: Any) -> None:
    trained = []
    for wanted in (True, False):
        trainer = dapo(tmp_path / str(wanted), spread_unless(lambda n: False), dynamic_sampling=wanted)
        assert trainer.dynamic_sampling is wanted
        trainer.train()
        trained.append(parameters(trainer.model))
        other = ("dynamic", "step_time", "train_", "profiling")
        trained.append([{key: value for key, value in record.items() if not key.startswith(other)}
                        for record in trainer.state.log_history])
    assert all(torch.equal(trained[0][name], value) for name, value in trained[2].items())
    assert trained[1] == trained[3] and "completions/mean_length" in trained[1][0]


def test_flat_groups_are_replaced_by_fresh_prompts(tmp_path: Any) -> None:
    trainer = dapo(tmp_path, spread_unless(lambda n: n % 2 == 1))
    shown, out, metrics = draw(trainer, [1, 4])
    assert len(shown) == 8 and shown[4:] == [4] * 4  # where it was
    assert shown[:4] == [shown[0]] * 4 and shown[0] % 2 == 0 and shown[0] not in (1, 4)
    assert out["advantages"].view(2, 4).std(1).min() > 0.5
    rounds = metrics["dynamic_sampling/rounds"][0]
    drawn = metrics["dynamic_sampling/drawn_completions"][0]
    assert rounds >= 1 and drawn >= 12
    assert metrics["dynamic_sampling/discarded_completions"] == [drawn - 8]
    assert metrics["dynamic_sampling/bound_reached"] == [0]
    assert metrics["frac_reward_zero_std"] == [0]
    assert metrics["reward"] == [2.5]
    flat = metrics["dynamic_sampling/flat_groups"][0]
    assert 0 < flat <= (drawn / 4 - 2) / (drawn / 4)
    assert metrics["dynamic_sampling/reward_drawn"][0] == pytest.approx(2.5 - 1.5 * flat)


def test_what_is_drawn_is_counted(tmp_path: Any) -> None:
    """Tokens by hand: every completion ever made passes the reward, kept or not."""
    made: list[list[int]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        made.extend(completion_ids)
        return spread_unless(lambda n: n < 12)(prompts, completion_ids)

    trainer = dapo(tmp_path, reward)
    _, out, metrics = draw(trainer, [1, 2])
    total, kept = sum(map(len, made)), int(out["completion_mask"].sum())
    assert metrics["dynamic_sampling/drawn_completions"] == [len(made)]
    assert metrics["dynamic_sampling/discarded_tokens"] == [total - kept] and total > kept > 0
    assert metrics["completions/mean_length"] == [pytest.approx(total / len(made))]
    assert metrics["completions/max_length"] == [max(map(len, made))]
    ended = [len(ids) for ids in made if ids[-1] == 2]
    assert metrics["completions/clipped_ratio"] == [pytest.approx(1 - len(ended) / len(made))]
    assert all(len(values) == 1 for values in metrics.values())


def test_the_bound_leaves_flat_groups_in_the_batch_and_says_so(tmp_path: Any, caplog: Any) -> None:
    trainer = dapo(tmp_path, spread_unless(lambda n: True), max_resample_rounds=3)
    with caplog.at_level(logging.WARNING, "aligntune"):
        shown, out, metrics = draw(trainer, [1, 4])
        draw(trainer, [5, 6])
    assert shown == [1] * 4 + [4] * 4 and not out["advantages"].any()
    assert metrics["dynamic_sampling/rounds"] == [3] and metrics["dynamic_sampling/bound_reached"] == [1]
    assert metrics["dynamic_sampling/drawn_completions"] == [32]
    assert metrics["dynamic_sampling/discarded_completions"] == [24]
    said = [record.message for record in caplog.records if "dynamic sampling" in record.message]
    assert len(said) == 1 and "after max_resample_rounds=3 rounds of fresh prompts 2 of 2 groups" in said[0]


def test_no_rounds_is_trl(tmp_path: Any) -> None:
    trainer = dapo(tmp_path, spread_unless(lambda n: n == 1), max_resample_rounds=0)
    shown, out, metrics = draw(trainer, [1, 4])
    assert shown == [1] * 4 + [4] * 4 and metrics["dynamic_sampling/drawn_completions"] == [8]
    assert not out["advantages"][:4].any() and out["advantages"][4:].all()


def test_fresh_prompts_come_round_again_where_the_dataset_is_used_up(tmp_path: Any) -> None:
    """16 prompts of which one has a spread: it is the only one that can fill the batch."""
    trainer = dapo(tmp_path, spread_unless(lambda n: n != 7), max_resample_rounds=60)
    shown, _, metrics = draw(trainer, [1, 4])
    assert shown == [7] * 8 and metrics["dynamic_sampling/bound_reached"] == [0]


def test_the_same_seed_and_step_draw_the_same_prompts_and_others_do_not(tmp_path: Any) -> None:
    def fresh(trainer: Any, step: int) -> list[str]:
        trainer._step = step
        rows = trainer._fresh_rows({"'count to 3:'"})
        return [next(rows)["prompt"] for _ in range(31)]

    one, two = dapo(tmp_path / "a"), dapo(tmp_path / "b")
    assert fresh(one, 5) == fresh(two, 5)
    assert fresh(one, 5) != fresh(one, 6)
    assert "count to 3:" not in fresh(one, 5)[:15] and len(set(fresh(one, 5)[:15])) == 15
    assert fresh(dapo(tmp_path / "c", seed=8), 5) != fresh(one, 5)


def test_a_length_punishment_is_no_spread(tmp_path: Any) -> None:
    """All wrong, of different lengths: the punishment alone would keep the group."""
    trainer = dapo(tmp_path, spread_unless(lambda n: n == 1), overlong_buffer_len=6)
    assert trainer.reward_func_names == ["reward", "soft_overlong"]
    generated = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *rest: (
        [[5] * (place % 4 + 2) for place in range(len(ids))], generated and None)
    shown, out, metrics = draw(trainer, [1, 4])
    assert 1 not in shown
    # lengths 2 to 5 of 6 with a buffer of 6: -2/6 to -5/6; with the reward 1 to 4
    rewards = torch.tensor([1 - 2 / 6, 2 - 3 / 6, 3 - 4 / 6, 4 - 5 / 6])
    torch.testing.assert_close(out["advantages"][:4], (rewards - rewards.mean()) / (rewards.std() + 1e-4))


def test_rows_without_a_reward_are_flat(tmp_path: Any) -> None:
    def reward(prompts: list[str], **columns: Any) -> list[float | None]:
        return [None if number(prompt) == 1 or place % 4 == 0 else float(place % 4)
                for place, prompt in enumerate(prompts)]

    shown, out, _ = draw(dapo(tmp_path, reward), [1, 4])
    assert 1 not in shown
    assert [bool(value) for value in out["advantages"][:4]] == [False, True, False, True]  # None, 1, 2 (the mean), 3


def test_evaluation_draws_nothing(tmp_path: Any) -> None:
    trainer = dapo(tmp_path, spread_unless(lambda n: True))
    trainer.model.eval()
    out = trainer._generate_and_score_completions([{"prompt": "count to 1:"}] * 4)
    assert len(out["prompt_ids"]) == 4
    assert not any(key.startswith("dynamic") for mode in ("train", "eval") for key in trainer._metrics[mode])


def test_columns_that_a_reward_logs_stay_with_their_rows(tmp_path: Any) -> None:
    def reward(prompts: list[str], log_extra: Any, **columns: Any) -> list[float]:
        log_extra("number", [number(prompt) for prompt in prompts])
        return spread_unless(lambda n: n % 2 == 1)(prompts, [])

    trainer = dapo(tmp_path, reward)
    shown, _, _ = draw(trainer, [1, 4])
    assert list(trainer._logs["extra"]["number"]) == shown == [number(p) for p in trainer._logs["prompt"]]


def test_a_reward_model_and_weights(tmp_path: Any) -> None:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(3)
    model = LlamaForSequenceClassification(
        type(tiny.llama().config)(**{**tiny.llama().config.to_dict(), "num_labels": 1}))
    folder = tmp_path / "scorer"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    trainer = dapo(tmp_path, spread_unless(lambda n: n % 2 == 1), reward_model_name=str(folder),
                   reward_function_weights=[1.0, 0.0], max_steps=2, overlong_buffer_len=3)
    assert trainer.reward_weights.tolist() == [1.0, 0.0, 1.0]
    shown, _, metrics = draw(trainer, [1, 4])
    assert all(n % 2 == 0 for n in shown)  # the model's scores differ in every group, with weight 0
    assert metrics[f"rewards/{trainer.reward_func_names[1]}/std"][0] > 0
    assert trainer.train().global_step == 2


def test_with_lora_only_adapters_move(tmp_path: Any) -> None:
    trainer = dapo(tmp_path, spread_unless(lambda n: n % 2 == 1), use_peft=True, lora_r=4, beta=0.1)
    before = parameters(trainer.model)
    assert trainer.train().global_step == 3
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert trainer.state.log_history[-2]["dynamic_sampling/rounds"] > 0


@pytest.mark.parametrize(("what", "message"), [
    ({"rows": [{"prompt": "a", "image": 1}]}, "images"), ({"tools": [len]}, "tools"),
])
def test_what_it_cannot_do_is_an_error(what: dict[str, Any], message: str, tmp_path: Any) -> None:
    trainer = dapo(tmp_path)
    trainer.model.train()
    trainer.tools = what.get("tools", [])
    with pytest.raises(ConfigError, match=f"dynamic_sampling does not work with {message}"):
        trainer._generate_and_score_completions(what.get("rows", [{"prompt": "a"}]) * 8)


# The soft overlong punishment


def test_the_buffer_is_a_fifth_as_published_and_may_be_set_or_dropped(tmp_path: Any) -> None:
    def punishment(**options: Any) -> SoftOverlong | None:
        trainer = trainer_of("dapo", tmp_path, **options)
        return trainer.reward_funcs[1] if len(trainer.reward_funcs) > 1 else None

    assert punishment(max_completion_length=40, max_seq_length=100) == SoftOverlong(40, 8)
    assert punishment(overlong_buffer_len=3) == SoftOverlong(6, 3)
    assert punishment(overlong_buffer_len=0) is None
    assert punishment(overlong_penalty_factor=0.0) is None
    assert trainer_of("dapo", tmp_path, overlong_penalty_factor=0.5).reward_weights.tolist() == [1.0, 0.5]
    with pytest.raises(ConfigError, match="overlong_buffer_len = 7: must be at most max_completion_length = 6"):
        punishment(overlong_buffer_len=7)
    assert SoftOverlong(100, 20)([], [], [[1] * 80, [1] * 90, [1] * 100]) == [0, -0.5, -1]


# The loss over the accumulation window


def test_micro_batches_of_the_token_level_loss_add_up_to_one_big_batch(tmp_path: Any) -> None:
    """Ragged completions, so that a mean of the micro-batches' means is another step: bnpo is that."""
    def step(algorithm: str, batch: int, accumulation: int, **options: Any) -> tuple[torch.Tensor, float]:
        trainer = trainer_of(
            algorithm, tmp_path / f"{algorithm}{batch}", tiny.llama(), batch_size=batch, max_steps=1,
            gradient_accumulation_steps=accumulation, learning_rate=1e-2, beta=0.0, max_grad_norm=1e9,
            reward_functions=[spread_unless(lambda n: False)], trainer_options={"optim": "sgd"}, **options)
        trainer._generate_single_turn = lambda ids, *rest: (
            [[10 + place + len(prompt) % 7] * (place % 5 + 1) for place, prompt in enumerate(ids)], None)
        before = torch.cat([v.reshape(-1) for v in parameters(trainer.model).values()])
        trainer.train()
        after = torch.cat([v.reshape(-1) for v in parameters(trainer.model).values()])
        return after - before, trainer.state.log_history[0]["loss"]

    whole, loss = step("dapo", 16, 1)
    pieces, loss_of_pieces = step("dapo", 4, 4)
    assert whole.abs().max() > 1e-4 and abs(loss) > 1e-3
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-7)
    assert loss_of_pieces == pytest.approx(loss, rel=1e-4)
    means, _ = step("grpo", 4, 4, loss_type="bnpo")
    big, _ = step("grpo", 16, 1, loss_type="bnpo")
    assert (means - big).norm() > 0.02 * big.norm()


# Several processes

TWO = """
import json, os, pathlib, sys
import torch.distributed as dist
from tests.backends.trl.test_dynamic_sampling import dapo, draw, spread_unless

rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
asked = []

def reward(prompts, completions, **columns):
    asked.append(len(prompts))
    # Rank-dependent counts would hang: the group of 4 lies across both processes of 6 completions each.
    numbers = [int(p.split()[-1][:-1]) for p in prompts]
    return [1.0 if n % 3 else float(1 + 2 * place + rank) for place, n in enumerate(numbers)]

found = {}
trainer = dapo(folder, reward, batch_size=6, num_generations=4, device="cpu", max_steps=2)
batch = [1] * 4 + [4] * 4 + [6] * 4
trainer.model.train()
out = trainer._generate_and_score_completions([{"prompt": f"count to {n}:"} for n in batch[rank * 6:][:6]])
shown = trainer.processing_class.batch_decode(out["prompt_ids"], skip_special_tokens=True)
found["shown"] = [int(text.split()[-1][:-1]) for text in shown]
found["advantages"] = out["advantages"].tolist()
found["metrics"] = {k: v[-1] for k, v in trainer._metrics["train"].items() if k.startswith("dynamic") or k == "reward"}
found["asked"] = asked[:]
trainer.train()
found["weight"] = float(sum(value.double().sum() for value in trainer.model.parameters()))
(folder / f"rank{rank}.json").write_text(json.dumps(found))
dist.barrier()  # a process that leaves while the other still speaks to it is aborted by gloo
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_agree_on_rounds_and_share_what_was_kept(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
               str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    groups = first["shown"] + second["shown"]
    assert len(groups) == 12 and groups[8:] == [6] * 4
    assert all(len(set(groups[start:start + 4])) == 1 and groups[start] % 3 == 0 for start in (0, 4, 8))
    assert first["metrics"] == second["metrics"] and first["metrics"]["dynamic_sampling/rounds"] >= 1
    assert first["asked"] == second["asked"] and all(count % 2 == 0 for count in first["asked"])
    advantages = torch.tensor(first["advantages"] + second["advantages"]).view(3, 4)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-4, rtol=0)
    assert advantages.abs().min() > 0
    assert first["weight"] == second["weight"]
