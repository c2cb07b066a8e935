"""Sampling: the drawn frequencies, the log-probabilities, the bookkeeping; kernel against torch twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops import sample as op
from aligntune.backends.fast.ops.sample import (
    FIELDS,
    FULL,
    RUNNING,
    STOPPED,
    Outputs,
    gumbel_reference,
    philox_words,
    sample_step,
    sample_step_reference,
)
from aligntune.errors import ConfigError
from tests.backends.fast.ops.harness import assert_fits, sm90_case

BOTH = pytest.mark.parametrize("step", [sample_step, sample_step_reference])


def state_of(rows, device="cpu", **fields):
    lines = torch.zeros(rows, len(FIELDS), dtype=torch.int32)
    values = {"active": 1, "limit": 100, "row_id": torch.arange(rows)} | fields
    for name, value in values.items():
        lines[:, FIELDS.index(name)] = torch.as_tensor(value, dtype=torch.int32)
    return lines.to(device)


def outputs_of(rows, most=4, device="cpu"):
    return Outputs(torch.full((rows, most), -1, dtype=torch.int32, device=device),
                   torch.full((rows, most), float("nan"), device=device))


def run(step, logits, *, seed=7, temperature=1.0, stops=(-1,), greedy=False, choices=None, device="cpu", **fields):
    state, outputs = state_of(len(logits), device, **fields), outputs_of(len(logits), device=device)
    step(logits.to(device), state, outputs, seed=torch.tensor(seed, device=device),
         temperature=torch.tensor(temperature, device=device),
         stops=torch.tensor(stops, dtype=torch.int32, device=device), greedy=greedy,
         choices=None if choices is None else choices.to(device))
    return state.cpu(), Outputs(outputs.tokens.cpu(), outputs.log_probs.cpu())


def test_philox_known_answers():
    """Random123's vector is of ten rounds; seven are held against the same recursion in Python integers."""
    def by_hand(c, k, rounds):
        for _ in range(rounds):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = ((b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF)
            k = ((k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF)
        return list(c)

    assert by_hand((0, 0, 0, 0), (0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed, c in ((0, (0, 0, 0)), (2**63 - 5, (2**31, 17, 2**32 - 1)), (123456789123, (5, 6, 7))):
        words = philox_words(seed, *(torch.tensor(x) for x in c))
        assert words.tolist() == by_hand((*c, 0), (seed & 0xFFFFFFFF, seed >> 32), 7)


@BOTH
@pytest.mark.parametrize("vocab", [5, 4099])
def test_greedy_and_log_probs(step, vocab, device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, vocab, generator=g) * 3
    logits[1, 2] = logits[1, vocab - 1] = 50.0  # equals: the first wins, also across blocks
    state, out = run(step, logits, greedy=True, device=device)
    expected = logits.argmax(1)
    assert expected[1] == 2
    assert out.tokens[:, 0].tolist() == expected.tolist()
    truth = logits.double().log_softmax(1).gather(1, expected[:, None])[:, 0]
    torch.testing.assert_close(out.log_probs[:, 0].double(), truth, atol=3e-6, rtol=1e-6)


@BOTH
def test_bookkeeping(step, device):
    """A row that goes on, one that stops, one that is full, one that is not active; an output line with an offset."""
    logits = torch.full((4, 9), -5.0)
    logits[torch.arange(4), torch.tensor([3, 8, 4, 5])] = 5.0
    before = {"length": [10, 20, 30, 40], "generated": [2, 0, 6, 1], "limit": [9, 9, 7, 9], "offset": [2, 0, 4, 0],
              "active": [1, 1, 1, 0], "token": [1, 1, 1, 6], "row_id": [7, 7, 7, 7]}
    state, out = run(step, logits, greedy=True, stops=(8, 2, -1, -1), device=device, **before)
    named = {name: state[:, i].tolist() for i, name in enumerate(FIELDS)}
    assert named["token"] == [3, 8, 4, 6]
    assert named["length"] == [11, 21, 31, 40]
    assert named["generated"] == [3, 1, 7, 1]
    assert named["active"] == [1, 0, 0, 0]
    assert named["reason"] == [RUNNING, STOPPED, FULL, 0]
    assert named["limit"] == before["limit"] and named["offset"] == before["offset"]
    assert out.tokens.tolist() == [[3, -1, -1, -1], [8, -1, -1, -1], [-1, -1, 4, -1], [-1] * 4]
    assert torch.isfinite(out.log_probs).sum() == 3


def test_kernel_and_twin_draw_the_same(device):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5000, generator=g)
    fields = {"generated": [0, 1, 2, 3, 0, 0], "offset": [0, 1, 2, 3, 0, 0], "row_id": [0, 1, 2, 3, 99, 2**31 - 1]}
    kwargs = {"seed": 2**40 + 3, "temperature": 0.7, "device": device, **fields}
    (_, ours), (_, twin) = run(sample_step, logits, **kwargs), run(sample_step_reference, logits, **kwargs)
    assert ours.tokens.tolist() == twin.tokens.tolist()
    assert len(set(ours.tokens[:, 0].tolist())) == 6
    torch.testing.assert_close(ours.log_probs[:, 0], twin.log_probs[:, 0], atol=3e-6, rtol=1e-6)


def test_a_row_draws_the_same_wherever_it_stands(device):
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2)).expand(8, 300).contiguous()
    _, first = run(sample_step, logits, device=device)
    _, turned = run(sample_step, logits, device=device, row_id=list(range(8))[::-1])
    assert first.tokens[:, 0].tolist() == turned.tokens[:, 0].tolist()[::-1]
    assert len(set(first.tokens[:, 0].tolist())) > 1
    _, other_seed = run(sample_step, logits, device=device, seed=8)
    _, later = run(sample_step, logits, device=device, generated=1)
    assert first.tokens[:, 0].tolist() != other_seed.tokens[:, 0].tolist()
    assert first.tokens[:, 0].tolist() != later.tokens[:, 1].tolist()


def test_frequencies_match_the_softmax():
    """Chi-square over 40,000 draws of 12 tokens, down to a probability of 1 in 600; the 0.1% point of 11 degrees."""
    logits = torch.linspace(-4.5, 1.5, 12)
    n = 40_000
    noise = gumbel_reference(11, torch.arange(n) % 50, torch.arange(n) // 50, 12)
    drawn = torch.bincount((logits / 1.3 + noise).argmax(1), minlength=12).double().numpy()
    expected = (logits.double() / 1.3).softmax(0).numpy() * n
    chi2 = float(np.sum((drawn - expected) ** 2 / expected))
    assert chi2 < 31.3, chi2
    uniform = np.full(12, n / 12)
    assert float(np.sum((drawn - uniform) ** 2 / uniform)) > 1000  # the test can fail


def test_kernel_frequencies(device):
    """The same through the kernel, fewer draws: its own logarithms and words."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5, -2.0]]).expand(64, 5).contiguous()
    drawn = torch.zeros(5)
    for position in range(8):
        _, out = run(sample_step, logits, device=device, generated=position, offset=position)
        drawn += torch.bincount(out.tokens[:, 0].long(), minlength=5)
    expected = logits[0].softmax(0) * drawn.sum()
    assert drawn.sum() == 512
    assert float(((drawn - expected) ** 2 / expected).sum()) < 18.5  # 0.1% point of 4 degrees


def test_noise_has_the_right_tail():
    noise = gumbel_reference(3, torch.zeros(1), torch.zeros(1), 400_000)[0].double()
    assert torch.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.008)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert (noise > 10).double().mean() == pytest.approx(math.exp(-10), rel=0.8)


@BOTH
def test_lines_beyond_the_logits_stay_as_they_are(step, device):
    """The state is as long as the engine's largest batch; a step reads as many lines as there are logits."""
    state, out = state_of(5, device, token=7), outputs_of(5, device=device)
    step(torch.eye(3, 9, device=device) * 9, state, out, seed=torch.tensor(1, dtype=torch.int32, device=device),
         temperature=torch.tensor(1.0, device=device), stops=torch.full((1,), -1, dtype=torch.int32, device=device),
         greedy=True)  # fmt: skip
    assert state[:, FIELDS.index("token")].tolist() == [0, 1, 2, 7, 7]
    assert torch.equal(state[3:].cpu(), state_of(5, token=7)[3:]) and not torch.isfinite(out.log_probs[3:]).any()


@triton.jit
def _noise_of(words, noise, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(noise + index, op._gumbel(tl.load(words + index)))


def test_the_kernels_noise_of_a_word(device):
    """Also below u = 2^-10, where a series stands for the logarithm: one draw in a thousand, the likeliest tokens."""
    words = torch.tensor([0, 1, 1000, 2**18, 2**21, 2**22 - 1, 2**22, 2**25, 2**30, 2**31 - 1, -(2**31), -2**20, -1,
                          *range(-8, -5)], dtype=torch.int64)  # fmt: skip
    noise = torch.empty(len(words), device=device)
    _noise_of[(1,)](words.to(torch.int32).to(device), noise, N=len(words))
    u = ((words % 2**32).double() + 0.5) / 2.0**32
    expected = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    torch.testing.assert_close(noise.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_choices_decide_and_logits_are_scored(step, device):
    logits = torch.tensor([[9.0, 0.0, 1.0, 2.0]] * 5)
    choices = torch.full((5, 4), float("-inf"))
    choices[:, 2] = -3.0
    _, out = run(step, logits, temperature=2.0, choices=choices, device=device)
    assert out.tokens[:, 0].tolist() == [2] * 5
    truth = (logits[0] / 2).log_softmax(0)[2]
    torch.testing.assert_close(out.log_probs[:, 0], truth.expand(5), atol=1e-6, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="do not fit"):
        run(lambda logits, state, *a, **k: sample_step(logits, state[:1], *a, **k), torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="power of two"):
        run(sample_step_reference, torch.zeros(2, 4), stops=(1, 2, 3))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("vocab", [40, 4096, 5000])
def test_logits_of_nan_draw_a_token_of_the_vocabulary(vocab, greedy, device):
    """Whose log-prob is NaN; an id beyond the embeddings would end a GPU's process. Rows beside it draw theirs."""
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1))
    _, expected = run(sample_step, logits, greedy=greedy, device=device)
    every = [slice(None)] if device == "cuda" else []  # later interpreters refuse a block of nothing but NaN
    for broken in (slice(1, None), slice(vocab - 1, None), *every):
        wrong = logits.clone()
        wrong[1, broken] = float("nan")
        _, found = run(sample_step, wrong, greedy=greedy, device=device)
        assert 0 <= int(found.tokens[1, 0]) < vocab and found.log_probs[1, 0].isnan()
        assert torch.equal(found.tokens[::2, 0], expected.tokens[::2, 0])


BLOCKS = sm90_case(
    op.sample_blocks,
    {"logits_ptr": "*bf16", "logits_row": 128256, "choices_ptr": "*fp32", "choices_row": 128256, "state_ptr": "*i32",
     "state_row": 8, "seed_ptr": "*i64", "temperature_ptr": "*fp32", "partial_ptr": "*fp32", "vocab": 128256},
    {"HAS_CHOICES": True, "GREEDY": False, "BLOCK": 4096}, num_warps=8,
)  # fmt: skip
FINISH = sm90_case(
    op.sample_finish,
    {"logits_ptr": "*bf16", "logits_row": 128256, "partial_ptr": "*fp32", "blocks": 32, "vocab": 128256,
     "state_ptr": "*i32", "state_row": 8, "temperature_ptr": "*fp32", "stops_ptr": "*i32", "tokens_ptr": "*i32",
     "log_probs_ptr": "*fp32",
     "out_row": 1024},
    {"GREEDY": False, "STOPS": 4, "BLOCKS": 32}, num_warps=1,
)  # fmt: skip


def test_compiles_for_sm90():
    assert_fits(BLOCKS, load_bits=128)
    assert_fits(FINISH)


@pytest.mark.gpu
def test_on_the_gpu_at_full_vocabulary():
    logits = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(4)).bfloat16()
    (_, ours), (_, twin) = (run(step, logits, device="cuda", seed=5) for step in (sample_step, sample_step_reference))
    # A near-tie of two sums of fp32 may fall either way.
    assert (ours.tokens[:, 0] == twin.tokens[:, 0]).sum() >= 63
    same = ours.tokens[:, 0] == twin.tokens[:, 0]
    torch.testing.assert_close(ours.log_probs[same, 0], twin.log_probs[same, 0], atol=2e-5, rtol=1e-5)
