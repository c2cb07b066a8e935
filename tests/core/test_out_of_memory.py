"""When the GPU's memory runs out: an error of ours, with the settings now and what would lower it by how much."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligntune import create_sft_trainer
from aligntune.core import out_of_memory
from aligntune.errors import AlignTuneError, GpuMemoryError

GIB = 1 << 30


class Model(torch.nn.Module):
    """64 MiB of 16-bit weights, of which a part trains."""

    def __init__(self, *, adapters: bool, layers: int = 4) -> None:
        super().__init__()
        self.base = torch.nn.Parameter(torch.zeros(1 << 25, dtype=torch.bfloat16), requires_grad=not adapters)
        if adapters:
            self.a = torch.nn.Parameter(torch.zeros(1 << 10))
            self.peft_config: dict[str, Any] = {}
        sizes = SimpleNamespace(num_hidden_layers=layers, hidden_size=1024)
        self.config = SimpleNamespace(get_text_config=lambda: sizes)


def message(monkeypatch: pytest.MonkeyPatch, *, adapters: bool, recompute: bool, batch: int = 4, peak: float = 1.0,
            config: dict[str, Any] | None = None, optim: str = "adamw_torch") -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: int(peak * GIB))
    trainer = SimpleNamespace(
        model=Model(adapters=adapters), optimizer=None, state=SimpleNamespace(global_step=6),
        args=SimpleNamespace(gradient_checkpointing=recompute, per_device_train_batch_size=batch,
                             gradient_accumulation_steps=2, optim=optim))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total of 80 GiB")
    return out_of_memory.explain(trainer, config, error)


CONFIG = {"train": {"batch_size": 4, "gradient_checkpointing": True, "optimizer": "adamw"},
          "data": {"max_seq_length": 2048}, "model": {"quantization": None}}


def test_the_settings_and_where_memory_went(monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(monkeypatch, adapters=True, recompute=True, config=CONFIG)
    assert text.startswith("the GPU ran out of memory in step 7: CUDA out of memory.\n")
    assert "now: batch_size=4, max_seq_length=2048, optimizer=adamw, gradient_checkpointing=True" in text
    assert "peak 1.0 GiB: weights 0.1, optimizer state 0.0, gradients and activations 0.9" in text
    assert text.count("less") == 3


@pytest.mark.parametrize(("given", "said"), [
    # 0.9375 GiB of activations, of which one of four layers' stays
    ({"adapters": True, "recompute": False}, ["gradient_checkpointing=True: about 0.7 GiB less",
                                              "batch_size=2, gradient_accumulation_steps=4: about 0.5 GiB less"]),
    ({"adapters": True, "recompute": True, "config": CONFIG}, ["max_seq_length=1024: about 0.5 GiB less"]),
    # 2 bytes x 4 rows x 2,048 tokens x 1,024 x 3 layers
    ({"adapters": True, "recompute": True, "config": CONFIG, "batch": 4, "peak": 0.1},
     ["quantization='nf4': about 0.0 GiB less", "gradient_checkpointing='offload' (backend 'fast'): about 0.0 GiB"]),
    ({"adapters": False, "recompute": True, "peak": 3.0, "batch": 1},
     ["optimizer='adamw_8bit': about 0.2 GiB less", "use_peft=True: about 0.2 GiB less"]),
    ({"adapters": False, "recompute": True, "optim": "adamw_8bit", "batch": 1}, ["use_peft=True"]),
])
def test_what_would_lower_it(given: dict[str, Any], said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(monkeypatch, **given)
    assert all(line in text for line in said), text
    assert ("adamw_8bit" in text) is ("adamw_8bit" in " ".join(said))
    assert ("gradient_checkpointing=True:" in text) is not given["recompute"]
    assert ("batch_size=" in text.split("lower it:")[1]) is (given.get("batch", 4) > 1)


def test_a_run_that_ran_out_ends_in_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = create_sft_trainer(
        "builtin:tiny", [{"text": "one two three four"}] * 4, backend="trl", max_steps=2, batch_size=2,
        max_seq_length=16, output_dir=str(tmp_path / "run"), report_to="none", progress=False)

    def runs_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(trainer.trainer, "training_step", runs_out)
    with pytest.raises(GpuMemoryError, match="ran out of memory in step 1: CUDA out of memory") as caught:
        trainer.train()
    assert isinstance(caught.value, AlignTuneError) and isinstance(caught.value, MemoryError)
    assert "batch_size=2, max_seq_length=16" in str(caught.value) and caught.value.exit_code == 11
    assert '"status": "failed"' in (tmp_path / "run" / "summary.json").read_text()
