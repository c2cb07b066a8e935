"""Process-wide settings that must be in place before torch or Triton is imported, and the rule for GPU tests."""

from __future__ import annotations

import os
import signal
import sys

import pytest

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


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a `gpu` test left in its process's cache goes back: a dozen processes share the card."""
    if item.get_closest_marker("gpu") is None or "torch" not in sys.modules:
        return
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels can read tensors here: the GPU, or the CPU under Triton's interpreter."""
    import torch

    from aligntune.backends.fast.ops import _runtime

    return "cpu" if _runtime.interpreting() or not torch.cuda.is_available() else "cuda"
