"""Device and precision: chosen by the machine, and said. A name that is of a part of a model is told what it lacks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BitsAndBytesConfig

from aligntune import create_sft_trainer
from aligntune.backends import loading
from aligntune.backends._compat import flash_kernel
from aligntune.backends.fast.support import FastBackend
from aligntune.backends.loading import (
    Precision,
    check_model_object,
    load_model,
    load_tokenizer,
    precision_of,
    steps_lost,
)
from aligntune.core.config import ModelSection
from aligntune.core.registry import Support
from aligntune.core.resolve import resolve
from aligntune.errors import BackendUnavailableError, ConfigError
from tests.core import tiny


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


# A model object is taken as it is

BESIDE = {"model_revision": "v2", "model_dtype": "bf16", "quantization": "nf4", "attn_implementation": "eager"}


def test_every_option_for_loading_is_held_against_an_object() -> None:
    elsewhere = {"model_name", "tokenizer_name", "precision", "base_precision", "device", "trust_remote_code", "strict"}
    assert set(BESIDE) == set(loading._LOADED_WITH) == {one.name for one in fields(ModelSection)} - elsewhere


@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_an_option_for_loading_beside_an_object_is_told_before_anything_is_read(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastBackend, "available", lambda self: Support("supported", "a GPU"))
    with pytest.raises(ConfigError) as caught:
        create_sft_trainer(tiny.llama(), "/no/such/data", backend=backend, **BESIDE)
    told = dict(fault.split(", but the model object has ") for fault in caught.value.faults)
    assert list(told) == [f"model.{name} = {value!r}" for name, value in BESIDE.items()]
    held, fixes = zip(*(text.removesuffix(", or leave the option out").split(": ", 1) for text in told.values()),
                      strict=True)
    assert held == ("None", "'fp32'", "None", "'sdpa'")
    assert fixes == ("load it with revision='v2'", "load it with dtype=torch.bfloat16",
                     "load it with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')",
                     "call its set_attn_implementation('eager')")


def check(model: Any, **options: Any) -> None:
    check_model_object(resolve({"model_name": model, "dataset_name": "d", "algorithm": "sft", **options}))


@pytest.mark.parametrize(("revision", "taken"), [
    ("main", True), ("v1.0", True), ("1234567", True), ("1234567" * 5 + "12345", True), ("f" * 40, False),
])
def test_a_commit_may_be_what_a_branch_or_a_tag_is(revision: str, taken: bool) -> None:
    model = tiny.llama()
    model.config._commit_hash = "1234567" * 5 + "12345"
    with contextlib.nullcontext() if taken else pytest.raises(ConfigError, match="object has '123456.*revision='fff"):
        check(model, model_revision=revision)


def test_what_is_no_model_of_transformers_is_told() -> None:
    for options in ({}, {"attn_implementation": "eager"}):
        with pytest.raises(ConfigError, match="model_name: a Linear object has no config"):
            check(torch.nn.Linear(2, 2), **options)


@pytest.mark.parametrize(("stored", "told"), [
    (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes 8 bits"), ({"quant_method": "gptq"}, "gptq"),
    (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "bitsandbytes fp4"),
])
def test_how_an_object_is_quantised_is_told(stored: Any, told: str) -> None:
    model = tiny.llama()
    model.config.quantization_config = stored
    with pytest.raises(ConfigError, match=f"the model object has '{told}'"):
        check(model, quantization="nf4")


def test_an_object_that_has_what_is_asked_for_is_taken() -> None:
    model = tiny.llama().to(torch.bfloat16)
    model.set_attn_implementation("eager")
    model.config._commit_hash = "v2"
    model.config.quantization_config = {"bnb_4bit_quant_type": "nf4"}
    check(model, **BESIDE)
    check(tiny.llama(), quantization=None, device="cpu", precision="fp32", trust_remote_code=True)
    check("a/name", **BESIDE)
    check(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), **BESIDE)
    kernel = flash_kernel("flash_attention_2")
    if kernel is not None:  # what transformers stores where flash_attn is not installed
        model.config._attn_implementation = kernel
        check(model, attn_implementation="flash_attention_2")
        with pytest.raises(ConfigError, match="the model object has 'kernels"):
            check(model, attn_implementation="flash_attention_3")


def with_adapters(**config: Any) -> Any:
    return get_peft_model(tiny.llama(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config))


@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_adapters_of_an_object_stay_and_an_option_that_differs_is_told(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastBackend, "available", lambda self: Support("supported", "a GPU"))
    with pytest.raises(ConfigError) as caught:
        create_sft_trainer(with_adapters(), "/no/such/data", backend=backend, use_peft=True, lora_r=8, lora_alpha=64,
                           lora_dropout=0.0, lora_target_modules=["lm_head", "q_proj"])
    assert [fault.partition(": leave the option out")[0] for fault in caught.value.faults] == [
        "lora.lora_r = 8, but the adapters of the model object have 4",
        "lora.lora_alpha = 64.0, but the adapters of the model object have 8",
        "lora.modules_to_save = ['lm_head'], but the adapters of the model object have None"]
    with pytest.raises(ConfigError, match="use_peft = False, but the model object has adapters.*merge_and_unload"):
        create_sft_trainer(with_adapters(), "/no/such/data", backend=backend, use_peft=False)


@pytest.mark.parametrize(("adapters", "asked", "told"), [
    ({}, {"lora_target_modules": "all-linear"}, r"'all-linear', but .* have \['q_proj'\]"),
    ({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, {"lora_target_modules": "all-linear"}, None),
    ({}, {"lora_init": "pissa"}, "'pissa', but .* have True"),
    ({"init_lora_weights": "gaussian"}, {"lora_init": "gaussian"}, None),
    ({}, {"lora_init": "default", "modules_to_save": []}, None),
])
def test_options_of_adapters_are_held_against_those_of_an_object(
    adapters: dict[str, Any], asked: dict[str, Any], told: str | None
) -> None:
    with pytest.raises(ConfigError, match=told) if told else contextlib.nullcontext():
        check(with_adapters(**adapters), **asked)


def test_the_configuration_tells_the_adapters_of_an_object() -> None:
    model = with_adapters(target_modules=["v_proj", "q_proj"], use_rslora=True, lora_dropout=0.1)
    job = resolve({"model_name": model, "dataset_name": "d", "algorithm": "sft"})
    check_model_object(job)
    found = dict(job.config.lora)
    assert found == {
        "use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj", "v_proj"], "lora_bias": "none",
        "modules_to_save": None, "use_dora": False, "use_rslora": True, "lora_init": "default"}
    other = get_peft_model(tiny.llama(), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    job = resolve({"model_name": other, "dataset_name": "d", "algorithm": "sft"})
    check_model_object(job)
    assert (job.config.lora.use_peft, job.config.lora.lora_target_modules) == (True, ["v_proj"])


@pytest.mark.parametrize(("tokenizer", "revision"), [(None, "v2"), ("a/model", "v2"), ("a/tokenizer", None)])
def test_a_revision_is_of_the_models_name(
    tokenizer: str | None, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Callable[..., Any] = lambda source, **how: SimpleNamespace(pad_token_id=0, source=source, how=how)  # noqa: E731
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    job = resolve({"model_name": "a/model", "tokenizer_name": tokenizer, "model_revision": "v2", "dataset_name": "d",
                   "algorithm": "sft"})
    found = load_tokenizer(job)
    assert (found.source, found.how["revision"]) == (tokenizer or "a/model", revision)


@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_all_weights_in_bf16_are_spoken_of(backend: str, tmp_path: Path) -> None:
    def said(**options: Any) -> list[str]:
        run = create_sft_trainer("builtin:tiny", [{"text": f"{i} and {i}"} for i in range(4)], backend=backend,
                                 max_steps=1, batch_size=2, learning_rate=1e-6, report_to="none",
                                 output_dir=str(tmp_path / "run"), precision="bf16", **options)
        return [line for line in run._notices if "bfloat16" in line]

    (line,) = said(model_dtype="bf16")
    assert "weights train that are stored in bfloat16, which loses steps below 1/256 of a weight" in line
    assert "learning_rate (1e-06) on weights above about 0.00026; storage in float32" in line
    assert "model_dtype='fp32'" in line
    if backend == "trl":  # whose build is the other's too
        assert not said() and not said(model_dtype="bf16", use_peft=True)


def test_weights_that_are_frozen_or_in_fp32_lose_nothing() -> None:
    model = tiny.llama()
    assert steps_lost(model, 1e-6) is None
    model.bfloat16()
    assert steps_lost(model, 1e-3).startswith(f"{sum(p.numel() for p in model.parameters()):,} weights train")
    model.lm_head.weight.requires_grad_(False)  # tied: the embedding's too
    assert steps_lost(model, 1e-3).startswith(
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} weights")
    assert steps_lost(with_adapters(), 1e-3) is None
    assert steps_lost(model.requires_grad_(False), 1e-3) is None


# Names that are paths


def test_a_run_folder_is_the_model_of_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = create_sft_trainer(tiny.llama(), [{"text": f"{i} and {i}"} for i in range(4)], backend="trl", device="cpu",
                             tokenizer_name=tiny.tokenizer(), max_steps=2, save_steps=1, batch_size=2, report_to="none",
                             learning_rate=0.1, output_dir=str(folder))
    run.train()
    job = resolve({"model_name": str(folder), "dataset_name": "d", "algorithm": "sft", "device": "cpu"})
    newest = load_model(job, precision_of(job)).lm_head.weight
    assert torch.equal(newest, run.model.lm_head.weight)
    assert load_tokenizer(job).get_vocab() == tiny.tokenizer().get_vocab()
    assert job.notices == [
        f"model_name: {str(folder)!r} is a run; its newest complete checkpoint is taken, {folder / 'checkpoint-2'}"]
    (folder / "checkpoint-2/model.safetensors").unlink()
    earlier = load(folder, scores=False).lm_head.weight
    assert torch.equal(earlier, load(folder / "checkpoint-1", scores=False).lm_head.weight)
    assert not torch.equal(earlier, newest)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "runs/sft/model"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model_name: '{name}' is no folder here"):
        load(name)
    job = resolve({"model_name": name, "dataset_name": "d", "algorithm": "sft"})
    with pytest.raises(ConfigError, match=f"model_name: '{name}' is no folder here"):
        load_tokenizer(job)


# A name that is of a part of a model


def load(folder: Any, *, scores: bool = True, **options: Any) -> Any:
    job = resolve({"model_name": str(folder), "dataset_name": "d", "algorithm": "reward" if scores else "sft",
                   "device": "cpu", **options})
    return load_model(job, precision_of(job), scores=scores)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """`lm`, `scorer`, and `adapters` of a scorer on `lm` with their head."""
    tiny.llama().save_pretrained(tmp_path / "lm")
    tiny.scorer().save_pretrained(tmp_path / "scorer")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    peft.save_pretrained(tmp_path / "adapters")
    return tmp_path


def without(part: str, file: Path, *, count: int = 1) -> None:
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    assert len(kept) == len(load_file(file)) - count
    save_file(kept, file, metadata={"format": "pt"})


def test_a_scorer_is_loaded_whole_and_one_of_a_language_model_gets_a_head(saved: Path) -> None:
    assert torch.equal(load(saved / "scorer").score.weight, tiny.scorer().score.weight)
    fresh = [load(saved / "lm", seed=seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(saved / "encoder")  # of its head the pooler lies in the base
    assert load(saved / "encoder").classifier.weight.shape == (1, 32)
    quantised = load(saved / "lm", use_peft=True, quantization="nf4")
    assert quantised.is_loaded_in_4bit and quantised.score.weight.shape == (1, 32)


@pytest.mark.parametrize(("folder", "part"), [
    ("scorer", "score.weight"), ("scorer", "model.norm.weight"), ("lm", "model.norm.weight")])
def test_a_scorer_that_lacks_weights_of_its_own_is_told(folder: str, part: str, saved: Path) -> None:
    without(part, saved / folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"'{saved / folder}' has no {part}, which would be random"):
        load(saved / folder)


@pytest.mark.parametrize("options", [{}, {"use_peft": True, "quantization": "nf4"}], ids=["plain", "nf4"])
@pytest.mark.parametrize(("part", "named"), [
    ("lm_head.weight", "lm_head.weight"), ("model.norm.weight", "model.norm.weight"),
    ("mlp", "model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
            "model.layers.0.mlp.up_proj.weight and 3 more"),
])
def test_a_language_model_that_lacks_weights_is_told(
    part: str, named: str, options: dict[str, Any], saved: Path
) -> None:
    assert load(saved / "lm", scores=False, **options).lm_head.weight.shape == (259, 32)
    without(part, saved / "lm/model.safetensors", count=6 if part == "mlp" else 1)
    with pytest.raises(ConfigError, match=rf"^model_name: '{saved}/lm' has no {named}, which would be random: it was"):
        load(saved / "lm", scores=False, **options)


def test_a_reward_model_is_no_language_model(saved: Path) -> None:
    told = (rf"^model_name: '{saved}/scorer' is a reward model \(LlamaForSequenceClassification\): it has no "
            r"lm_head\.weight, which would be random; reward_model_name takes it$")
    with pytest.raises(ConfigError, match=told):
        load(saved / "scorer", scores=False)
    tiny.tokenizer().save_pretrained(saved / "scorer")
    with pytest.raises(ConfigError, match=told):
        create_sft_trainer(str(saved / "scorer"), [{"text": "a b"}], backend="trl", device="cpu", report_to="none",
                           output_dir=str(saved / "run"))


def test_a_head_that_is_tied_is_not_missing(saved: Path) -> None:
    tiny.llama(tie_word_embeddings=True).save_pretrained(saved / "tied")
    tiny.scorer(tie_word_embeddings=True).save_pretrained(saved / "tied-scorer")
    for name in ("tied", "tied-scorer"):
        assert "lm_head.weight" not in load_file(saved / name / "model.safetensors")
        model = load(saved / name, scores=False)
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("scores", [True, False])
def test_adapters_beside_the_model_under_them_are_loaded(scores: bool, saved: Path) -> None:
    if scores:
        base = AutoModelForSequenceClassification.from_pretrained(saved / "lm", num_labels=1)
    else:
        base = tiny.llama()
    base.save_pretrained(saved / "both")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS" if scores else "CAUSAL_LM")
                   ).save_pretrained(saved / "both")
    assert any("lora_A" in name for name, _ in load(saved / "both", scores=scores).named_parameters())


@pytest.mark.parametrize("scores", [True, False])
def test_adapters_alone_are_no_model(scores: bool, saved: Path) -> None:
    with pytest.raises(ConfigError, match="holds adapters without the model under them.*merge_adapters=True") as caught:
        load(saved / "adapters", scores=scores)
    assert len(caught.value.faults) == 1  # their head is there


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a model"])
def test_adapters_of_a_scorer_without_its_head_are_told(beside: bool, saved: Path) -> None:
    folder = saved / "adapters"
    without("score.weight", folder / "adapter_model.safetensors")
    if beside:
        tiny.llama().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no score\.weight: its scores would be random") as caught:
        load(folder)
    assert len(caught.value.faults) == 2 - beside
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="adapter_config.json' cannot be read"):
        load(folder)
