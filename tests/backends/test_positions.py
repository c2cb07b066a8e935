"""Rows beyond a model's positions: an error where these are learned, a notice where they are rotary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from aligntune import create_rl_trainer, create_sft_trainer
from aligntune.backends.positions import check_positions
from aligntune.core.resolve import resolve
from aligntune.errors import ConfigError
from tests.core import tiny


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
                                      eos_token_id=2))


def opt() -> Any:
    return OPTForCausalLM(OPTConfig(vocab_size=259, max_position_embeddings=32, hidden_size=16, num_hidden_layers=1,
                                    num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16))


def llama(**rope: Any) -> Any:
    return tiny.llama(max_position_embeddings=32, **rope)


def check(model: Any, longest: int, **options: Any) -> list[str]:
    """The notices for rows (prompts) of up to `longest` tokens."""
    job = resolve({"model_name": model, "dataset_name": "d", "algorithm": "sft", **options})
    check_positions(job, model, SimpleNamespace(lengths=[3, longest], eval=None))
    return job.notices


ONLINE = {"algorithm": "grpo", "reward_functions": [len]}


@pytest.mark.parametrize(("longest", "options", "told"), [
    (8, {"max_seq_length": 64}, "data.max_seq_length = 64"),
    (8, {"algorithm": "dpo", "max_seq_length": 33}, "data.max_seq_length = 33"),
    (40, {}, "rows of up to 40 tokens"),
    (40, {"packing": True, "max_seq_length": 64}, "rows of up to 40 tokens"),
    (20, ONLINE | {"max_completion_length": 16}, "prompts of up to 20 tokens and completions of up to 16"),
    (8, {}, None),
    (8, {"max_seq_length": 1024}, None),  # as a run's own config.yaml has it
    (40, {"max_seq_length": 32}, None),  # cut
    (8, {"packing": True, "max_seq_length": 64}, None),
    (20, ONLINE, None),
    (20, ONLINE | {"max_completion_length": 12}, None),
    (20, ONLINE | {"max_completion_length": 31, "max_seq_length": 32}, None),
])
def test_the_length_that_counts_is_that_of_whole_rows(longest: int, options: dict[str, Any], told: str | None) -> None:
    for model in (gpt2(), opt(), get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"]))):
        if told is None:
            assert not any("positions" in notice for notice in check(model, longest, **options))
            continue
        with pytest.raises(ConfigError) as caught:
            check(model, longest, **options)
        assert str(caught.value).startswith(f"{told}, but the model's learned positions end at 32: lower max_")
    said = [notice for notice in check(llama(), longest, **options) if "positions" in notice]
    assert said == ([f"{told}: the model's rotary positions end at 32, and it was trained on none beyond"]
                    if told else [])


def test_scaled_positions_go_on() -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert check(llama(rope_parameters=scaled), 40) == []


@pytest.mark.parametrize("backend", ["trl", "fast"])
def test_the_factories_look(backend: str, tmp_path: Any) -> None:
    given = {"backend": backend, "tokenizer_name": tiny.tokenizer(), "device": "cpu", "max_steps": 1,
             "max_seq_length": 64, "report_to": "none"}
    with pytest.raises(ConfigError, match="learned positions end at 32"):
        create_sft_trainer(gpt2(), [{"text": "ab"}] * 4, output_dir=str(tmp_path / "sft"), **given)
    with pytest.raises(ConfigError, match="completions of up to 30, but the model's learned positions end at 32"):
        create_rl_trainer(gpt2(), [{"prompt": "count to 3"}] * 8, output_dir=str(tmp_path / "grpo"), algorithm="grpo",
                          reward_functions=["format"], max_completion_length=30, **given)
