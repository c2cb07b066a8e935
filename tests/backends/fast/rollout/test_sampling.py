"""Filters against transformers' LogitsProcessors, and drawn completions against the probabilities they came from."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aligntune.backends.fast.rollout import RolloutEngine, Sampling
from aligntune.backends.fast.rollout.sampling import Numbers, choices
from tests.backends.fast.minis import build

ROWS, VOCAB = 6, 57

CASES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 500},
    {"top_p": 0.8},
    {"top_p": 1e-4},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5, "temperature": 2.0},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.3, "top_k": 3, "top_p": 0.99},
]


def processors(*, temperature=1.0, top_k=0, top_p=1.0, min_p=None, repetition_penalty=1.0):
    """In the order of transformers' `generate`."""
    found = LogitsProcessorList()
    if repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    found.append(TemperatureLogitsWarper(temperature))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    if min_p:
        found.append(MinPLogitsWarper(min_p))
    return found


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_scores_are_transformers(options, dtype, kernels, device):
    if kernels and "top_p" not in options:
        pytest.skip("no kernel takes part")
    g = torch.Generator().manual_seed(0)
    # Well apart from each other, also after rounding: equal scores at a cut may fall either way.
    logits = torch.stack([torch.randperm(VOCAB, generator=g) for _ in range(ROWS)]).float() * 0.25 - 7
    logits = logits.to(dtype)
    ids = torch.randint(0, VOCAB, (ROWS, 9), generator=g)
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    sampling = Sampling(**options)
    numbers = Numbers.on(torch.device(device))
    numbers.set(sampling)
    ours = choices(logits.to(device), sampling.form, numbers, seen.to(device), kernels=kernels).softmax(1).cpu()
    expected = processors(**options)(ids, logits.float()).softmax(1)
    assert (ours > 0).sum(1).tolist() == (expected > 0).sum(1).tolist()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    plain = logits.float().softmax(1)
    assert options.get("top_k") == 500 or not torch.allclose(ours, plain, atol=1e-3)


def test_forms():
    assert not Sampling().form.filters
    assert Sampling(temperature=0, top_k=3, top_p=0.5).form == Sampling(temperature=0).form
    assert Sampling(temperature=0, repetition_penalty=2.0).form.filters
    assert Sampling(top_p=0.5).form == Sampling(top_p=0.9, temperature=3.0).form  # one graph serves both
    assert Sampling(min_p=0.0).form == Sampling().form


DRAWN = [{}, {"temperature": 1.6, "top_k": 6}, {"top_p": 0.7},
         {"temperature": 2.5, "min_p": 0.1, "repetition_penalty": 1.5}]  # fmt: skip


@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_drawn_frequencies_match_the_model(options):
    """4,000 completions of two tokens."""
    assert_frequencies(build("llama", vocab_size=13), options, count=4000, max_batch=500)


def assert_frequencies(model, options, *, count, off=None, **engine):
    """Chi-square of the first token, and of the second given the commonest first; returns the rollout.

    `off`: the test of the first is to tell probabilities that are wrong by this share, up and down by turns.
    """
    prompt = [4, 9, 5]
    sampling = Sampling(max_new_tokens=2, stop_token_ids=(), seed=17, **options)
    rollout = RolloutEngine(model, max_len=16, **engine).generate([prompt], num_generations=count, sampling=sampling)
    model.eval()
    warp = processors(**options)

    def expected(ids):
        given = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            scores = warp(given, model(given).logits[:, -1].float())
        return scores.softmax(1)[0].double().cpu()

    firsts = torch.tensor([ids[0] for ids in rollout.completion_ids])
    truth = expected(prompt)
    assert_drawn(firsts, truth)
    if off is not None:
        kept = (truth > 0).nonzero()[:, 0]
        wrong = truth.clone()
        wrong[kept[::2]] *= 1 + off
        wrong[kept[1::2]] *= 1 - off
        chi2, _, bound = chi_square(firsts, wrong / wrong.sum())
        assert chi2 > bound, (chi2, bound)
    commonest = int(firsts.mode().values)
    seconds = torch.tensor([ids[1] for ids in rollout.completion_ids if ids[0] == commonest])
    assert_drawn(seconds, expected([*prompt, commonest]))
    return rollout


def chi_square(tokens, probabilities):
    """(chi-square, that of cells which are all as likely, the 0.1% point)."""
    count = torch.bincount(tokens, minlength=len(probabilities)).double()
    wanted = probabilities * len(tokens)
    # Cells of under five expected draws are summed, as the approximation asks.
    rare = wanted < 5
    cells = torch.cat([count[~rare], count[rare].sum()[None]])
    means = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    cells, means = cells[means > 0], means[means > 0]
    degrees = len(cells) - 1
    assert degrees >= 2
    flat = torch.full_like(means, len(tokens) / len(means))
    # Wilson-Hilferty: the 0.1% point of chi-square.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    return *(float(((cells - each) ** 2 / each).sum()) for each in (means, flat)), bound


def assert_drawn(tokens, probabilities):
    assert not (torch.bincount(tokens, minlength=len(probabilities))[probabilities == 0]).any()
    chi2, of_a_flat_one, bound = chi_square(tokens, probabilities)
    assert chi2 < bound, (chi2, bound)
    assert of_a_flat_one > bound  # the test can fail
