"""Attention that is not the family's reads no cache: the engine refuses it, or says what has replaced its own."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
from transformers.models.llama import modeling_llama

from aligntune.backends.fast import attach, detach
from aligntune.backends.fast.rollout import RolloutEngine, Sampling, cannot_run_because
from aligntune.errors import ConfigError
from tests.backends.fast.minis import MINIS
from tests.backends.fast.rollout.test_engine import GREEDY, lora, mini, prompts_of, theirs
from tests.backends.fast.rollout.test_trl import built_of
from tests.core import tiny

_FAMILYS = modeling_llama.LlamaAttention.forward


def of_their_own(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    """No attention at all: nothing is cached, and nobody is asked."""
    return self.o_proj(self.q_proj(hidden_states)), None


class Subclass(modeling_llama.LlamaAttention):
    forward = of_their_own


class Same(modeling_llama.LlamaAttention):
    """Runs what its parent runs."""


def subclassed(layer: Any, monkeypatch: Any) -> None:
    layer.self_attn.__class__ = Subclass


def patched_class(layer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", of_their_own)


def patched_instance(layer: Any, monkeypatch: Any) -> None:
    layer.self_attn.forward = types.MethodType(of_their_own, layer.self_attn)


replaced = pytest.mark.parametrize("replace", [subclassed, patched_class, patched_instance])


@replaced
@pytest.mark.parametrize("attached", [False, True])
def test_another_attention_is_refused_at_creation(replace: Any, attached: bool, monkeypatch: Any) -> None:
    """In the last layer alone, or in all."""
    model = mini()
    replace(model.model.layers[1], monkeypatch)
    path = "model.layers.0" if replace is patched_class else "model.layers.1"
    if attached:
        attach(model)
    try:
        with pytest.raises(ConfigError, match=rf"'fast': .*{path}\.self_attn.* the family's attention; rollout_engine"):
            RolloutEngine(model, max_len=64)
        if replace is not patched_instance:
            assert f"{__name__}.of_their_own" in (cannot_run_because(lora(model)) or "")
    finally:
        if attached:
            detach(model)


@pytest.mark.parametrize("family", MINIS)
def test_the_familys_own_is_not(family: str) -> None:
    """As it is, attached, under adapters, and where a bound copy of the class's forward was left on an instance."""
    model = mini(family)
    assert cannot_run_because(model) is None
    attention = model.model.layers[0].self_attn
    attention.forward = types.MethodType(type(attention).forward, attention)
    assert cannot_run_because(model) is None
    del attention.forward
    attach(model)
    assert cannot_run_because(model) is None
    detach(model)
    assert cannot_run_because(lora(model)) is None
    llama = mini()
    llama.model.layers[0].self_attn.__class__ = Same
    assert cannot_run_because(llama) is None


def wrapped(layer: Any, monkeypatch: Any) -> None:
    """Calls the family's, and is not it for that."""
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = _FAMILYS(self, *args, **kwargs)
        return output * 0.1, weights

    layer.self_attn.forward = types.MethodType(scaled, layer.self_attn)


@pytest.mark.parametrize("replace", [subclassed, patched_class, patched_instance, wrapped])
def test_an_attention_that_is_replaced_later_is_told(replace: Any, monkeypatch: Any) -> None:
    model, prompts = mini(), prompts_of((1, 9))
    engine = RolloutEngine(model, max_batch=2, max_len=64)
    expected = theirs(model, prompts)
    assert engine.generate(prompts, sampling=GREEDY).completion_ids == expected
    replace(model.model.layers[1], monkeypatch)
    with pytest.raises(ConfigError, match="the family's attention; rollout_engine='hf'"):
        engine.generate(prompts, sampling=GREEDY)
    monkeypatch.undo()
    model.model.layers[1].self_attn.__class__ = modeling_llama.LlamaAttention
    model.model.layers[1].self_attn.__dict__.pop("forward", None)
    assert engine.generate(prompts, sampling=GREEDY).completion_ids == expected


@pytest.mark.parametrize("length", [1, 9], ids=["step", "prefill"])
@pytest.mark.parametrize(("times", "called"), [(0, "[0]"), (2, "[0, 1, 1]")])
def test_a_layer_that_calls_its_attention_otherwise_than_once_is_told(times: int, called: str, length: int) -> None:
    """Not at all, nothing of its row is cached; twice, the second call would see the first's keys as its own."""
    model, prompts = mini(), prompts_of((length,))
    engine = RolloutEngine(model, max_batch=2, max_len=64)
    expected = engine.generate(prompts, sampling=GREEDY).completion_ids
    layer = model.model.layers[1]

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        for _ in range(times):
            type(self).forward(self, hidden_states, *args, **kwargs)
        return hidden_states

    layer.forward = types.MethodType(forward, layer)
    with pytest.raises(ConfigError) as error:
        engine.generate(prompts, sampling=GREEDY)
    assert f"layers {called} of 2 called its attention" in str(error.value)
    pool = engine._decoder.pool  # type: ignore[union-attr]
    assert pool.free == pool.capacity and model.config._attn_implementation == "sdpa"
    del layer.forward
    assert engine.generate(prompts, sampling=GREEDY).completion_ids == expected


def test_a_trainer_is_told_when_it_is_built(tmp_path: Any) -> None:
    def of(**options: Any) -> Any:
        model = tiny.llama()
        model.model.layers[1].self_attn.__class__ = Subclass
        return built_of("fast", "grpo", tmp_path, model_name=model, **options)

    why = f"model.layers.1.self_attn runs {__name__}.of_their_own, not the family's attention"
    layout = of().attestation()["layout"]
    assert f"; rollouts: hf, {why}" in layout and f"; generate: transformers, for {why}" in layout
    with pytest.raises(ConfigError, match=f"rollout.rollout_engine = 'fast': {why}"):
        of(rollout_engine="fast")


def test_capped_scores_are_said_to_run_eager(tmp_path: Any, device: str) -> None:
    """Gemma 2: in the layout, in the attested step, and as a refusal under strict."""
    eager = "attention of a prefill, a row at a time: no launch over ragged rows caps scores"
    model = mini("gemma2", vocab_size=259)
    layout = built_of("fast", "grpo", tmp_path, model_name=model).attestation()["layout"]
    detach(model)
    assert f"; rollouts: our engine (eager: {eager}), in the model's own memory" in layout
    assert layout.endswith(f"; generate: our engine (eager: {eager})")
    attachment = attach(model.to(device))
    engine = RolloutEngine(model, max_batch=2, max_len=64)
    sampling = Sampling(max_new_tokens=1, temperature=0)
    for length, told in ((1, False), (5, True)):  # one token has no prefill
        result = attachment.attest(functools.partial(engine.generate, prompts_of((length,)), sampling=sampling))
        assert result.problems == ()
        assert any(line.startswith("model.layers.*.self_attn: eager, 1 calls since attach: " + eager)
                   for line in result.eager) is told
    attach(model, strict=True)
    assert cannot_run_because(model) == f"strict=True, and eager would run {eager}"
    detach(model)
    llama = mini()
    attach(llama, strict=True)
    assert cannot_run_because(llama) is None


def test_strict_is_not_answered_with_transformers_generate(tmp_path: Any) -> None:
    def of(**options: Any) -> Any:
        return built_of("fast", "grpo", tmp_path, model_name=mini("gemma2", vocab_size=259), strict=True, **options)

    with pytest.raises(ConfigError, match="'auto' with model.strict = True: .* eager would run attention of a prefill, "
                                          ".*; rollout_engine='hf' generates with transformers, strict=False takes"):
        of()
    assert "; rollouts: hf, as was asked for" in of(rollout_engine="hf").attestation()["layout"]


def test_a_model_that_was_cut_runs_with_the_layers_that_it_has() -> None:
    model = tiny.llama(num_hidden_layers=4).eval()
    model.model.layers = model.model.layers[:2]
    prompts = prompts_of((3, 9))
    found = RolloutEngine(model, max_batch=2, max_len=64).generate(prompts, sampling=GREEDY)
    assert found.completion_ids == theirs(model, prompts)
    model.model.layers = model.model.layers[1:]
    assert cannot_run_because(model) == "model.layers.0.self_attn is number 1 of its cache, in place 0"


def test_layers_with_configurations_of_their_own_are_refused() -> None:
    """PEFT's layer_replication: the second half is a copy, configuration and all."""
    model = lora(tiny.llama(num_hidden_layers=2), layer_replication=[(0, 2), (0, 2)])
    assert "reads a configuration of its own" in (cannot_run_because(model) or "")
