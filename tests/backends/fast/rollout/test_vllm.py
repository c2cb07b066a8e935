"""TRL's own vLLM path on backend fast, with a stand-in for vLLM: what it is sent, and what its answers teach."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from trl.generation import vllm_generation

from aligntune.backends.fast import head, lora
from tests.backends.fast.rollout.test_trl import built_of, logged
from tests.core import tiny

_SLOW = pytest.mark.slow
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4}
FP8 = LORA | {"base_precision": "fp8"}
SERVER: dict[str, Any] = {"trainer_options": {"vllm_mode": "server"}}


class Engine:
    """What vLLM is to TRL, colocated or as the client of a server: takes weights, and answers for the n-th time.

    `syncs`: the weights of each time that they were sent. `policies`: those that `watched` held at that time, adapters
    merged. `asked`: rows of each round of generation. `scores`: whether log-probs were asked for. `stops`: the strings
    that were to end completions.
    """

    def __init__(self, **options: Any) -> None:
        self.watched: Any = None
        self.asked: list[int] = []
        self.scores: set[bool] = set()
        self.stops: list[Any] = []
        self.syncs: list[dict[str, torch.Tensor]] = [{}]
        self.policies: list[dict[str, torch.Tensor]] = []
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=self)))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def init_communicator(self, **options: Any) -> None:
        pass

    def get_server_info(self) -> Any:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.syncs[-1] |= {name: value.detach().clone() for name, value in weights}

    def update_named_params(self, metadata: Any, weights: Any) -> None:
        self.load_weights(weights)
        assert [name for name, *_ in metadata] == list(self.syncs[-1])

    def reset_prefix_cache(self) -> None:
        """Comes after the last weight of a sync."""
        self.policies.append(merged(self.watched))
        self.syncs.append({})

    def generate(self, prompts: Any, sampling_params: Any = None, *, n: int = 1, **options: Any) -> Any:
        served = sampling_params is None
        scores = (options["logprobs"] if served else sampling_params.logprobs) is not None
        self.scores.add(scores)
        sent = (options["generation_kwargs"] or {}) if served else vars(sampling_params)
        self.stops.append(sent.get("stop"))
        rows = []
        for row in range(len(prompts) * n):
            noise = torch.Generator().manual_seed(100 * len(self.asked) + row)
            ids = torch.randint(3, 250, (2 + row % 4,), generator=noise).tolist()
            rows.append(([*ids, 2][:5], (-6 + torch.rand(5, generator=noise)).tolist()))
        self.asked.append(len(rows))
        if served:
            return {"prompt_ids": prompts, "completion_ids": [ids for ids, _ in rows],
                    "logprobs": [[[score] for score in some[: len(ids)]] for ids, some in rows] if scores else None}
        return [SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[SimpleNamespace(
            token_ids=ids, logprobs=[{token: SimpleNamespace(rank=1, logprob=score)} for token, score in
                                     zip(ids, some, strict=False)] if scores else None)])
                for prompt, (ids, some) in zip(prompts, rows, strict=True)]


def merged(model: Any) -> dict[str, torch.Tensor]:
    """The policy's weights under the names of the model without adapters."""
    found = {name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone()
             for name, value in model.named_parameters() if ".lora_" not in name}
    for path, layer in model.named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            found[path.removeprefix("base_model.model.") + ".weight"] += layer.scaling["default"] * delta.detach()
    return found


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    made: list[Engine] = []

    def engine(**options: Any) -> Engine:
        made.append(Engine(**options))
        return made[-1]

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    for name, stand_in in (("LLM", engine), ("VLLMClient", engine), ("SamplingParams", SimpleNamespace)):
        monkeypatch.setattr(vllm_generation, name, stand_in, raising=False)
    return made


def trained(backend: str, algorithm: str, engines: list[Engine], path: Any, **options: Any) -> tuple[Any, Engine]:
    """What was built, after two steps of it, and its engine."""
    if algorithm == "ppo":
        options |= {"num_generations": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}
    with mock.patch.dict(os.environ):  # TRL sets a launcher's variables for vLLM, and the next trainer would read them
        built = built_of(backend, algorithm, path, model_name=tiny.llama(num_hidden_layers=1), rollout_engine="vllm",
                         **options)
    engine = engines[-1]
    engine.watched = built.trainer.model
    before = frozen(built.trainer.model)
    built.trainer.train()
    for name, value in frozen(built.trainer.model).items():  # adapters were merged for each sync, and taken off again
        torch.testing.assert_close(value.float(), before[name].float(), rtol=0, atol=1e-6, msg=name)
    return built, engine


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """Weights that do not train, and copies of them in fp8."""
    found = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    found |= {f"{name}.fp8": layer.__dict__[lora.FP8].weight.rows for name, layer in model.named_modules()
              if lora.FP8 in layer.__dict__}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", LORA), ("rloo", LORA | SERVER),
    *(pytest.param(algorithm, options, marks=_SLOW) for algorithm, options in (
        ("grpo", {}), ("grpo", LORA | SERVER), ("grpo", FP8), ("dapo", LORA), ("rloo", LORA), ("rloo", {}),
        ("rloo", FP8), ("ppo", LORA), ("ppo", SERVER), ("ppo", FP8))),
], ids=str)
def test_two_steps_are_those_of_the_trl_backend(
    algorithm: str, options: dict[str, Any], engines: list[Engine], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_budget", lambda model: 1)  # a head that trains makes its gradients in the forward
    built, engine = trained("fast", algorithm, engines, tmp_path, **options)
    plain = {name: value for name, value in options.items() if name != "base_precision"}
    theirs, other = trained("trl", algorithm, engines, tmp_path, **plain)
    told = built.attestation()
    assert "; rollouts: vllm, as was asked for; generate: transformers" in told["layout"]
    assert told["step"]["ok"], told["step"]["problems"]
    made = 2 if algorithm != "rloo" and "use_peft" not in options else 0
    assert ("gradients in the forward" in told["layout"]) == bool(made)
    assert getattr(built.trainer, "in_forward", 0) == made

    assert engine.asked == other.asked == [4, 4]
    assert engine.scores == other.scores == {algorithm != "rloo"}, "TRL's RLOO asks for completions alone"
    names = {name for name, _ in tiny.llama(num_hidden_layers=1).named_parameters()}
    assert len(engine.policies) == len(other.policies) == 2
    for sent, policy in zip(engine.syncs, engine.policies, strict=False):
        assert sent.keys() == policy.keys() == names
        for name, value in sent.items():
            torch.testing.assert_close(value, policy[name], rtol=0, atol=1e-6, msg=name)
    first, second = engine.syncs[:2]
    assert max(float((second[name] - first[name]).abs().max()) for name in names) > 1e-4, "the step is in the second"

    keys = ["loss", "reward", "grad_norm", "entropy", "completions/mean_length"]
    if algorithm != "rloo":
        keys += [f"sampling/{name}" for name in ("importance_sampling_ratio/mean", "sampling_logp_difference/mean")]
        assert min(logged(built.trainer, keys[-1])) > 0.1, "an engine that is not the policy"
    near: dict[str, Any] = {"rel": 5e-4, "abs": 2e-6}
    if options is FP8:  # e4m3 rounds, and a completion at the cut of the importance ratio may fall on either side
        near = {"rel": 0.2, "abs": 0.02}
    for key in keys:
        found, expected = logged(built.trainer, key), logged(theirs.trainer, key)
        assert len(found) == len(expected) == 2 and all(map(math.isfinite, found)), key
        compared = 1 if options is FP8 else 2
        assert found[:compared] == pytest.approx(expected[:compared], **near), key
    assert min(logged(built.trainer, "grad_norm")) > 1e-3


@pytest.mark.parametrize("options", [LORA, pytest.param(LORA | SERVER, marks=_SLOW)], ids=str)
@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("rloo", marks=_SLOW), pytest.param("ppo", marks=_SLOW)])
def test_stop_strings_are_sent_as_stop(
    algorithm: str, options: dict[str, Any], engines: list[Engine], tmp_path: Any) -> None:
    for backend, given in (("trl", "^"), ("fast", ["^", "\n"])):
        _, engine = trained(backend, algorithm, engines, tmp_path, stop_strings=given, **options)
        assert engine.stops == [["^"] if given == "^" else given] * 2


@pytest.mark.parametrize(("options", "said"), [
    ({"rollout_engine": "vllm"}, "vllm, as was asked for"),
    ({"trainer_options": {"use_vllm": True}}, "vllm, as was asked for"), ({"rollout_engine": "hf"}, "hf, as was asked"),
], ids=str)
def test_the_layout_names_the_engine(options: dict[str, Any], said: str, engines: list[Engine], tmp_path: Any) -> None:
    with mock.patch.dict(os.environ):
        layout = built_of("fast", "grpo", tmp_path, **options).attestation()["layout"]
    assert f"; rollouts: {said}" in layout and len(engines) == ("vllm" in said)
