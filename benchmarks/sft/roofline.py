"""Where a step's milliseconds go, beside the least that each part can take: from a committed report alone.

Every run traces one step of its own (`trace["kernels"]`: seconds of the kernels by name). Bounds are those of the card
as the report's run measured it: a large bf16 product's flop/s, a large copy's bytes/s. A part can be below its bound in
bytes where the kernel before left its inputs in the L2 cache.

    products    2 T P flops forward and as many for the gradient of the inputs, over all linears of the layers and the
                head; again as many for the gradient of weights that are trained. Adapters add bytes: a group's inputs
                once in the forward, inputs and output gradients once in the backward.
    attention   2 S^2 heads head_dim flops a row forward (causal: half of the square), 2.5 times that backward; of rows
                end to end S^2 is the sum over the documents that the step had
    fp8         products with the linears' frozen weights at twice the rate; what they take is read in bf16 and written
                in e4m3 ("quantising"): a group's inputs forward, output gradients backward
    GLU         gate, up read and the product written; then three read and two written
    norms       two tensors read and two written, forward and backward, at each of the 2 L + 1 places
    rotation    q and k read and written, forward and backward; where they are normalised too, read once more
    loss        logits read once, their gradient written once
    NF4         0.5625 bytes a weight read and 2 written, forward and backward
    optimizer   parameter, gradient and moments read, parameter and moments written; gradients once more for their norm
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.sft.workloads import MODELS, MODES, WORKLOADS

PARTS: dict[str, str] = {
    "attention": r"segment_attention|sdpa|flash|fmha|cudnn::fusion",
    "GLU": r"^glu_",
    "norms": r"rms_norm|norm_weight_grad",
    "rotation": r"rope",
    "loss": r"logits_loss|scale_in_place",
    "NF4": r"nf4_dequant",
    "quantising": r"quantize_rows",
    "optimizer": r"kOptimizer|FusedOptimizer|multi_tensor_apply|lpnorm|tensors_(norm|clip|scale|adamw)_kernel",
    "products": r"nvjet|gemm|cublas|cutlass|splitK|lora_up",
}
"""The part of a step that a kernel's name says it is; the first that matches."""
REST = "copies and the rest"
IDLE = "no kernel runs"
ROWS = (("lora-1b", "fast"), ("lora-1b", "fast-fp8"),
        *((name, "fast") for name in ("lora-1b-ragged", "lora-1b-packed", "full-1b", "qlora-8b", "lora-4b",
                                      "lora-1b-16k")))  # fmt: skip
"""Results files, and the arm whose traced step is shown."""
FP8_RATE = 2.0
"""e4m3 products to bf16's, of one tensor core."""


@dataclass(frozen=True)
class Shape:
    """What a bound needs of a model: sizes in elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    normalised: bool

    @classmethod
    def of(cls, model: str) -> Shape:
        kind, c = MODELS[model]
        return cls(c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], c["num_attention_heads"],
                   c["num_key_value_heads"], c["head_dim"], c["vocab_size"], kind == "qwen3")

    @property
    def groups(self) -> list[tuple[int, list[int]]]:
        """Linears that share their input: its width, and theirs."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(self.hidden, [q, kv, kv]), (q, [self.hidden]), (self.hidden, [self.intermediate] * 2),
                (self.intermediate, [self.hidden])]

    @property
    def linear(self) -> int:
        """Weights of all linears in the layers."""
        return self.layers * sum(width * sum(outs) for width, outs in self.groups)


def bounds_ms(row: str, ceilings: Mapping[str, float], *, sizes: Mapping[str, float] | None = None, fp8: bool = False
              ) -> dict[str, float]:
    """The least milliseconds of each part of a step of `fast` that keeps its activations.

    Args:
        sizes: "tokens" of the step, and "squared", the sum of the squares of its documents' lengths; None is full rows.
        fp8: the linears' frozen weights are e4m3.
    """
    workload = WORKLOADS[row]
    shape, mode = Shape.of(workload.model), workload.mode
    length, rows = workload.max_seq_length, workload.batch_size
    full = {"tokens": rows * length, "squared": rows * length**2}
    tokens, squared = ((sizes or full)[name] for name in ("tokens", "squared"))
    passes, head = (3 if mode == "full" else 2), shape.hidden * shape.vocab
    flops = {
        "products": 2.0 * tokens * (shape.linear / (FP8_RATE if fp8 else 1) + head) * passes,
        "attention": 3.5 * 2.0 * squared * shape.heads * shape.head_dim * shape.layers,
    }
    per_token = shape.heads * shape.head_dim + shape.kv_heads * shape.head_dim
    moved = {
        "GLU": 2.0 * tokens * shape.layers * shape.intermediate * (3 + 5),
        "norms": 2.0 * tokens * shape.hidden * (4 + 4) * (2 * shape.layers + 1),
        "rotation": 2.0 * tokens * shape.layers * per_token * (2 + 2 + shape.normalised),
        "loss": 2.0 * tokens * shape.vocab * 2,
    }
    if mode != "full":
        moved["products"] = 2.0 * tokens * shape.layers * sum(2 * width + sum(outs) for width, outs in shape.groups)
    if mode == "qlora":
        moved["NF4"] = (0.5625 + 2) * shape.linear * 2
    if fp8:
        moved["quantising"] = (2.0 + 1) * tokens * shape.layers * sum(width + sum(outs) for width, outs in shape.groups)
    moved["optimizer"] = _trained(shape, row) * {"full": 14 + 2, "lora": 28 + 4, "qlora": 10 + 2}[mode]
    found = {part: 1e3 * work / ceilings["flops_per_s"] for part, work in flops.items()}
    for part, size in moved.items():
        found[part] = found.get(part, 0.0) + 1e3 * size / ceilings["bytes_per_s"]
    return found


def _trained(shape: Shape, row: str) -> float:
    """Parameters that the optimizer steps; of a whole model, whose head is its embedding here, norms left out."""
    mode = WORKLOADS[row].mode
    if mode == "full":
        return shape.linear + shape.hidden * shape.vocab
    rank = MODES[mode]["lora_r"]
    return rank * shape.layers * sum(width + out for width, outs in shape.groups for out in outs)


def measured_ms(trace: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the traced step's kernels by part, and of its time in which none ran."""
    found = dict.fromkeys([*PARTS, REST], 0.0)
    for name, seconds in trace["kernels"].items():
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), REST)
        found[part] += 1e3 * seconds
    # The trace names the kernels that take longest; what the others take is the rest.
    found[REST] += 1e3 * max(0.0, trace["busy"] - sum(trace["kernels"].values()))
    return {part: ms for part, ms in found.items() if ms} | {IDLE: 1e3 * trace["idle"]}


def shown(arm: str, report: dict[str, Any]) -> dict[str, Any] | None:
    """An arm's entry of a report, or None where the arm did not run or no step of it was traced."""
    return next((one for one in report["rows"] if one["arm"] == arm and one.get("trace")), None)


def parts(entry: dict[str, Any], ceilings: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """Of an arm's traced step: part, milliseconds, bound; the longest first, the whole traced step last.

    Of uneven rows there is no bound where the entry does not say how long those of the traced step were.
    """
    found, sizes = measured_ms(entry["trace"]), entry.get("traced")
    known = WORKLOADS[entry["row"]].lengths == "full" or sizes is not None
    bounds = bounds_ms(entry["row"], ceilings, sizes=sizes, fp8="fp8" in entry["arm"]) if known else {}
    rows = [(part, ms, bounds.get(part)) for part, ms in sorted(found.items(), key=lambda one: -one[1])]
    least = sum(bounds[part] for part in found if part in bounds) if known else None
    return [*rows, ("the traced step", sum(found.values()), least)]
