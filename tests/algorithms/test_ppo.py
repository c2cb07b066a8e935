"""PPO's maths against plain loops over single tokens in Python floats: ragged lengths, empty completions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from aligntune.algorithms.policy_gradient import clipped_surrogate
from aligntune.algorithms.ppo import (
    approx_kl,
    clipped_value_loss,
    generalized_advantages,
    next_kl_coef,
    ppo_loss,
    token_kl,
    token_rewards,
    whiten,
)

DTYPES = [torch.float64, torch.float32]
SHAPES = {"ragged": [5, 1, 3, 7], "with empty": [0, 4, 0, 2, 6], "one token": [1], "all full": [4, 4, 4]}


def batch(lengths: list[int], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rollouts; what lies beyond a completion's end is rubbish, which nothing may read."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths) + 2

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    found = {name: draw(rows, width, scale=0.5, shift=-1.5) for name in ("log_probs", "old_log_probs", "ref_log_probs")}
    found |= {name: draw(rows, width) for name in ("values", "old_values", "entropies")}
    found["scores"] = draw(rows, scale=2.0, shift=0.7)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    for name, value in found.items():
        if value.ndim == 2:
            value[~mask] = 1e3 if name != "entropies" else 77.0
    return {**found, "mask": mask.long()}


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-6


def close(tensor: torch.Tensor, rows: list[list[float]], lengths: list[int], dtype: torch.dtype) -> None:
    assert tensor.dtype == dtype
    for row, (expected, length) in enumerate(zip(rows, lengths, strict=True)):
        assert len(expected) == length
        got = tensor[row, :length].tolist()
        scale = max([1.0, *map(abs, expected)])
        assert got == pytest.approx(expected, abs=tolerance(dtype) * scale), (row, got, expected)
        assert not tensor[row, length:].any()


def loop(lengths: list[int], data: dict[str, torch.Tensor], **settings: Any) -> dict[str, Any]:
    """Everything one token at a time, from the equations."""
    beta, gamma, lam = settings["kl_coef"], settings["gamma"], settings["lam"]
    get = {name: value.double().tolist() for name, value in data.items()}
    kl: list[list[float]] = []
    rewards: list[list[float]] = []
    advantages: list[list[float]] = []
    returns: list[list[float]] = []
    for b, length in enumerate(lengths):
        kl.append([])
        for t in range(length):
            ratio = get["ref_log_probs"][b][t] - get["old_log_probs"][b][t]
            kl[b].append(-ratio if settings["estimator"] == "k1" else math.exp(ratio) - 1 - ratio)
        rewards.append([-beta * kl[b][t] + (get["scores"][b] if t == length - 1 else 0.0) for t in range(length)])
        row = []
        for t in range(length):  # equation 16 as it stands: a sum over all later temporal differences
            total = 0.0
            for later in range(t, length):
                following = get["old_values"][b][later + 1] if later + 1 < length else 0.0
                delta = rewards[b][later] + gamma * following - get["old_values"][b][later]
                total += (gamma * lam) ** (later - t) * delta
            row.append(total)
        advantages.append(row)
        returns.append([row[t] + get["old_values"][b][t] for t in range(length)])
    return {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}


def whiten_loop(rows: list[list[float]], shift: bool) -> list[list[float]]:
    every = [value for row in rows for value in row]
    mean = sum(every) / len(every)
    if len(every) < 2:
        return [[value - mean if shift else value for value in row] for row in rows]
    deviation = math.sqrt(sum((value - mean) ** 2 for value in every) / (len(every) - 1) + 1e-8)
    return [[(value - mean) / deviation + (0.0 if shift else mean) for value in row] for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("gamma", "lam", "estimator"), [(1.0, 0.95, "k1"), (0.9, 0.5, "k3"), (1.0, 1.0, "k1"),
                                                         (0.97, 0.0, "k1")])
def test_rewards_and_advantages_are_the_loops(
    lengths: list[int], dtype: torch.dtype, gamma: float, lam: float, estimator: str
) -> None:
    data = batch(lengths, dtype)
    expected = loop(lengths, data, kl_coef=0.3, gamma=gamma, lam=lam, estimator=estimator)
    kl = token_kl(data["old_log_probs"], data["ref_log_probs"], estimator=estimator)
    rewards = token_rewards(data["scores"], kl, data["mask"], kl_coef=0.3)
    close(rewards, expected["rewards"], lengths, dtype)
    advantages, returns = generalized_advantages(rewards, data["old_values"], data["mask"], gamma=gamma, lam=lam)
    close(advantages, expected["advantages"], lengths, dtype)
    close(returns, expected["returns"], lengths, dtype)
    for shift in (True, False):
        whitened = whiten(advantages, data["mask"], shift_mean=shift)
        close(whitened, whiten_loop(expected["advantages"], shift), lengths, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("cliprange_value", [0.2, 0.7, None])
def test_losses_are_the_loops(lengths: list[int], dtype: torch.dtype, cliprange_value: float | None) -> None:
    data = batch(lengths, dtype, seed=3)
    advantages = torch.randn(data["mask"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    returns = data["scores"][:, None] + data["old_values"]
    policy = clipped_surrogate((data["log_probs"] - data["old_log_probs"]).exp(), advantages, epsilon=0.25)
    value, clipped = clipped_value_loss(data["values"], data["old_values"], returns, cliprange=cliprange_value)
    loss = ppo_loss(policy, value, data["entropies"], data["mask"], vf_coef=0.4, entropy_coef=0.03)
    get = {name: tensor.double().tolist() for name, tensor in data.items()}
    total, count, clips, policy_clips = 0.0, 0, 0, 0
    for b, length in enumerate(lengths):
        for t in range(length):
            ratio = math.exp(get["log_probs"][b][t] - get["old_log_probs"][b][t])
            cut = min(max(ratio, 0.75), 1.25)
            advantage = float(advantages[b, t])
            value_now, value_old = get["values"][b][t], get["old_values"][b][t]
            target = float(returns[b, t])
            error = (value_now - target) ** 2
            if cliprange_value is not None:
                near = value_old + min(max(value_now - value_old, -cliprange_value), cliprange_value)
                clips += (near - target) ** 2 > error
                error = max(error, (near - target) ** 2)
            policy_clips += cut * advantage < ratio * advantage
            total += -min(ratio * advantage, cut * advantage) + 0.4 * error / 2 - 0.03 * get["entropies"][b][t]
            count += 1
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(total / count, rel=tolerance(dtype), abs=tolerance(dtype))
    assert int((clipped & data["mask"].bool()).sum()) == clips
    if len(lengths) > 2:
        assert policy_clips > 0
        assert cliprange_value is None or clips > 0
    whole = ppo_loss(policy, value, data["entropies"], data["mask"], vf_coef=0.4, entropy_coef=0.03, num_items=50)
    assert whole.item() == pytest.approx(total / 50, rel=10 * tolerance(dtype), abs=tolerance(dtype))


@pytest.mark.parametrize("bonus", [0.0, 0.05])
def test_entropies_have_a_gradient_where_they_are_rewarded(bonus: float) -> None:
    policy, entropies = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    loss = ppo_loss(policy, policy.square(), entropies, torch.ones(2, 3), vf_coef=0.4, entropy_coef=bonus)
    assert loss.item() == pytest.approx(1.4 - bonus)
    loss.backward()
    assert policy.grad is not None and (entropies.grad is not None) == bool(bonus)


def test_gradients_are_finite_differences() -> None:
    """Of policy, critic and entropy at once; ratios and values lie on both sides of their clips."""
    data = batch([5, 1, 3, 7], torch.float64, seed=3)
    mask = data["mask"].bool()
    for name in ("log_probs", "old_log_probs"):  # their rubbish would make the ratio infinite
        data[name][~mask] = -1.0
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9)).double()
    returns = data["scores"][:, None] + data["old_values"]

    def loss(log_probs: torch.Tensor, values: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        policy = clipped_surrogate((log_probs - data["old_log_probs"]).exp(), advantages, epsilon=0.2)
        value, _ = clipped_value_loss(values, data["old_values"], returns, cliprange=0.5)
        return ppo_loss(policy, value, entropies, mask, vf_coef=0.4, entropy_coef=0.03)

    points = [data[name].requires_grad_() for name in ("log_probs", "values", "entropies")]
    assert torch.autograd.gradcheck(loss, points)
    for gradient in torch.autograd.grad(loss(*points), points):
        assert gradient[mask].abs().max() > 1e-3 and not gradient[~mask].any()
    ratios = (points[0] - data["old_log_probs"]).exp()[mask]
    assert (ratios < 0.8).any() and (ratios > 1.2).any()


def test_nothing_beyond_the_end_of_a_completion_is_read() -> None:
    lengths = [3, 0, 5]
    data = batch(lengths, torch.float64)
    data["log_probs"].requires_grad_()
    for name in ("old_values", "old_log_probs", "ref_log_probs"):
        data[name][~data["mask"].bool()] = math.nan
    kl = token_kl(data["old_log_probs"], data["ref_log_probs"])
    rewards = token_rewards(data["scores"], kl, data["mask"], kl_coef=0.1)
    advantages, returns = generalized_advantages(rewards, data["old_values"], data["mask"])
    assert torch.isfinite(advantages).all() and torch.isfinite(returns).all()
    assert torch.isfinite(whiten(advantages, data["mask"])).all()


def test_no_completion_has_a_token() -> None:
    data = batch([0, 0], torch.float32)
    kl = token_kl(data["old_log_probs"], data["ref_log_probs"])
    rewards = token_rewards(data["scores"], kl, data["mask"], kl_coef=0.1)
    advantages, _ = generalized_advantages(rewards, data["old_values"], data["mask"])
    zero = torch.zeros_like(advantages)
    assert torch.equal(whiten(advantages, data["mask"]), zero)
    assert ppo_loss(data["values"], data["values"], data["values"], data["mask"], vf_coef=1.0).item() == 0.0


def test_one_hand_computed_completion() -> None:
    """Two tokens, by hand: gamma 0.5, lambda 0.5, values 1 and 2, score 4, KL 1 and -2 at weight 0.5."""
    mask = torch.ones(1, 2)
    rewards = token_rewards(torch.tensor([4.0]), torch.tensor([[1.0, -2.0]]), mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 5.0]]
    advantages, returns = generalized_advantages(rewards, torch.tensor([[1.0, 2.0]]), mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.25, 3.0]]  # -0.5 + 0.5 x 2 - 1 = -0.5, + 0.25 x 3; 5 - 2 = 3
    assert returns.tolist() == [[1.25, 5.0]]


def test_the_clipped_value_loss_and_the_whole_loss_by_hand() -> None:
    """Values 1, -1, 0.25 and 1 away from an old value of 1, clip 0.5; the last token does not count."""
    values, old = torch.tensor([[2.0, 0.0, 1.25, 2.0]]), torch.ones(1, 4)
    returns = torch.tensor([[2.0, 2.0, 1.75, 9.0]])
    losses, clipped = clipped_value_loss(values, old, returns, cliprange=0.5)
    # max(0, (1.5 - 2)^2) / 2; max(4, (0.5 - 2)^2) / 2; inside: 0.5^2 / 2; max(49, 7.5^2) / 2
    assert losses.tolist() == [pytest.approx([0.125, 2.0, 0.125, 28.125])]
    assert clipped.tolist() == [[True, False, False, True]]
    plain, none = clipped_value_loss(values, old, returns, cliprange=None)
    assert plain.tolist() == [pytest.approx([0.0, 2.0, 0.125, 24.5])] and not none.any()
    policy, entropies = torch.tensor([[-1.0, 2.0, 0.5, 100.0]]), torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    # policy 1.5 + 0.4 x 2.25 - 0.05 x 6 = 2.1, over 3 tokens or over the 7 of a window
    for items, expected in ((None, 0.7), (7, 0.3)):
        found = ppo_loss(policy, losses, entropies, mask, vf_coef=0.4, entropy_coef=0.05, num_items=items)
        assert found.item() == pytest.approx(expected)


def test_whitening_far_from_zero_keeps_its_deviation() -> None:
    values = 1e4 + torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    whitened = whiten(values, torch.ones(1, 4))
    assert whitened.std().item() == pytest.approx(1.0, abs=1e-3)
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-3)


def test_whitening_over_parts_is_whitening_of_the_whole() -> None:
    data = batch([5, 1, 3, 7], torch.float64)
    whole = whiten(data["values"], data["mask"])
    parts = [slice(0, 2), slice(2, 4)]
    sums: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def first(part: slice) -> None:
        kept = torch.where(data["mask"][part].bool(), data["values"][part], 0.0)
        count = data["mask"][part].sum().double()
        sums[0].append(torch.stack([kept.sum(), count]))

    for part in parts:
        first(part)
    mean = sum(s[0] for s in sums[0]) / sum(s[1] for s in sums[0])
    for part in parts:
        kept = torch.where(data["mask"][part].bool(), data["values"][part] - mean, 0.0)
        sums[1].append(kept.square().sum().reshape(1))
    for part in parts:
        calls = iter([sum(sums[0]), sum(sums[1])])
        got = whiten(data["values"][part], data["mask"][part], reduce=lambda mine, calls=calls: next(calls))
        torch.testing.assert_close(got, whole[part])


def test_the_adaptive_coefficient_by_hand() -> None:
    assert next_kl_coef(0.1, 6.0, goal=6.0) == pytest.approx(0.1)
    assert next_kl_coef(0.1, 6.6, goal=6.0) == pytest.approx(0.1 * 1.01)
    assert next_kl_coef(0.1, 60.0, goal=6.0) == pytest.approx(0.1 * 1.02)  # cut at +0.2
    assert next_kl_coef(0.1, -3.0, goal=6.0, gain=0.5) == pytest.approx(0.1 * 0.9)  # cut at -0.2


def test_approximate_kl_is_never_negative_and_is_unbiased() -> None:
    torch.manual_seed(0)
    old, new = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    estimate = (old.exp() * approx_kl(new, old)).sum()
    assert (approx_kl(new, old) >= 0).all()
    assert estimate.item() == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-12)
    assert estimate > 0.05
