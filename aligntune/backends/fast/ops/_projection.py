"""The products around the head's pass: which rows, in what chunks, in what precision, accumulated how.

T rows, H hidden, V vocabulary. Logits X W^T cost 2THV flops, dX = G W and dW = G^T X as much each.

* Chunks. A chunk's products are as efficient as full ones from about 2,000 rows on; its logits take rows x V x 2 bytes.
  `plan_rows` takes the number of rows whose dX products fill whole waves of the GPU, within a budget of bytes.
* dW is summed over the chunks in fp32: each chunk's product rounded to bf16 before the sum would bias training. The sum
  takes 4VH bytes and the bf16 result 2VH more; `WeightGradient` keeps the upper half of the sum inside the result's own
  memory, so that the peak is 4VH and what remains is 2VH.
* fp32 logits from bf16 inputs: the products of two bf16 numbers are exact in fp32, so the forward is the same GEMM with
  an fp32 output. Their gradient is split in two bf16 terms, g = hi + lo with 16 bits of mantissa together, and each
  takes the fast GEMM: 2 x 2THV flops at the bf16 rate instead of 2THV at the fp32 rate, which is 10 times lower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from aligntune.backends.fast.ops._runtime import cdiv

MEMORY_BUDGET = 1 << 30
_FEWEST_ROWS = 1024
_HALF = (torch.bfloat16, torch.float16)
# The output tile of the large GEMMs on Hopper.
_TILE_ROWS, _TILE_COLS = 128, 256


def plan_rows(n_rows: int, hidden: int, row_bytes: int, budget: int, sms: int, trained: bool) -> int:
    """Rows a chunk: what leaves the fewest partial waves of dX tiles within `budget` bytes.

    Of these the fewest rows, for memory's sake; where the weight is `trained` the most, as each chunk reads and writes
    the sum of its gradients.

    2816 rows of H = 2048 are 176 tiles: two waves of 132 SMs, the second a third full; 2048 rows are 128 tiles, a wave
    all but full. Never fewer than 256 rows, whatever the budget: the products would be bound by reading W. Below
    `_FEWEST_ROWS` of a frozen weight they come near it.
    """
    most = max(256, budget // max(row_bytes, 1))
    if n_rows <= min(most, 4096 if trained else _FEWEST_ROWS):
        return max(n_rows, 1)

    def waves(rows: int) -> int:
        full, rest = divmod(n_rows, rows)
        tiles = [cdiv(r, _TILE_ROWS) * cdiv(hidden, _TILE_COLS) for r in (rows, rest)]
        return full * cdiv(tiles[0], sms) + cdiv(tiles[1], sms)

    candidates = range(256, min(most, 4096) + 1, 256)
    if trained:
        large = [rows for rows in candidates if 2 * rows > candidates[-1]]
        return min(large, key=lambda rows: (waves(rows), -rows))
    enough = [rows for rows in candidates if rows >= min(_FEWEST_ROWS, candidates[-1])]
    return min(n_rows, min(enough, key=lambda rows: (waves(rows), rows)))


@dataclass(frozen=True)
class LogitsBuffer:
    """What a head's logits take, of a weight (V, H).

    Args:
        rows: that were scored when this was noted.
        hidden: H.
        row_bytes: of one row's logits.
        sms: processors of the GPU.
        trained: whether the weight is.
    """

    rows: int
    hidden: int
    row_bytes: int
    sms: int
    trained: bool

    def chunk(self, rows: int, budget: int) -> int:
        """Bytes of a chunk's logits where so many rows are scored."""
        step = plan_rows(rows, self.hidden, self.row_bytes, budget, self.sms, self.trained)
        return min(step, rows) * self.row_bytes

    def most(self, rows: int, budget: int) -> int:
        """Bytes of the logits that are there at once at most: of all rows where a backward may find them kept."""
        whole = rows * self.row_bytes
        return max(self.chunk(rows, budget), whole if self.trained and whole <= budget else 0)


def add_product(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """acc = a @ b if `first`, else acc += a @ b, for an fp32 `acc`: the product is never rounded to a half type."""
    beta = 0 if first else 1
    if acc.is_cuda and a.dtype in _HALF:
        torch.addmm(acc, a, b, beta=beta, out_dtype=torch.float32, out=acc)
    else:
        # CPU torch has no out_dtype
        acc.addmm_(a.float(), b.float(), beta=beta)


class WeightGradient:
    """dW (V, H) as a sum of products, in fp32; see the module's docstring for where it lives."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        rows, cols = weight.shape
        self.result = torch.empty(rows, cols, dtype=dtype, device=weight.device)
        if dtype.itemsize == 4:
            self.split, self.lower, self.upper = rows, self.result, None
        else:
            # 64 rows and more at a time keep the GEMM's operand aligned
            self.split = rows // 2 // 64 * 64
            inside = self.result.view(-1)[: 2 * self.split * cols]
            self.lower = inside.view(torch.float32).view(self.split, cols)
            self.upper = torch.empty(rows - self.split, cols, dtype=torch.float32, device=weight.device)
        self.empty = True  # nothing was added

    def add(self, g: torch.Tensor, x: torch.Tensor) -> None:
        """Add g^T x for g (n, V), x (n, H)."""
        if self.split:
            add_product(self.lower, g[:, : self.split].t(), x, first=self.empty)
        if self.upper is not None:
            add_product(self.upper, g[:, self.split :].t(), x, first=self.empty)
        self.empty = False

    def finish(self) -> torch.Tensor:
        """The sum, rounded once."""
        if self.empty:
            return self.result.zero_()
        if self.upper is None:
            return self.result
        # Row i of the sum lies where rows 2i and 2i + 1 of the result belong. Going up, a slab only writes over rows
        # that were read before it or with it.
        for start in range(0, self.split, 4096):
            stop = min(start + 4096, self.split)
            rounded = self.lower[start:stop].to(self.result.dtype)
            self.result[start:stop].copy_(rounded)
        self.result[self.split :].copy_(self.upper)
        self.upper = None
        return self.result


class Rows:
    """The rows of `hidden` (T, H) that are scored: all, or those that `kept` names.

    `kept` (K,) holds row numbers; -1 pads it to a bucket's length. Rows it leaves out must be ignored ones: their
    outputs and gradients are 0.
    """

    def __init__(
        self, hidden: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor | None, ignore_index: int
    ) -> None:
        self.total = hidden.shape[0]
        self.read: torch.Tensor | None = None
        self.write: torch.Tensor | None = None
        if kept is None:
            self.count, self.targets = self.total, targets.contiguous()
            return
        self.count = kept.shape[0]
        self.read = kept.clamp(min=0)
        # padding is written to a row past the end, which nobody sees
        self.write = torch.where(kept < 0, self.total, kept)
        self.targets = torch.where(kept < 0, ignore_index, targets.index_select(0, self.read))

    def take(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of what is scored, from a tensor with T rows."""
        return values[start:stop] if self.read is None else values.index_select(0, self.read[start:stop])

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(count,) values to (T,), 0 where nothing was scored."""
        if self.write is None:
            return values
        return values.new_zeros(self.total + 1).index_copy_(0, self.write, values)[: self.total]

    def gradient(self, hidden: torch.Tensor) -> torch.Tensor:
        """Memory for dX: (T, H), and one more row for padding where rows are named."""
        if self.write is None:
            return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        return torch.zeros(self.total + 1, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)


class Precision(NamedTuple):
    """What the GEMMs read, and what the logits are stored in."""

    gemm: torch.dtype
    logits: torch.dtype


def precision_of(hidden: torch.Tensor, weight: torch.Tensor, *, fp32_logits: bool) -> Precision:
    """As the model's own head would have it: autocast's type, else that of the hidden states."""
    device = hidden.device.type
    if fp32_logits:
        exact = hidden.dtype == weight.dtype and hidden.dtype in _HALF
        return Precision(hidden.dtype if exact else torch.float32, torch.float32)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return Precision(dtype, dtype)


def _pitch(vocab: int) -> int:
    # a row stride that is a multiple of 128 bytes: or loads and GEMM tiles of an odd vocabulary are not aligned
    return cdiv(vocab, 64) * 64


def logits_row_bytes(vocab: int, precision: Precision) -> int:
    """Bytes a row of logits takes, with the two terms of its gradient where that is split."""
    terms = 0 if precision.gemm == precision.logits else 2 * precision.gemm.itemsize
    return _pitch(vocab) * (precision.logits.itemsize + terms)


class Projection:
    """X W^T + bias and its gradients for a chunk of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, precision: Precision) -> None:
        self.dtype, self.logits_dtype = precision
        self.split = self.dtype != self.logits_dtype
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.logits_dtype)
        self.vocab = weight.shape[0]

    def buffer(self, rows: int) -> torch.Tensor:
        memory = torch.empty(rows, _pitch(self.vocab), dtype=self.logits_dtype, device=self.weight.device)
        # oneDNN's products in bf16 (torch's on a CPU) read on between rows, and NaN times 0 is NaN.
        memory[:, self.vocab :].zero_()
        return memory[:, : self.vocab]

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write x W^T + bias into `out` (n, V)."""
        if self.split:
            add_product(out, x, self.weight.t(), first=True)
            if self.bias is not None:
                out.add_(self.bias)
        elif self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        return out

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        rows: Rows,
        start: int,
        grad_hidden: torch.Tensor | None,
        grad_weight: WeightGradient | None,
        grad_bias: torch.Tensor | None,
    ) -> None:
        """Add the chunk's share to the gradients, from dloss/dlogits g (n, V); g is used up."""
        if grad_bias is not None:
            grad_bias += g.sum(0, dtype=torch.float32)
        terms = [g]
        if self.split:
            hi = g.to(self.dtype)
            terms = [hi, g.sub_(hi).to(self.dtype)]
        if grad_hidden is not None:
            self._backward_hidden(terms, rows.write, slice(start, start + g.shape[0]), grad_hidden)
        if grad_weight is not None:
            for term in terms:
                grad_weight.add(term, x)

    def _backward_hidden(
        self, terms: list[torch.Tensor], write: torch.Tensor | None, chunk: slice, grad_hidden: torch.Tensor
    ) -> None:
        if write is None and grad_hidden.dtype == self.logits_dtype:
            product = grad_hidden[chunk]
        else:
            shape = (terms[0].shape[0], grad_hidden.shape[1])
            product = torch.empty(shape, dtype=self.logits_dtype, device=grad_hidden.device)
        if self.split:
            for i, term in enumerate(terms):
                add_product(product, term, self.weight, first=i == 0)
        else:
            torch.mm(terms[0], self.weight, out=product)
        if write is not None:
            grad_hidden.index_copy_(0, write[chunk], product.to(grad_hidden.dtype))
        elif grad_hidden.dtype != self.logits_dtype:
            grad_hidden[chunk].copy_(product)
