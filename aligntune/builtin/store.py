"""Put a trained `builtin:tiny` into the package as `builtin:tiny-instruct`.

    aligntune train tiny-instruct precision=fp32
    python -m aligntune.builtin.store runs/tiny-instruct/2-sft/checkpoint-N

The weights are stored in bfloat16; the config says float32, so every loader widens them again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from aligntune.builtin.models import PACKAGED
from aligntune.errors import CheckpointError

LIMIT_BYTES = 6_000_000


def main(checkpoint: str, folder: Path = PACKAGED / "tiny-instruct") -> None:
    """Write the checkpoint's weights, with the config and tokenizer of `tiny`, into `folder`.

    Raises:
        CheckpointError: the checkpoint is no model of this shape, or takes more than 6 MB.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, LlamaForCausalLM

    with torch.device("meta"):
        expected = LlamaForCausalLM(AutoConfig.from_pretrained(PACKAGED / "tiny"))
    trained = dict(LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).named_parameters())
    if {name: value.shape for name, value in trained.items()} != {
        name: value.shape for name, value in expected.named_parameters()
    }:
        raise CheckpointError(f"{checkpoint} does not have the shape of builtin:tiny")
    folder.mkdir(exist_ok=True)
    for file in (PACKAGED / "tiny").iterdir():
        shutil.copy(file, folder)
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in sorted(trained.items())}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > LIMIT_BYTES:
        raise CheckpointError(f"{folder} holds {size:,} bytes; the limit for package data is {LIMIT_BYTES:,}")
    print(f"{folder}: {size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m aligntune.builtin.store CHECKPOINT")
    main(sys.argv[1])
