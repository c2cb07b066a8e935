"""NF4 dequantisation: both levels of bitsandbytes' double quantisation in one launch.

Dettmers et al., QLoRA (arXiv 2305.14314), eq. 6. With i the index in the flattened weight, b = i // blocksize:

    absmax[b] = nested_code[absmax_u8[b]] * nested_absmax[b // nested_blocksize] + offset     (double quantisation)
    w[i]      = code[nibble[i]] * absmax[b]           nibble[2j] = byte[j] >> 4,  nibble[2j + 1] = byte[j] & 15

Without double quantisation `absmax` is stored in fp32. All arithmetic is fp32 and rounded to the output's dtype once,
as bitsandbytes does, so the result is bit-equal to `bitsandbytes.functional.dequantize_4bit`.

Bytes: 1/2 (nibble) + 1/64 (absmax) + 4/16384 (nested) + 2 (bf16 out) = 2.52 a weight at block sizes 64 and 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from aligntune.backends.fast.ops._runtime import cdiv, kernel, on_device, require_device
from aligntune.errors import ConfigError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NF4Weight:
    """A weight of `shape` stored as NF4; the tensors are bitsandbytes' own, nothing is copied.

    `packed` holds (numel + 1) // 2 bytes, in any storage dtype. `absmax` is uint8 with the three `nested_*` tensors
    beside it, or fp32 and then they are None. `dtype` is what it was quantised from, the default of dequantisation.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: torch.Size
    blocksize: int
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_blocksize: int = 256
    offset: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def from_param(cls, param: Any) -> NF4Weight:
        """The NF4 weight inside a quantised `bitsandbytes.nn.Params4bit`.

        Raises ConfigError for a parameter that is not quantised yet, for FP4, and for bitsandbytes' CPU packing.
        """
        state = getattr(param, "quant_state", None)
        if state is None:
            raise ConfigError("a 4-bit weight without a quantisation state: move the module to its device first")
        if state.quant_type != "nf4":
            raise ConfigError(
                f"4-bit weights of type {state.quant_type!r} have no kernel; quantise with bnb_4bit_quant_type='nf4'"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError("this NF4 weight is in bitsandbytes' CPU inference packing; reload the model to train it")
        nested = state.state2
        return cls(
            packed=param.data,
            absmax=state.absmax,
            code=state.code,
            shape=torch.Size(state.shape),
            blocksize=state.blocksize,
            dtype=state.dtype,
            nested_absmax=nested.absmax if nested is not None else None,
            nested_code=nested.code if nested is not None else None,
            nested_blocksize=nested.blocksize if nested is not None else 256,
            offset=state.offset if nested is not None else None,
        )

    def check(self) -> None:
        """Raise ConfigError where the parts do not fit together; a kernel would read past their ends."""
        numel, blocks = self.numel, cdiv(self.numel, self.blocksize)
        faults = []
        if self.blocksize not in BLOCK_SIZES:
            faults.append(f"block size {self.blocksize} is not one of {BLOCK_SIZES}")
        if self.packed.numel() * self.packed.element_size() != cdiv(numel, 2):
            faults.append(f"{self.packed.numel() * self.packed.element_size()} packed bytes for {numel} weights")
        if self.absmax.numel() != blocks:
            faults.append(f"{self.absmax.numel()} block scales for {blocks} blocks")
        if self.code.numel() != 16 or self.code.dtype != torch.float32:
            faults.append(f"the code book is not 16 fp32 numbers but {self.code.numel()} of {self.code.dtype}")
        if (self.absmax.dtype == torch.uint8) != (self.nested_absmax is not None):
            faults.append(f"block scales are {self.absmax.dtype}: uint8 needs the nested scales, fp32 has none")
        elif self.nested_absmax is not None:
            if self.nested_absmax.numel() != cdiv(blocks, self.nested_blocksize):
                faults.append(f"{self.nested_absmax.numel()} nested scales for {blocks} block scales")
            if self.nested_code is None or self.nested_code.numel() != 256 or self.offset is None:
                faults.append("nested scales without their 256-entry code book and offset")
        elif self.absmax.dtype != torch.float32:
            faults.append(f"block scales are {self.absmax.dtype}, not fp32")
        if faults:
            raise ConfigError.from_faults(faults, where="an NF4 weight")


@dataclass(frozen=True)
class Launch:
    """`units` packed words (8 weights each; 2 where bytes are read one by one) a program.

    One word a thread: 24 registers, so 64 warps an SM, and each thread's 8 weights are one 16-byte store. With two the
    compiler passes the words through shared memory.
    """

    units: int = 256
    num_warps: int = 8


LAUNCH = Launch()


@kernel
def nf4_dequant_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr, numel,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, PER_UNIT: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    # int64: a 128-expert weight passes 2^31 elements.
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    in_range = unit * PER_UNIT < numel
    word = tl.load(packed_ptr + unit, mask=in_range, other=0).to(tl.int32)
    # A unit never straddles two blocks: it holds 2 or 8 weights and blocks are powers of two >= 32.
    block = unit * PER_UNIT // BLOCKSIZE
    absmax = tl.load(absmax_ptr + block, mask=in_range, other=0)
    if NESTED:
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=in_range, other=0.0)
        # Launched without fp fusion: an fma here rounds once where bitsandbytes rounds twice.
        scale = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + tl.load(offset_ptr)
    else:
        scale = absmax
    # Little-endian words: weight 2j is the high nibble of byte j, so nibbles come in the order 1 0 3 2 5 4 7 6.
    lane = tl.arange(0, PER_UNIT)
    nibble = (word[:, None] >> ((lane ^ 1) * 4)[None, :]) & 15
    value = tl.load(code_ptr + nibble) * scale[:, None]
    index = unit[:, None] * PER_UNIT + lane[None, :]
    tl.store(out_ptr + index, value.to(out_ptr.dtype.element_ty), mask=index < numel)


def dequantize_nf4(
    weight: NF4Weight, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight in `dtype` (fp32, bf16 or fp16; default `weight.dtype`), of `weight.shape`, in one launch.

    `out`: a contiguous buffer of that many elements to write into (its dtype decides); it is returned in the weight's
    shape. Raises ConfigError for parts that do not fit together, BackendUnavailableError off the GPU.
    """
    weight.check()
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.packed.device)
    elif out.numel() != weight.numel or not out.is_contiguous() or (dtype is not None and out.dtype != dtype):
        raise ConfigError(
            f"out is {tuple(out.shape)} {out.dtype}, {'' if out.is_contiguous() else 'not '}contiguous; "
            f"wanted {weight.numel} contiguous elements of {dtype or out.dtype}"
        )
    if out.dtype not in OUT_DTYPES:
        raise ConfigError(f"NF4 is dequantised to fp32, bf16 or fp16, not to {out.dtype}")
    if weight.numel:
        _launch(weight, out)
    return out.view(weight.shape)


def _launch(weight: NF4Weight, out: torch.Tensor) -> None:
    nested = weight.nested_absmax is not None
    parts = [weight.packed, weight.absmax, weight.code, weight.nested_absmax, weight.nested_code, weight.offset]
    require_device(out, *parts)
    packed = weight.packed.detach().contiguous().view(-1).view(torch.uint8)
    # Four bytes at a time where the length and the address allow it: a shard of a weight may start anywhere.
    wide = packed.numel() % 4 == 0 and packed.data_ptr() % 4 == 0
    units = packed.view(torch.int32) if wide else packed
    with on_device(out):
        nf4_dequant_kernel[(cdiv(units.numel(), LAUNCH.units),)](
            units,
            *(part if part is not None else weight.code for part in parts[1:]),
            out,
            weight.numel,
            BLOCKSIZE=weight.blocksize,
            NESTED_BLOCKSIZE=weight.nested_blocksize,
            NESTED=nested,
            PER_UNIT=8 if wide else 2,
            UNITS=LAUNCH.units,
            num_warps=LAUNCH.num_warps,
            enable_fp_fusion=False,
        )


def dequantize_nf4_reference(
    weight: NF4Weight, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`dequantize_nf4` in plain torch."""
    weight.check()
    packed = weight.packed.detach().contiguous().view(-1).view(torch.uint8)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: weight.numel].int()
    scale = weight.absmax
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None and weight.offset is not None
        nested = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: scale.numel()]
        scale = weight.nested_code[scale.int()] * nested + weight.offset
    value = weight.code[nibbles] * scale.repeat_interleave(weight.blocksize)[: weight.numel]
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=packed.device)
    out.view(-1).copy_(value)
    return out.view(weight.shape)
