"""Saved models: adapters, merged, 4-bit; atomic; never somebody's other files."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from aligntune.core import saving
from aligntune.core.model_hygiene import autocast_if_mixed, keep_4bit_layout
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from aligntune.errors import CheckpointError, ConfigError
from tests.core import tiny

IDS = torch.arange(3, 40)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(path, *, model=None, **lora):
    trainer = tiny.sft(path, model=model, peft_config=tiny.lora(**lora) if lora.pop("use", True) else None, max_steps=3,
                       save_strategy="no", report_to="none", learning_rate=0.05)
    run = AlignTrainer(trainer, config={}, run_dir=RunDir(path), tokenizer=trainer.processing_class, backend="trl",
                       algorithm="sft", progress=False)
    trainer.train()
    return run


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_adapters_are_saved_alone_and_load_on_their_base(tmp_path):
    run = trained(tmp_path / "run")
    assert run.save_model(tmp_path / "out") == tmp_path / "out"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in names and "tokenizer.json" in names and "model.safetensors" not in names
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    assert torch.equal(logits(again), logits(run.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.TEMPLATE


def test_a_whole_model_is_saved_whole(tmp_path):
    run = trained(tmp_path / "run", use=False)
    run.save_model(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(run.model))
    assert "forward" in vars(run.model)


@pytest.mark.parametrize("lora", [
    {}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": "all-linear", "lora_dropout": 0.3}, {"bias": "lora_only"},
], ids=["lora", "dora", "rslora", "embeddings", "all-linear", "bias"])
def test_a_merged_model_is_the_trained_one(tmp_path, capsys, lora):
    model = tiny.llama(attention_bias=True) if "bias" in lora else None
    run = trained(tmp_path / "run", model=model, **lora)
    run.model.train()
    before = state(run.model)
    run.save_model(tmp_path / "out", merge_adapters=True)
    assert "read back and compared" in capsys.readouterr().err
    after = state(run.model)
    assert run.model.training and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/adapter_config.json").exists()
    assert torch.allclose(logits(merged), logits(run.model), atol=1e-4)
    with run.model.disable_adapter():
        assert not torch.allclose(logits(merged), logits(run.model), atol=1e-2)


def test_tied_embeddings_stay_tied(tmp_path):
    run = trained(tmp_path / "run", model=tiny.llama(tie_word_embeddings=True))
    run.save_model(tmp_path / "out", merge_adapters=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.allclose(logits(merged), logits(run.model), atol=1e-4)


def test_bf16_is_merged_within_its_rounding(tmp_path):
    run = trained(tmp_path / "run", model=tiny.llama().bfloat16())
    run.save_model(tmp_path / "out", merge_adapters=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    error = (logits(merged) - logits(run.model)).float().std() / logits(run.model).float().std()
    assert 0 < error < 0.05


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny.llama(hidden_size=64, intermediate_size=64).save_pretrained(path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
                                bnb_4bit_use_double_quant=True)
    return lambda: AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": "cpu"})


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}],
                         ids=["lora", "dora", "head"])
def test_a_4_bit_base_is_merged_in_its_compute_type(tmp_path, four_bit, lora):
    run = trained(tmp_path / "run", model=four_bit(), **lora)
    before = state(run.model)
    with autocast_if_mixed(run.model):  # TRL casts the adapters on a 4-bit base to bf16
        with torch.no_grad():
            answer = run.model.train()(input_ids=IDS).logits.float()
        assert (logits(run.model).float() - answer).abs().max() < 1e-5
    run.save_model(tmp_path / "out", merge_adapters=True)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    assert all(type(module) is not type(run.model.get_base_model().model.layers[0].mlp.up_proj)
               for module in merged.modules())
    assert ((logits(merged) - answer).std() / answer.std()) < 0.03
    assert len(run.generate("hi", max_new_tokens=4)) == 1
    assert all(torch.equal(value, before[name]) for name, value in state(run.model).items())


def test_a_4_bit_model_that_was_evaluated_before_it_came_here(tmp_path, four_bit):
    """bitsandbytes has repacked it then, on CPUs with AVX512-BF16."""
    model = four_bit()
    plain = {name: saving._dequantized(module) for name, module in model.named_modules() if "proj" in name}
    logits(model)
    keep_4bit_layout(model)
    for name, module in model.named_modules():
        if name in plain:
            assert (saving._dequantized(module) - plain[name]).abs().max() < 0.01 * plain[name].abs().max()
    logits(model)
    assert not any(getattr(module.weight.quant_state, "packing_format_for_cpu", False)
                   for name, module in model.named_modules() if name in plain)


def test_a_base_quantised_otherwise_is_refused(tmp_path, four_bit):
    run = trained(tmp_path / "run", model=four_bit())
    base = run.model.get_base_model()
    base.is_loaded_in_4bit = False
    with pytest.raises(ConfigError, match="only bitsandbytes 4-bit"):
        run.save_model(tmp_path / "out", merge_adapters=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["lost", "twice", "other"])
def test_a_wrong_merge_is_caught_and_nothing_is_saved(tmp_path, monkeypatch, damage):
    run = trained(tmp_path / "run")
    plain = saving.merged_copy

    def wrong(model):
        merged = plain(model)
        with torch.no_grad():
            for name in ("q_proj", "v_proj"):
                for mine, theirs in zip(merged.model.layers, model.get_base_model().model.layers, strict=True):
                    weight = getattr(mine.self_attn, name).weight
                    base = getattr(theirs.self_attn, name).base_layer.weight
                    factor = {"lost": -1.0, "twice": 1.0, "other": 0.0}[damage]
                    weight += factor * (weight - base)
            if damage == "other":
                merged.lm_head.weight.mul_(1.01)
        return merged

    monkeypatch.setattr(saving, "merged_copy", wrong)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="nothing was saved"):
        run.save_model(tmp_path / "out", merge_adapters=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(("error", "effect", "share", "rounding", "passed"), [
    (1e-6, 0.3, 1.0, 1e-4, True), (0.3, 0.3, 0.0, 1e-4, False), (0.3, 0.3, 2.0, 5e-2, False),
    (0.02, 0.02, 0.0, 5e-2, False), (0.01, 0.02, 1.05, 5e-2, True), (0.01, 0.001, 0.3, 5e-2, True),
    (0.0, 0.0, 1.0, 1e-4, True), (0.06, 0.1, 1.0, 5e-2, False), (1e-6, 1e-5, 0.5, 1e-4, False),
    (0.0072, 0.006, 0.64, 5e-2, True), (0.03, 0.02, 1.8, 5e-2, False), (0.01, 0.03, 0.64, 5e-2, False),
])
def test_what_passes_as_the_same_model(error, effect, share, rounding, passed):
    assert saving.MergeCheck(error, effect, share, rounding).passed is passed


# Where it is saved


def test_saving_twice_replaces_the_model_and_keeps_the_rest(tmp_path):
    run = trained(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/README.md").write_text("my card")
    run.save_model(tmp_path / "out")
    first = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        run.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(1.0)
    run.save_model(tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() != first
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert (tmp_path / "out/README.md").read_text() == "my card"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_mixture_of_models_is_refused_before_any_work(tmp_path, monkeypatch):
    run = trained(tmp_path / "run")
    run.save_model(tmp_path / "out")
    monkeypatch.setattr(saving, "merged_copy", None)
    with pytest.raises(ConfigError, match="holds adapters"):
        run.save_model(tmp_path / "out", merge_adapters=True)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/model-00001-of-00002.safetensors").write_text("")
    with pytest.raises(ConfigError, match="holds a whole model"):
        run.save_model(tmp_path / "whole")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run.save_model(tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path, monkeypatch):
    run = trained(tmp_path / "run")
    monkeypatch.setattr(saving, "merged_copy", None)
    with pytest.raises(ConfigError, match="^save_model: '/proc/foo' cannot be written: No such file or directory$"):
        run.save_model("/proc/foo", merge_adapters=True)
    with pytest.raises(ConfigError, match="^save_model: '/proc' cannot be written: "):  # it has files, and takes none
        run.save_model("/proc", merge_adapters=True)
    mounted = tmp_path / "mounted"
    mounted.mkdir()

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ConfigError, match=rf"made beside '{mounted}' first: '{tmp_path}' cannot be written: Perm"):
        run.save_model(mounted, merge_adapters=True)
    with pytest.raises(ConfigError, match=rf"^save_model: '{mounted}/a' cannot be written: Permission denied$"):
        run.save_model(mounted / "a", merge_adapters=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mounted", "run"]


def test_an_error_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    run = trained(tmp_path / "run")
    monkeypatch.setattr(type(run.tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        run.save_model(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# The hub


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    calls: list = []

    def __init__(self, token=None):
        self.calls.append(("api", token))

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private))

        class Url(str):
            pass

        url = Url(f"https://hub.example/{repo_id}")
        url.repo_id = repo_id
        return url

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push_uploads_what_save_model_saves(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run = trained(tmp_path / "run")
    assert run.push_to_hub("me/model", private=True, token="t") == "https://hub.example/me/model"
    assert Hub.calls[:2] == [("api", "t"), ("create", "me/model", True)]
    assert "adapter_model.safetensors" in Hub.calls[2][2] and "tokenizer.json" in Hub.calls[2][2]
    with pytest.raises(ConfigError, match="push_to_hub"):
        run.push_to_hub("not a repo//id")
