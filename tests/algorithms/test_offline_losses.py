"""Losses of the methods on fixed data: against values worked out on paper, finite differences, and their own limits."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from aligntune.algorithms.cpo import cpo_loss
from aligntune.algorithms.dpo import FORMS, LOSS_TYPES, dpo_loss, wpo_weights
from aligntune.algorithms.ipo import ipo_loss
from aligntune.algorithms.kto import kl_reference_point, kto_loss
from aligntune.algorithms.log_probs import IGNORED, sequence_log_probs, token_stats
from aligntune.algorithms.orpo import log1mexp, orpo_loss
from aligntune.algorithms.reward import reward_loss
from aligntune.algorithms.sft import sft_loss
from aligntune.algorithms.simpo import simpo_loss

# Two pairs, chosen rows first; lengths 2, 1 and 1, 3. What stands where the mask is 0 must never count.
JUNK = -77.0
LOG_PROBS = torch.tensor([[-0.5, -1.0, JUNK], [-0.25, JUNK, JUNK], [-1.5, JUNK, JUNK], [-0.75, -0.5, -0.25]]).double()
REF = torch.tensor([[-1.0, -1.0, JUNK], [-0.5, JUNK, JUNK], [-1.0, JUNK, JUNK], [-0.5, -0.5, -0.5]]).double()
MASK = (LOG_PROBS != JUNK).double()
# Sums: chosen -1.5, -0.25, rejected -1.5, -1.5; log-ratios: chosen 0.5, 0.25, rejected -0.5, 0; margins h 1, 0.25.
BETA = 0.5


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ls(x: float) -> float:
    return math.log(sig(x))


def smooth(x: float, share: float = 0.1) -> float:
    return -(1 - share) * ls(x) - share * ls(-x)


def kl_of_pair(x: float, share: float = 0.1) -> float:
    return sig(x) * math.log(sig(x) / (1 - share)) + sig(-x) * math.log(sig(-x) / share)


def disco(x: float) -> float:
    share = sig(x / 0.05)
    return -ls(x) * (1 - share) + math.exp(-x) * share


# beta h is 0.5 and 0.125; beta times the log-ratios 0.25, 0.125 and -0.25, 0; per token h is 0.25 + 0.5 and 0.25 - 0.
BY_HAND: dict[str, float] = {
    "sigmoid": (-ls(0.5) - ls(0.125)) / 2,
    "hinge": (0.5 + 0.875) / 2,
    "ipo": ((0.75 - 1) ** 2 + (0.25 - 1) ** 2) / 2,
    "sigmoid_norm": (-ls(0.375) - ls(0.125)) / 2,
    "exo_pair": (kl_of_pair(0.5) + kl_of_pair(0.125)) / 2,
    "nca_pair": ((-ls(0.25) - 0.5 * ls(-0.25) - 0.5 * ls(0.25)) + (-ls(0.125) - 0.5 * ls(-0.125) - 0.5 * ls(0))) / 2,
    "robust": sum((0.9 * -ls(x) - 0.1 * -ls(-x)) / 0.8 for x in (0.5, 0.125)) / 2,
    "bco_pair": ((-ls(0.25) - ls(0.25)) + (-ls(0.125) - ls(0))) / 2,
    "sppo_hard": ((0.5 - 1) ** 2 + (-0.5 + 1) ** 2 + (0.25 - 1) ** 2 + 1**2) / 2,
    # margins of the policy 0 and 1.25, of the reference -1 and 1: both sorted, 0 - -1 and 1.25 - 1
    "aot": (smooth(0.5) + smooth(0.125)) / 2,
    # 0.25, 0.5 less -0.5, 0: 0.75 and 0.5
    "aot_unpaired": (smooth(0.375) + smooth(0.25)) / 2,
    "discopop": (disco(0.5) + disco(0.125)) / 2,
    "apo_zero": (1 - sig(0.25) + sig(-0.25) + 1 - sig(0.125) + sig(0)) / 2,
    "apo_down": (sig(0.25) + 1 - sig(0.5) + sig(0.125) + 1 - sig(0.125)) / 2,
    "sft": (0.5 + 1.0 + 0.25) / 3,
}
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def test_the_table_has_every_form() -> None:
    assert set(LOSS_TYPES) == set(FORMS) == set(BY_HAND)


def test_the_forms_are_those_of_trl_as_installed() -> None:
    """What DPOTrainer compares `loss_type` with; a form of a newer TRL fails here."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    theirs = [node.comparators[0].value for node in ast.walk(ast.parse(inspect.getsource(trainer.DPOTrainer)))
              if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)
              and ast.unparse(node.left) == "loss_type" and isinstance(node.comparators[0], ast.Constant)]
    assert len(theirs) > 10 and set(theirs) == set(LOSS_TYPES)


@pytest.mark.parametrize("form", LOSS_TYPES)
def test_dpo_by_hand(form: str) -> None:
    loss, _ = dpo_loss(LOG_PROBS, REF, MASK, beta=BETA, loss_type=form, label_smoothing=0.1)
    assert loss.item() == pytest.approx(BY_HAND[form], rel=1e-12)
    plain, _ = dpo_loss(LOG_PROBS, REF, MASK, beta=BETA, loss_type=form, label_smoothing=0.2)
    assert (abs(plain.item() - loss.item()) > 1e-6) == (form in SMOOTHED)


def test_aot_sorts_each_side_by_itself() -> None:
    """The pairs' order matters to DPO and not to the batch's distribution; here the reference's order is swapped."""
    ref = REF.clone()
    ref[[2, 3]] = torch.tensor([[-3.0, JUNK, JUNK], [-0.1, -0.1, -0.1]], dtype=torch.double)
    # policy margins 0, 1.25; reference -2 + 3 = 1 and -0.5 + 0.3 = -0.2, sorted -0.2 and 1
    loss, _ = dpo_loss(LOG_PROBS, ref, MASK, beta=BETA, loss_type="aot")
    assert loss.item() == pytest.approx((smooth(0.1, 0) + smooth(0.125, 0)) / 2, rel=1e-12)


def test_dpo_metrics_by_hand() -> None:
    _, metrics = dpo_loss(LOG_PROBS, REF, MASK, beta=BETA)
    expected = {"rewards/chosen": 0.1875, "rewards/rejected": -0.125, "rewards/accuracies": 1.0,
                "rewards/margins": 0.3125, "logps/chosen": -0.875, "logps/rejected": -1.5}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    swapped = LOG_PROBS[[2, 1, 0, 3]], REF[[2, 1, 0, 3]], MASK[[2, 1, 0, 3]]
    assert dpo_loss(*swapped, beta=BETA)[1]["rewards/accuracies"].item() == 0.5


def test_several_forms_are_summed_with_their_weights() -> None:
    loss, _ = dpo_loss(LOG_PROBS, REF, MASK, beta=BETA, loss_type=["sigmoid", "sft"], loss_weights=[0.7, 0.2])
    assert loss.item() == pytest.approx(0.7 * BY_HAND["sigmoid"] + 0.2 * BY_HAND["sft"], rel=1e-12)
    both, _ = dpo_loss(LOG_PROBS, REF, MASK, beta=BETA, loss_type=["sigmoid", "hinge"])
    assert both.item() == pytest.approx(BY_HAND["sigmoid"] + BY_HAND["hinge"], rel=1e-12)


def test_wpo_weighs_a_pair_by_both_answers() -> None:
    squares = torch.full_like(LOG_PROBS, -0.5)
    # means of log p + 0.5: -0.25, 0.25; -1, 0
    weights = [math.exp(-0.25 - 1), math.exp(0.25 + 0)]
    assert wpo_weights(LOG_PROBS, squares, MASK).tolist() == pytest.approx(weights)
    loss, _ = dpo_loss(LOG_PROBS, REF, MASK, beta=BETA, log_sum_sq_probs=squares)
    assert loss.item() == pytest.approx((weights[0] * -ls(0.5) + weights[1] * -ls(0.125)) / 2, rel=1e-12)
    assert wpo_weights(LOG_PROBS.clone().requires_grad_(), squares, MASK).requires_grad is False


def test_ipo_by_hand_per_token_and_as_printed() -> None:
    assert ipo_loss(LOG_PROBS, REF, MASK, beta=BETA)[0].item() == pytest.approx(BY_HAND["ipo"], rel=1e-12)
    summed, metrics = ipo_loss(LOG_PROBS, REF, MASK, beta=BETA, per_token=False)
    assert summed.item() == pytest.approx(((1 - 1) ** 2 + (0.25 - 1) ** 2) / 2, rel=1e-12)
    assert metrics["rewards/margins"].item() == pytest.approx(0.3125)


def test_orpo_by_hand() -> None:
    # per token: chosen -0.75, -0.25; rejected -1.5, -0.5
    odds = [(math.exp(p) / (1 - math.exp(p))) for p in (-0.75, -0.25, -1.5, -0.5)]
    logs = [math.log(odds[0] / odds[2]), math.log(odds[1] / odds[3])]
    loss, metrics = orpo_loss(LOG_PROBS, MASK, beta=0.2)
    expected = 1.75 / 3 + 0.2 * (-ls(logs[0]) - ls(logs[1])) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["nll_loss"].item() == pytest.approx(1.75 / 3)
    assert metrics["log_odds_chosen"].item() == pytest.approx(sum(logs) / 2)
    assert metrics["log_odds_ratio"].item() == pytest.approx((ls(logs[0]) + ls(logs[1])) / 2)
    assert metrics["logps/chosen"].item() == pytest.approx(-0.5)
    assert metrics["rewards/margins"].item() == pytest.approx(0.2 * 0.5)


def test_orpo_can_train_the_prompt_too() -> None:
    wide = torch.cat([torch.full((4, 1), -2.0).double(), LOG_PROBS], 1)
    mask = torch.cat([torch.zeros(4, 1).double(), MASK], 1)
    everything = torch.cat([torch.ones(2, 1).double(), MASK[:2]], 1)
    with_prompt, _ = orpo_loss(wide, mask, beta=0.2, nll_mask=everything)
    without, _ = orpo_loss(wide, mask, beta=0.2)
    assert with_prompt.item() - without.item() == pytest.approx(5.75 / 5 - 1.75 / 3, rel=1e-12)


def test_log1mexp_keeps_its_digits() -> None:
    near, far = torch.tensor([-1e-12]).double(), torch.tensor([-40.0]).double()
    assert log1mexp(near).item() == pytest.approx(math.log(1e-12), rel=1e-9)
    assert log1mexp(far).item() == pytest.approx(-math.exp(-40), rel=1e-9)


def test_simpo_by_hand() -> None:
    loss, metrics = simpo_loss(LOG_PROBS, MASK, beta=2.0, simpo_gamma=0.5)
    # per token: -0.75 + 1.5 and -0.25 + 0.5
    assert loss.item() == pytest.approx((-ls(1.5 - 0.5) - ls(0.5 - 0.5)) / 2, rel=1e-12)
    assert metrics["rewards/margins"].item() == pytest.approx(1.0)
    assert metrics["nll_loss"].item() == 0
    both, metrics = simpo_loss(LOG_PROBS, MASK, beta=2.0, simpo_gamma=0.5, cpo_alpha=0.3, label_smoothing=0.1)
    assert both.item() == pytest.approx((smooth(1.0) + smooth(0.0)) / 2 + 0.3 * 1.75 / 3, rel=1e-12)
    assert metrics["nll_loss"].item() == pytest.approx(1.75 / 3)


@pytest.mark.parametrize(("form", "expected"), [
    ("sigmoid", (smooth(0.0) + smooth(0.625)) / 2), ("hinge", (1 + 0.375) / 2),
    ("ipo", ((0.75 - 1) ** 2 + (0.25 - 1) ** 2) / 2),
])
def test_cpo_by_hand(form: str, expected: float) -> None:
    # sums: -1.5 + 1.5 and -0.25 + 1.5
    loss, metrics = cpo_loss(LOG_PROBS, MASK, beta=BETA, cpo_alpha=0.4, loss_type=form, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected + 0.4 * 1.75 / 3, rel=1e-12)
    assert metrics["nll_loss"].item() == pytest.approx(1.75 / 3)
    assert metrics["logps/rejected"].item() == pytest.approx(-1.0 if form == "ipo" else -1.5)


@pytest.mark.parametrize("loss", [
    lambda beta: dpo_loss(LOG_PROBS, REF, MASK, beta=beta, loss_type="ipo"),
    lambda beta: ipo_loss(LOG_PROBS, REF, MASK, beta=beta),
    lambda beta: cpo_loss(LOG_PROBS, MASK, beta=beta, cpo_alpha=0.0, loss_type="ipo"),
], ids=["dpo", "ipo", "cpo"])
def test_the_target_of_ipo_is_half_of_one_over_beta(loss: Callable[[float], Any]) -> None:
    """At beta 0.5 the target is 1, which 2 beta is too, and 0.75 and 0.25 are as far from it as from 0."""
    assert loss(0.25)[0].item() == pytest.approx(((0.75 - 2) ** 2 + (0.25 - 2) ** 2) / 2, rel=1e-12)


def test_cpos_rewards_are_beta_times_the_log_probs() -> None:
    _, metrics = cpo_loss(LOG_PROBS, MASK, beta=0.25)
    # sums: chosen -1.5 and -0.25, rejected -1.5 and -1.5
    assert metrics["rewards/chosen"].item() == pytest.approx(0.25 * -0.875, rel=1e-12)
    assert metrics["rewards/rejected"].item() == pytest.approx(0.25 * -1.5, rel=1e-12)
    assert metrics["rewards/margins"].item() == pytest.approx(0.25 * 0.625, rel=1e-12)
    assert metrics["rewards/accuracies"].item() == 0.5  # the first pair is a tie


def test_kto_by_hand() -> None:
    labels = torch.tensor([True, True, False, False])
    kl = 0.2
    loss, metrics = kto_loss(LOG_PROBS, REF, MASK, labels, kl=kl, beta=BETA, desirable_weight=0.75,
                             undesirable_weight=1.25)
    good = [1 - sig(0.5 * (0.5 - 0.2)), 1 - sig(0.5 * (0.25 - 0.2))]
    bad = [1 - sig(0.5 * (0.2 + 0.5)), 1 - sig(0.5 * 0.2)]
    assert loss.item() == pytest.approx((0.75 * sum(good) + 1.25 * sum(bad)) / 4, rel=1e-12)
    expected = {"kl": 0.2, "rewards/chosen": 0.1875, "rewards/rejected": -0.125, "rewards/margins": 0.3125,
                "logps/chosen": -0.875, "logps/rejected": -1.5}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_kto_without_its_kl_term_and_with_one_side_only() -> None:
    labels = torch.tensor([True, True, False, False])
    loss, _ = kto_loss(LOG_PROBS, REF, MASK, labels, kl=9.0, beta=BETA, loss_type="apo_zero_unpaired")
    expected = (1 - sig(0.25) + 1 - sig(0.125) + sig(-0.25) + sig(0)) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss, metrics = kto_loss(LOG_PROBS, REF, MASK, torch.ones(4), beta=BETA)
    assert set(metrics) == {"kl", "rewards/chosen", "logps/chosen"}
    assert loss.item() == pytest.approx(sum(1 - sig(x) for x in (0.25, 0.125, -0.25, 0)) / 4, rel=1e-12)


def test_the_kl_reference_point_is_a_mean_that_never_falls_below_0_and_has_no_gradient() -> None:
    policy = LOG_PROBS.clone().requires_grad_()
    point = kl_reference_point(policy, REF, MASK)
    assert point.item() == pytest.approx((0.5 + 0.25 - 0.5 + 0) / 4)
    assert not point.requires_grad
    assert kl_reference_point(REF, LOG_PROBS, MASK).item() == 0


def test_reward_by_hand() -> None:
    good, bad = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.25, 0.5]).double()
    loss, metrics = reward_loss(good, bad)
    assert loss.item() == pytest.approx((-ls(0.75) - ls(-1.0)) / 2, rel=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 0.5, "margin": -0.125, "min_reward": -0.5, "mean_reward": 0.3125, "max_reward": 1.0})
    margin = torch.tensor([0.5, 0.0]).double()
    centred, _ = reward_loss(good, bad, margin=margin, center_rewards_coefficient=0.1)
    assert centred.item() == pytest.approx((-ls(0.25) - ls(-1.0)) / 2 + 0.1 * (1.25**2 + 0) / 2, rel=1e-12)


def test_sft_by_hand() -> None:
    """Vocabulary of two: the logit difference is the log odds. Labels on positions 1 and 2 of one row of two."""
    logits = torch.zeros(2, 3, 2).double()
    logits[0, 0, 1], logits[0, 1, 0] = math.log(3), math.log(4)  # p(1) = 3/4, then p(0) = 4/5
    labels = torch.tensor([[0, 1, 1], [1, 0, IGNORED]])
    stats = token_stats(logits, labels)
    assert stats.mask.tolist() == [[1, 1], [1, 0]]
    assert stats.log_probs.exp().tolist() == [pytest.approx([0.75, 0.2]), [0.5, 1.0]]
    loss, metrics = sft_loss(stats)
    nll = [-math.log(0.75), -math.log(0.2), math.log(2)]
    assert loss.item() == pytest.approx(sum(nll) / 3, rel=1e-12)
    dft, _ = sft_loss(stats, loss_type="dft")
    assert dft.item() == pytest.approx((0.75 * nll[0] + 0.2 * nll[1] + 0.5 * nll[2]) / 3, rel=1e-12)
    assert sft_loss(stats, num_tokens=6)[0].item() == pytest.approx(sum(nll) / 6, rel=1e-12)
    # right, wrong, and a tie that argmax gives to token 0
    assert metrics["mean_token_accuracy"].item() == pytest.approx(2 / 3)
    entropies = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.75, 0.2, 0.5)]
    assert metrics["entropy"].item() == pytest.approx(sum(entropies) / 3)
    assert stats.log_sum_sq_probs[0].exp().tolist() == pytest.approx([0.625, 0.68])
    assert stats.mean_logits[0].tolist() == pytest.approx([math.log(3) / 2, math.log(4) / 2])


def test_sfts_gradient_is_finite_differences() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.double, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = torch.tensor([[0, 3, IGNORED, 6, 2], [1, IGNORED, IGNORED, 4, IGNORED]])

    def loss(logits: Tensor) -> Tensor:
        return sft_loss(token_stats(logits, labels))[0]

    assert torch.autograd.gradcheck(loss, logits)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    learnt = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    assert gradient[learnt].abs().max() > 0.05 and not gradient[~learnt].any()


def test_dft_has_no_gradient_through_its_weight() -> None:
    logits = torch.randn(1, 4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
    stats = token_stats(logits, torch.tensor([[0, 1, 2, 3]]))
    (got,) = torch.autograd.grad(sft_loss(stats, loss_type="dft")[0], stats.log_probs)
    assert torch.allclose(got, -stats.log_probs.exp() / 3)


def test_averages_and_sums_of_a_row_with_nothing_learnt_are_0() -> None:
    mask = MASK.clone()
    mask[1] = 0
    assert sequence_log_probs(LOG_PROBS, mask).tolist() == [-1.5, 0, -1.5, -1.5]
    assert sequence_log_probs(LOG_PROBS, mask, average=True).tolist() == [-0.75, 0, -1.5, -0.5]


LABELS = torch.tensor([True, False, True, False])
GRADIENTS: dict[str, Callable[[Tensor], Any]] = {
    **{f"dpo {form}": partial(dpo_loss, ref_log_probs=REF, mask=MASK, beta=BETA, loss_type=form, label_smoothing=0.1)
       for form in LOSS_TYPES},
    "ipo as printed": partial(ipo_loss, ref_log_probs=REF, mask=MASK, per_token=False),
    "kto": partial(kto_loss, ref_log_probs=REF, mask=MASK, labels=LABELS, kl=0.3, undesirable_weight=1.3),
    "apo_zero_unpaired": partial(kto_loss, ref_log_probs=REF, mask=MASK, labels=LABELS, loss_type="apo_zero_unpaired"),
    "orpo": partial(orpo_loss, mask=MASK, beta=0.2),
    "simpo": partial(simpo_loss, mask=MASK, cpo_alpha=0.1, label_smoothing=0.1),
    **{f"cpo {form}": partial(cpo_loss, mask=MASK, loss_type=form) for form in ("sigmoid", "hinge", "ipo")},
    "reward": lambda x: reward_loss(x[:2, 0], x[2:, 0], margin=MASK[:2, 1], center_rewards_coefficient=0.2),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_finite_differences(name: str) -> None:
    loss = GRADIENTS[name]
    point = LOG_PROBS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point)[0], point)
    step, differences = 1e-6, torch.zeros_like(LOG_PROBS)
    for index in range(LOG_PROBS.numel()):
        move = torch.zeros(LOG_PROBS.numel()).double()
        move[index] = step
        move = move.view_as(LOG_PROBS)
        differences.view(-1)[index] = (loss(LOG_PROBS + move)[0] - loss(LOG_PROBS - move)[0]) / (2 * step)
    assert gradient.abs().max() > 1e-3
    assert torch.allclose(gradient, differences, atol=1e-8, rtol=1e-6)
    if name != "reward":
        assert not gradient[MASK == 0].any()


def test_padding_on_either_side_gives_the_same_loss() -> None:
    def left(rows: Tensor) -> Tensor:
        width = MASK.sum(-1).long().tolist()
        return torch.stack([row.roll(len(row) - n) for row, n in zip(rows, width, strict=True)])

    policy, ref, mask = left(LOG_PROBS), left(REF), left(MASK)
    assert mask[:, -1].tolist() == [1, 1, 1, 1]
    for form in LOSS_TYPES:
        one = dpo_loss(LOG_PROBS, REF, MASK, beta=BETA, loss_type=form, label_smoothing=0.1)[0]
        two = dpo_loss(policy, ref, mask, beta=BETA, loss_type=form, label_smoothing=0.1)[0]
        assert one.item() == pytest.approx(two.item(), rel=1e-12), form
    assert orpo_loss(LOG_PROBS, MASK)[0].item() == pytest.approx(orpo_loss(policy, mask)[0].item(), rel=1e-12)
    assert simpo_loss(LOG_PROBS, MASK)[0].item() == pytest.approx(simpo_loss(policy, mask)[0].item(), rel=1e-12)
