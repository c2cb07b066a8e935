"""What the seam promises a step will launch, written down while `attest` watches; held against the trace afterwards.

The instance forwards write here when they hand work to an op. Whether the op's kernels ran is not taken from here: the
trace says that. Outside `attest` there is no ledger and nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

# A module whose work another module's op does in this call.
WITH_ITS_NEIGHBOUR = "with its neighbour"

# Autograd nodes of ours: a trace names them as it names kernels (but not those of a replayed graph).
NODES = ("LoraLinearGroup", "LoraLinearGroupBackward", "LoraMLP", "LoraMLPBackward")

# Kernels of fused attentions, by what their names hold: cuDNN's, FlashAttention's, the memory-efficient ones, ours.
ATTENTION = {
    "fused attention": ("flash_fprop", "flash_fwd", "fmha_cutlassF", "segment_attention_forward"),
    "fused attention, backward": ("flash_bprop", "flash_bwd_dq_dk_dv", "fmha_cutlassB", "segment_attention_dq"),
}


def attention_kernel(name: str) -> str | None:
    """Which of `ATTENTION` a GPU kernel of this name is, or None."""
    return next((kind for kind, parts in ATTENTION.items() if any(part in name for part in parts)), None)


# op -> kernels that one call launches at least once: in its forward, and in the backward of that call.
PROMISES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    WITH_ITS_NEIGHBOUR: ((), ()),
    "rms_norm": (("rms_norm_forward",), ("rms_norm_backward",)),
    "rms_norm, trained": (("rms_norm_forward",), ("rms_norm_backward", "norm_weight_grad")),
    "norm, made again": ((), ("rms_norm_again",)),
    "qk_norm_rope": (("qk_norm_rope_forward",), ("qk_norm_rope_backward",)),
    "qk_norm_rope, trained": (("qk_norm_rope_forward",), ("qk_norm_rope_backward", "norm_weight_grad")),
    "rope": (("rope_forward",), ("rope_backward",)),
    "glu": (("glu_forward",), ("glu_backward",)),
    # Groups without dropout and NF4 are cuBLAS's: what shows them is their autograd node.
    "lora_linear_group": (("LoraLinearGroup",), ("LoraLinearGroupBackward",)),
    "lora_mlp": (("LoraMLP", "glu_forward"), ("LoraMLPBackward", "glu_backward")),
    "lora dropout": (("lora_dropout_down_kernel",), ("lora_dropout_grad_a_kernel",)),
    "lora dropout, input gradient": ((), ("lora_dropout_grad_x_kernel",)),
    "nf4": (("nf4_dequant_kernel",), ("nf4_dequant_kernel",)),
    # A group's input is quantised once, and the gradient of each of its outputs, or all of them together.
    "fp8 base": (("quantize_rows_kernel",), ()),
    "fp8 base, input gradient": ((), ("quantize_rows_kernel",)),
    "fp8 base, one input gradient": ((), ("quantize_rows_together_kernel",)),
    # Torch's kernels or ours: rows end to end in 16 bits on a GPU never attend by a matrix of scores.
    "attention": (("fused attention",), ("fused attention, backward",)),
    # A frozen head makes its gradients in the forward, and so does a loss.
    "log-probs head": (("logits_loss",), ()),
    "log-probs, trained head": (("logits_loss",), ("logits_grad",)),
    "loss head": (("logits_loss",), ()),
    "token loss head": (("logits_loss", "logits_grad"), ()),
    # A rollout's; a prefill attends by torch's kernels.
    "prefill": (("write_kv_kernel",), ()),
    "decode attention": (("write_kv_kernel", "decode_attention_kernel"), ()),
    "sample": (("sample_blocks", "sample_finish"), ()),
}


@dataclass
class Entry:
    """Calls of one op by one module; `recomputed` are those made while a backward was running (checkpointing)."""

    calls: int = 0
    with_grad: int = 0
    recomputed_with_grad: int = 0

    @property
    def backwards(self) -> int:
        """Backward passes these calls lead to: a checkpointed call and its recomputation share one."""
        return max(self.with_grad, self.recomputed_with_grad)


@dataclass(eq=False)  # one is told from another by identity: two that are still empty must not be mixed up
class Ledger:
    """Entries by (module, op), and the ledgers of graphs that were replayed."""

    entries: dict[tuple[int, str], Entry] = field(default_factory=dict)
    replays: list[Ledger] = field(default_factory=list)

    def write(self, module: nn.Module, op: str, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """`module` is about to call `op` on `tensors` (whose gradients decide whether a backward follows)."""
        entry = self.entries.setdefault((id(module), op), Entry())
        entry.calls += 1
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            # Inside a running backward this is a recomputation: non-reentrant checkpointing calls twice with grad.
            if torch._C._current_graph_task_id() == -1:
                entry.with_grad += 1
            else:
                entry.recomputed_with_grad += 1

    def modules(self) -> set[int]:
        """`id` of every module that called an op."""
        return {module for module, _ in self.entries}.union(*(replay.modules() for replay in self.replays))

    def launches(self, *, backward: bool) -> Counter[str]:
        """The least number of launches of each kernel that these calls lead to."""
        least: Counter[str] = Counter()
        for (_, op), entry in self.entries.items():
            in_forward, in_backward = PROMISES[op]
            for kernel in in_forward:
                least[kernel] += entry.calls
            for kernel in in_backward if backward else ():
                least[kernel] += entry.backwards
        for replay in self.replays:
            for kernel, count in replay.launches(backward=backward).items():
                if kernel not in NODES:  # a replay runs kernels; autograd's nodes ran at the capture
                    least[kernel] += count
        return +least


_open: list[Ledger] = []


@contextmanager
def writing() -> Iterator[Ledger]:
    """A ledger that every attached module of this process writes into, in any thread (backward has its own).

    Around the capture of a graph it collects what a replay of that graph will launch; hand it to `replayed` then.
    """
    with writing_to(Ledger()) as ledger:
        yield ledger


@contextmanager
def writing_to(ledger: Ledger) -> Iterator[Ledger]:
    """`writing`, on in a ledger that there is already: layers recomputed in a captured backward."""
    _open.append(ledger)
    try:
        yield ledger
    finally:
        _open.remove(ledger)


def attesting() -> bool:
    """True while some ledger is open."""
    return bool(_open)


def promise(module: nn.Module, op: str, *tensors: torch.Tensor | None) -> None:
    """Written by an instance forward next to the call of an op; does nothing unless a step is being attested."""
    if _open:
        _open[-1].write(module, op, tensors)


def replayed(captured: Ledger) -> None:
    """Written by whoever replays a graph whose capture filled `captured`, forward and backward alike."""
    if _open:
        _open[-1].replays.append(captured)
