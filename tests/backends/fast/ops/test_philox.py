"""The in-kernel Philox: the published numbers, the order of the halves, uniformity."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops._philox import random_u16


@triton.jit
def _draw(seed_ptr, out_ptr, c1, c2, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    row, group = tl.arange(0, ROWS), tl.arange(0, GROUPS)
    numbers = random_u16(tl.load(seed_ptr), group[None, :] + (row * 0)[:, None], row[:, None] + c1, c2)
    column = tl.arange(0, 8 * GROUPS)
    tl.store(out_ptr + row[:, None] * (8 * GROUPS) + column[None, :], numbers)


def draw(seed: int, *, c1=0, c2=0, rows=4, groups=4, device="cpu") -> torch.Tensor:
    out = torch.zeros(rows, 8 * groups, dtype=torch.int32, device=device)
    _draw[(1,)](torch.tensor([seed], device=device), out, c1, c2, ROWS=rows, GROUPS=groups)
    return out.cpu()


def philox(key: int, counter: tuple[int, int, int, int], rounds: int = 7) -> list[int]:
    """Philox4x32 (Salmon et al., SC'11, section 3.2) in Python integers."""
    low = 0xFFFFFFFF
    k0, k1 = key & low, (key >> 32) & low
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def test_the_authors_known_answer(device):
    # Random123's kat_vectors, philox4x32 with 7 rounds, all zero.
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox(0, (0, 0, 0, 0)) == words
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert draw(0, device=device)[0, :8].tolist() == halves


def test_every_place_is_its_counters(device):
    for seed in (1, -1234567890123456789, 2**62 + 17):
        found = draw(seed, c1=5, c2=2**31 - 1, device=device)
        for row in range(4):
            for group in range(4):
                words = philox(seed, (group, row + 5, 2**31 - 1, 0))
                halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
                assert found[row, 8 * group : 8 * group + 8].tolist() == halves


def test_uniform(device):
    numbers = draw(3, rows=64, groups=64, device=device).double()
    assert numbers.min() >= 0 and numbers.max() < 65536
    # 32768 numbers: the mean's standard deviation is 18918 / 181 = 104.5.
    assert abs(float(numbers.mean()) - 32767.5) < 4 * 104.5
    assert abs(float(numbers.std()) - 18918.6) < 200


@pytest.mark.gpu
def test_the_same_numbers_on_the_gpu():
    test_the_authors_known_answer("cuda")
    test_every_place_is_its_counters("cuda")
