"""The parts of policy-gradient losses against values worked out by hand, and their gradients against differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from aligntune.algorithms import policy_gradient as pg
from aligntune.algorithms import rloo

NAN = math.nan


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(seed: int = 0, count: int = 6, width: int = 5) -> dict[str, torch.Tensor]:
    """Ragged completions, one of them masked whole, with ratios on both sides of every clip."""
    random = torch.Generator().manual_seed(seed)
    log_probs = -0.2 - 2 * torch.rand(count, width, generator=random, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 3, 0, 4, 2])[:count]
    return {
        "log_probs": log_probs, "old_log_probs": log_probs + 0.4 * torch.randn(count, width, generator=random,
                                                                              dtype=torch.float64),
        "ref_log_probs": log_probs + 0.5 * torch.randn(count, width, generator=random, dtype=torch.float64),
        "advantages": double([1.5, -0.7, 0.3, 2.0, -1.1, 0.9])[:count],
        "completion_mask": (torch.arange(width) < lengths[:, None]).long(),
    }


# Advantages


def test_group_advantages_by_hand() -> None:
    rewards = double([1, 0, 0, 1, 2, 4, 6, 8])
    # deviations with n - 1: sqrt(1/3) and sqrt(20/3)
    first, second = math.sqrt(1 / 3), math.sqrt(20 / 3)
    scaled = [0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first, -3 / second, -1 / second, 1 / second, 3 / second]
    torch.testing.assert_close(pg.group_advantages(rewards, 4, epsilon=0.0), double(scaled))
    centred = [0.5, -0.5, -0.5, 0.5, -3, -1, 1, 3]
    torch.testing.assert_close(pg.group_advantages(rewards, 4, scale_rewards="none"), double(centred))
    whole = math.sqrt(((rewards - 2.75) ** 2).sum().item() / 7)
    torch.testing.assert_close(pg.group_advantages(rewards, 4, scale_rewards="batch"),
                               double(centred) / (whole + 1e-4))


def test_a_group_without_spread_gives_nothing_and_epsilon_is_what_keeps_it_from_dividing_by_zero() -> None:
    assert pg.group_advantages(double([3, 3, 3, 3]), 4).tolist() == [0, 0, 0, 0]
    shrunk = pg.group_advantages(double([1, 0]), 2)[0].item()
    assert shrunk == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4), rel=1e-12)
    assert shrunk != pytest.approx(0.5 / math.sqrt(0.5), rel=1e-5)


def test_a_completion_without_a_reward_is_out_of_the_group() -> None:
    found = pg.group_advantages(double([1, NAN, 0, 2]), 4, scale_rewards="none")
    assert found.tolist() == [0, 0, -1, 1]
    assert pg.leave_one_out_advantages(double([1, NAN, 0, 2]), 4).tolist() == [0, 0, -1.5, 1.5]
    assert pg.leave_one_out_advantages(double([NAN, NAN, 0, NAN]), 4).tolist() == [0, 0, 0, 0]


def test_leave_one_out_by_hand_and_as_the_centred_reward() -> None:
    rewards = double([1, 2, 6, 3])
    # less the mean of the others: 1 - 11/3, 2 - 10/3, 6 - 2, 3 - 3
    expected = double([1 - 11 / 3, 2 - 10 / 3, 4, 0])
    found = pg.leave_one_out_advantages(rewards, 4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, 4 / 3 * pg.group_advantages(rewards, 4, scale_rewards="none"))
    normalized = pg.leave_one_out_advantages(rewards, 4, normalize=True, epsilon=0.0)
    assert normalized.mean().item() == pytest.approx(0, abs=1e-12)
    assert normalized.std().item() == pytest.approx(1, rel=1e-12)


def test_kl_in_the_reward_by_hand() -> None:
    old, reference = double([[-1, -2, -9]]), double([[-1.5, -1, 0]])
    mask = torch.tensor([[1, 1, 0]])
    # 3 - 0.1 * (0.5 - 1)
    assert pg.kl_in_reward(double([3]), old, reference, mask, beta=0.1).tolist() == [pytest.approx(3.05)]


# Ratios, clips, KL


def test_ratios_at_three_levels_by_hand() -> None:
    new, old = double([[-1.0, -2.0, -5.0]]), double([[-1.2, -1.9, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    assert pg.log_ratios(new, old, mask)[0, :2].tolist() == [pytest.approx(0.2), pytest.approx(-0.1)]
    assert pg.log_ratios(new, old, mask, level="sequence").item() == pytest.approx(0.05)
    assert pg.log_ratios(new, old, mask, level="product").item() == pytest.approx(0.1)
    assert pg.log_ratios(new, old, mask * 0, level="sequence").item() == 0


@pytest.mark.parametrize(("ratio", "advantage", "options", "expected"), [
    (1.1, 2.0, {}, -2.2),                       # inside
    (1.5, 2.0, {}, -2.4),                       # a gain stops at 1.2
    (1.5, 2.0, {"epsilon_high": 0.28}, -2.56),  # clip-higher lets it go to 1.28
    (0.5, 2.0, {}, -1.0),                       # a loss of a good token is not held
    (0.5, -2.0, {}, 1.6),                       # pushing a bad token down stops at 0.8
    (0.5, -2.0, {"epsilon": 0.1}, 1.8),
    (5.0, -2.0, {}, 10.0),                      # pushing a bad token that grew has no bound ...
    (5.0, -2.0, {"delta": 3.0}, 6.0),           # ... but delta
])
def test_the_clip_by_hand(ratio: float, advantage: float, options: dict[str, float], expected: float) -> None:
    found = pg.clipped_surrogate(double(ratio), double(advantage), **({"epsilon": 0.2} | options))
    assert found.item() == pytest.approx(expected)


def test_kl_estimators_by_hand_and_in_expectation() -> None:
    assert pg.kl_k1(double(-1.0), double(-1.5)).item() == pytest.approx(0.5)
    assert pg.kl_k3(double(-1.0), double(-1.5)).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    policy, reference = double([0.7, 0.2, 0.1]), double([0.3, 0.3, 0.4])
    true = (policy * (policy / reference).log()).sum()
    for estimator in (pg.kl_k1, pg.kl_k3):
        torch.testing.assert_close((policy * estimator(policy.log(), reference.log())).sum(), true)


def test_high_entropy_tokens() -> None:
    entropies = double([[0.1, 0.9, 0.5, 99.0], [0.2, 0.8, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    kept = pg.high_entropy_mask(entropies, mask, top_quantile=0.4)
    assert kept.tolist() == [[False, True, False, False], [False, True, False, False]]
    assert pg.high_entropy_mask(entropies, mask * 0, top_quantile=0.4).sum() == 0


# Normalisations


def test_normalisations_by_hand() -> None:
    losses = double([[1, 2, 3, 7], [10, 7, 7, 7], [7, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])

    def of(loss_type: str, **more: Any) -> float:
        return pg.aggregate(losses, mask, loss_type=loss_type, **more).item()

    assert of("grpo") == of("sapo") == pytest.approx((2 + 10 + 0) / 3)
    assert of("bnpo") == of("dapo") == pytest.approx(16 / 4)
    assert of("bnpo", num_items_in_batch=8) == pytest.approx(16 / 4)
    assert of("dapo", num_items_in_batch=8) == of("cispo", num_items_in_batch=8) == pytest.approx(2)
    assert of("dr_grpo", max_completion_length=4) == pytest.approx(16 / 12)
    assert of("luspo") == pytest.approx(16 / 3)


def test_one_value_a_sequence_stands_for_every_token() -> None:
    losses, mask = double([[2.0], [5.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert pg.aggregate(losses, mask, loss_type="grpo").item() == pytest.approx(3.5)
    assert pg.aggregate(losses, mask, loss_type="dapo").item() == pytest.approx(11 / 4)


def test_pieces_of_a_batch_add_up_to_the_whole_for_token_level_losses_only() -> None:
    rows = batch()
    reference = rows.pop("ref_log_probs")

    def of(part: slice, loss_type: str, **more: Any) -> torch.Tensor:
        return pg.policy_loss(*(rows[k][part] for k in ("log_probs", "old_log_probs", "advantages", "completion_mask")),
                              loss_type=loss_type, beta=0.1, ref_log_probs=reference[part], **more)

    count = rows["completion_mask"].sum()
    pieces = [slice(0, 3), slice(3, 6)]
    for loss_type in ("dapo", "cispo"):
        summed = sum(of(part, loss_type, num_items_in_batch=count) for part in pieces)
        torch.testing.assert_close(summed, of(slice(None), loss_type))
    assert not torch.allclose(sum(of(part, "bnpo") for part in pieces) / 2, of(slice(None), "bnpo"), rtol=1e-3)


# Gradients


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo"])
def test_gradients_are_the_differences(loss_type: str, level: str) -> None:
    rows = batch()
    start = rows.pop("log_probs").requires_grad_()

    def of(log_probs: torch.Tensor) -> torch.Tensor:
        return pg.policy_loss(log_probs, **rows, loss_type=loss_type, level=level, epsilon=0.2, epsilon_high=0.28,
                              delta=3.0, beta=0.3, max_completion_length=7)

    assert torch.autograd.gradcheck(of, start)
    gradient = torch.autograd.grad(of(start), start)[0]
    mask = rows["completion_mask"].bool()
    assert gradient[mask].abs().max() > 1e-3 and gradient[~mask].abs().max() == 0


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_gradients_where_a_weight_is_held_fixed(loss_type: str) -> None:
    """The weight takes no gradient: what is left is REINFORCE, weight x advantage x gradient of log p."""
    rows = batch()
    start, mask = rows["log_probs"].requires_grad_(), rows["completion_mask"]
    loss = pg.policy_loss(start, rows["old_log_probs"], rows["advantages"], mask, loss_type=loss_type, epsilon_high=1.1)
    found = torch.autograd.grad(loss, start)[0]
    ratio = (start - rows["old_log_probs"]).exp().detach()
    if loss_type == "cispo":
        weight = ratio.clamp(max=1.1)
        assert (ratio > 1.1)[mask.bool()].any()
    else:
        w = (ratio.log() * mask).sum(1, keepdim=True).exp()
        positive = rows["advantages"][:, None] >= 0
        weight = torch.where(positive, w**2 * (3 * (1 - w)).exp(), w**3 * (2 * (1 - w)).exp())
    torch.testing.assert_close(found, -weight * rows["advantages"][:, None] * mask / mask.sum())


def test_at_ratio_one_every_clipped_loss_has_reinforces_gradient() -> None:
    rows = batch()
    start, mask = rows["log_probs"].requires_grad_(), rows["completion_mask"]
    for level in ("token", "product"):
        loss = pg.policy_loss(start, start.detach(), rows["advantages"], mask, loss_type="luspo", level=level)
        found = torch.autograd.grad(loss, start)[0]
        lengths = mask.sum(1, keepdim=True) if level == "product" else torch.ones(6, 1)
        torch.testing.assert_close(found, -lengths * rows["advantages"][:, None] * mask / 6)


def test_the_kl_times_the_ratio_has_another_gradient_at_ratio_one() -> None:
    rows = batch()
    start = rows["log_probs"].requires_grad_()
    gradients = []
    for times in (False, True):
        loss = pg.policy_loss(start, start.detach(), rows["advantages"] * 0, rows["completion_mask"], loss_type="dapo",
                              beta=1.0, ref_log_probs=rows["ref_log_probs"], kl_times_ratio=times)
        gradients.append(torch.autograd.grad(loss, start)[0])
    log_ratio = (rows["ref_log_probs"] - rows["log_probs"]) * rows["completion_mask"] / rows["completion_mask"].sum()
    # d/dlogp of k3 is 1 - p_ref/p; times the ratio it is log(p / p_ref)
    torch.testing.assert_close(gradients[1], -log_ratio.detach())
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.05)


def test_a_token_filter_leaves_the_kl() -> None:
    rows = batch()
    nothing = torch.zeros_like(rows["log_probs"])
    found = pg.policy_loss(**rows, loss_type="dapo", beta=0.5, token_filter=nothing)
    kl = pg.kl_k3(rows["log_probs"], rows["ref_log_probs"]) * rows["completion_mask"]
    torch.testing.assert_close(found, 0.5 * kl.sum() / rows["completion_mask"].sum())
    assert found > 1e-3


# RLOO


def test_the_loss_of_rloo_by_hand() -> None:
    """Ratios of whole completions: 1.5, cut at 1.2; 0.6, a loss that is not held; 0.5, cut at 0.8."""
    old = double([[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    new = old + double([[math.log(3), -math.log(2)], [math.log(0.6), 0.0], [math.log(0.5), 9.0]])
    advantages = double([2.0, 1.0, -4.0])
    # - (1.2 x 2 + 0.6 x 1 - 0.8 x 4) / 3; with 0.4 above 1.4 x 2 in place of the first
    assert rloo.loss(new, old, advantages, mask).item() == pytest.approx(0.2 / 3)
    higher = rloo.RLOOOptions(epsilon_high=0.4)
    assert rloo.loss(new, old, advantages, mask, options=higher).item() == pytest.approx(-0.2 / 3)
    wide = rloo.RLOOOptions(epsilon=0.9)
    assert rloo.loss(new, old, advantages, mask, options=wide).item() == pytest.approx(-1.6 / 3)


def test_the_gradient_of_rloo_is_the_difference_and_at_ratio_one_the_papers() -> None:
    rows = batch()
    start, mask = rows["log_probs"].requires_grad_(), rows["completion_mask"]

    def of(log_probs: torch.Tensor) -> torch.Tensor:
        return rloo.loss(log_probs, rows["old_log_probs"], rows["advantages"], mask)

    assert torch.autograd.gradcheck(of, start)
    found = torch.autograd.grad(of(start), start)[0]
    ratio = ((start - rows["old_log_probs"]) * mask).sum(1).exp().detach()
    held = torch.where(rows["advantages"] > 0, ratio > 1.2, ratio < 0.8)
    assert held.any() and not held.all()
    torch.testing.assert_close(found, -(ratio * rows["advantages"] * ~held)[:, None] * mask / 6)
    first = torch.autograd.grad(rloo.loss(start, start.detach(), rows["advantages"], mask), start)[0]
    torch.testing.assert_close(first, -rows["advantages"][:, None] * mask / 6)


# Overlong


def test_soft_overlong_punishment_by_hand() -> None:
    found = pg.soft_overlong_punishment([1, 80, 81, 90, 100, 101], max_completion_length=100, overlong_buffer_len=20)
    assert found == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0]
    assert pg.soft_overlong_punishment([99, 100, 101], max_completion_length=100, overlong_buffer_len=0) == [0, 0, -1]
