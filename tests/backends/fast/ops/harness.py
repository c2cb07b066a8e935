"""How ops are judged: closeness to a higher-precision truth, rows far apart, what sm_90's compiler made of a kernel.

    CASE = sm90_case(some_kernel, {"x_ptr": "*bf16", "row": 2048, "eps": "fp32"}, {"BLOCK": 2048}, num_warps=4)

    def test_compiles():
        assert_fits(CASE, load_bits=128)

Cases registered while test modules are imported are compiled together, in one subprocess, when the first result is
asked for: importing torch and Triton there costs far more than a compile. Processes of one test run share the results.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import importlib
import itertools
import json
import mmap
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aligntune.backends.fast.ops import _runtime

REPO = Path(__file__).resolve().parents[4]
SM90_SHARED_LIMIT = 227 * 1024
EPS = 1e-6


# ---------------------------------------------------------------------------------------------- closeness to the truth


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """||x - truth|| / ||truth||, Frobenius, in float64."""
    truth = truth.detach().double().cpu()
    return float((x.detach().double().cpu() - truth).norm() / truth.norm())


def assert_close_to_truth(
    ours: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    *,
    eps: float = EPS,
    what: str = "result",
    zero_truth: bool = False,
) -> float:
    """Assert err(ours) < 2 err(eager) + eps against `truth` (a higher precision); returns err(ours).

    Shapes must agree, NaN and inf never pass, and a truth of norm 0 fails unless `zero_truth` (then `ours` must be 0).
    """
    assert ours.shape == truth.shape == eager.shape, f"{what}: shapes {ours.shape}, {eager.shape}, {truth.shape}"
    assert ours.dtype == eager.dtype, f"{what}: {ours.dtype}, where eager gives {eager.dtype}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    assert torch.isfinite(truth).all(), f"{what}: the truth is not finite"
    if zero_truth:
        assert not truth.any(), f"{what}: the truth was said to be 0 and is not"
        assert not ours.any(), f"{what}: should be exactly 0"
        return 0.0
    assert float(truth.detach().norm()) > 0, f"{what}: the truth is 0 everywhere, so the comparison shows nothing"
    error, error_of_eager = relative_error(ours, truth), relative_error(eager, truth)
    bound = 2 * error_of_eager + eps
    assert error < bound, f"{what}: error {error:.3e}, eager's is {error_of_eager:.3e}, the bound {bound:.3e}"
    return error


def far_rows(rows: int, cols: int, dtype: torch.dtype, device: str, *, stride: int = 2**29) -> torch.Tensor:
    """A `(rows, cols)` tensor whose rows lie `stride` elements apart, past 2^31, in memory that is never committed.

    The first row sits in the middle, so that a wrapped int32 offset reads wrong numbers, not an unmapped page.
    """
    span = (rows - 1) * stride + cols
    assert span > 2**31, "no offset here overflows int32"
    middle = 2**31 + cols
    if device != "cpu":
        return torch.empty(middle + span, dtype=dtype, device=device).as_strided((rows, cols), (stride, 1), middle)
    # Python 3.11 does not export Linux's MAP_NORESERVE, without which the kernel may refuse more than its RAM.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    memory = mmap.mmap(-1, (middle + span) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, cols), (stride, 1), middle)


def launches(fn: Callable[[], Any]) -> dict[str, int]:
    """Run `fn` under the profiler and count the launches of our kernels, by name."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not _runtime.interpreting():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        fn()
    return {event.key: event.count for event in trace.key_averages() if event.key in _runtime.KERNELS}


# --------------------------------------------------------------------------------------------- the sm_90 compile check


@dataclass(frozen=True)
class Case:
    """One compile: `kernel` as "module:name", the runtime arguments, the constexprs, the launch."""

    kernel: str
    signature: tuple[tuple[str, str | int], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class Resources:
    """What the compiler made: registers a thread, spill instructions (LDL/STL in SASS), stack and shared-memory bytes.

    `loads` counts global loads by width in bits, `stores` global stores; `mma` counts tensor-core instructions;
    `arrivals` how often a warp group begins with some: as often as there are any where these were serialised;
    `half_fmas` the products of half-precision numbers that were fused with a sum, and so not rounded.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    mma: int
    arrivals: int
    half_fmas: int


_pending: list[Case] = []
_results: dict[Case, Resources] = {}


def sm90_case(
    kernel: Any,
    signature: dict[str, str | int],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    enable_fp_fusion: bool = True,
) -> Case:
    """Register a compile of `kernel` (a kernel object or "module:name") and return its key for `resources`.

    `signature` names every argument that is not a constexpr. Its values are Triton types ("*bf16", "i32", "fp32"), or
    a sample integer, which is specialised as the launcher does: 1 becomes a constant, multiples of 16 are marked
    divisible, 2^31 and more are i64. Pointers are taken as 16-byte aligned.
    """
    name = kernel if isinstance(kernel, str) else f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    case = Case(name, tuple(signature.items()), tuple(constexprs.items()), num_warps, num_stages, maxnreg,
                enable_fp_fusion)
    if case not in _results and case not in _pending:
        _pending.append(case)
    return case


def resources(case: Case) -> Resources:
    """The compiler's figures for `case`; compiles every registered case that is still waiting, in one subprocess."""
    if case not in _results:
        waiting = list(_pending) if case in _pending else [case]
        _pending.clear()
        request = json.dumps([asdict(one) for one in waiting])
        for one, result in zip(waiting, json.loads(_compiled(request)), strict=True):
            widths = {key: {int(w): n for w, n in result.pop(key).items()} for key in ("loads", "stores")}
            _results[one] = Resources(**result, **widths)
    return _results[case]


def _compiled(request: str) -> str:
    """What the subprocess answers; the same request of another process of this test run is waited for and shared."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return _compile_apart(request)
    name = hashlib.sha256(f"{run} {request}".encode()).hexdigest()[:32]
    with (Path(tempfile.gettempdir()) / f"aligntune-sm90-{name}").open("a+") as shared:
        fcntl.flock(shared, fcntl.LOCK_EX)
        shared.seek(0)
        answer = shared.read()
        if answer:
            os.unlink(shared.name)  # two processes ask, or the rest of more compiles again
        else:
            answer = _compile_apart(request)
            shared.write(answer)
    return answer


def _compile_apart(request: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", __name__ if __name__ != "__main__" else "tests.backends.fast.ops.harness"],
        input=request, cwd=REPO, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"the compile process failed:\n{done.stderr[-4000:]}"
    return done.stdout.splitlines()[-1]


def compile_sm90(
    kernel: Any,
    signature: dict[str, str | int],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> Resources:
    """`sm90_case` and `resources` in one; prefer a case at module level, so that many share one subprocess."""
    return resources(sm90_case(kernel, signature, constexprs, num_warps, num_stages, maxnreg))


def assert_fits(case: Case, *, load_bits: int | None = None, spills: int = 0) -> Resources:
    """Assert no (or `spills`) spill instructions, shared memory within an H100's, and loads of `load_bits` present."""
    found = resources(case)
    assert found.spills <= spills, f"{case.kernel}: {found}"
    assert found.shared <= SM90_SHARED_LIMIT, f"{case.kernel}: {found}"
    if load_bits is not None:
        assert found.loads.get(load_bits, 0) > 0, f"{case.kernel}: no {load_bits}-bit global load: {found}"
    return found


def _compile(case: dict[str, Any]) -> tuple[bytes, dict[str, int]]:
    """One case's sm_90 binary, and what the binary does not say; where kernels are not interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    given, constants = dict(case["signature"]), dict(case["constexprs"])
    missing = set(kernel.arg_names) - set(given) - set(constants)
    strange = (set(given) | set(constants)) - set(kernel.arg_names)
    assert not missing and not strange, f"{name}: arguments missing {sorted(missing)}, unknown {sorted(strange)}"
    signature, attrs = {}, {}
    for index, arg in enumerate(kernel.arg_names):
        value = "constexpr" if arg in constants else given[arg]
        if value == 1:
            value, constants[arg] = "constexpr", 1
        if isinstance(value, int):
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
            value = "i32" if -(2**31) <= value < 2**31 else "i64"
        elif value.startswith("*"):
            attrs[(index,)] = [["tt.divisibility", 16]]
        signature[arg] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {key: case[key] for key in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    fused = len(re.findall(r"\bfma\.rn\.(?:bf16|f16)", compiled.asm["ptx"]))
    return compiled.asm["cubin"], {"shared": compiled.metadata.shared, "half_fmas": fused}


def _code(binary: bytes) -> bytes:
    """The executable sections of an ELF, one after the other."""
    start, = struct.unpack_from("<Q", binary, 0x28)
    size, count = struct.unpack_from("<HH", binary, 0x3A)
    sections = [struct.unpack_from("<8xQ8xQQ", binary, start + size * number) for number in range(count)]
    return b"".join(binary[offset : offset + length] for flags, offset, length in sections if flags & 4)


def _read_binaries(binaries: list[bytes], workdir: str) -> list[dict[str, Any]]:
    """Of each: registers, stack, shared memory and the widths of global accesses.

    All code is disassembled at once: nvdisasm takes half a second to start, and a hundredth for a kernel.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    file = Path(workdir) / "kernel"

    def ask(content: bytes, *command: str) -> str:
        file.write_bytes(content)
        done = subprocess.run([str(tools / command[0]), *command[1:], str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    codes = [_code(binary) for binary in binaries]
    ends = list(itertools.accumulate(map(len, codes)))
    found: list[list[tuple[str, str]]] = [[] for _ in binaries]
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", ask(b"".join(codes), "nvdisasm", "-b", "SM90"))
    assert len(lines) == ends[-1] // 16, "an instruction of 16 bytes was not read"
    for address, instruction in lines:
        mine = found[bisect.bisect_right(ends, int(address, 16))]
        mine += re.findall(r"\b(LDG|STG|LDL|STL|HGMMA|HMMA|IMMA|QGMMA|WARPGROUP)([.\w]*)", instruction)
    return [_summed(ask(binary, "cuobjdump", "-res-usage"), instructions)
            for binary, instructions in zip(binaries, found, strict=True)]


def _summed(usage_told: str, instructions: list[tuple[str, str]]) -> dict[str, Any]:
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage_told)}
    widths: dict[str, dict[int, int]] = {"LDG": {}, "STG": {}}
    for op, suffix in instructions:
        if op in widths:
            bits = next((int(part.lstrip("US")) for part in suffix.split(".")
                         if re.fullmatch(r"128|64|[US](8|16)", part)), 32)  # fmt: skip
            widths[op][bits] = widths[op].get(bits, 0) + 1
    return {
        "registers": usage["REG"],
        "spills": sum(op in ("LDL", "STL") for op, _ in instructions),
        "stack": usage["STACK"],
        "shared": usage["SHARED"],
        "loads": widths["LDG"],
        "stores": widths["STG"],
        "mma": sum(op.endswith("MMA") for op, _ in instructions),
        "arrivals": sum(op == "WARPGROUP" and suffix.startswith(".ARRIVE") for op, suffix in instructions),
    }


def _main() -> None:
    binaries, told = zip(*(_compile(case) for case in json.load(sys.stdin)), strict=True)
    with tempfile.TemporaryDirectory() as workdir:
        read = _read_binaries(list(binaries), workdir)
    print(json.dumps([one | more | {"shared": one["shared"] + more["shared"]}
                      for one, more in zip(read, told, strict=True)]))


if __name__ == "__main__":
    _main()
