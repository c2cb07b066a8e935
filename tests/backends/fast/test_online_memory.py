"""Recompute planned by memory in online trainers: for the pass of the loss, with what rollouts hold meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from aligntune.backends.fast import memory
from aligntune.backends.fast.memory import GIB, Costs
from aligntune.backends.fast.online import LossPassPlan
from aligntune.backends.fast.recompute import Recompute, recompute_of
from aligntune.backends.fast.rollout.trl import share_of_budget
from tests.backends.fast.rollout.test_trl import built_of
from tests.backends.fast.test_graphs import standing
from tests.core import tiny

MIB = 1 << 20


class Layer(torch.nn.Module):
    gradient_checkpointing = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda's counters, by hand."""
    now: dict[str, Any] = {"allocated": 1000 * MIB, "peak": 9000 * MIB, "free": 1000 * MIB, "segments": []}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: now["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: now.update(peak=now["allocated"]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2000 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (now["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: now["segments"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return now


def segment(pool: tuple[int, int], total: int, allocated: int) -> dict[str, Any]:
    return {"segment_pool_id": pool, "total_size": total * MIB, "allocated_size": allocated * MIB}


def planned_after_a_step(gpu: dict[str, Any], budget: int | None = None) -> LossPassPlan:
    """A first pass of 1,000 tokens takes 300 MiB, 50 of them a layer's, after a rollout that peaked far above it."""
    plan = LossPassPlan(Recompute([Layer() for _ in range(10)]), budget, 0)
    with plan.step(1000, number=0):
        plan.recompute.measure, plan.recompute.measured, plan.recompute.standing = False, 50 * MIB, gpu["allocated"]
        gpu["peak"] = max(gpu["peak"], gpu["allocated"] + 300 * MIB)
    return plan


def test_the_rollouts_peak_is_not_the_passes(gpu: dict[str, Any]) -> None:
    plan = planned_after_a_step(gpu)
    gpu["peak"] = 9000 * MIB
    with plan.step(1000, number=1):
        assert gpu["peak"] == 9000 * MIB, "once it is measured, nobody's peak is reset"
        assert plan.costs is not None and plan.costs.backward == pytest.approx(0.3 * MIB)


def test_what_graphs_hold_idle_is_not_free(gpu: dict[str, Any]) -> None:
    gpu["segments"] = [segment((0, 0), 500, 100), segment((0, 1), 1400, 300), segment((0, 2), 100, 100)]
    assert memory.idle_in_pools() == 1100 * MIB
    plan = planned_after_a_step(gpu)
    left = 3000 * MIB * (1 - memory.SPARE) - 1100 * MIB - 1000 * MIB - memory.WORKSPACES - 300 * MIB
    with plan.step(1000, number=1):
        kept = [layer.gradient_checkpointing for layer in plan.recompute.layers].count(False)
        assert kept == int(left / (50 * MIB)) == 7
    gpu["segments"] = []
    other = planned_after_a_step(gpu)
    with other.step(1000, number=1):
        more = [layer.gradient_checkpointing for layer in other.recompute.layers].count(False)
    assert more == 10
    exact = planned_after_a_step(gpu | {"segments": [segment((0, 1), 700, 300)]}, 2 * GIB)
    with exact.step(1000, number=1):
        assert exact.reach() == 2 * GIB, "a budget is of what is allocated, and idle blocks are not"


def test_the_cache_takes_its_share_of_a_budget(gpu: dict[str, Any]) -> None:
    assert share_of_budget(None) is None
    plan = LossPassPlan(Recompute([]), None, 0)
    assert share_of_budget(plan) is None
    plan.budget = 3000 * MIB
    assert share_of_budget(plan) == pytest.approx(0.3 * 2000 / 1024)
    plan.budget = 500 * MIB
    assert share_of_budget(plan) == 0


class Watched:
    """Stands for a plan: which passes it is asked about, and what had a gradient when each ended."""

    budget = None

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.passes = trainer, []

    def training_begins(self) -> None:
        pass

    @contextlib.contextmanager
    def step(self, tokens: int, *, number: int, length: int) -> Iterator[None]:
        assert torch.is_grad_enabled() and length == 0
        yield
        assert any(p.grad is not None for p in self.trainer.model.parameters()), "it ends after the backward"
        self.passes.append((tokens, number))


@pytest.mark.slow  # in CI the next one shows the plan at work
@pytest.mark.parametrize(("algorithm", "padded"), [
    ("grpo", False), ("grpo", True), ("rloo", False), ("ppo", False), ("dapo", False), ("dr_grpo", False),
])
def test_each_micro_step_has_one_planned_pass(algorithm: str, padded: bool, tmp_path: Any) -> None:
    group = {} if algorithm == "ppo" else {"num_generations": 4}
    options = {"num_ppo_epochs": 1, "num_mini_batches": 1, "num_generations": None} if algorithm == "ppo" else {}
    built = built_of("fast", algorithm, tmp_path, gradient_accumulation_steps=2,
                     **{name: value for name, value in (group | options).items() if value is not None})
    trainer = built.trainer
    trainer.rows_end_to_end = not padded
    trainer.memory = Watched(trainer)
    sizes, run = [], trainer._compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any]) -> Any:
        masks = [inputs["prompt_mask"], inputs["completion_mask"]]
        sizes.append(int(sum(mask.numel() if padded else mask.sum() for mask in masks)))
        return run(model, inputs)

    trainer._compute_loss = compute_loss
    trainer.train()
    assert [number for _, number in trainer.memory.passes] == [0, 0, 1, 1] and min(sizes) > 16
    for (tokens, _), size in zip(trainer.memory.passes, sizes, strict=True):
        assert tokens == size if padded else tokens < size, "prompts are computed once"
    engine = trainer.rollout_engine
    assert engine.cache_bytes > 0 and engine._decoder.pool.memory is None
    assert trainer._unplanned is None


@pytest.mark.slow
def test_the_plan_is_in_force_in_the_loss_pass(tmp_path: Any, gpu: dict[str, Any],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL switches checkpointing off and on around passes without gradients: the layers that were chosen stay so."""
    model = tiny.llama(num_hidden_layers=3)
    built = built_of("fast", "grpo", tmp_path, model_name=model, gradient_checkpointing=True, use_peft=True, lora_r=4)
    trainer = built.trainer
    recompute = recompute_of(trainer.model.get_base_model())
    assert recompute is not None and "recomputed in every layer" in built.attestation()["layout"]
    monkeypatch.setattr(recompute, "measure", False)
    layer = 10 * MIB
    trainer.memory = LossPassPlan(recompute, None, 0, costs=Costs(
        GIB, 0, forward=0.0, standing=0.0, backward=0.0, layer=layer / 40, passing=0.0, layers=3))
    trainer.memory.budget = int(trainer.memory.costs.of(40, 1)) + layer // 2
    seen: list[tuple[int, bool, list[bool]]] = []
    score = trainer._get_per_token_logps_and_entropies

    def scored(*args: Any, **kwargs: Any) -> Any:
        found = score(*args, **kwargs)
        flags = [one.gradient_checkpointing for one in recompute.layers]
        assert all("shared_before" in flat.inputs for flat in trainer.flats)
        seen.append((sum(flat.inputs["input_ids"].numel() for flat in trainer.flats), torch.is_grad_enabled(), flags))
        return found

    trainer._get_per_token_logps_and_entropies = scored
    trainer.train()
    losses = [(tokens, flags) for tokens, grad, flags in seen if grad]
    assert len(losses) == 2 and any(not grad for _, grad, _ in seen)
    for tokens, flags in losses:
        kept = trainer.memory.costs.kept(tokens, trainer.memory.budget)
        assert flags == [True] * (3 - kept) + [False] * kept and 0 < kept < 3
    assert built.attestation()["memory"].startswith(f"up to {trainer.memory.most} of 3 layers recomputed")


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_layers_are_recomputed_as_a_budget_asks(algorithm: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what just fits no layer more is recomputed than must be; losses stay."""
    tokens: list[int] = []
    layers_kept = Costs.kept

    def counted(self: Any, count: int, *args: Any) -> int:
        tokens.append(count)
        return layers_kept(self, count, *args)

    monkeypatch.setattr(Costs, "kept", counted)
    layers, found = 3, {}
    passes = {"num_ppo_epochs": 1, "num_mini_batches": 1} if algorithm == "ppo" else {}

    def train(name: str, budget: float | None) -> Any:
        # A workspace of cuBLAS (32 MiB) for the stream of an earlier trainer's graphs stands for as long as the
        # process, and counts, as it should: each run begins without.
        standing()
        model = tiny.llama(hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=layers)
        built = built_of("fast", algorithm, tmp_path / name, model_name=model, gradient_checkpointing="auto",
                         batch_size=32, max_steps=5, precision="bf16", max_completion_length=40, max_seq_length=128,
                         rollout_memory_gib=0.05, learning_rate=1e-5, memory_budget_gib=budget, **passes)
        built.trainer.train()
        return built

    free = train("free", None)
    plan = free.trainer.memory
    assert isinstance(plan, LossPassPlan) and plan.most == 0 and plan.costs.layer > 0 and plan.costs.backward > 0
    line = free.attestation()["memory"]
    assert line.startswith("no layer recomputed")
    assert "recomputed as memory asks" in free.attestation()["layout"]
    most, costs = max(tokens), plan.costs
    found["free"] = [entry["loss"] for entry in free.trainer.state.log_history if "loss" in entry]
    del free, plan
    takes = [costs.of(most, count) for count in range(layers + 1)]
    apart = [kept for kept in range(layers) if takes[kept + 1] - takes[kept] > most * costs.layer / 2]
    assert len(apart) >= 2, costs
    for kept in (apart[0], apart[-1]):
        budget = (takes[kept] + takes[kept + 1]) / 2
        tight = train(f"tight-{kept}", budget / GIB)
        # The base is measured anew: what an earlier trainer left is not in it.
        assert abs(tight.trainer.memory.costs.base - costs.base) < most * costs.layer / 4
        assert tight.trainer.memory.most == layers - kept
        losses = [entry["loss"] for entry in tight.trainer.state.log_history if "loss" in entry]
        assert losses == pytest.approx(found["free"], rel=5e-2, abs=5e-3)
        del tight
