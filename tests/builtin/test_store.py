"""A trained model put into the package: bfloat16 on disk, float32 in memory, of the right shape and size."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aligntune.builtin import load_model
from aligntune.builtin.store import LIMIT_BYTES, main
from aligntune.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path / "cache"))


def test_store_and_load_again(tmp_path, capsys):
    model = load_model("builtin:tiny")
    with torch.no_grad():
        model.model.norm.weight.add_(0.25)
    model.save_pretrained(tmp_path / "trained")
    folder = tmp_path / "stored"
    main(str(tmp_path / "trained"), folder)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert 4_000_000 < size <= LIMIT_BYTES == 6_000_000
    assert f"{size:,} bytes" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    for (name, before), (_, after) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(before.to(torch.bfloat16).float(), after), name
    assert loaded.model.norm.weight[0].item() == 1.25
    assert len(AutoTokenizer.from_pretrained(folder)) == loaded.config.vocab_size


def test_a_model_of_another_shape_is_refused(tmp_path):
    other = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="shape of builtin:tiny"):
        main(str(tmp_path / "other"), tmp_path / "stored")
    assert not (tmp_path / "stored").exists()
