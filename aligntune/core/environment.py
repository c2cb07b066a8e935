"""What a run stood on: versions, machine, card, commit, command line. Never a secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "aligntune", "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers",
    "bitsandbytes", "omegaconf", "numpy", "vllm", "liger-kernel", "unsloth",
)

FLAG_NAMES = frozenset({
    "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
})
FLAG_PREFIXES = ("ALIGNTUNE_", "CUDA_", "TRITON_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "NCCL_", "ACCELERATE_")

_SECRET_NAME = re.compile(r"token(?!iz|s)|secret|passw|credential|api_?key|auth", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf|gh[opsu]|github_pat|sk|glpat|xox[abp])[-_][A-Za-z0-9_-]{12,}|(?<=://)[^/\s@]+@")
_HIDDEN = "<hidden>"


def redact(text: str) -> str:
    """`text` without the strings that have the shape of an access token or of a login in a URL."""
    return _SECRET_VALUE.sub(_HIDDEN, text)


def command_line(argv: list[str] | None = None) -> list[str]:
    """The process's arguments, with the value of anything named like a secret hidden."""
    shown: list[str] = []
    hide_next = False
    for argument in sys.argv if argv is None else argv:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            shown.append(_HIDDEN)
        elif equals and _SECRET_NAME.search(name):
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(redact(argument))
        hide_next = not equals and argument.startswith("-") and bool(_SECRET_NAME.search(argument))
    return shown


def flags(environment: dict[str, str] | None = None) -> dict[str, str]:
    """The environment variables that change what a run does; listed by name, so that no other one is ever written."""
    source = os.environ if environment is None else environment
    return {
        name: redact(value) for name, value in sorted(source.items())
        if (name in FLAG_NAMES or name.startswith(FLAG_PREFIXES)) and not _SECRET_NAME.search(name)
    }


def versions() -> dict[str, str]:
    """Installed packages of `PACKAGES` and their versions."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "aligntune" not in found:
        from aligntune._version import __version__

        found["aligntune"] = __version__
    return found


def commit(folder: Path | None = None) -> dict[str, Any] | None:
    """The git commit that `folder` (default: the working directory) is at and whether tracked files differ from it."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder or Path.cwd()), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if not head:
        return None
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "uncommitted_changes": None if changes is None else bool(changes)}


def cards() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that torch sees: name, memory in bytes, compute capability."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({
            "name": properties.name, "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
        })
    return found


def snapshot() -> dict[str, Any]:
    """Everything of this module, as environment.json holds it."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": cards(),
        "packages": versions(),
        "git": commit(),
        "command_line": command_line(),
        "working_directory": str(Path.cwd()),
        "flags": flags(),
    }
