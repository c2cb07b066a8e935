"""TRL scripts made fast: accelerate_trl, fast_train, FastLanguageModel."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer

from aligntune.backends.base import require
from aligntune.backends.fast import FastLanguageModel, accelerate_trl, attach, attachment_of, detach, fast_train
from aligntune.backends.fast.recompute import recompute_of
from aligntune.backends.fast.scripts import attach_trainer
from aligntune.backends.fast.sft_trainer import FastSFTTrainer
from aligntune.backends.fast.support import BACKEND
from aligntune.errors import ConfigError, UnsupportedAlgorithmError
from tests.core import tiny

FUSED = "head: linear + log-probs, behind TRL's fused-head call and plain labels (x1)"


def trainer_classes() -> list[type]:
    from aligntune.backends.fast.scripts import _subclasses

    return [transformers.Trainer, *_subclasses(transformers.Trainer)]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_trainers_built_in_the_block_are_fast_after_it_and_the_same(tmp_path):
    before = {cls: dict(vars(cls)) for cls in trainer_classes()}
    with accelerate_trl() as attachments:
        trainer = tiny.sft(tmp_path / "fast", max_steps=2)
    assert [str(attachment.report[-1]) for attachment in attachments] == [FUSED]
    assert attachment_of(trainer.model) is attachments[0] and attachments[0].attached
    assert {cls: dict(vars(cls)) for cls in trainer_classes() if cls in before} == before
    fast = losses(trainer)
    assert attachments[0].attached
    plain_trainer = tiny.sft(tmp_path / "plain", max_steps=2)
    assert attachment_of(plain_trainer.model) is None
    assert fast == pytest.approx(losses(plain_trainer), abs=1e-4) and fast[0] > 4
    detach(trainer.model)
    assert attachment_of(trainer.model) is None


def test_what_stays_trl_s_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", logger="aligntune"), accelerate_trl():
        tiny.sft(tmp_path / "theirs", max_steps=1)
    said = [line for line in caplog.messages if line.startswith("SFTTrainer: the model runs on our kernels")]
    assert len(said) == 1 and "FastSFTTrainer lays rows end to end" in said[0]
    caplog.clear()
    with caplog.at_level("INFO", logger="aligntune"):
        ours = FastSFTTrainer(tiny.llama(), tiny.sft_args(tmp_path / "ours", max_steps=1),
                              train_dataset=tiny.text_rows(),
                              processing_class=tiny.tokenizer())
    assert ours.layout.startswith("rows: end to end") and "on our kernels" not in caplog.text


def test_train_inside_the_block_is_fast_too(tmp_path):
    with accelerate_trl() as attachments:
        trainer = tiny.sft(tmp_path, max_steps=1)
        result = attachments[0].attest(trainer.train)
    assert result.ok and result.kernels["logits_loss"] == 1


def test_the_block_is_left_clean_by_an_error_and_by_a_trainer_that_fails(tmp_path):
    before = {cls: dict(vars(cls)) for cls in trainer_classes()}
    with pytest.raises(ValueError), accelerate_trl() as attachments:
        SFTTrainer(model=tiny.llama(), args=tiny.sft_args(tmp_path, loss_type="no such loss"))
    assert attachments == []
    assert {cls: dict(vars(cls)) for cls in trainer_classes()} == before


def test_subclasses_and_trainers_imported_in_the_block_are_covered_and_others_not(tmp_path):
    class Mine(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = attachment_of(self.model)

    with accelerate_trl() as attachments:

        class Late(transformers.Trainer):
            __module__ = "trl.experimental.late"

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)

        mine = Mine(
            model=tiny.llama(), args=tiny.sft_args(tmp_path), train_dataset=tiny.text_rows(),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        assert mine.mine is attachments[0]
        args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        late = Late(model=tiny.llama(), args=args)
        own = transformers.Trainer(model=tiny.llama(), args=args)
    assert attachment_of(late.model) is attachments[1] and len(attachments) == 2
    assert attachment_of(own.model) is None
    assert attachment_of(Late(model=tiny.llama(), args=args).model) is None


def test_blocks_nest(tmp_path):
    before = {cls: dict(vars(cls)) for cls in trainer_classes()}
    with accelerate_trl() as outer, accelerate_trl() as inner:
        trainer = tiny.sft(tmp_path)
    assert outer == inner == [attachment_of(trainer.model)]
    assert {cls: dict(vars(cls)) for cls in trainer_classes()} == before


def test_reference_models_are_attached_with_the_policy(tmp_path):
    def dpo(folder: str) -> DPOTrainer:
        args = DPOConfig(
            output_dir=str(tmp_path / folder), max_length=64, max_steps=1, per_device_train_batch_size=2, bf16=False,
            use_cpu=True, gradient_checkpointing=False, report_to="none", logging_steps=1, learning_rate=1e-2,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        return DPOTrainer(
            model=tiny.llama(num_hidden_layers=1), ref_model=tiny.llama(num_hidden_layers=1, seed=1), args=args,
            train_dataset=tiny.pairs(),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip

    with accelerate_trl() as attachments:
        trainer = dpo("fast")
    assert attachment_of(trainer.ref_model).attached and len(attachments) == 1
    assert str(attachment_of(trainer.ref_model).report[-1]) == FUSED
    assert losses(trainer) == pytest.approx(losses(dpo("plain")), abs=1e-4)


def test_fast_train_covers_the_head_of_a_trainer_attached_before(tmp_path):
    model = tiny.llama()
    attachment = attach(model)
    trainer = tiny.sft(tmp_path, model=model, max_steps=1, peft_config=LoraConfig(r=2, target_modules=["down_proj"]))
    assert str(attachment.report[-1]) == "head: TRL's own (attached before the trainer)"
    output = fast_train(trainer)
    assert output.global_step == 1 and output.training_loss > 4
    assert str(attachment.report[-1]) == FUSED and attachment_of(trainer.model) is attachment


def test_strict_reaches_the_trainer(tmp_path):
    trainer = tiny.sft(tmp_path, model=tiny.llama(hidden_act="relu2"))
    with pytest.raises(ConfigError, match="relu2"):
        fast_train(trainer, strict=True)
    assert trainer.state.global_step == 0


def test_a_reference_that_strict_refuses_leaves_the_policy_as_it_was():
    trainer = SimpleNamespace(args=SimpleNamespace(), model=tiny.llama(), ref_model=tiny.llama(hidden_act="relu2"))
    with pytest.raises(ConfigError, match="relu2"):
        attach_trainer(trainer, strict=True)
    for model in (trainer.model, trainer.ref_model):
        assert attachment_of(model) is None and not any("forward" in vars(module) for module in model.modules())


def grpo(path: Path, model: Any = None, **options: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(path), per_device_train_batch_size=4, num_generations=4, bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", **options,
    )  # fmt: skip
    return GRPOTrainer(model=tiny.llama() if model is None else model, args=args, train_dataset=tiny.prompts(),
                       reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
                       processing_class=tiny.tokenizer())


@pytest.mark.parametrize("options", [
    {"importance_sampling_level": "sequence", "loss_type": "grpo"}, {"loss_type": "luspo"}, {"loss_type": "vespo"}],
    ids=str)
def test_what_the_factories_refuse_a_script_is_refused_in_their_words(options, tmp_path):
    with pytest.raises(UnsupportedAlgorithmError, match="token-level ratios.*backend='trl'") as told:
        require(BACKEND, "grpo", options)
    words = f"^{re.escape(str(told.value))}$"
    model = tiny.llama()
    with accelerate_trl() as attachments:
        with pytest.raises(UnsupportedAlgorithmError, match=words):
            grpo(tmp_path, model, **options)
        assert attachments == [] and attachment_of(model) is None
        assert attachment_of(grpo(tmp_path, loss_type="dapo").model) is attachments[0]
    attach(model)  # as `FastLanguageModel` does; a trainer of TRL's own around it is not ours to refuse
    trainer = grpo(tmp_path, model, **options)
    with pytest.raises(UnsupportedAlgorithmError, match=words):
        fast_train(trainer)
    assert trainer.state.global_step == 0


def test_replicas_of_one_process_are_refused():
    model = tiny.llama()
    attach(model)
    assert model._replicate_for_data_parallel().forward.__self__ is model  # what they would run
    detach(model)
    trainer = SimpleNamespace(args=SimpleNamespace(n_gpu=2), model=model)
    with pytest.raises(ConfigError, match="2 GPUs in one process.*torchrun"):
        attach_trainer(trainer)
    assert attachment_of(model) is None
    trainer.args.n_gpu = 1
    assert attach_trainer(trainer).attached


def test_weights_that_are_gathered_for_calls_alone_are_refused():
    model = tiny.llama()
    plugin = SimpleNamespace(zero_stage=3)
    trainer = SimpleNamespace(args=SimpleNamespace(deepspeed_plugin=plugin), model=model)
    with pytest.raises(ConfigError, match="DeepSpeed's stage 3.*backend='trl' runs it"):
        attach_trainer(trainer)
    assert attachment_of(model) is None
    plugin.zero_stage = 2
    assert attach_trainer(trainer).attached


@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_one_process_on_a_machine_with_several_gpus_trains_on_one(backend, tmp_path, monkeypatch, capsys):
    from aligntune import create_sft_trainer
    from aligntune.backends.trl import build

    def two_gpus(*args, **kwargs):
        made = trl_config(*args, **kwargs)
        made._n_gpu = 2
        return made

    trl_config = build.trl_config
    monkeypatch.setattr(build, "trl_config", two_gpus)
    options = {"batch_size": 3, "max_steps": 1, "max_samples": 6, "use_peft": True, "output_dir": tmp_path / "run"}
    made = create_sft_trainer("builtin:tiny", "builtin:arithmetic", backend=backend, **options)
    assert made.trainer.args.n_gpu == 1 and made.trainer.args.train_batch_size == 3
    made.train()  # notices are said when it begins
    assert "2 GPUs: this process trains on cpu alone; `aligntune launch RECIPE`" in capsys.readouterr().err


def test_a_model_that_accelerate_prepared_before_attach(tmp_path):
    """bf16 autocast wraps the instance's forward; ours goes inside it, and detach leaves it as it was."""
    trainer = tiny.sft(tmp_path, max_steps=1, bf16=True)
    trainer.train()
    model = trainer.model
    wrapped, inside = vars(model)["forward"], vars(model)["_original_forward"]
    inputs = {"input_ids": torch.arange(3, 15)[None], "labels": torch.arange(3, 15)[None]}
    before = model(**inputs, fused_lm_head=True)
    attachment = attach(model)
    result = attachment.attest(lambda: model(**inputs, fused_lm_head=True).loss.backward())
    assert result.ok and result.kernels["logits_loss"] == 1
    after = model(**inputs, fused_lm_head=True)
    assert after.log_probs.dtype == before.log_probs.dtype
    assert torch.allclose(after.log_probs, before.log_probs, atol=0.1)
    seen = []
    handle = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    model(**inputs, fused_lm_head=True)
    handle.remove()
    assert seen == [torch.bfloat16]
    detach(model)
    assert vars(model)["_original_forward"] is inside and vars(model)["forward"] is wrapped


def test_a_model_prepared_after_attach_is_detached_from_inside_the_wrapper(tmp_path):
    with accelerate_trl():
        trainer = tiny.sft(tmp_path, max_steps=1, bf16=True)
    model = trainer.model
    trls = vars(model)["forward"]
    trainer.train()
    assert vars(model)["_original_forward"] is trls or vars(model)["_original_forward"].__func__ is trls.__func__
    inputs = {"input_ids": torch.arange(3, 15)[None], "labels": torch.arange(3, 15)[None]}
    fast = model(**inputs, fused_lm_head=True).log_probs
    detach(model)
    plain = model(**inputs, fused_lm_head=True).log_probs
    assert torch.allclose(fast, plain, atol=0.05) and not torch.equal(fast, plain)
    assert not any("aligntune" in key for module in model.modules() for key in vars(module))


# ---------------------------------------------------------------------------------------------------- FastLanguageModel


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model"
    tiny.llama().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def test_from_pretrained_and_get_peft_model(saved, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(saved, max_seq_length=128, dtype=torch.float32)
    assert tokenizer.model_max_length == 128 and attachment_of(model).attached
    state = torch.get_rng_state()
    peft_model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, use_rslora=True, random_state=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert attachment_of(peft_model).attached
    config = peft_model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, True)
    assert config.target_modules == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)
    again, _ = FastLanguageModel.from_pretrained(saved, dtype=torch.float32)
    again = FastLanguageModel.get_peft_model(again, r=4, random_state=5)
    name = next(name for name in trainable if "lora_A" in name)
    assert torch.equal(dict(again.named_parameters())[name], dict(peft_model.named_parameters())[name])
    trainer = tiny.sft(tmp_path, model=peft_model, max_steps=2)
    assert fast_train(trainer).global_step == 2


def four_bits(path: str, *, asked: bool) -> Any:
    """(model, its loss and what an attested step of its adapters says)."""
    where = {} if torch.cuda.is_available() else {"device_map": {"": "cpu"}}
    model, _ = FastLanguageModel.from_pretrained(path, load_in_4bit=asked, dtype=torch.float32, **where)
    assert "model.layers.*.self_attn.q_proj: nf4 (x1)" in str(attachment_of(model))
    state = model.model.layers[0].self_attn.q_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested
    ids = torch.arange(3, 9, device=model.device)[None]
    peft_model = FastLanguageModel.get_peft_model(model, r=4, strict=True)
    attachment = attachment_of(peft_model)
    assert "model.layers.*.self_attn.q_proj: lora on nf4 (x1)" in str(attachment)
    losses = []

    def step() -> None:
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))

    result = attachment.attest(step)
    assert result.ok and result.kernels["nf4_dequant_kernel"] >= 7
    assert sum(float(p.grad.norm()) > 0 for p in peft_model.parameters() if p.grad is not None) == 7
    return peft_model, losses[0]


@pytest.fixture
def square(tmp_path):
    """bitsandbytes packs rows of 64."""
    tiny.llama(num_hidden_layers=1, hidden_size=64, head_dim=16).save_pretrained(tmp_path / "square")
    tiny.tokenizer().save_pretrained(tmp_path / "square")
    return str(tmp_path / "square")


def test_four_bits_asked_for(square):
    assert four_bits(square, asked=True)[1] > 3


@pytest.mark.slow
def test_four_bits_stored_load_as_they_are_asked_for_or_not(square, tmp_path):
    model, loss = four_bits(square, asked=True)
    model.unload().save_pretrained(tmp_path / "stored")
    tiny.tokenizer().save_pretrained(tmp_path / "stored")
    for asked in (False, True):
        assert four_bits(str(tmp_path / "stored"), asked=asked)[1] == pytest.approx(loss, rel=1e-6)


def test_full_fine_tuning_trains_every_parameter(saved):
    model, _ = FastLanguageModel.from_pretrained(saved, full_finetuning=True, dtype=torch.float32)
    ids = torch.arange(3, 15, device=model.device)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert len(grads) == 21 and all(g is not None and g.any() for g in grads)


def test_embeddings_among_the_targets_are_trained_whole(saved, caplog):
    model, _ = FastLanguageModel.from_pretrained(saved, dtype=torch.float32)
    with caplog.at_level("INFO", logger="aligntune"):
        peft_model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "lm_head"])
    assert peft_model.peft_config["default"].modules_to_save == ["lm_head"]
    assert "lm_head are trained whole" in caplog.text
    assert any(p.requires_grad and "lm_head" in n for n, p in peft_model.named_parameters())


def test_checkpointing_and_modes(saved):
    model, _ = FastLanguageModel.from_pretrained(saved, dtype=torch.float32)
    peft_model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=True)
    assert model.model.layers[0].gradient_checkpointing and recompute_of(model) is None
    FastLanguageModel.for_inference(peft_model)
    assert not peft_model.training and peft_model.config.use_cache
    FastLanguageModel.for_training(peft_model)
    assert peft_model.training and not peft_model.config.use_cache and attachment_of(peft_model).attached


@pytest.mark.parametrize("name", ["unsloth", "offload"])
def test_inputs_of_layers_wait_in_host_memory_under_any_trainer(name, saved, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(saved, dtype=torch.float32)
    peft_model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=name)
    recompute = recompute_of(model)
    assert recompute.offload and recompute.on and not recompute.buffers.free
    fast_train(tiny.sft(tmp_path, model=peft_model, max_steps=1))
    assert recompute_of(model) is recompute and sum(map(len, recompute.buffers.free.values())) > 0


def test_wrong_options_say_what_would_be_right(saved):
    with pytest.raises(ConfigError, match="max_seq_length=100000, but the model's positions end at 256"):
        FastLanguageModel.from_pretrained(saved, max_seq_length=100_000)
    with pytest.raises(ConfigError, match="choose one"):
        FastLanguageModel.from_pretrained(saved, load_in_4bit=True, full_finetuning=True)
    model, _ = FastLanguageModel.from_pretrained(saved)
    with pytest.raises(ConfigError, match="'offlaod'"):
        FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="offlaod")
    with pytest.raises(ConfigError, match="'lora_alhpa'; did you mean 'lora_alpha'"):
        FastLanguageModel.get_peft_model(model, lora_alhpa=3)
    with pytest.raises(ConfigError, match="give target_modules"):
        FastLanguageModel.get_peft_model(copy.deepcopy(torch.nn.Sequential(torch.nn.Linear(2, 2))))


def test_names_that_no_module_has(saved):
    model, _ = FastLanguageModel.from_pretrained(saved, dtype=torch.float32)
    with pytest.raises(ConfigError) as caught:
        FastLanguageModel.get_peft_model(
            model, target_modules=["q_proj", "v_porj", "embed_token"], modules_to_save=["lm_hed"]
        )
    assert [fault.split("?")[0] for fault in caught.value.faults] == [
        "target_modules: unknown module 'v_porj'; did you mean 'v_proj'",
        "target_modules: unknown module 'embed_token'; did you mean 'embed_tokens'",
        "modules_to_save: unknown module 'lm_hed'; did you mean 'lm_head'",
    ]
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("targets", "adapted"), [
    ("all-linear", 14), (r".*layers\.1\..*\.(q|v)_proj", 2), (("q_proj", "mlp.up_proj"), 4),
    (["model.layers.0.self_attn.q_proj"], 1),
])
def test_patterns_and_longer_names_are_read_as_peft_reads_them(targets, adapted, saved):
    model, _ = FastLanguageModel.from_pretrained(saved, dtype=torch.float32)
    peft_model = FastLanguageModel.get_peft_model(model, r=2, target_modules=targets)
    assert sum("lora_A" in name for name, _ in peft_model.named_parameters()) == adapted


# ------------------------------------------------------------------------------------------------ what is left behind

_SCRIPT = """
import hashlib, sys
sys.path.insert(0, {root!r})
import torch
from tests.core import tiny

def run(trainer):
    trainer.train()
    losses = [row["loss"].hex() for row in trainer.state.log_history if "loss" in row]
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in trainer.model.parameters())
    random = torch.get_rng_state().numpy().tobytes()
    return " ".join([*losses, *(hashlib.sha256(found).hexdigest() for found in (weights, random))])

if {after!r}:
    from aligntune.backends.fast import accelerate_trl, detach, fast_train
    with accelerate_trl():
        trainer = tiny.sft({path!r} + "/fast", max_steps=2, peft_config=tiny.lora())
    trainer.train()
    detach(trainer.model)
    fast_train(tiny.sft({path!r} + "/again", max_steps=1))
print(run(tiny.sft({path!r} + "/plain", max_steps=2)))
"""


def test_a_trl_run_after_fast_ones_is_bit_equal_to_one_in_a_fresh_process(tmp_path):
    root = str(Path(__file__).resolve().parents[3])
    runs = []
    for after in (False, True):
        script = _SCRIPT.format(root=root, after=after, path=str(tmp_path / str(after)))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout.splitlines()[-1])
    assert runs[0] == runs[1] and len(runs[0].split()) == 4 and len(set(runs[0].split())) == 4
