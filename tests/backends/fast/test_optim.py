"""Embeddings at a rate of their own: which weights, which groups, what schedules, clipping and resume make of them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from aligntune import create_rl_trainer, create_sft_trainer
from aligntune.backends.base import require
from aligntune.backends.fast.optim import EmbeddingRate, _keep_overrides_to_itself, _move, embedding_weights
from aligntune.backends.fast.support import BACKEND
from aligntune.backends.fast.trainers import FAST_TRAINERS, FastSFT
from aligntune.backends.trl.offline import _write_settings
from aligntune.errors import CheckpointError, ConfigError
from tests.core import tiny

RATE, OTHERS = 1e-3, 1e-2
NEAR = 1e-5 if torch.cuda.is_available() else 0  # a GPU adds in no fixed order
WHOLE = ["q_proj", "embed_tokens", "lm_head"]
ROWS = [{"text": f"row {i:02d}"} for i in range(16)]  # of one length: nothing is filled up


def sft(path: Path, *, backend: str = "fast", model: Any = None, **options: Any) -> Any:
    settings = {
        "max_steps": 1, "batch_size": 2, "learning_rate": OTHERS, "report_to": "none", "logging_steps": 1,
        "max_seq_length": 48, "tokenizer_name": tiny.tokenizer(), "output_dir": str(path), "seed": 3,
        "precision": "fp32",
    }  # fmt: skip
    if backend == "fast":
        settings["embedding_learning_rate"] = RATE
    return create_sft_trainer(
        model if model is not None else tiny.llama(num_hidden_layers=1), ROWS, backend=backend,
        **(settings | options),
    )  # fmt: skip


def groups(trainer: Any) -> list[tuple[float, float, set[str]]]:
    """(rate, weight decay, names) of each parameter group."""
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    made = trainer.create_optimizer().param_groups
    return [(g["lr"], g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in made]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------ which weights


def test_full_training(tmp_path):
    trainer = sft(tmp_path, weight_decay=0.1).trainer
    decayed, plain, embeddings = groups(trainer)
    everything = {name for name, _ in trainer.model.named_parameters()}
    assert embeddings == (RATE, 0.1, {"model.embed_tokens.weight", "lm_head.weight"})
    assert plain == (OTHERS, 0.0, {name for name in everything if "norm" in name}) and len(plain[2]) == 3
    assert decayed == (OTHERS, 0.1, everything - plain[2] - embeddings[2]) and len(decayed[2]) == 7


def test_tied_embeddings_are_one_tensor(tmp_path):
    trainer = sft(tmp_path, model=tiny.llama(num_hidden_layers=1, tie_word_embeddings=True)).trainer
    assert groups(trainer)[2:] == [(RATE, 0.0, {"model.embed_tokens.weight"})]


@pytest.mark.parametrize("tied", [False, True])
def test_trained_whole_beside_adapters(tied, tmp_path):
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=tied)
    before = model.model.embed_tokens.weight.detach().clone()
    trainer = sft(tmp_path, model=model, use_peft=True, lora_target_modules=WHOLE, max_steps=2)
    head = trainer.trainer.model.get_output_embeddings().weight
    assert (head is trainer.trainer.model.get_input_embeddings().weight) == tied
    (_, _, adapters), (_, _, none), (rate, _, embeddings) = groups(trainer.trainer)
    prefix, suffix = "base_model.model.", ".modules_to_save.default.weight"
    both = {f"{prefix}model.embed_tokens{suffix}", f"{prefix}lm_head{suffix}"}
    assert embeddings == ({f"{prefix}model.embed_tokens{suffix}"} if tied else both) and rate == RATE
    assert len(adapters) == 2 and all("lora_" in name for name in adapters) and none == set()
    trainer.train()
    trained = trainer.trainer.model.get_input_embeddings().weight
    assert 0.5 * RATE < (trained - before).abs().max() < 2.1 * RATE  # AdamW's steps are as long as the rate


def test_found_by_identity_not_by_name():
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.GPTNeoXForCausalLM(config)
    head = model.get_output_embeddings().weight  # its name is not the same in all versions of transformers
    assert [id(p) for p in embedding_weights(model)] == [id(model.gpt_neox.embed_in.weight), id(head)]
    head.requires_grad_(False)
    assert [id(p) for p in embedding_weights(model)] == [id(model.gpt_neox.embed_in.weight)]


def test_low_rank_factors_on_an_embedding_are_an_adapter_like_any_other():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    assert embedding_weights(model) == []
    rows = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM")
    (delta,) = embedding_weights(get_peft_model(tiny.llama(), rows))
    assert delta.shape == (2, 32)


def test_a_bias_of_the_head_keeps_the_decay_of_biases():
    config = transformers.PhiConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.PhiForCausalLM(config)
    head = model.lm_head
    assert {id(p) for p in embedding_weights(model)} == {
        id(model.get_input_embeddings().weight), id(head.weight), id(head.bias)
    }  # fmt: skip
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1, "betas": (0.5, 0.6)}, {"params": plain, "weight_decay": 0.0}], lr=1.0
    )
    _move(optimizer, embedding_weights(model), 0.25)
    own = optimizer.param_groups[2:]
    assert [(g["lr"], g["weight_decay"], g["betas"], len(g["params"])) for g in own] == [
        (0.25, 0.1, (0.5, 0.6), 2), (0.25, 0.0, (0.9, 0.999), 1)
    ]  # fmt: skip
    assert own[1]["params"][0] is head.bias
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


# -------------------------------------------------------------------------------------- schedules, clipping, the step


def test_a_schedule_scales_each_peak_and_logs_both(tmp_path):
    trainer = sft(tmp_path, max_steps=4, warmup_steps=2, lr_scheduler="linear")
    trainer.train()
    seen = [(row["learning_rate"], row["embedding_learning_rate"]) for row in trainer.trainer.state.log_history[:4]]
    expected = [(OTHERS * share, RATE * share) for share in (0.0, 0.5, 1.0, 0.5)]
    assert seen == [pytest.approx(pair, abs=1e-12) for pair in expected]
    assert "embeddings: 16,576 weights train at 0.001" in (tmp_path / "summary.json").read_text()


def test_the_step_is_trls_with_another_rate_and_the_norm_is_of_everything(tmp_path):
    """SGD, clipped: each weight moves by its rate times trl's clipped gradient."""
    start = weights(sft(tmp_path / "start").trainer)
    options = {"optimizer": "sgd", "max_grad_norm": 1.0, "lr_scheduler": "constant"}
    moved = {}
    for backend in ("fast", "trl"):
        trainer = sft(tmp_path / backend, backend=backend, **options)
        trainer.train()
        assert trainer.trainer.state.log_history[0]["grad_norm"] > 1.5
        moved[backend] = {name: value - start[name] for name, value in weights(trainer.trainer).items()}
    total = math.sqrt(sum(float(value.double().square().sum()) for value in moved["trl"].values()))
    assert total == pytest.approx(1.0 * OTHERS, rel=1e-3)
    for name, theirs in moved["trl"].items():
        share = RATE / OTHERS if name in ("model.embed_tokens.weight", "lm_head.weight") else 1.0
        assert (moved["fast"][name] - share * theirs).norm() < 5e-3 * share * theirs.norm(), name
        assert theirs.norm() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_beside_adapters_learn_what_they_learn_on_trl(tied, tmp_path):
    """A tied weight gets the gradient of both of its uses."""
    moved = {}
    for backend in ("fast", "trl"):
        model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=tied)
        trainer = sft(tmp_path / backend, backend=backend, model=model, embedding_learning_rate=None, optimizer="sgd",
                      use_peft=True, lora_target_modules=WHOLE, max_steps=1, lr_scheduler="constant")  # fmt: skip
        before = weights(trainer.trainer)
        trainer.train()
        moved[backend] = {name: value - before[name] for name, value in weights(trainer.trainer).items()}
    whole = [name for name in moved["trl"] if "modules_to_save" in name]
    assert len(whole) == (1 if tied else 2)
    for name in whole:
        theirs = moved["trl"][name]
        assert theirs.norm() > 1e-4 and (moved["fast"][name] - theirs).norm() < 1e-3 * theirs.norm(), name


def test_without_the_option_the_optimizer_is_transformers_own(tmp_path):
    trainer = sft(tmp_path, embedding_learning_rate=None).trainer
    assert isinstance(trainer, EmbeddingRate) and len(groups(trainer)) == 2
    trainer.train()
    assert "embedding_learning_rate" not in trainer.state.log_history[0]


# ------------------------------------------------------------------------------------------------ optimizers and resume


SLOW = ["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "sgd", "adafactor"]


@pytest.mark.parametrize(
    "optimizer", ["adamw_fused", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw_8bit", *SLOW))]
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_resumed_is_uninterrupted(optimizer, tmp_path):
    resume(optimizer, tmp_path)


def resume(optimizer: str, tmp_path: Path, **size: Any) -> Any:
    """Four steps, and two of them again from a checkpoint: the same rates and weights; returns the first trainer."""
    options = {
        "optimizer": optimizer, "max_steps": 4, "save_steps": 2, "weight_decay": 0.01, "warmup_steps": 1,
        "use_peft": True, "lora_target_modules": WHOLE,
    }  # fmt: skip
    whole = sft(tmp_path / "whole", model=tiny.llama(num_hidden_layers=1, **size), **options)
    whole.train()
    resumed = sft(tmp_path / "again", model=tiny.llama(num_hidden_layers=1, **size), **options)
    start = weights(resumed.trainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.trainer.state.global_step == 4
    rates = [(row["learning_rate"], row["embedding_learning_rate"]) for row in resumed.trainer.state.log_history[:4]]
    assert rates == [(row["learning_rate"], row["embedding_learning_rate"])
                     for row in whole.trainer.state.log_history[:4]]  # fmt: skip
    assert all(embedding == pytest.approx(other * RATE / OTHERS) for other, embedding in rates) and rates[2][0] > 0
    counted = [row["num_tokens"] for row in whole.trainer.state.log_history[:4]]
    assert counted == [row["num_tokens"] for row in resumed.trainer.state.log_history[:4]] == sorted({*counted})
    there, here = weights(whole.trainer), weights(resumed.trainer)
    for name in there:
        assert torch.allclose(there[name], here[name], rtol=0, atol=NEAR), name
        assert not torch.equal(there[name], start[name]), name
    return whole.trainer


@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_a_longer_run_at_other_rates_follows_its_own_schedule(backend, tmp_path):
    """Left alone the step after a linear schedule's end trains at 0, and all that follow at the old peaks' shares."""
    used = []

    class Rates(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            used.append(sorted({group["lr"] for group in optimizer.param_groups}))

    sft(tmp_path, backend=backend, max_steps=2, lr_scheduler="linear").train()
    peaks = {"learning_rate": 2 * OTHERS} | ({"embedding_learning_rate": 3 * RATE} if backend == "fast" else {})
    resumed = sft(tmp_path, backend=backend, max_steps=4, lr_scheduler="linear", resume=True, callbacks=[Rates()],
                  **peaks)  # fmt: skip
    resumed.train()
    assert used == [pytest.approx(sorted(peak * share for peak in peaks.values())) for share in (0.5, 0.25)]
    logged = {row["step"]: row["learning_rate"] for row in resumed.trainer.state.log_history if "learning_rate" in row}
    assert logged == pytest.approx({1: OTHERS, 2: 0.5 * OTHERS, 3: OTHERS, 4: 0.5 * OTHERS})


@pytest.mark.parametrize(("backend", "first", "then"), [
    ("trl", "adamw", "adamw_fused"), ("fast", "adamw", "adamw_fused"), ("fast", "adamw_fused", "adamw"),
    ("fast", "adamw_8bit", "adamw_8bit"),
])  # fmt: skip
def test_a_resumed_run_steps_with_its_own_settings(backend, first, then, tmp_path):
    """torch and bitsandbytes load the old run's with the moments."""
    used = []

    class Settings(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            names = ("weight_decay", "betas", "eps", "fused")
            used.append([tuple(group[name] for name in names if name in group) for group in optimizer.param_groups])

    sft(tmp_path, backend=backend, weight_decay=0.1, optimizer=first).train()
    sft(tmp_path, backend=backend, weight_decay=0.2, optimizer=then, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6,
        max_steps=2, resume=True, callbacks=[Settings()]).train()  # fmt: skip
    fused = () if then == "adamw_8bit" else (then == "adamw_fused" or None,)
    decays = [0.2, 0.0] + ([0.2] if backend == "fast" else [])
    assert used == [[(decay, (0.8, 0.9), 1e-6, *fused) for decay in decays]]


def test_a_fused_step_counts_where_its_weights_are():
    """torch keeps the count of any other step in host memory, and so in the checkpoint of one."""
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight]["step"] = torch.tensor(1.0)
    for fused, device in ((None, "cpu"), (True, "meta")):
        _write_settings(optimizer, [{"fused": fused}])
        assert optimizer.state[weight]["step"].device.type == device


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_moments_of_large_weights_on_a_gpu(optimizer, tmp_path):
    """Paged moments exist on GPUs alone, for 100,000 weights and more."""
    trainer = resume(optimizer, tmp_path, hidden_size=512)
    state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    moments = [state[p]["state1"] for p in embedding_weights(trainer.model)]
    assert [m.dtype for m in moments] == [torch.float32, torch.float32 if "32bit" in optimizer else torch.uint8]
    paged = [getattr(m, "is_paged", False) for m in moments]
    assert paged == [False, False] if optimizer == "adamw_8bit" else paged[1]


def test_eight_bit_moments_go_by_the_weight_not_by_the_group(tmp_path):
    """transformers keeps the moments of nn.Embedding in 32 bits; the head's are 8 bits, in the same group."""
    trainer = sft(tmp_path, optimizer="adamw_8bit", use_peft=True, lora_target_modules=WHOLE)
    trainer.train()
    optimizer, model = trainer.trainer.optimizer, trainer.trainer.model
    optimizer = getattr(optimizer, "optimizer", optimizer)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert [id(p) for p in optimizer.param_groups[2]["params"]] == [id(embedding), id(head)]
    assert optimizer.state[embedding]["state1"].dtype == torch.float32
    assert optimizer.state[head]["state1"].dtype == torch.uint8


def test_one_run_decides_nothing_for_the_next(tmp_path):
    """bitsandbytes keeps overrides by place in the groups, for the whole process: the next weight there got 32 bits."""
    for name, targets in (("first", WHOLE), ("second", ["q_proj", "lm_head"])):
        trainer = sft(tmp_path / name, optimizer="adamw_8bit", use_peft=True, lora_target_modules=targets)
        trainer.train()
        optimizer = trainer.trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)
    (head,) = optimizer.param_groups[2]["params"]
    assert head is trainer.trainer.model.get_output_embeddings().weight
    assert optimizer.state[head]["state1"].dtype == torch.uint8
    modules = {id(module) for module in trainer.trainer.model.modules()}
    shared = type(optimizer.mng).get_instance()
    assert optimizer.mng is not shared
    assert not [triple for triple in shared.module_weight_config_triple if id(triple[0]) in modules]


@pytest.mark.parametrize(("first", "then"), [(RATE, None), (None, RATE)])
def test_a_checkpoint_with_other_groups_is_refused(first, then, tmp_path):
    sft(tmp_path / "run", embedding_learning_rate=first).train()
    other = sft(tmp_path / "other", embedding_learning_rate=then, max_steps=2)
    with pytest.raises(CheckpointError, match="other parameter groups.*resume with the options"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


# -------------------------------------------------------------------------------------------------------------- errors


def test_where_no_embedding_trains_it_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"embedding_learning_rate = 0.001: neither .* modules_to_save, or leave it"):
        sft(tmp_path / "a", use_peft=True, lora_target_modules=["q_proj"])
    frozen = tiny.llama(num_hidden_layers=1)
    for weight in embedding_weights(frozen):
        weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="set requires_grad"):
        sft(tmp_path / "b", model=frozen)


def test_rates_that_are_none_and_optimizers_that_are_made(tmp_path):
    trainer = sft(tmp_path, embedding_learning_rate=None).trainer
    for rate in (float("nan"), float("inf"), -1e-3):
        with pytest.raises(ConfigError, match="a finite number >= 0"):
            trainer.train_embeddings_at(rate)
    trainer.create_optimizer()
    with pytest.raises(ConfigError, match="made already"):
        trainer.train_embeddings_at(RATE)
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="SGD keeps 1 of the embeddings in no parameter group"):
        _move(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0), [weight], 0.1)


def test_embeddings_stored_in_bf16_are_spoken_of(tmp_path, caplog):
    options = {"embedding_learning_rate": None, "precision": "bf16"}
    model = tiny.llama(num_hidden_layers=1)
    said = sft(tmp_path / "fp32", model=model, **options).trainer.train_embeddings_at(RATE)
    assert said == "embeddings: 16,576 weights train at 0.001, the others at 0.01"
    assert "stored in" not in caplog.text
    assert sft(tmp_path / "bf16", model=model.bfloat16(), **options).trainer.train_embeddings_at(RATE) == said
    assert "stored in bfloat16, which loses steps below 1/256 of a weight" in caplog.text


# ------------------------------------------------------------------------------------------------ the other algorithms


def test_every_algorithm_of_fast_takes_it(tmp_path):
    for algorithm, support in BACKEND.support.items():
        if support.status == "supported":
            assert issubclass(FAST_TRAINERS[algorithm], EmbeddingRate), algorithm
            require(BACKEND, algorithm, {"embedding_learning_rate": 1e-5})
    assert FAST_TRAINERS["sft"] is FastSFT


def test_a_manager_of_another_make_is_left_alone():
    optimizer = SimpleNamespace(mng=object(), param_groups=[])
    before = optimizer.mng
    _keep_overrides_to_itself(optimizer, torch.nn.Linear(2, 2))
    assert optimizer.mng is before


@pytest.mark.slow
def test_dpo(tmp_path):
    trainer = create_rl_trainer(
        tiny.llama(num_hidden_layers=1), list(tiny.pairs()), algorithm="dpo", backend="fast", max_steps=1, batch_size=2,
        learning_rate=OTHERS, embedding_learning_rate=RATE, report_to="none", tokenizer_name=tiny.tokenizer(),
        output_dir=str(tmp_path), use_peft=True, lora_target_modules=WHOLE, lr_scheduler="constant",
    )  # fmt: skip
    before = weights(trainer.trainer)
    trainer.train()
    for name, after in weights(trainer.trainer).items():
        if "lora_A" not in name:  # its gradient is 0 while B is
            rate = RATE if "modules_to_save" in name else OTHERS
            assert (after - before[name]).abs().max() == pytest.approx(rate, rel=0.01), name


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_bitsandbytes_waits_for_no_parameter(optimizer, tmp_path, monkeypatch):
    """The same numbers as its own step, its hooks run, and nothing is synchronised between parameters."""
    from bitsandbytes.optim import optimizer as theirs

    waited, hooked = [], []
    monkeypatch.setattr(theirs, "sync_gpu", lambda tensor: waited.append(tensor))
    weights = {}
    for whose in ("ours", "theirs"):
        torch.manual_seed(0)
        trainer = sft(tmp_path / whose, optimizer=optimizer, use_peft=True, lora_target_modules=WHOLE)
        made = trainer.trainer.create_optimizer()
        made.register_step_post_hook(lambda *_: hooked.append(1))
        if whose == "theirs":
            del made.step
        waited.clear()
        hooked.clear()
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for group in made.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=generator)
            made.param_groups[0]["params"][0].grad = None
            made.step()
        assert hooked == [1, 1, 1]
        parameters = sum(len(group["params"]) for group in made.param_groups)
        assert parameters > 2 and len(waited) >= (0 if whose == "ours" else 3 * (parameters - 1))
        assert whose == "theirs" or not waited
        weights[whose] = [p.detach().clone() for group in made.param_groups for p in group["params"]]
    pairs = list(zip(weights["ours"], weights["theirs"], strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(float(a.norm()) > 0 for a, _ in pairs)
