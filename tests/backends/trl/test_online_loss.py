"""TRL's GRPOTrainer and RLOOTrainer compute the losses and advantages that `algorithms/` defines.

Nothing is at a point where terms vanish: ratios are on both sides of the clips, the reference is another model, a
completion is masked whole, lengths are ragged, advantages differ.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import split_tensor_dict

from aligntune.algorithms import dapo, dr_grpo, grpo, gspo, rloo
from aligntune.algorithms import policy_gradient as pg
from tests.backends.trl.test_build import trainer_of
from tests.core import tiny

PAD, LONGEST = 0, 8


def noise(value: torch.Tensor, scale: float, seed: int) -> torch.Tensor:
    return value + scale * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)


def log_probs_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """By the class's own forward, without the head that TRL puts on the instance: (B, T)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = type(model).forward(model, input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
    picked = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None]).squeeze(2)
    return picked[:, -inputs["completion_ids"].shape[1]:]


def batch(model: Any) -> dict[str, torch.Tensor]:
    lengths, prompts = torch.tensor([5, 1, 3, 0]), torch.tensor([4, 2, 3, 4])
    random = torch.Generator().manual_seed(7)
    inputs = {
        "prompt_ids": torch.randint(3, 250, (4, 4), generator=random),
        "completion_ids": torch.randint(3, 250, (4, 5), generator=random),
        "prompt_mask": (torch.arange(4) >= 4 - prompts[:, None]).long(),
        "completion_mask": (torch.arange(5) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.5, -0.7, -1.2, 2.0], dtype=torch.float64),
    }
    inputs["prompt_ids"].masked_fill_(inputs["prompt_mask"] == 0, PAD)
    with torch.no_grad():
        now = log_probs_of(model, inputs)
    # Whole sequences move too, so that their ratios leave the clips as well: 0.74 to 1.35 and beyond.
    inputs["old_per_token_logps"] = noise(now, 0.15, 1) + torch.tensor([[0.3], [-0.5], [0.3], [-0.3]])
    inputs["ref_per_token_logps"] = noise(now, 0.5, 2)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def ready(algorithm: str, tmp_path: Any, **options: Any) -> Any:
    trainer = trainer_of(algorithm, tmp_path, tiny.llama().double(), max_completion_length=LONGEST,
                         batch_size=4, gradient_accumulation_steps=1, **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def compare(theirs: torch.Tensor, ours: torch.Tensor, model: Any) -> None:
    assert theirs.abs() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=2e-7)  # TRL's head works in fp32
    one, two = gradient(theirs, model), gradient(ours, model)
    assert one.norm() > 1e-4
    assert ((one - two).norm() / two.norm()).item() < 1e-5


GRPO = [("grpo", "token"), ("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "token"), ("dapo", "token"),
        ("sapo", "token"), ("luspo", "sequence"), ("cispo", "token"), ("vespo", "token")]


@pytest.mark.parametrize(("loss_type", "level"), GRPO)
@pytest.mark.parametrize("more", [{}, {"epsilon_high": 0.35, "delta": 1.5, "top_entropy_quantile": 0.5}],
                         ids=["plain", "clips and entropy"])
def test_grpo_in_every_form(loss_type: str, level: str, more: dict[str, Any], tmp_path: Any) -> None:
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.3, **more}
    trainer = ready("grpo", tmp_path, **options)
    model, inputs = trainer.model, batch(trainer.model)
    log_probs, kept = log_probs_of(model, inputs), None
    ratios = pg.log_ratios(log_probs, inputs["old_per_token_logps"], inputs["completion_mask"], level=level).exp()
    assert ratios.min() < 0.85 and ratios.max() > 1.2
    if more:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            _, entropies, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, 5, compute_entropy=True)
        kept = pg.high_entropy_mask(entropies, inputs["completion_mask"], top_quantile=0.5)
        assert 0 < kept.sum() < inputs["completion_mask"].sum()
    ours = grpo.loss(
        log_probs, inputs["old_per_token_logps"], inputs["advantages"], inputs["completion_mask"],
        ref_log_probs=inputs["ref_per_token_logps"], options=grpo.GRPOOptions(**options), token_filter=kept,
        max_completion_length=LONGEST, num_items_in_batch=inputs["num_items_in_batch"])
    compare(trainer._compute_loss(model, inputs), ours, model)


@pytest.mark.parametrize("algorithm", ["gspo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_others_at_their_published_constants(algorithm: str, beta: float, tmp_path: Any) -> None:
    trainer = ready(algorithm, tmp_path, beta=beta)
    model, inputs = trainer.model, batch(trainer.model)
    module: Any = {"gspo": gspo, "dapo": dapo, "dr_grpo": dr_grpo}[algorithm]
    extra = {"gspo": {}, "dapo": {"num_items_in_batch": inputs["num_items_in_batch"]},
             "dr_grpo": {"max_completion_length": LONGEST}}[algorithm]
    if algorithm == "gspo":  # some sequences inside the narrow clip: outside of it there is no gradient
        inputs["old_per_token_logps"] = noise(log_probs_of(model, inputs).detach(), 3e-4, 1)
        trainer.args.steps_per_generation = 1
    options = module.SPEC.options(beta=beta)
    ours = module.loss(log_probs_of(model, inputs), inputs["old_per_token_logps"], inputs["advantages"],
                       inputs["completion_mask"], options=options, ref_log_probs=inputs["ref_per_token_logps"], **extra)
    compare(trainer._compute_loss(model, inputs), ours, model)


def test_trls_kl_is_another_unless_it_is_told(tmp_path: Any) -> None:
    """What `differs` says: TRL's default multiplies the KL by the ratio."""
    losses = []
    for times in (False, True):
        trainer = ready("grpo", tmp_path, beta=0.3)
        trainer.args.use_bias_correction_kl = times
        inputs = batch(trainer.model)
        theirs = trainer._compute_loss(trainer.model, inputs)
        ours = pg.policy_loss(
            log_probs_of(trainer.model, inputs), inputs["old_per_token_logps"], inputs["advantages"],
            inputs["completion_mask"], loss_type="grpo", beta=0.3, ref_log_probs=inputs["ref_per_token_logps"],
            kl_times_ratio=times)
        compare(theirs, ours, trainer.model)
        losses.append(theirs.item())
    assert abs(losses[0] - losses[1]) > 1e-4


LENGTHS, SIGNS = [6, 2, 1, 3], [1.0, -1.0, 1.0, -1.0]


def rollout(trainer: Any, rows: slice) -> dict[str, Any]:
    """TRL's own generation batch of these answers of the page's batch, with the page's advantages."""
    trainer._generate_single_turn = lambda *rest: ([[9] * length for length in LENGTHS[rows]], None)
    count = len(LENGTHS[rows])
    out = trainer._generate_and_score_completions([{"prompt": "ab"[place // 2]} for place in range(count)])
    out["advantages"] = torch.tensor(SIGNS[rows])
    assert out["num_items_in_batch"] == sum(LENGTHS[rows])
    return out


def test_which_tokens_dapos_loss_divides_by(tmp_path: Any) -> None:
    """The numbers of docs/algorithms/dapo.md: TRL's where a rollout is one window, two, or half of one."""
    def trainer(accumulation: int, steps: int) -> Any:
        made = trainer_of("dapo", tmp_path / f"{accumulation}{steps}", tiny.llama(), batch_size=2, num_generations=2,
                          gradient_accumulation_steps=accumulation, steps_per_generation=steps, overlong_buffer_len=0,
                          dynamic_sampling=False)
        assert made.args.steps_per_generation == steps
        made.current_gradient_accumulation_steps = accumulation
        made.model.train()
        return made

    def losses(made: Any, batches: list[dict[str, Any]]) -> list[float]:
        return [made._compute_loss(made.model, each).item() for each in batches]

    def own(rows: slice) -> float:
        mask = torch.arange(6) < torch.tensor(LENGTHS[rows])[:, None]
        log_probs = torch.full(mask.shape, -1.0)
        return dapo.loss(log_probs, log_probs, torch.tensor(SIGNS[rows]), mask).item()

    whole, first, second = slice(0, 4), slice(0, 2), slice(2, 4)
    default, many, few = trainer(2, 2), trainer(1, 2), trainer(2, 1)
    window = losses(default, split_tensor_dict(rollout(default, whole), 2))
    assert window == pytest.approx([-4 / 12, 2 / 12], abs=1e-5)
    halves = losses(many, split_tensor_dict(rollout(many, whole), 2))
    rounds = losses(few, [rollout(few, first), rollout(few, second)])
    assert rounds == pytest.approx([-4 / 16, 2 / 8], abs=1e-5)
    found = {"one rollout, one step": [sum(window)], "one rollout, two steps": halves,
             "by their own tokens": [own(first), own(second)], "two rollouts, one step": [sum(rounds)]}
    assert own(whole) == pytest.approx(sum(window), abs=1e-5)
    page = (Path(__file__).parents[3] / "docs" / "algorithms" / "dapo.md").read_text()
    said = " ".join(dapo.SPEC.differs)
    for what, numbers in found.items():
        (stated,) = re.findall(rf"^{what}: (.*)$", page, re.M)
        assert [float(each) for each in stated.split(", ")] == pytest.approx(numbers, abs=6e-5), what
        assert all(re.search(rf"(?<![\d.-]){round(number, 4) + 0.0:g}(?!\d|\.\d)", said) for number in numbers), what


def test_rloo(tmp_path: Any) -> None:
    trainer = ready("rloo", tmp_path, epsilon=0.25, epsilon_high=0.5)
    model, inputs = trainer.model, batch(trainer.model)
    mask = inputs["completion_mask"]
    inputs["old_logps"] = (inputs["old_per_token_logps"] * mask).sum(1)
    log_probs = log_probs_of(model, inputs)
    ratio = pg.log_ratios(log_probs, inputs["old_per_token_logps"], mask, level="product").exp()
    assert ratio.min() < 0.75 or ratio.max() > 1.5
    ours = rloo.loss(log_probs, inputs["old_per_token_logps"], inputs["advantages"], mask,
                     options=rloo.RLOOOptions(epsilon=0.25, epsilon_high=0.5))
    compare(trainer._compute_loss(model, inputs), ours, model)


# Advantages


SCORES = [0.0, 1.0, 0.5, 3.0, 2.0, 2.0, 2.0, 2.5]


def fixed(trainer: Any) -> None:
    """Generation that returns set completions, and a reward that grades them by their place."""
    made = [[10 + i] * (i % 3 + 1) + [2] for i in range(8)]
    trainer._generate_single_turn = lambda *args, **kwargs: (made, None) if trainer.args.__class__.__name__ == (
        "GRPOConfig") else made


def graded(completions: list, **columns: Any) -> list[float]:
    return list(SCORES)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale: str, tmp_path: Any) -> None:
    trainer = trainer_of("grpo", tmp_path, batch_size=8, reward_functions=[graded], scale_rewards=scale)
    fixed(trainer)
    found = trainer._generate_and_score_completions([{"prompt": "a"}] * 4 + [{"prompt": "b"}] * 4)["advantages"]
    expected = pg.group_advantages(torch.tensor(SCORES), 4, scale_rewards=scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"normalize_advantages": True}, {"reward_clip_range": [0.5, 2.0]}],
                         ids=["plain", "normalized", "clipped"])
def test_rloo_advantages_with_kl_in_the_reward(options: dict[str, Any], tmp_path: Any) -> None:
    trainer = trainer_of("rloo", tmp_path, batch_size=8, reward_functions=[graded], beta=0.2, **options)
    with torch.no_grad():
        for seed, value in enumerate(trainer.ref_model.parameters()):
            value.copy_(noise(value, 0.05, seed))
    fixed(trainer)
    out = trainer._generate_and_score_completions([{"prompt": "a"}] * 4 + [{"prompt": "b"}] * 4)
    with torch.no_grad():
        old, reference = log_probs_of(trainer.model, out), log_probs_of(trainer.ref_model, out)
    mask = out["completion_mask"]
    kl = ((old - reference) * mask).sum(1)
    assert kl.abs().min() > 1e-3
    torch.testing.assert_close(out["old_logps"], (old * mask).sum(1), rtol=1e-5, atol=1e-5)
    expected = rloo.advantages(torch.tensor(SCORES), 4, old_log_probs=old, ref_log_probs=reference,
                               completion_mask=mask, options=rloo.RLOOOptions(beta=0.2, **options))
    torch.testing.assert_close(out["advantages"], expected, rtol=1e-4, atol=1e-5)
