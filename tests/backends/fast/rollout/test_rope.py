"""Rotary embeddings that look at lengths: rows up to where they choose anew are transformers', longer ones refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from aligntune.backends.fast.rollout import RolloutEngine, cannot_run_because
from aligntune.backends.fast.rollout.rope import length_limit
from aligntune.backends.fast.rollout.serve import EngineGenerator
from aligntune.core import generation
from aligntune.errors import ConfigError
from tests.backends.fast.minis import build
from tests.backends.fast.rollout.test_engine import GREEDY, prompts_of, theirs
from tests.backends.fast.rollout.test_trl import built_of
from tests.core import tiny

LIMIT = 64
NEW = 10
_BASE = {"rope_theta": 10000.0}
_LONGROPE = _BASE | {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0 + i / 10 for i in range(6)], "long_factor": [4.0 + i for i in range(6)]}
_DYNAMIC = _BASE | {"rope_type": "dynamic", "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"hidden_size": 48, "max_position_embeddings": 4 * LIMIT, "rope_parameters": _LONGROPE,
                          "original_max_position_embeddings": LIMIT}),
    "dynamic": ("llama", {"max_position_embeddings": LIMIT, "rope_parameters": _DYNAMIC}),
    "of one kind of layer": ("gemma3_text", {"max_position_embeddings": LIMIT, "rope_parameters": {
        "sliding_attention": _BASE | {"rope_type": "default"}, "full_attention": _DYNAMIC}}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
SAMPLING = dataclasses.replace(GREEDY, max_new_tokens=NEW)


def made(kind: str, **overrides: Any) -> Any:
    family, settings = KINDS[kind]
    return build(family, **(settings | overrides))


def seen_long(model: Any) -> None:
    """A forward over a row beyond the limit, whose frequencies stay in the model."""
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        model(torch.tensor(prompts_of((LIMIT + 40,)), device=device))


@kinds
def test_rows_up_to_the_limit_are_transformers_alone_and_together(kind: str) -> None:
    """The longest ends on the limit; the model comes with the frequencies of a longer row."""
    model, prompts = made(kind), prompts_of((3, 5, LIMIT - NEW))
    expected = theirs(model, prompts, max_new_tokens=NEW)
    seen_long(model)
    engine = RolloutEngine(model, max_batch=4, max_len=LIMIT)
    assert engine.generate(prompts, sampling=SAMPLING).completion_ids == expected
    assert [engine.generate([ids], sampling=SAMPLING).completion_ids[0] for ids in prompts] == expected


@kinds
def test_the_model_chooses_again_afterwards(kind: str) -> None:
    model, other = made(kind), made(kind)
    ids = torch.tensor(prompts_of((LIMIT + 9,)))
    engine = RolloutEngine(model, max_batch=2, max_len=LIMIT)
    seen_long(model)
    seen_long(other)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    engine.generate(prompts_of((7,)), sampling=SAMPLING)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(engine._decoder, "prefill", lambda prefixes: 1 / 0)
        engine.generate([[3] * 3], sampling=SAMPLING)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        long, fresh = model.eval()(ids).logits, other.eval()(ids).logits
        assert torch.equal(long, fresh)
        assert not torch.allclose(long[:, :8], model(ids[:, :8]).logits, atol=1e-3)  # the choice is there


@kinds
def test_longer_rows_are_refused(kind: str) -> None:
    model = made(kind)
    name, limit = length_limit(model.config) or ("", 0)
    assert limit == LIMIT and length_limit(build("llama").config) is None
    assert cannot_run_because(model) is None and cannot_run_because(model, max_len=LIMIT) is None
    with pytest.raises(ConfigError, match=f"rows of 65 tokens: beyond 64 its rotary embedding of type {name!r}.*'hf'"):
        RolloutEngine(model, max_len=LIMIT + 1)
    with pytest.raises(ConfigError, match="prompt 0 has 60 tokens: with 10 new ones it passes max_len 64"):
        RolloutEngine(model, max_len=LIMIT).generate([[3] * 60], sampling=SAMPLING)


def test_a_trainer_is_told_when_it_is_built(tmp_path: Any) -> None:
    def of(**options: Any) -> Any:
        model = tiny.llama(max_position_embeddings=LIMIT, rope_parameters=_DYNAMIC)
        return built_of("fast", "grpo", tmp_path, model_name=model, **options)

    assert "; rollouts: our engine" in of(max_seq_length=LIMIT).attestation()["layout"]
    long = of(max_seq_length=LIMIT + 1).attestation()["layout"]
    assert "; rollouts: hf, rows of 65 tokens: beyond 64 its rotary embedding of type 'dynamic'" in long
    with pytest.raises(ConfigError, match="rollout_engine = 'fast': rows of 65 tokens: beyond 64"):
        of(max_seq_length=LIMIT + 1, rollout_engine="fast")


def test_longer_rows_are_generated_by_transformers(capsys: Any) -> None:
    model, tokens = made("longrope", vocab_size=259), tiny.tokenizer()
    generator = EngineGenerator(model, tokens)
    for prompt, declined in (("x" * 54, 0), ("x" * 55, 1)):
        texts = [generation.generate(model, tokens, prompt, raw=True, max_new_tokens=10, generator=one)
                 for one in (generator, None)]
        assert texts[0] == texts[1]
        assert capsys.readouterr().err.count("with transformers; rows of 65 tokens: beyond 64") == declined
    assert generator._engine is not None and generator._engine.max_len == LIMIT
