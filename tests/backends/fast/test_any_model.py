"""`attach` on models that the table does not know, and under trainers that are not TRL's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from aligntune.backends.fast import attach, attachment_of, detach
from aligntune.errors import ConfigError
from tests.backends.fast.minis import VOCAB, batch, build

_SPECIALS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}

# (class, config class, settings), and the modules that stay eager.
OTHERS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 2, "n_head": 2, "n_embd": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {"transformer.h.*", "transformer.h.*.ln_1", "transformer.h.*.ln_2", "transformer.h.*.attn",
         "transformer.h.*.mlp", "transformer.ln_f", "head"},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 12, "word_embed_proj_dim": 12, "ffn_dim": 20,
         "dropout": 0.0},
        # Its two linears of the MLP lie in the layer itself.
        {"model.decoder.layers.*", "model.decoder.layers.*.self_attn", "model.decoder.layers.*.self_attn_layer_norm",
         "model.decoder.layers.*.final_layer_norm", "model.decoder.final_layer_norm", "head"},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "decoder_start_token_id": 0},
        {"encoder.block.*", "encoder.block.*.layer.*", "encoder.block.*.layer.*.SelfAttention", "decoder.block.*",
         "decoder.block.*.layer.*", "decoder.block.*.layer.*.SelfAttention",
         "decoder.block.*.layer.*.EncDecAttention", "head"},
    ),
}  # fmt: skip


def other(name: str) -> Any:
    model_class, config_class, settings, _ = OTHERS[name]
    torch.manual_seed(3)
    config = getattr(transformers, config_class)(**_SPECIALS, **settings)
    return getattr(transformers, model_class)(config).train()


def losses_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_which_nothing_is_known_runs_as_it_did_and_every_block_is_named(name):
    model = other(name)
    plain = copy.deepcopy(model)
    state = {path: dict(vars(module)) for path, module in model.named_modules()}
    attachment = attach(model)
    assert {line.modules for line in attachment.report} == OTHERS[name][3]
    assert all(line.eager and line.reason for line in attachment.report)
    assert attachment_of(model) is attachment and not attachment.patches
    ours, theirs = losses_and_gradients(model), losses_and_gradients(plain)
    assert len(ours) == len(theirs) > 10 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    model.zero_grad()
    detach(model)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == state
    with pytest.raises(ConfigError, match="is in no family of the table"):
        attach(model, strict=True)


def test_an_encoder_without_a_head():
    config = transformers.BertConfig(
        **_SPECIALS, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config).eval()
    ids = batch()["input_ids"]
    plain = model(ids).last_hidden_state
    lines = [str(line) for line in attach(model).report]
    assert "encoder.layer.*: eager, BertLayer is in no family of the table" in lines
    assert not [line for line in lines if line.startswith("head")]
    assert torch.equal(model(ids).last_hidden_state, plain) and plain.any()


class Rows(torch.utils.data.Dataset):
    """Rows of six tokens, their own labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(6) * 7 + 13 * index) % (VOCAB - 3) + 3
        return {"input_ids": ids, "labels": ids}


def trained(model: nn.Module, path: Path, **settings: Any) -> tuple[transformers.Trainer, list[float]]:
    args = transformers.TrainingArguments(
        str(path), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, logging_steps=1, report_to="none",
        use_cpu=not torch.cuda.is_available(), save_strategy="no", seed=3, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Rows())
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("settings", [
    pytest.param({}, id="plain"),
    pytest.param({"gradient_accumulation_steps": 2}, id="accumulated", marks=pytest.mark.slow),
    pytest.param({"gradient_checkpointing": True}, id="recomputed", marks=pytest.mark.slow),
])  # fmt: skip
def test_under_transformers_own_trainer(settings, tmp_path):
    model, plain = (build("mistral", num_hidden_layers=1) for _ in range(2))
    attachment = attach(model, strict=True)
    trainer, ours = trained(model, tmp_path / "ours", **settings)
    _, theirs = trained(plain, tmp_path / "theirs", **settings)
    assert len(theirs) == 2 and abs(theirs[0] - theirs[1]) > 0.05 and ours == pytest.approx(theirs, rel=1e-5)
    assert attachment_of(trainer.model) is attachment and attachment.attached
    step = {name: value.to(model.device)[None] for name, value in Rows()[0].items()}
    result = attachment.attest(lambda: trainer.compute_loss(model, step).backward())
    assert result.ok and result.kernels["logits_loss"] == 1
