"""QLoRA on CPU, and checkpoints that are stored in 4 bits already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from aligntune import ConfigError, create_rl_trainer, create_sft_trainer
from tests.core import tiny

ROWS = [{"prompt": f"say {i}", "completion": f" {i * i}"} for i in range(8)]
PAIRS = [{"prompt": f"say {i}", "chosen": f" {i}", "rejected": " no"} for i in range(8)]
SMALL: dict[str, Any] = {"backend": "trl", "max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, "report_to": "none",
                         "logging_steps": 1, "max_seq_length": 64}


def wide() -> Any:
    """Linears of at least one 64-weight block each, so that 4 bits apply to them."""
    return tiny.llama(hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    wide().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stored(plain: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("stored")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def kinds(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_qlora_on_cpu(algorithm: str, plain: str, tmp_path: Path) -> None:
    options = {**SMALL, "quantization": "nf4", "lora_r": 4, "use_peft": True, "output_dir": str(tmp_path)}
    if algorithm == "sft":
        trainer = create_sft_trainer(plain, ROWS, **options)
    else:
        trainer = create_rl_trainer(plain, PAIRS, algorithm="dpo", beta=0.3, **options)
    assert "Linear4bit" in kinds(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert before and all("lora_" in name for name in before)
    assert trainer.train().global_step == 2
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    assert moved


def test_four_bits_turn_lora_on_and_config_yaml_shows_it(plain: str, tmp_path: Path) -> None:
    trainer = create_sft_trainer(plain, ROWS, **SMALL, quantization="nf4", output_dir=str(tmp_path))
    assert trainer.config.lora.use_peft is True
    assert hasattr(trainer.model, "peft_config")


def test_a_stored_4_bit_checkpoint_loads_as_it_is_and_turns_lora_on(stored: str, tmp_path: Path) -> None:
    trainer = create_sft_trainer(stored, ROWS, **SMALL, output_dir=str(tmp_path))
    assert "Linear4bit" in kinds(trainer.model)
    assert trainer.config.lora.use_peft is True
    assert trainer.train().global_step == 2
    notices = (tmp_path / "summary.json").read_text()
    assert "LoRA is turned on" in notices


@pytest.mark.parametrize(("options", "message"), [
    ({"quantization": None}, "the checkpoint is quantised"),
    ({"use_peft": False}, "use_peft = False: the checkpoint is quantised"),
])
def test_what_contradicts_a_stored_4_bit_checkpoint(options: dict, message: str, stored: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        create_sft_trainer(stored, ROWS, **SMALL, **options, output_dir=str(tmp_path))
