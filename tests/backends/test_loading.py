"""Device and precision: chosen by the machine, and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aligntune.backends.loading import Precision, precision_of
from aligntune.core.resolve import resolve
from aligntune.errors import BackendUnavailableError, ConfigError


def chosen(**options: Any) -> Precision:
    return precision_of(resolve({"model_name": "m", "dataset_name": "d", "algorithm": "sft", **options}))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a GPU (or none) where torch looks for one."""
    def put(bf16: bool | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bf16 is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Stub 9000")
        # Emulated bf16 is slower than fp16, so it does not count.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
            bool(bf16) or including_emulation))

    return put


@pytest.mark.parametrize(("bf16", "options", "expected", "dtype"), [
    (None, {}, Precision("fp32", "cpu", "fp32 on CPU"), torch.float32),
    (True, {}, Precision("bf16", "cuda", "bf16 on Stub 9000"), torch.bfloat16),
    (False, {}, Precision("fp16", "cuda", "fp16: Stub 9000 has no bf16"), torch.float16),
    (True, {"device": "cpu"}, Precision("fp32", "cpu", "fp32 on CPU"), torch.float32),
    (True, {"precision": "fp32"}, Precision("fp32", "cuda", "fp32 as asked, on cuda"), torch.float32),
    (None, {"precision": "bf16"}, Precision("bf16", "cpu", "bf16 as asked, on cpu"), torch.bfloat16),
    (False, {"precision": "fp16"}, Precision("fp16", "cuda", "fp16 as asked, on cuda"), torch.float16),
], ids=["no GPU", "a GPU", "a GPU without bf16", "the CPU beside a GPU", "fp32 asked", "bf16 asked", "fp16 asked"])
def test_the_precision_is_the_devices_unless_asked_for(
    bf16: bool | None, options: dict[str, Any], expected: Precision, dtype: torch.dtype, card: Any
) -> None:
    card(bf16)
    found = chosen(**options)
    assert found == expected
    assert found.dtype == dtype


def test_what_the_device_cannot_do_is_an_error(card: Any) -> None:
    card(None)
    with pytest.raises(BackendUnavailableError, match="device='cuda': torch sees no CUDA GPU here"):
        chosen(device="cuda")
    with pytest.raises(ConfigError, match="precision = 'fp16': CPU trains in fp32 or bf16"):
        chosen(precision="fp16")
