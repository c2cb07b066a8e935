"""FastLanguageModel of a folder of adapters: it answers with them, and training goes on from them."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel
from transformers import TrainingArguments

from aligntune.backends.fast import FastLanguageModel, FastSFTTrainer, attachment_of
from aligntune.backends.fast.recompute import recompute_of
from aligntune.backends.fast.unsloth_arguments import ANY, ARGUMENTS
from aligntune.errors import ConfigError
from tests.core import tiny

NEAR = 1e-4 if torch.cuda.is_available() else 0  # a GPU adds in no fixed order
ROWS = Dataset.from_list([{"story": f"{i:02d}".ljust(8, "ab"[i % 2])} for i in range(8)])


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A model and its tokenizer on disk, as a script names them."""
    path = tmp_path / "model"
    tiny.llama(num_hidden_layers=1).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapters(saved: str, path: Path, *, seed: int = 0, **options: Any) -> Any:
    """A model whose adapters, which do something, are saved to `path` with the tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(saved, max_seq_length=16, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def two_steps(model: Any, out: Path) -> Any:
    args = TrainingArguments(str(out), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, logging_steps=1,
                             report_to="none", save_strategy="no", lr_scheduler_type="constant", seed=3)
    trainer = FastSFTTrainer(model=model, tokenizer=tiny.tokenizer(), train_dataset=ROWS, dataset_text_field="story",
                             args=args)
    trainer.train()
    return trainer


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [
    pytest.param({}, id="linears"),
    pytest.param({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, id="tied ends", marks=pytest.mark.slow),
    pytest.param({"lora_dropout": 0.5}, id="dropout", marks=pytest.mark.slow),
])
def test_training_goes_on_from_saved_adapters(options, tmp_path):
    """As it would have without the detour over the disk: the same losses, and the same weights after it."""
    tiny.llama(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    model = adapters(str(tmp_path / "model"), tmp_path / "lora_model", **options)
    again, tokenizer = FastLanguageModel.from_pretrained(
        str(tmp_path / "lora_model"), max_seq_length=16, dtype=torch.float32
    )
    assert isinstance(again, PeftModel) and attachment_of(again).attached and tokenizer.model_max_length == 16
    assert not any(module.training for module in again.modules())  # with dropout it would answer by chance
    ids = tokenizer(["00aa"], return_tensors="pt").to(again.device)
    answers = [m.generate(**ids, max_new_tokens=3, do_sample=False).tolist() for m in (model.eval(), again, again)]
    assert answers[0] == answers[1] == answers[2]
    start = trained(again)
    assert list(start) == list(trained(model)) and len(start) == (3 if "target_modules" in options else 14)
    assert all(torch.equal(value, start[name]) for name, value in trained(model).items())
    runs = [two_steps(m, tmp_path / "out") for m in (model, again)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=NEAR) and runs[1].args.max_length == 16
    end = trained(again)
    for name, value in trained(model).items():
        assert torch.allclose(value, end[name], rtol=0, atol=NEAR) and not torch.equal(end[name], start[name]), name
    if "target_modules" in options:
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    FastLanguageModel.for_inference(again)
    assert again.config.use_cache and again.generate(**ids, max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_training_goes_on_from_adapters_under_four_bits(tmp_path):
    where = {} if torch.cuda.is_available() else {"device_map": {"": "cpu"}}
    tiny.llama(num_hidden_layers=1, hidden_size=64, head_dim=16).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    adapters(str(tmp_path / "model"), tmp_path / "lora_model")
    model, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "lora_model"), max_seq_length=16, load_in_4bit=True, dtype=torch.float32, **where
    )
    assert model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.quant_state.quant_type == "nf4"
    assert "model.layers.*.self_attn.q_proj: lora on nf4 (x1)" in str(attachment_of(model))
    start = trained(model)
    trainer = two_steps(model, tmp_path / "out")
    end = trained(model)
    assert len(start) == 14 and all(not torch.equal(end[name], value) for name, value in start.items())
    assert len(losses(trainer)) == 2 and min(losses(trainer)) > 4


@pytest.mark.slow
def test_adapters_beside_a_whole_model_train_on_it(saved, tmp_path):
    model = adapters(saved, tmp_path / "both", target_modules=["q_proj"])
    shutil.copytree(saved, tmp_path / "both", dirs_exist_ok=True)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "both"), max_seq_length=16, dtype=torch.float32)
    assert [name.split(".")[-3] for name in trained(again)] == ["lora_A", "lora_B"]
    runs = [two_steps(m, tmp_path / "out") for m in (model, again)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=NEAR)


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_model_that_lacks_weights_is_told(four_bits, tmp_path):
    tiny.llama(num_hidden_layers=1).model.save_pretrained(tmp_path)  # without its head
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no lm_head\.weight, which would be random: it was not saved whole"):
        FastLanguageModel.from_pretrained(str(tmp_path), dtype=torch.float32, load_in_4bit=four_bits)


@pytest.mark.skipif(Version(metadata.version("transformers")) < Version("5.23"),
                    reason="offline, it does not read in the cache that the hub has no such file")
def test_adapters_of_the_hub(saved, tmp_path, monkeypatch):
    """From the hub's cache: the adapters' revision is theirs, and their base is at its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache" / "models--me--lora_model"
    model = adapters(saved, cache / "snapshots" / ("0" * 40))
    for folder in ("refs", ".no_exist/" + "0" * 40):
        (cache / folder).mkdir(parents=True)
    (cache / ".no_exist" / ("0" * 40) / "config.json").touch()  # as it is where the hub has been asked for one
    (cache / "refs" / "second").write_text("0" * 40)
    again, _ = FastLanguageModel.from_pretrained(
        "me/lora_model", revision="second", cache_dir=str(tmp_path / "cache"), dtype=torch.float32
    )
    assert len(trained(again)) == 14
    assert all(torch.equal(value, trained(model)[name]) for name, value in trained(again).items())


def test_adapters_of_another_shape_and_of_no_base(saved, tmp_path):
    adapters(saved, tmp_path / "lora_model", target_modules=["q_proj", "v_proj"])
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora_model"), dtype=torch.float32)
    start = trained(model)
    same = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["v_proj", "q_proj"], use_gradient_checkpointing="unsloth"
    )
    assert same is model and recompute_of(model.get_base_model()).offload
    assert len(start) == 4 and all(torch.equal(value, start[name]) for name, value in trained(model).items())
    with pytest.raises(ConfigError) as caught:
        FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj"])
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "r=8, but the model has adapters of 4",
        "target_modules=['q_proj'], but the model has adapters of ['q_proj', 'v_proj']",
    ]
    with pytest.raises(ConfigError, match="holds adapters, whose base is frozen"):
        FastLanguageModel.from_pretrained(str(tmp_path / "lora_model"), full_finetuning=True)
    path = tmp_path / "lora_model" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="name no model under them"):
        FastLanguageModel.from_pretrained(str(tmp_path / "lora_model"))


# ------------------------------------------------------------------------------------------------ arguments of Unsloth


def test_arguments_of_unsloth_that_ask_for_nothing_are_taken(saved):
    model, _ = FastLanguageModel.from_pretrained(
        saved, dtype=torch.float32, load_in_8bit=False, fast_inference=False, max_lora_rank=8, rope_scaling=None,
        gpu_memory_utilization=0.6, random_state=3407, use_exact_model_name=True, attn_implementation="sdpa",
        initializer_range=0.5,
    )  # fmt: skip
    assert model.config.initializer_range == 0.5  # a field of the config is one of transformers' arguments
    model = FastLanguageModel.get_peft_model(model, r=2, max_seq_length=64, temporary_location="x", qat_scheme=None,
                                             loftq_config={}, layers_to_transform=None, task_type="CAUSAL_LM")
    assert model.peft_config["default"].r == 2


@pytest.mark.parametrize(("arguments", "faults"), [
    ({"fast_inference": True, "max_lora_rank": 8, "load_in_8bit": True},
     ["load_in_8bit=True: `load_in_4bit=True` is the one", "fast_inference=True: `create_rl_trainer` generates"]),
    ({"max_seq_len": 64, "device_mop": None, "qqqq": 1},
     ["unknown argument 'max_seq_len'; did you mean 'max_seq_length'?",
      "unknown argument 'device_mop'; did you mean 'device_map'?", "unknown argument 'qqqq'; valid: adapter_kwargs"]),
])
def test_arguments_that_nothing_takes_are_told_before_weights_are_loaded(saved, arguments, faults):
    (Path(saved) / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as caught:
        FastLanguageModel.from_pretrained(saved, dtype=torch.float32, **arguments)
    assert len(caught.value.faults) == len(faults)
    assert all(fault.startswith(start) for fault, start in zip(caught.value.faults, faults, strict=True))


def test_arguments_that_no_adapters_take():
    model = tiny.llama(num_hidden_layers=1)
    with pytest.raises(ConfigError, match="unknown argument 'lora_alph'; did you mean 'lora_alpha'"):
        FastLanguageModel.get_peft_model(model, lora_alph=8)
    with pytest.raises(ConfigError, match="qat_scheme='int4': quantisation-aware training is not here"):
        FastLanguageModel.get_peft_model(model, qat_scheme="int4")
    assert not hasattr(model, "peft_config")


def test_the_page_shows_the_arguments_of_unsloth():
    page = (Path(__file__).parents[3] / "docs/porting.md").read_text()
    for name, (idle, why) in ARGUMENTS.items():
        assert f"| `{name}` | {'any value' if idle is ANY else f'`{idle}`'} | {why} |" in page
