"""Segments for `segment_attention`: lengths, which go on from which, tensors, and the comparison with fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aligntune.backends.fast.ops.segment_attention import SharedPrompts, segment_attention_reference
from tests.backends.fast.ops.harness import assert_close_to_truth


@dataclass(frozen=True)
class Layout:
    """Lengths of segments; `before` and `group` of those that go on from another, `users` of the first.

    `longest`: what is said of the longest, where that is not its length.
    """

    lengths: tuple[int, ...]
    before: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    users: tuple[tuple[int, ...], ...] = ()
    longest: int | None = None

    def options(self, device: Any) -> dict[str, Any]:
        """What says to the op where segments are."""
        def numbers(x: Any) -> torch.Tensor:
            return torch.tensor(x, dtype=torch.int32, device=device)

        shared = SharedPrompts(*map(numbers, (self.before, self.group, self.users))) if self.users else None
        return {"cu_seqlens": numbers((0, *self.lengths)).cumsum(0).to(torch.int32), "shared": shared,
                "max_seqlen": self.longest or max(self.lengths)}


PLAIN = Layout((0, 6, 21, 1, 0, 17, 0))
# Users of both prompts in any order, one of a part of its prompt, one alone; segments 2 and 5 are rows of their own.
SHARED = Layout((9, 20, 7, 13, 4, 18, 1, 5), (0, 0, 0, 9, 20, 0, 11, 20), (7, 9, 0, 0, 1, 99, 1, 1),
                ((3, -1, -1), (7, 4, 6)))
ONE_USER = Layout((6, 5, 3), (0, 6, 0), (0, 0, 0), ((1,),))


def tensors(layout: Layout, heads: tuple[int, int], head_dim: int, dtype: Any, device: Any) -> list[torch.Tensor]:
    """q, k, v as views of projections' outputs, and the gradient of the result."""
    tokens = sum(layout.lengths)
    made = [torch.randn(1, tokens, n, head_dim).to(device, dtype) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [*(x.transpose(1, 2).requires_grad_() for x in made[:3]), made[3]]


def run(fn: Any, q: Any, k: Any, v: Any, dout: Any, layout: Layout, **options: Any) -> list[torch.Tensor]:
    """out, dq, dk, dv; what is not written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        cu_seqlens, *_ = (where := layout.options(q.device)).values()
        del where["cu_seqlens"]
        out = fn(q, k, v, cu_seqlens, scale=0.3, **where, **options)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    finally:
        torch.use_deterministic_algorithms(before)


def compare(fn: Any, inputs: list[torch.Tensor], layout: Layout, *, eps: float = 1e-6, **options: Any) -> None:
    """Against the reference in fp64: closer than twice what it is in the inputs' own type."""
    wide = [x.detach().double().requires_grad_() for x in inputs[:3]] + [inputs[3].double()]
    truth = run(segment_attention_reference, *wide, layout, **options)
    eager = run(segment_attention_reference, *inputs, layout, **options)
    ours = run(fn, *inputs, layout, **options)
    assert ours[0].is_contiguous()
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        if options.get("window") == 1 and name in ("dq", "dk"):  # one key's weight is 1, whatever its score
            assert not c.any() and a.abs().max() < 1e-5
        else:
            assert_close_to_truth(a, b, c, eps=eps, what=name)
