"""Process-wide settings that must be in place before torch or Triton is imported, and the rule for GPU tests."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

from tests import interpreter

# Without a GPU driver the kernels are interpreted; with one they are compiled, and the same tests run on the GPU.
HAS_GPU_DRIVER = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
if not HAS_GPU_DRIVER:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors of these tests are tiny: a thread pool per process costs more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# A shell's background job ignores SIGINT, and so do the processes it starts: then no test can send Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup` a test without a group is in its file's: module fixtures are made once."""
    if config.getoption("loadgroup", default=False):
        for item in items:
            if item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(item.location[0]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `gpu` tests where there is no GPU that torch can use."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET", "0") == "1":
        pytest.skip("needs an NVIDIA GPU, and TRITON_INTERPRET unset")


def _roomy(call: Callable[..., Any], /, **arguments: Any) -> Any:
    return call(**arguments)


# Python keeps frames in chunks of 16 KiB, and maps and unmaps one at each call that crosses a chunk's end: where that
# falls into a kernel's loop, the interpreter's calls made a fault of memory each, an eighth of all CPU time. This
# frame asks for a chunk of 2 MiB, of which the test's own frames have the half that it does not use.
_roomy.__code__ = _roomy.__code__.replace(co_stacksize=1 << 17)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Give the frames of a test room of their own."""
    test = pyfuncitem.obj
    pyfuncitem.obj = functools.partial(_roomy, test)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a `gpu` test left, and its process's cache, goes back: a dozen processes share the card."""
    if item.get_closest_marker("gpu") is None or "torch" not in sys.modules:
        return
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", autouse=True)
def _nothing_older_is_looked_through() -> None:
    """Every training starts with a full collection: of a million objects of modules and tests, in half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if "triton.runtime.interpreter" in sys.modules:
        interpreter.quicken()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels can read tensors here: the GPU, or the CPU under Triton's interpreter."""
    import torch

    from aligntune.backends.fast.ops import _runtime

    return "cpu" if _runtime.interpreting() or not torch.cuda.is_available() else "cuda"
