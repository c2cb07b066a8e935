"""QLoRA under CUDA graphs: launched steps' bits, one unpacked weight at a time, and weights that came to lie elsewhere.

Without a GPU a stand-in takes the place of the captured graphs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from aligntune.backends.fast import graph_shapes
from aligntune.backends.fast.capture import Addresses
from aligntune.backends.fast.graphs import GraphedModel, _numbers, _unread_four_bits
from aligntune.backends.fast.ops.lora import Adapter, LoraLinear, lora_linear_group
from aligntune.backends.fast.ops.nf4 import NF4Weight
from tests.backends.fast import test_graphs, test_preference_graphs
from tests.backends.fast.test_preference_graphs import Pool, batch_of, stand_in

bnb = pytest.importorskip("bitsandbytes")


def four_bits(outs: int, ins: int, *, device: str = "cpu", kind: str = "nf4") -> Any:
    layer = bnb.nn.Linear4bit(ins, outs, bias=False, quant_type=kind, compress_statistics=True,
                              compute_dtype=torch.bfloat16)
    weight = torch.randn(outs, ins, device=device) * ins**-0.5
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
    return layer.to(device)


class Pair(nn.Module):
    def __init__(self, kind: str = "nf4") -> None:
        super().__init__()
        self.q_proj, self.lm_head = four_bits(64, 64, kind=kind), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.q_proj(x))


def test_layers_that_bitsandbytes_multiplies_are_found() -> None:
    assert _unread_four_bits(Pair()) is None
    assert _unread_four_bits(get_peft_model(Pair(), LoraConfig(target_modules=["q_proj"]))) is None  # type: ignore[arg-type]
    assert _unread_four_bits(nn.Linear(4, 4)) is None
    assert "'fp4' have no kernel" in str(_unread_four_bits(Pair("fp4")))
    other = get_peft_model(Pair(), LoraConfig(target_modules=["q_proj"], use_dora=True))  # type: ignore[arg-type]
    assert "Dora" in str(_unread_four_bits(other))
    scaled = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    assert "no kernel" in str(_unread_four_bits(get_peft_model(Pair(), scaled)))  # type: ignore[arg-type]
    waiting = Pair()
    waiting.q_proj = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert "not quantised yet" in str(_unread_four_bits(waiting))


def test_an_eighth_of_the_numbers_not_of_the_bytes() -> None:
    layer = four_bits(64, 128)
    assert layer.weight.numel() == 64 * 128 / 2 and _numbers(layer.weight) == 64 * 128
    assert _numbers(nn.Parameter(torch.zeros(3, 5))) == 15


STATE = "weight.quant_state."
PARTS = ("weight.data", *(STATE + name for name in ("absmax", "code", "offset", "state2.absmax", "state2.code")))


def move(holder: Any, part: str) -> torch.Tensor:
    """A tensor of a module at another place; returns the one it was, as it lies."""
    *path, name = part.split(".")
    for one in path:
        holder = getattr(holder, one)
    old = getattr(holder, name)
    setattr(holder, name, old.clone())
    return old


@pytest.mark.parametrize("part", [*(f"q_proj.{part}" for part in PARTS), "lm_head.bias.data", "seen"])
def test_every_tensor_that_a_graph_reads_is_watched(part: str) -> None:
    model = Pair()
    model.register_buffer("seen", torch.ones(3))
    watched = Addresses(model)
    before = watched.now()
    assert len(before) == 6 + 2 + 1 == len(set(before)) and watched.now() == before
    kept = move(model, part)
    assert sum(one != other for one, other in zip(before, watched.now(), strict=True)) == 1, kept.shape


def test_a_parameter_that_is_another_object_is_watched() -> None:
    model = Pair()
    watched = Addresses(model)
    before, kept = watched.now(), model.q_proj
    model.q_proj.weight = four_bits(64, 64).weight
    assert watched.now() != before and kept is model.q_proj


def test_what_was_captured_goes_when_a_weight_moves(monkeypatch: Any) -> None:
    stand_in(monkeypatch)
    toy = test_preference_graphs.Toy()
    graphed, batch = GraphedModel(toy, [toy.w]), batch_of(3)
    replays, kept = [], []
    for step in range(6):
        if step == 3:
            kept.append(toy.w.data)
            toy.w.data = toy.w.data + 1
            toy.w.grad = None
        graphed(batch)["log_probs"].sum().backward()
        replays.append(len(Pool.replays))
    # Launched, then captured; the same again after the move.
    assert replays == [0, 1, 2, 2, 3, 4] and graphed.captures == 2
    assert toy.w.grad.item() == 9.0 and toy.w.grad is graphed.buffers[0]


# ------------------------------------------------------------------------------------------------------------- the card


class Stack(nn.Module):
    """Layers in 4 bits under adapters, one after the other; log p of a token is the sum over its row."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(four_bits(width, width, device="cuda") for _ in range(layers))
        self.a, self.b = (nn.ParameterList(nn.Parameter(torch.randn(*shape, device="cuda") * shape[1]**-0.5)
                                           for _ in range(layers)) for shape in ((8, width), (width, 8)))

    def forward(self, input_ids: torch.Tensor, fused_lm_head: bool, **lengths: Any) -> Any:
        x = input_ids[0, :, None].sin().bfloat16().expand(-1, self.width).contiguous()
        for layer, a, b in zip(self.layers, self.a, self.b, strict=True):
            linear = LoraLinear(NF4Weight.from_param(layer.weight), None, (Adapter(a, b, 0.1),))
            (x,) = lora_linear_group(x, [linear])
        return SimpleNamespace(log_probs=x.float().sum(1)[None])


def step_of(call: Any, model: Stack, batch: dict[str, Any]) -> list[torch.Tensor]:
    for p in model.parameters():
        p.grad = None
    log_probs = call(batch)["log_probs"]
    log_probs.sin().sum().backward()
    return [log_probs.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def launched(model: Stack, batch: dict[str, Any]) -> list[torch.Tensor]:
    return step_of(lambda given: vars(model(**given, fused_lm_head=True)), model, batch)


@pytest.mark.gpu
def test_a_graph_holds_one_unpacked_weight_at_a_time() -> None:
    torch.manual_seed(0)
    layers, width = 24, 4096
    model = Stack(layers, width)
    graphed = GraphedModel(model, [p for p in model.parameters() if p.requires_grad])
    batch = batch_of(128) | {"input_ids": torch.randn(1, 128, device="cuda")}
    wanted = launched(model, batch)
    step_of(graphed, model, batch)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    found = step_of(graphed, model, batch)
    assert graphed.captures == 1 and all(one.abs().max() > 0 for one in wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    # One unpacked is 32 MiB: all of them would be 768.
    assert torch.cuda.memory_reserved() - before < layers * width * width * 2 / 2


@pytest.mark.gpu
@pytest.mark.parametrize("part", [part for part in PARTS if not part.endswith("code")])  # all layers share those
def test_a_weight_that_moves_is_read_where_it_lies(part: str) -> None:
    torch.manual_seed(1)
    model = Stack(2, 256)
    graphed = GraphedModel(model, [p for p in model.parameters() if p.requires_grad])
    batch = batch_of(128) | {"input_ids": torch.randn(1, 128, device="cuda")}
    for _ in range(3):
        step_of(graphed, model, batch)
    assert graphed.captures == 1
    move(model.layers[0], part).zero_()
    wanted = launched(model, batch)
    assert all(one.abs().max() > 0 for one in wanted)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(step_of(graphed, model, batch), wanted, strict=True))
    assert graphed.captures == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    test_graphs.model().to(torch.bfloat16).save_pretrained(path)
    return str(path)


def both(tmp_path: Any, monkeypatch: Any, lengths: tuple[int, ...], **options: Any) -> Any:
    """A captured run of 4 bits that a launched one equals to the bit."""
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)  # products over another number of rows round otherwise
    options = {"quantization": "nf4", "precision": "bf16"} | options
    captured = test_graphs.train(tmp_path / "captured", test_graphs.rows(lengths), **options)
    attested = captured.attestation()
    assert "replayed as CUDA graphs" in attested["layout"] and captured.trainer.graphed.pairs
    assert not attested["step"]["problems"], attested["step"]["problems"]
    assert attested["step"]["replayed"] or len(lengths) > 1
    # Seven weights a layer, for its outputs and (but for the first q, k, v) for the gradient of its input.
    assert attested["step"]["kernels"]["nf4_dequant_kernel"] >= 3 * 7 * 2 - 3
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    plain = test_graphs.train(tmp_path / "launched", test_graphs.rows(lengths), **options)
    assert plain.trainer.graphed is None
    test_graphs.assert_same_run(captured, plain)
    return captured


@pytest.mark.gpu
@pytest.mark.parametrize("how", [False, True, "offload"])
@pytest.mark.parametrize("lengths", [(60,), (3, 5, 40, 60)], ids=["equal", "ragged"])
def test_replayed_steps_are_launched_ones_to_the_bit(lengths, how, folder, tmp_path, monkeypatch):
    captured = both(tmp_path, monkeypatch, lengths, source=folder, gradient_checkpointing=how)
    assert ("recomputed in every layer" in captured.attestation()["layout"]) == bool(how)
    assert any("lora on nf4" in line for line in captured.attestation()["modules"])


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_with_moments_in_eight_bits(optimizer, accumulation, folder, tmp_path, monkeypatch):
    captured = both(tmp_path, monkeypatch, (60,), source=folder, optimizer=optimizer, lora_r=32,
                    gradient_accumulation_steps=accumulation)
    held = captured.trainer.optimizer.state.values()
    assert any(moment.dtype == torch.uint8 for state in held for moment in state.values() if torch.is_tensor(moment))


@pytest.mark.gpu
def test_as_many_layers_are_recomputed_as_memory_asks(folder, tmp_path, monkeypatch):
    captured = both(tmp_path, monkeypatch, (60,), source=folder, gradient_checkpointing="auto")
    assert captured.trainer.memory.most == 0 and captured.trainer.memory.costs.layer > 0


@pytest.mark.gpu
def test_a_reference_with_its_adapters_off_is_replayed_too(folder, tmp_path, monkeypatch):
    from aligntune import create_rl_trainer
    from aligntune.builtin import load_tokenizer

    data = [{"prompt": f"say {i % 7}", "chosen": " alpha beta" * (i % 5 + 1), "rejected": " gamma" * (i % 3 + 1)}
            for i in range(64)]

    def train(path: Any) -> Any:
        trainer = create_rl_trainer(
            folder, data, algorithm="dpo", backend="fast", tokenizer_name=load_tokenizer("builtin:tiny"),
            quantization="nf4", use_peft=True, lora_r=8, lora_dropout=0.0, batch_size=4, max_steps=16,
            learning_rate=3e-3, output_dir=str(path), overwrite=True, logging_steps=1, progress=False,
            gradient_checkpointing=False, lr_scheduler="constant", precision="bf16",
        )  # fmt: skip
        with torch.no_grad():
            torch.manual_seed(5)
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
        trainer.train()
        return trainer

    captured = train(tmp_path / "captured")
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    plain = train(tmp_path / "launched")
    assert {key[0] for key in captured.trainer.graphed.pairs} == {"trained", "reference"}
    assert plain.trainer.graphed is None and not captured.attestation()["step"]["problems"]
    test_preference_graphs.assert_same_run(captured.trainer, plain.trainer)
