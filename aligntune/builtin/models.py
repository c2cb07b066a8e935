"""Where the embedded models lie, and the random weights of `builtin:tiny`."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zlib
from pathlib import Path

PACKAGED = Path(__file__).parent
SEED = 20250
STD = 0.02


def folder(name: str) -> Path:
    """The folder of the model `name`, one of `aligntune.builtin.MODELS`; weights that are not stored are written."""
    packaged = PACKAGED / name
    return packaged if (packaged / "model.safetensors").is_file() else _in_cache(packaged)


def _cache() -> Path:
    explicit, xdg = os.environ.get("ALIGNTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(explicit) if explicit else (Path(xdg) if xdg else Path.home() / ".cache") / "aligntune"
    try:
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        if explicit:
            raise
    return Path(tempfile.gettempdir()) / f"aligntune-{os.getuid()}"  # a home that cannot be written to


def _in_cache(packaged: Path) -> Path:
    """A folder beside others in the cache, named after everything its content depends on."""
    digest = hashlib.sha256(f"{SEED}:{STD}".encode())
    for file in sorted(packaged.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    final = _cache() / "builtin" / f"{packaged.name}-{digest.hexdigest()[:12]}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: several processes may come here at once, and none may see half a folder.
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        shutil.copytree(packaged, draft, dirs_exist_ok=True)
        _write_weights(draft)
        draft.rename(final)
    except FileExistsError:
        pass  # another process was first
    except OSError:
        if not final.is_dir():  # a rename onto a folder that has files is ENOTEMPTY
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _write_weights(target: Path) -> None:
    """Random weights for the config in `target`: each matrix from a generator of its own, seeded by its name.

    So the model is the same whatever order transformers creates its parameters in, and the caller's random state is
    left alone.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(target))
    weights = {}
    for name, parameter in model.named_parameters():  # a tied lm_head is not among them
        if parameter.dim() == 1:  # the scale of a norm
            weights[name] = torch.ones(parameter.shape)
            continue
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
        weights[name] = torch.randn(parameter.shape, generator=generator) * STD
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
