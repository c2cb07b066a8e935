"""A recomputed layer by tiles of rows: of what is as wide as its MLP, one tile at a time is in memory.

With T tokens, H hidden and F intermediate features, a layer that is recomputed for its backward as a whole holds 3TF
numbers of its MLP (gate, up, and the gradient of their product) beside some 10TH others. In tiles of R rows it holds
3RF: the MLP and the norm before it see each row for itself. A tile is computed and led back at once,

    a = attention's branch of the layer's input x               as a whole, or a group of whole sequences at a time
    for a tile t of rows:  y_t = h_t + MLP(norm(h_t)),  h_t = x_t + a_t;  dh_t from dy_t;  dW += dW_t
    dx = dh + (da/dx)^T dh

so nothing is computed more often than without tiles, the layer's output is not kept, and dh lies where a did. Where
rows have one length, which the shapes tell, a group of whole sequences goes through attention too before the next one
begins.

Sums. Gradients of parameters are summed over tiles in fp32 (of fp64 parameters in fp64) and rounded once. What trains
must be small beside what tiles save: under full fine-tuning those sums alone would take 12HF bytes, so that rows are
tiled only where they are very many. Dropout draws one mask a tile, in the forward and in its recomputation, which
begin from the same random state: the masks are the same, though others than without tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from aligntune.backends.fast.lora import KEY
from aligntune.backends.fast.ops.rms_norm import source_of

FEWEST_NUMBERS = 1 << 23
"""Of the hidden states in a tile: the product down to H features then makes 256 blocks of 128 x 256, two for each of an
H100's 132 processors. With half as many, and sequences of 2,048 one at a time, a step of a 1B model took 17% longer."""
FEWEST_GROUPED = 8192
"""Rows that go through attention together at least: its products are of tiles' size then."""
UNPACKED = 2
"""How many times as many rows a tile has whose weights are unpacked for it: at 4,096 rows of an 8B model unpacking NF4
takes 7% of the products' time. One unpacked copy for all tiles would hold 6HF bytes: 16,000 rows of hidden states."""
PARTS = 16
"""No tile is a smaller part of all rows: 3RF numbers are then 0.7 TH of an 8B model, and unpacking takes nothing."""
ROUND = 128
_CALLS = ("__call__", "_wrapped_call_impl")
LATE_ROWS = 1 << 16
"""From so many rows on the input of the layer before is fetched behind attention's backward, whose buffers are the
largest by far; with fewer, the copy would not be over in time."""


@dataclass(frozen=True)
class Halves:
    """A decoder layer as a whole, `whole(x)`, and in parts: `second(attend(norm(x)), x)`.

    Args:
        module: the layer.
        norm: makes attention's input (..., H) from the layer's.
        whole: (module, x, **kwargs) -> the layer's output.
        with_input: (norm, x) -> normed, and x itself or a tensor that stands for it: its gradient joins norm's.
        attend: (module, normed, **kwargs) -> attention's branch as it is added, (..., H).
        second: (module, branch, x) -> the layer's output, each row from the same rows of both.
        kwargs: what attention takes beside its input.
        width: F; 0 where `second` must see all rows at once.
        unpacks: the MLP's weights are unpacked at every call.
    """

    module: nn.Module
    norm: nn.Module
    whole: Callable[..., torch.Tensor]
    with_input: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    attend: Callable[..., torch.Tensor]
    second: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    kwargs: dict[str, Any]
    width: int
    unpacks: bool = False

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer as a whole."""
        return self.whole(self.module, hidden, **self.kwargs)


@dataclass(frozen=True)
class Tiles:
    """`rows` of the MLP at a time, within `group` of attention, which are all rows or whole sequences."""

    rows: int
    group: int

    def __str__(self) -> str:
        return f"{self.rows} rows at a time"


def parts_of(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's call as one that can be run in parts, where the layer is attached; any other call as it is.

    transformers asks for recomputation in a layer's forward, or (up to 5.17 at least) in its class's `__call__`, which
    hands over a partial of torch's own: there the forward, and what stands beside it, has not been reached yet.
    """
    if not isinstance(call, functools.partial) or call.args or getattr(call.func, "__name__", "") not in _CALLS:
        return call
    layer = getattr(call.func, "__self__", None)
    make = getattr(layer.__dict__.get(KEY), "parts", None) if isinstance(layer, nn.Module) else None
    parts = None if make is None else make(layer, call.keywords)
    return call if parts is None else parts


def rows_of(tokens: int, hidden: int, *, unpacks: bool = False) -> int:
    """Rows of a tile: equal ones, as many as GEMMs need to be as fast as on all rows."""
    fewest = -(-FEWEST_NUMBERS // hidden) * (UNPACKED if unpacks else 1)
    rows = max(fewest, -(-tokens // PARTS))
    rows = -(-tokens // max(1, tokens // rows))
    return min(tokens, -(-rows // ROUND) * ROUND)


def plan(call: Any, args: Sequence[Any], parameters: Sequence[torch.Tensor] = ()) -> Tiles | None:
    """How a recomputed call is tiled; None where it is run as a whole. Told by shapes alone: nothing waits.

    Args:
        call: what the layer asked to be run.
        args: its positional arguments.
        parameters: those of the layer that train.
    """
    if not isinstance(call, Halves) or not call.width or len(args) != 1:
        return None
    hidden = args[0]
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
        return None
    width = hidden.shape[-1]
    tokens = hidden.numel() // max(width, 1)
    if not tokens:
        return None
    rows = rows_of(tokens, width, unpacks=call.unpacks)
    saved = (tokens - rows) * 3 * call.width * hidden.element_size()
    sums = sum(p.numel() * 4 + p.nbytes for p in parameters)
    if rows >= tokens or 2 * sums > saved:
        return None
    length = _one_length(call, hidden)
    group = tokens if length is None else min(tokens, max(rows // length, -(-FEWEST_GROUPED // length)) * length)
    return Tiles(min(rows, group), group)


def tile_bytes(tokens: int, *, width: int, hidden: int, element_size: int, unpacks: bool = False) -> int:
    """Bytes of one tile of an MLP: gate, up, the product's gradient, and three as wide as the hidden states."""
    return rows_of(tokens, hidden, unpacks=unpacks) * 3 * (width + hidden) * element_size


def _one_length(call: Halves, hidden: torch.Tensor) -> int | None:
    """The length of rows that lie end to end and have all the same; None where that is not so, or cannot be told."""
    ends, longest = call.kwargs.get("cu_seq_lens_q"), call.kwargs.get("max_length_q")
    mask = call.kwargs.get("attention_mask")
    if not isinstance(ends, torch.Tensor) or not isinstance(mask, torch.Tensor) or not isinstance(longest, int):
        return None
    if mask.shape[-1] or hidden.shape[0] != 1:
        return None
    if (ends.shape[0] - 1) * longest != hidden.shape[1] or ends.shape[0] < 3:
        return None
    known = all(name in _SLICED or not _holds_tensors(value) for name, value in call.kwargs.items())
    return longest if known else None


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensors, value)))


def _ends(value: torch.Tensor, start: int, stop: int, length: int) -> torch.Tensor:
    return value[: (stop - start) // length + 1]  # all sequences are as long: those of any group end at the same places


def _tokens(value: Any, start: int, stop: int, length: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_tokens(one, start, stop, length) for one in value)
    return value[:, start:stop] if isinstance(value, torch.Tensor) else value


# What attention takes that speaks of tokens, and how a group's part is cut out of it. A mask of width 0 has none.
_SLICED: dict[str, Callable[[Any, int, int, int], Any]] = {
    "cu_seq_lens_q": _ends, "cu_seq_lens_k": _ends, "position_embeddings": _tokens, "position_ids": _tokens,
    "attention_mask": lambda value, *_: value,
}


def _groups(call: Halves, hidden: torch.Tensor, tiles: Tiles) -> Iterator[tuple[slice, Halves]]:
    """The sequences of each group, as (part of dimension 1, the layer's call on it)."""
    tokens = hidden.numel() // hidden.shape[-1]
    if tiles.group >= tokens:
        yield slice(None), call
        return
    length = call.kwargs["max_length_q"]
    for start in range(0, tokens, tiles.group):
        stop = min(start + tiles.group, tokens)
        kwargs = {name: _SLICED[name](value, start, stop, length) if name in _SLICED else value
                  for name, value in call.kwargs.items()}
        yield slice(start, stop), dataclasses.replace(call, kwargs=kwargs)


def _spans(tokens: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, -1, x.shape[-1])


# -------------------------------------------------------------------------------------------------------------- forward


def forward(call: Halves, hidden: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """The layer's output, without a graph."""
    out: torch.Tensor | None = None
    at = 0
    for part, inner in _groups(call, hidden, tiles):
        x = hidden[:, part]
        branch, rows = _flat(inner.attend(inner.module, inner.norm(x), **inner.kwargs)), _flat(x)
        for span in _spans(rows.shape[1], tiles.rows):
            tile = inner.second(inner.module, branch[:, span], rows[:, span])
            if out is None:
                out = tile.new_empty(hidden.shape)
            _flat(out)[:, at : at + tile.shape[1]] = tile
            at += tile.shape[1]
            del tile
    assert out is not None
    return out


# ------------------------------------------------------------------------------------------------------------- backward


def backward(
    call: Halves, hidden: torch.Tensor, gradient: torch.Tensor, parameters: Sequence[torch.Tensor], tiles: Tiles, *,
    wanted: bool, fetch: Callable[[], None],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of the layer's input, if it is wanted, and of `parameters`, from the one of its output.

    Args:
        fetch: called when the last tile is done (or later, `LATE_ROWS`), once or more: another tensor as large as the
            input may then be made.
    """
    sums, found = Sums(parameters), None
    late = tiles.group >= LATE_ROWS
    for part, inner in _groups(call, hidden, tiles):
        x, last = hidden.detach()[:, part], part.stop is None or part.stop >= hidden.shape[1]
        dx = _of_group(inner, x.requires_grad_(wanted), gradient[:, part], sums, tiles.rows,
                       fetch if last else _nothing, late=late)
        if dx is None or part == slice(None):
            found = dx
            continue
        if found is None:
            found = dx.new_empty(hidden.shape)
        found[:, part] = dx
        del dx
    return found, sums.rounded()


def _nothing() -> None:
    pass


def _of_group(
    call: Halves, x: torch.Tensor, gradient: torch.Tensor, sums: Sums, rows: int, fetch: Callable[[], None], *,
    late: bool,
) -> torch.Tensor | None:
    """The gradient of `x` (..., H), a leaf; those of parameters go to `sums`."""
    with torch.enable_grad():
        branch, same_x = _attended(call, x, fetch if late else _nothing)
    edges = [get_gradient_edge(branch)] if branch.requires_grad else []
    joins = bool(edges) and same_x is not x and same_x.requires_grad
    if joins:
        edges.append(get_gradient_edge(same_x))
    # The gradient of a tile's rows takes the place of what they were made from, which no node of the branch's saves.
    down, over, given = _flat(branch.detach()), _flat(x.detach()), _flat(gradient)
    # Under autocast the residual may be wider than the branch: its gradient is then a tensor of its own.
    apart = x.requires_grad and x.dtype != branch.dtype
    residual = torch.empty_like(over) if apart else down
    for span in _spans(down.shape[1], rows):
        _of_tile(call, down[:, span], over[:, span], residual[:, span] if apart else None, given[:, span], sums)
    if not late:
        fetch()
    dx = residual.view(x.shape) if x.requires_grad else None
    if edges:
        wanted, given_back = [x] if x.requires_grad else [], [down.view(branch.shape), residual.view(branch.shape)]
        found = torch.autograd.grad(edges, [*wanted, *sums.parameters], given_back[: len(edges)], allow_unused=True)
        sums.add(found[len(wanted) :])
        if joins:
            dx = found[0]
        elif dx is not None and found[0] is not None:
            dx.add_(found[0])
    fetch()
    return dx


def _of_tile(
    call: Halves, down: torch.Tensor, over: torch.Tensor, residual: torch.Tensor | None, gradient: torch.Tensor,
    sums: Sums,
) -> None:
    """Write the gradient of a tile's branch over it, and that of the residual, if it is another, into `residual`."""
    branch, x = down.detach().requires_grad_(), over.detach().requires_grad_(residual is not None)
    with torch.enable_grad():
        out = call.second(call.module, branch, x)
    leaves = [branch] if residual is None else [branch, x]
    found = torch.autograd.grad([out], [*leaves, *sums.parameters], [gradient], allow_unused=True)
    down.copy_(found[0])
    if residual is not None:
        residual.copy_(found[1])
    sums.add(found[len(leaves) :])


def _attended(call: Halves, x: torch.Tensor, reached: Callable[[], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's branch and what stands for x; its graph calls `reached` when it makes its normed input again."""
    normed, same_x = call.with_input(call.norm, x)
    source = source_of(normed)
    if source is not None:
        source.recipe.reached = reached
    return call.attend(call.module, normed, **call.kwargs), same_x


class Sums:
    """Gradients of parameters, summed over tiles in fp32 or wider."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = list(parameters)
        self.totals: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.ours = [False] * len(self.parameters)

    def add(self, found: Sequence[torch.Tensor | None]) -> None:
        """Take a tile's; None where it reached a parameter not."""
        given = {number: gradient for number, gradient in enumerate(found) if gradient is not None}
        for number in [number for number in given if self.totals[number] is None]:
            # Whoever made it may hold it: only a sum, or a copy, is ours to write into.
            first = given.pop(number)
            wide = torch.promote_types(first.dtype, torch.float32)
            self.totals[number], self.ours[number] = first.to(wide), first.dtype != wide
        wide_of = {number: gradient.to(self.totals[number].dtype)  # type: ignore[union-attr]
                   for number, gradient in given.items()}
        begun = [number for number in wide_of if not self.ours[number]]
        if begun:
            new = torch._foreach_add([self.totals[n] for n in begun], [wide_of[n] for n in begun])
            for number, total in zip(begun, new, strict=True):
                self.totals[number], self.ours[number] = total, True
        going = [number for number in wide_of if number not in begun]
        if going:
            torch._foreach_add_([self.totals[n] for n in going], [wide_of[n] for n in going])

    def rounded(self) -> list[torch.Tensor | None]:
        """The sums in their parameters' dtypes."""
        return [None if total is None else total.to(parameter.dtype)
                for total, parameter in zip(self.totals, self.parameters, strict=True)]
