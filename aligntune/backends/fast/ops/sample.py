"""One token a row from logits, its log-probability, and the bookkeeping of a decode step, in two launches.

    token = argmax_v(score_v + g_v),  g_v = -log(-log(1 - u_v)),  u_v uniform        score = logits / T, or `choices`
    log_prob = logits_token / T - log sum_v exp(logits_v / T)

Gumbel's trick: the argmax is a draw from softmax(score) (Maddison et al. 2014, arXiv 1411.0030). u_v is Philox at
(v // 4, position, row id) under the seed, word v % 4: what a row draws depends on its own number and how many tokens it
has, never on which rows stand beside it. `choices` are scores after penalties and filters, -inf where a token is left
out; the log-probability is of the unfiltered distribution at temperature T either way, which is what a policy-gradient
loss computes. At T = 0 the highest score is taken, the lowest index among equals, and the log-probability is at T = 1.

u keeps its precision near 0, where g is large: the rarest tokens of a large vocabulary still come up as often as they
should. Bytes: the logits once (and the choices once).

A row's state is one line of int32 numbers, in the order of `FIELDS`, so that a host reads or writes all in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aligntune.backends.fast.ops import _runtime
from aligntune.errors import ConfigError

FIELDS = ("token", "length", "generated", "limit", "row_id", "active", "reason", "offset")
"""token: fed to the next step. length: tokens in the cache. generated: tokens drawn. limit: stop at this many.
row_id: the row's number in the random stream. active: 0 once it has stopped. reason: why, of `RUNNING`, `STOPPED`,
`FULL`. offset: `generated` at the start of the output line."""

RUNNING, STOPPED, FULL = 0, 1, 2
ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., SC'11, table 2)
_BLOCK = 4096


@dataclass
class Outputs:
    """Where drawn tokens go: (rows, most) each; row r's n-th since `offset` at [r, n]."""

    tokens: torch.Tensor
    log_probs: torch.Tensor


@triton.jit
def _gumbel(bits):
    """-log(-log(1 - u)) with u = (bits + 1/2) / 2^32, bits int32 read as unsigned."""
    # int32 has no unsigned view here: the low and the high half make the number.
    high = ((bits >> 16) & 0xFFFF).to(tl.float32)
    low = (bits & 0xFFFF).to(tl.float32)
    u = high * (1.0 / 65536.0) + (low + 0.5) * (1.0 / 4294967296.0)
    u = tl.minimum(u, 0.99999994)  # 1 - 2^-24: rounding must not reach 1
    # Below 2^-10 the series is exact to fp32, where 1 - u would round u away.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0)))
    race = tl.where(u < 0.0009765625, series, -tl.log(1.0 - u))
    return -tl.log(race)


@_runtime.kernel
def sample_blocks(
    logits_ptr, logits_row, choices_ptr, choices_row, state_ptr, state_row, seed_ptr, temperature_ptr, partial_ptr,
    vocab, HAS_CHOICES: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    groups = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    keep = cols < vocab
    inverse = 1.0 if GREEDY else 1.0 / tl.load(temperature_ptr)
    x = tl.load(logits_ptr + row * logits_row + cols, keep, other=float("-inf")).to(tl.float32) * inverse
    score = x
    if HAS_CHOICES:
        score = tl.load(choices_ptr + row * choices_row + cols, keep, other=float("-inf"))
    if not GREEDY:
        seed = tl.load(seed_ptr)
        position = tl.load(state_ptr + row * state_row + 2)
        row_id = tl.load(state_ptr + row * state_row + 4)
        zero = groups * 0
        w0, w1, w2, w3 = tl.philox(seed, groups, zero + position, zero + row_id, zero, 7)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK]).to(tl.int32, bitcast=True)
        score = score + _gumbel(words)
    top = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), axis=0)
    best, at = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    out = partial_ptr + (row * tl.num_programs(1) + block) * 4
    tl.store(out, top)
    tl.store(out + 1, total)
    tl.store(out + 2, best)
    # As bits: fp32 counts to 2^24 only.
    tl.store(out + 3, (block * BLOCK + at).to(tl.int32).to(tl.float32, bitcast=True))


@_runtime.kernel
def sample_finish(
    logits_ptr, logits_row, partial_ptr, blocks, vocab, state_ptr, state_row, temperature_ptr, stops_ptr,
    tokens_ptr, log_probs_ptr, out_row, GREEDY: tl.constexpr, STOPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    keep = b < blocks
    part = partial_ptr + (row * blocks + b) * 4
    top = tl.load(part, keep, other=float("-inf"))
    total = tl.load(part + 1, keep, other=0.0)
    best = tl.load(part + 2, keep, other=float("-inf"))
    at = tl.load(part + 3, keep, other=0.0).to(tl.int32, bitcast=True)
    highest = tl.max(top, axis=0)
    log_sum = highest + tl.log(tl.sum(tl.where(keep, total * tl.exp(top - highest), 0.0), axis=0))
    winner = tl.max(best, axis=0)
    token = tl.min(tl.where(keep & (best == winner), at, 2147483647), axis=0)
    # Logits of NaN, which the log-prob shows: a GPU's maximum may pass them by, for what lies behind the last logit.
    token = tl.where(token < vocab, token, 0)
    inverse = 1.0 if GREEDY else 1.0 / tl.load(temperature_ptr)
    log_prob = tl.load(logits_ptr + row * logits_row + token).to(tl.float32) * inverse - log_sum
    state = state_ptr + row * state_row
    generated, limit = tl.load(state + 2), tl.load(state + 3)
    active, offset = tl.load(state + 5), tl.load(state + 7)
    length = tl.load(state + 1)
    if active != 0:
        out = row * out_row + generated - offset
        tl.store(tokens_ptr + out, token)
        tl.store(log_probs_ptr + out, log_prob)
        stops = tl.load(stops_ptr + tl.arange(0, STOPS))
        stopped = tl.sum((stops == token).to(tl.int32), axis=0) > 0
        full = generated + 1 >= limit
        tl.store(state, token)
        tl.store(state + 1, length + 1)
        tl.store(state + 2, generated + 1)
        tl.store(state + 5, tl.where(stopped | full, 0, 1))
        tl.store(state + 6, tl.where(stopped, 1, tl.where(full, 2, 0)))


def _check(logits: torch.Tensor, state: torch.Tensor, stops: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or state.shape[0] < logits.shape[0]:
        raise ConfigError(f"logits {tuple(logits.shape)} do not fit {state.shape[0]} lines of state, or are strided")
    if state.dtype != torch.int32 or state.shape[1] != len(FIELDS) or stops.numel() & (stops.numel() - 1):
        raise ConfigError(f"state is (rows, {len(FIELDS)}) int32, stops a power of two of int32 numbers; got "
                          f"{tuple(state.shape)} {state.dtype}, {stops.numel()}")


def sample_step(
    logits: torch.Tensor, state: torch.Tensor, outputs: Outputs, *, seed: torch.Tensor, temperature: torch.Tensor,
    stops: torch.Tensor, greedy: bool, choices: torch.Tensor | None = None,
) -> None:
    """Draw one token for each row that is active, write it out and move the row's state on.

    Args:
        logits: (rows, V), any float type, rows at any stride.
        state: (rows or more, 8) int32, see `FIELDS`; changed in place.
        outputs: changed in place.
        seed: () int64. temperature: () fp32. Both are read on the device.
        stops: (a power of two,) int32 token ids that end a row; fill up with -1.
        greedy: take the highest score; the temperature is not read.
        choices: (rows, V) fp32 scores to draw from, where they differ from logits / temperature.

    Raises:
        ConfigError: shapes that do not fit. BackendUnavailableError: tensors that no kernel can read.
    """
    _check(logits, state, stops)
    _runtime.require_device(logits, state, outputs.tokens, outputs.log_probs, seed, temperature, stops, choices)
    rows, vocab = logits.shape
    if not rows:
        return
    blocks = _runtime.cdiv(vocab, _BLOCK)
    partial = torch.empty((rows, blocks, 4), dtype=torch.float32, device=logits.device)
    drawn = logits if choices is None else choices
    with _runtime.on_device(logits):
        sample_blocks[(rows, blocks)](
            logits, logits.stride(0), drawn, drawn.stride(0), state, state.stride(0), seed, temperature, partial,
            vocab, choices is not None, greedy, _BLOCK, num_warps=8,
        )  # fmt: skip
        sample_finish[(rows,)](
            logits, logits.stride(0), partial, blocks, vocab, state, state.stride(0), temperature, stops,
            outputs.tokens, outputs.log_probs, outputs.tokens.stride(0), greedy, stops.numel(),
            _runtime.next_power_of_2(blocks), num_warps=1,
        )  # fmt: skip


def philox_words(seed: int, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor) -> torch.Tensor:
    """Philox4x32-7 at counters (c0, c1, c2, 0): int64 tensors in, the four words in [0, 2^32) in a last dimension."""
    low32 = 0xFFFFFFFF
    c0, c1, c2 = torch.broadcast_tensors(c0 & low32, c1 & low32, c2 & low32)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(ROUNDS):
        # The product wraps at 2^64 in int64 too; its halves come out right.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low32) ^ c1 ^ k0, b & low32, ((a >> 32) & low32) ^ c3 ^ k1, a & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_reference(seed: int, positions: torch.Tensor, row_ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """(rows, V) fp32: the noise that row `row_ids[r]` adds to its scores at `positions[r]`."""
    groups = torch.arange((vocab + 3) // 4, device=positions.device)
    words = philox_words(seed, groups[None], positions.long()[:, None], row_ids.long()[:, None]).flatten(1)[:, :vocab]
    u = (words.double() + 0.5) / 2.0**32
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24))).float()


def sample_step_reference(
    logits: torch.Tensor, state: torch.Tensor, outputs: Outputs, *, seed: torch.Tensor, temperature: torch.Tensor,
    stops: torch.Tensor, greedy: bool, choices: torch.Tensor | None = None,
) -> None:
    """`sample_step` in torch; the arguments are the same."""
    _check(logits, state, stops)
    rows, vocab = logits.shape
    lines = state[:rows].long()
    x = logits.float() if greedy else logits.float() / temperature
    score = x if choices is None else choices
    if not greedy:
        score = score + gumbel_reference(int(seed), lines[:, 2], lines[:, 4], vocab)
    token = score.argmax(dim=1)
    log_prob = torch.log_softmax(x, dim=1).gather(1, token[:, None])[:, 0]
    active = lines[:, 5] != 0
    where = active.nonzero().flatten()
    at = (lines[:, 2] - lines[:, 7])[where]
    outputs.tokens[where, at] = token[where].to(outputs.tokens.dtype)
    outputs.log_probs[where, at] = log_prob[where]
    stopped, full = torch.isin(token, stops.long()), lines[:, 2] + 1 >= lines[:, 3]
    reason = torch.where(stopped, STOPPED, torch.where(full, FULL, RUNNING))
    moved = torch.stack((token, lines[:, 1] + 1, lines[:, 2] + 1, lines[:, 3], lines[:, 4],
                         (~(stopped | full)).long(), reason, lines[:, 7]), dim=1)
    state[:rows] = torch.where(active[:, None], moved, lines).to(state.dtype)
