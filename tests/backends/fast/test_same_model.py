"""Backend "fast" trains the model that "trl" trains, from the public factories: a few steps here, the bounds on a card.

Every case without a mark runs under the interpreter; "card" is the same case on a GPU. Bounds are those of
`benchmarks.parity`, whose figures over whole runs are committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune import create_rl_trainer
from aligntune.backends.fast import packing
from aligntune.backends.fast.ops import _runtime
from benchmarks import bounds, parity_runs
from benchmarks.parity_parts import ARMS, Arm
from tests.backends.fast.minis import MINIS, build
from tests.backends.fast.test_parity import IN_CI
from tests.core import tiny

CARD = pytest.mark.gpu
SLOW = pytest.mark.slow
VOCABULARY = 259
ROWS = [{"text": f"{i * i}:" + "ab" * (i % 4) + "c" * (i % 2)} for i in range(11)]
"""Of 3 to 12 tokens."""
ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def short_fillings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds a token and kernel: filled up to 64, two rows would cost three times more."""
    if _runtime.interpreting():
        monkeypatch.setattr(packing, "_SMALLEST", 8)


def mini(family: str = "llama", **settings: Any) -> Any:
    return build(family, vocab_size=VOCABULARY, max_position_embeddings=256, **settings)


def sft(backend: str, family: str = "llama", *, steps: int = 2, model: Any = None, **options: Any) -> Any:
    """(losses, gradients of every step) in fp32, by plain SGD: nothing but the gradient moves a weight."""
    given = {"tokenizer_name": tiny.tokenizer(), "batch_size": 4, "learning_rate": 0.1, "max_samples": None,
             "optimizer": "sgd", "lora_r": 3, "lora_alpha": 6, **options}  # fmt: skip
    losses, gradients, _ = parity_runs.sft(
        ARMS["fast"] if backend == "fast" else Arm("trl", {"precision": "fp32"}), model or mini(family), ROWS,
        steps=steps, kept=steps, **given)
    assert len(losses) == len(gradients) == steps
    return losses, gradients


def assert_same(ours: Any, theirs: Any, *, loss: float = bounds.FIRST, gradient: float = 1e-5) -> None:
    """Of every step: the loss, and every parameter's gradient relative to its norm."""
    for step, (x, y) in enumerate(zip(ours[0].tolist(), theirs[0].tolist(), strict=True)):
        assert y > 1 and x == pytest.approx(y, rel=loss), f"step {step}"
    for step, (found, true) in enumerate(zip(ours[1], theirs[1], strict=True)):
        apart = bounds.gradient_distances([true], [found])
        assert len(apart) > 4
        worst = max(apart, key=lambda name: apart[name])
        assert apart[worst] < gradient, f"step {step}: {worst} is {apart[worst]:.1e} from trl's"


def here_and_on_a_card(names: Any, here: tuple[str, ...]) -> list[Any]:
    return [*here, *(pytest.param(name, marks=CARD, id=f"{name}-card") for name in names)]


@pytest.mark.parametrize("family", here_and_on_a_card(MINIS, IN_CI))
def test_three_steps_of_a_family(family: str) -> None:
    """LoRA on every linear, whole for a family whose trunk has routed experts (their weights are no linears)."""
    adapters = family not in ("qwen3_moe", "mixtral")
    runs = [sft(backend, family, steps=3, use_peft=adapters, batch_size=2) for backend in ("fast", "trl")]
    assert len(set(runs[1][0].tolist())) == 3
    # Later steps start from weights that differ by a rounding already.
    assert_same(*runs, loss=2e-6, gradient=3e-5)


@pytest.mark.parametrize("where", ["here", pytest.param("card", marks=CARD)])
@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=SLOW)], ids=["lora", "full"])
def test_accumulated_windows_are_one_batch(adapters: bool, where: str) -> None:
    """11 rows in windows of 8: the second holds 3. As 8 x 1, 4 x 2 (a window of one micro-batch) and 1 x 8."""
    plain = sft("trl", batch_size=8, use_peft=adapters, model=mini(**ONE_LAYER))
    assert abs(float(plain[0][0] - plain[0][1])) > 1e-3
    for size, windows in ((8, 1), (4, 2), (1, 8)):
        found = sft("fast", batch_size=size, gradient_accumulation_steps=windows, use_peft=adapters,
                    model=mini(**ONE_LAYER))
        assert_same(found, plain)


@pytest.mark.parametrize("where", ["here", pytest.param("card", marks=CARD)])
@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=SLOW)])
def test_documents_end_to_end_and_packed_are_documents_alone(family: str, where: str) -> None:
    """All documents in one step: each alone, all end to end, packed; trl sees each alone, without a neighbour."""
    alone = {"batch_size": 1, "gradient_accumulation_steps": len(ROWS)}
    true = sft("trl", steps=1, model=mini(family, **ONE_LAYER), **alone)
    for options in (alone, {"batch_size": len(ROWS)}, {"batch_size": 8, "packing": True, "max_seq_length": 32}):
        assert_same(sft("fast", steps=1, model=mini(family, **ONE_LAYER), **options), true)


# Preference methods and online ones

GRPO: list[dict[str, Any]] = [
    *({"loss_type": one, "beta": 0.1} for one in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")),
    {"epsilon_high": 0.35, "delta": 1.5, "beta": 0.0}, {"top_entropy_quantile": 0.5},
    {"trainer_options": {"entropy_coef": 0.05}}, {"temperature": 0.7},
    {"trainer_options": {"off_policy_mask_threshold": 0.05}},
]  # fmt: skip
CASES = [
    *(("grpo", options) for options in GRPO), ("dr_grpo", {}), ("dr_grpo", {"beta": 0.1}), ("dapo", {}),
    ("dapo", {"epsilon_high": 0.2}), ("rloo", {"beta": 0.05}), ("rloo", {"beta": 0.0}),
    ("ppo", {}), ("ppo", {"entropy_coef": 0.05, "vf_coef": 0.5}), ("ppo", {"value_model_name": "policy"}),
    ("ppo", {"cliprange": 0.05, "cliprange_value": 0.05}),
]  # fmt: skip
QUICK = (0, 5, 11, 15, 17)
ADAPTED = {"use_peft": True, "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0}


def online(backend: str, algorithm: str, path: Path, **options: Any) -> Any:
    given = {"backend": backend, "output_dir": str(path / backend), "tokenizer_name": tiny.tokenizer(),
             "precision": "fp32", "batch_size": 4, "num_generations": 1 if algorithm == "ppo" else 4, "max_steps": 2,
             "max_completion_length": 5, "max_seq_length": 64, "report_to": "none", "progress": False,
             "gradient_accumulation_steps": 1, "reward_functions": [parity_runs.letters],
             "gradient_checkpointing": False, **options}  # fmt: skip
    with parity_runs.no_tf32():
        run = create_rl_trainer(mini(), [{"prompt": f"count to {i}:"} for i in range(8)], algorithm=algorithm, **given)
    parity_runs.draw_adapters(run.trainer.model)
    if algorithm == "ppo":  # a head of zeros passes no gradient on
        parity_runs.draw_adapters(run.trainer.critic)
        with torch.no_grad():
            run.trainer.critic.head.weight.copy_(noise(run.trainer.critic.head.weight.shape, 0.1, 6))
    return run.trainer


def noise(shape: Any, scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rollouts(trainer: Any, algorithm: str) -> dict[str, torch.Tensor]:
    """Four completions, one of them empty; ratios on both sides of the clips, advantages of either sign."""
    prompts, lengths = torch.tensor([4, 2, 3, 4]), torch.tensor([5, 1, 3, 0])
    ids = torch.randint(3, 250, (4, 9), generator=torch.Generator().manual_seed(7))
    given: dict[str, torch.Tensor] = {
        "prompt_ids": ids[:, :4], "prompt_mask": (torch.arange(4) >= 4 - prompts[:, None]).long(),
        "completion_ids": ids[:, 4:], "completion_mask": (torch.arange(5) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.5, -0.7, -1.2, 2.0]), "num_items_in_batch": lengths.sum(),
    }  # fmt: skip
    device = trainer.accelerator.device
    given = {name: value.to(device) for name, value in given.items()}
    mask = given["completion_mask"]
    with torch.no_grad(), parity_runs.no_tf32():
        now = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([given["prompt_ids"], given["completion_ids"]], 1),
            torch.cat([given["prompt_mask"], mask], 1), 5, compute_entropy=True)[0] * mask
    apart = noise(now.shape, 0.25, 1) + torch.tensor([[0.1], [-0.5], [0.1], [-0.3]])
    old = now + apart.to(device) * mask
    ratios = (now - old)[mask.bool()].exp()
    assert ratios.min() < 0.8 and ratios.max() > 1.2
    reference = (now + noise(now.shape, 0.5, 2).to(device)) * mask
    if algorithm == "rloo":
        return given | {"old_logps": (old * mask).sum(1)}
    if algorithm == "ppo":
        values = noise(now.shape, 1.0, 3).to(device)
        return given | {"loss_mask": mask, "old_log_probs": old, "values": values,
                        "advantages": noise(now.shape, 1.0, 4).to(device),
                        "returns": values + noise(now.shape, 0.5, 5).to(device)}
    return given | {"old_per_token_logps": old, "ref_per_token_logps": reference}


def loss_and_gradients(trainer: Any, inputs: dict[str, torch.Tensor]) -> Any:
    trainer.current_gradient_accumulation_steps = 1  # transformers' train() sets it
    trainer.model.train()
    trainer._items = inputs["num_items_in_batch"]
    models = {"": trainer.model, "critic.": getattr(trainer, "critic", torch.nn.Identity())}
    for model in models.values():
        model.zero_grad()
    with parity_runs.no_tf32():
        loss = trainer._compute_loss(trainer.model, dict(inputs))
        loss.backward()
    return loss.item(), {prefix + name: p.grad.double().cpu() for prefix, model in models.items()
                         for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("where", ["here", pytest.param("card", marks=CARD)])
@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=SLOW)], ids=["lora", "full"])
@pytest.mark.parametrize(("algorithm", "options"), [
    pytest.param(*case, marks=() if i in QUICK else SLOW, id=f"{case[0]}-{case[1]}") for i, case in enumerate(CASES)])
def test_the_loss_of_fixed_rollouts(
    algorithm: str, options: dict[str, Any], adapters: bool, where: str, tmp_path: Path
) -> None:
    more = options | (ADAPTED if adapters else {})
    theirs = online("trl", algorithm, tmp_path, **more)
    inputs = rollouts(theirs, algorithm)
    ours = online("fast", algorithm, tmp_path, **more)
    assert ours.rows_end_to_end
    (found, gradients), (true, expected) = (loss_and_gradients(one, inputs) for one in (ours, theirs))
    # Of the terms whose mean it is: those of advantages near 1 mostly cancel.
    assert abs(true) > 1e-3 and found == pytest.approx(true, rel=1e-6, abs=1e-6)
    apart = bounds.gradient_distances([expected], [gradients])
    worst = max(apart, key=lambda name: apart[name])
    assert len(apart) > 4 and apart[worst] < 1e-5, f"{worst}: {apart[worst]:.1e}"


def test_an_entropy_bonus_that_adapts_moves_alike(tmp_path: Path) -> None:
    """TRL's coefficient follows the entropy that the loss pass returns, step by step."""
    adaptive = {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_coef_delta": 0.01, "entropy_target": 9.0}
    theirs, ours = (online(one, "grpo", tmp_path, trainer_options=adaptive, **ADAPTED) for one in ("trl", "fast"))
    inputs = rollouts(theirs, "grpo")
    seen = []
    for _ in range(3):
        (found, gradients), (true, expected) = (loss_and_gradients(one, inputs) for one in (ours, theirs))
        assert abs(true) > 1e-3 and found == pytest.approx(true, rel=1e-6, abs=1e-6)
        assert max(bounds.gradient_distances([expected], [gradients]).values()) < 1e-5
        assert ours.entropy_coef == theirs.entropy_coef
        seen.append((true, theirs.entropy_coef))
    assert len(set(seen)) == 3, "the coefficient did not move, or the loss does not follow it"
