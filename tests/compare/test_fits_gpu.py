"""The search for what fits, on a card that refuses: a share of its memory is all that this process may take."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aligntune.compare.arm import too_little_memory
from aligntune.compare.fits import largest
from aligntune.compare.protocol import in_this_process
from aligntune.compare.settings import Settings, read_arm

GIB = 2**30


@pytest.fixture
def scarce() -> Iterator[int]:
    """Bytes more that torch may take of the card until the test ends: a gibibyte."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    allowed = torch.cuda.memory_reserved() + GIB
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    yield GIB
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_the_largest_batch_is_where_the_card_refuses(backend: str, scarce: int, tmp_path: Path) -> None:
    config = {"algorithm": "sft", "model": {"model_name": "builtin:tiny"},
              "data": {"dataset_name": "builtin:arithmetic", "max_samples": 8, "max_seq_length": 512}}
    settings = Settings("x", config, {}, read_arm(f"{backend},gradient_checkpointing=false"), read_arm("trl"))
    found = largest(settings, settings.a, "a", "batch", tmp_path, start=8, seed=0, runner=in_this_process,
                    say=lambda _: None)
    value, tried = found["value"], found["tried"]
    assert found["ended"] is None and value is not None and value >= 8
    # What is next to the limit, and nothing else, was refused: it is known to within a sixteenth.
    refused = [size for size, fitted in tried.items() if not fitted]
    assert refused and min(refused) > value and min(refused) - value <= max(1, value // 16)
    assert all(fitted == (size <= value) for size, fitted in tried.items())
    # The card is as usable as before: the allocator gave back what the refused steps held.
    torch.zeros(scarce // 2, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.zeros(2 * scarce, dtype=torch.uint8, device="cuda")
    assert too_little_memory(error.value)
