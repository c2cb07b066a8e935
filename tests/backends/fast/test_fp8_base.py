"""A frozen base in e4m3 under LoRA: what is multiplied, when copies are made again, and who is told."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTTrainer

from aligntune import create_sft_trainer
from aligntune.backends.base import require
from aligntune.backends.fast import (
    FastLanguageModel,
    FastSFTTrainer,
    FastTrainingArguments,
    accelerate_trl,
    attach,
    attach_trainer,
    attachment_of,
    detach,
    fp8_base,
    graph_shapes,
    lora,
)
from aligntune.backends.fast.fp8_base import install, quantize_base
from aligntune.backends.fast.ops.fp8 import Fp8Weight, quantize_rows_reference
from aligntune.backends.fast.ops.lora import LoraLinear, lora_linear_group, lora_linear_group_reference, lora_mlp
from aligntune.backends.trl.support import BACKEND as TRL
from aligntune.core.resolve import resolve
from aligntune.errors import ConfigError, UnsupportedAlgorithmError
from tests.backends.fast import test_graphs
from tests.backends.fast.minis import batch, build
from tests.backends.fast.ops.harness import launches
from tests.backends.fast.ops.lora_cases import Maker, assert_same, gradients
from tests.backends.fast.test_adapters import ALL, draw_b
from tests.core import tiny

SIDES = {"hidden_size": 48, "intermediate_size": 80, "head_dim": 16, "num_hidden_layers": 1}


class Rounded(torch.autograd.Function):
    """x W^T with rounded rows of x and W, and dout W with rounded rows of dout and W^T: written from the definition."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return _rounded(x) @ _rounded(weight).t()

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        return _rounded(dout) @ _rounded(ctx.weight.t()).t(), None


def _rounded(x: torch.Tensor) -> torch.Tensor:
    rows = x.detach().reshape(-1, x.shape[-1])
    scale = rows.abs().amax(1, keepdim=True) / 448
    return ((rows / torch.where(scale == 0, 1, scale)).to(torch.float8_e4m3fn).float() * scale).view(x.shape)


class RoundedTogether(torch.autograd.Function):
    """The same for several layers on one input, whose gradients, and whose columns, are rounded as one row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.weights = weights
        return tuple(_rounded(x) @ _rounded(weight).t() for weight in weights)

    @staticmethod
    def backward(ctx: Any, *douts: torch.Tensor) -> Any:
        return _rounded(torch.cat(douts, -1)) @ _rounded(torch.cat(ctx.weights).t()).t(), *[None] * len(douts)


def by_hand(model: Any) -> Any:
    """The model with the forward of every base layer under adapters replaced by torch's own operations."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = Rounded.apply(x, self.weight.detach())
        return out if self.bias is None else out + self.bias

    def together(parent: Any, layers: list[Any]) -> None:
        """The first layer that is called computes for all of them, which are called on the same input."""
        made: dict[int, torch.Tensor] = {}

        def one(self: Any, x: torch.Tensor) -> torch.Tensor:
            if not made:
                outs = RoundedTogether.apply(x, *(layer.weight.detach() for layer in layers))
                made.update(zip(map(id, layers), outs, strict=True))
            out = made.pop(id(self))
            return out if self.bias is None else out + self.bias

        for layer in layers:
            layer.forward = MethodType(one, layer)

    for module in model.modules():
        if lora.kind_of(module) == "lora":
            module.base_layer.forward = MethodType(forward, module.base_layer)
    for module in model.modules():
        for names in fp8_base.GROUPS:
            layers = [module._modules.get(name) for name in names]
            if all(layer is not None and lora.kind_of(layer) == "lora" for layer in layers):
                together(module, [layer.base_layer for layer in layers])
    return model


def adapted(device: str = "cpu", **settings: Any) -> Any:
    torch.manual_seed(7)
    model = get_peft_model(build("llama", **SIDES), LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": ALL}
                                                               | settings))
    draw_b(model)
    return model.train().to(device)


def bases(model: Any) -> dict[str, Any]:
    return {name: m.base_layer for name, m in model.named_modules() if lora.kind_of(m) == "lora"}


def step(model: Any, **extra: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch(), **extra).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def eight_beside(linears: list[LoraLinear]) -> list[LoraLinear]:
    weights = Fp8Weight.of_several([one.weight for one in linears])
    return [one._replace(weight=weight) for one, weight in zip(linears, weights, strict=True)]


def eight(linear: LoraLinear) -> LoraLinear:
    return linear._replace(weight=Fp8Weight.of(linear.weight))


def rounded_group(x: torch.Tensor, linears: Any) -> list[torch.Tensor]:
    outs = []
    for linear in linears:
        out = Rounded.apply(x, linear.weight.detach())
        if linear.bias is not None:
            out = out + linear.bias
        for one in linear.adapters:
            out = out + one.scaling * (x @ one.a.t() @ one.b.t())
        outs.append(out)
    return outs


@pytest.mark.parametrize("bias", [False, True])
def test_a_group_is_the_definition(bias, device):
    results = []
    for ours in (True, False):
        maker = Maker(device, seed=3)
        x = maker.tensor("x", 5, 48)
        linears = [maker.linear("q", 64, 48, bias=bias), maker.linear("k", 16, 48, ranks=(2, 4)),
                   maker.linear("v", 32, 48, ranks=())]
        if ours:
            outs = lora_linear_group(x, [eight(one) for one in linears])
        else:
            outs = rounded_group(x, linears)
            exact = lora_linear_group_reference(x, linears)
            assert all((out - one).abs().max() > 1e-2 for out, one in zip(outs, exact, strict=True))
        results.append((outs, gradients(outs, maker, x)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("count", [2, 3])
def test_columns_side_by_side_are_the_definition(count, device):
    """One product for the gradient of the input, also with biases and layers without adapters."""
    results = []
    for ours in (True, False):
        maker = Maker(device, seed=6)
        x = maker.tensor("x", 7, 48)
        linears = [maker.linear("q", 64, 48, bias=True), maker.linear("k", 16, 48, ranks=()),
                   maker.linear("v", 32, 48, ranks=(2,))][:count]
        if ours:
            outs = lora_linear_group(x, eight_beside(linears))
        else:
            outs = RoundedTogether.apply(x, *(one.weight.detach() for one in linears))
            outs = [out + sum(one.scaling * (x @ one.a.t() @ one.b.t()) for one in linear.adapters)
                    + (0 if linear.bias is None else linear.bias) for out, linear in zip(outs, linears, strict=True)]
        results.append((outs, gradients(outs, maker, x)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_same(results[0][1], results[1][1])


def test_part_of_what_lies_side_by_side(device):
    """Some of the layers, or all of them in another order, or an output that nothing is asked of: one by one."""
    for pick, skip in (((0, 1), ()), ((1, 0, 2), ()), ((0, 1, 2), (1,))):
        maker, other = Maker(device, seed=8), Maker(device, seed=8)
        x, y = maker.tensor("x", 5, 32), other.tensor("x", 5, 32)
        ours, theirs = ([one.linear(name, n, 32, ranks=()) for name, n in (("q", 32), ("k", 16), ("v", 48))]
                        for one in (maker, other))
        outs = lora_linear_group(x, [eight_beside(ours)[i] for i in pick])
        columns = _rounded(torch.cat([one.weight.detach() for one in theirs]).t()).split([32, 16, 48], dim=1)
        wanted, dx = [], torch.zeros_like(x)
        for place, i in enumerate(pick):
            wanted.append(_rounded(y) @ _rounded(theirs[i].weight.detach()).t())
            torch.testing.assert_close(outs[place], wanted[-1], rtol=1e-4, atol=1e-5)
            dout = torch.cos(torch.arange(wanted[-1].numel(), device=device).view_as(wanted[-1]) * (place + 1.0))
            if place not in skip:
                dx += _rounded(dout) @ columns[i].t()
        given = [(out, torch.cos(torch.arange(out.numel(), device=device).view_as(out) * (place + 1.0)))
                 for place, out in enumerate(outs) if place not in skip]
        (found,) = torch.autograd.grad([out for out, _ in given], [x], [dout for _, dout in given])
        torch.testing.assert_close(found, dx, rtol=1e-3, atol=1e-4)
        assert dx.norm() > 1


def test_one_layer_of_a_group_may_be_fp8(device):
    """And an output that nothing is asked of takes no part."""
    maker, other = Maker(device, seed=4), Maker(device, seed=4)
    x, y = maker.tensor("x", 4, 32), other.tensor("x", 4, 32)
    ours = [maker.linear("a", 16, 32), eight(maker.linear("b", 32, 32)), eight(maker.linear("c", 16, 32))]
    theirs = [other.linear("a", 16, 32), other.linear("b", 32, 32), other.linear("c", 16, 32)]
    outs = lora_linear_group(x, ours)
    wanted = [*lora_linear_group_reference(y, theirs[:1]), *rounded_group(y, theirs[1:])]
    assert_same(gradients(outs, maker, x, skip=(2,)), gradients(wanted, other, y, skip=(2,)))


def test_the_gated_mlp_is_the_definition(device):
    results = []
    for ours in (True, False):
        maker = Maker(device, seed=5)
        x = maker.tensor("x", 6, 32)
        gate, up, down = maker.linear("gate", 48, 32), maker.linear("up", 48, 32), maker.linear("down", 32, 48)
        if ours:
            out = lora_mlp(x, eight(gate), eight(up), eight(down))
        else:
            g, u = rounded_group(x, [gate, up])
            (out,) = rounded_group(torch.nn.functional.silu(g) * u, [down])
        results.append((out, gradients([out], maker, x)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert_same(results[0][1], results[1][1])


def test_the_twin_in_plain_torch_refuses(device):
    maker = Maker(device)
    with pytest.raises(ConfigError, match="fp8 weight"):
        lora_linear_group_reference(maker.tensor("x", 2, 32), [eight(maker.linear("a", 16, 32))])


def test_a_model_is_the_one_made_by_hand(device):
    ours = adapted(device)
    theirs, exact = by_hand(copy.deepcopy(ours)), copy.deepcopy(ours)
    assert install(ours) == (7, 0)
    attachment = attach(ours)
    loss, grads = step(ours, output_logits=False)
    wanted, wanted_grads = step(theirs)
    plain, plain_grads = step(exact)
    assert loss == pytest.approx(wanted, abs=1e-4)
    assert grads.keys() == wanted_grads.keys() and len(grads) == 14
    for name, grad in wanted_grads.items():
        # A number that lies on the border of two e4m3 numbers may fall to either side: what rounding does is bounded.
        off, rounding = float((grads[name] - grad).norm()), float((plain_grads[name] - grad).norm())
        assert rounding > 0 and off < 0.1 * rounding, (name, off, rounding)
    assert abs(wanted - plain) > 1e-4
    lines = [str(line) for line in attachment.report if "lora" in line.op]
    assert len(lines) == 7 and all("lora, fp8 base" in line for line in lines), lines


def test_the_witness_is_promised_what_runs(device):
    model = adapted(device)
    install(model)
    attestation = attach(model, strict=False).attest(lambda: step(model, output_logits=False))
    assert attestation.ok, attestation.problems
    # q, k, v share an input, o has its own, gate and up share one, down has its own. Backward: one for each input, but
    # that of q, k, v, which is an embedding that does not train.
    assert attestation.kernels["quantize_rows_kernel"] == attestation.promised["quantize_rows_kernel"] == 4 + 2
    together = "quantize_rows_together_kernel"
    assert attestation.kernels[together] == attestation.promised[together] == 1


def test_adapters_off_go_through_the_copies_and_merged_ones_do_not(device):
    model = adapted(device)
    twin = by_hand(copy.deepcopy(model))
    plain = copy.deepcopy(model)
    install(model)
    attach(model)

    def logits(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return one(**batch()).logits

    with model.disable_adapter(), twin.disable_adapter(), plain.disable_adapter():
        assert torch.allclose(logits(model), logits(twin), atol=1e-3)
        assert not torch.allclose(logits(model), logits(plain), atol=1e-3)
    for safe in (False, True):
        before = logits(model)
        model.merge_adapter(safe_merge=safe)
        plain.merge_adapter(safe_merge=safe)
        assert torch.allclose(logits(model), logits(plain), atol=1e-5)
        model.unmerge_adapter()
        plain.unmerge_adapter()
        assert torch.allclose(logits(model), before, atol=1e-3)
    whole = model.merge_and_unload()
    assert torch.allclose(logits(whole), logits(plain.merge_and_unload()), atol=1e-5)


def test_a_weight_that_was_written_is_quantised_again_in_place(device):
    model = adapted(device)
    install(model)
    attach(model)
    base = next(iter(bases(model).values()))
    held = base.__dict__[lora.FP8]
    memory, before = held.weight.rows.data_ptr(), held.weight.dequantized()
    with torch.no_grad():
        base.weight.mul_(-2)
    step(model, output_logits=False)
    assert held.weight.rows.data_ptr() == memory
    torch.testing.assert_close(held.weight.dequantized(), before * -2)
    # Another tensor in the parameter's place, as loading by assignment leaves it.
    base.weight.data = base.weight.detach() * 3
    assert held.current(base.weight) is held.weight and held.weight.rows.data_ptr() == memory
    torch.testing.assert_close(held.weight.dequantized(), before * -6)
    version = held.weight.row_scale._version
    held.current(base.weight)
    assert held.weight.row_scale._version == version
    base.weight.requires_grad_(True)
    assert held.current(base.weight) is base.weight


def test_columns_side_by_side_are_renewed_together(device):
    model = adapted(device)
    install(model)
    attach(model)
    attention = model.base_model.model.model.layers[0].self_attn
    q, k, v = (getattr(attention, name).base_layer for name in ("q_proj", "k_proj", "v_proj"))
    held = [base.__dict__[lora.FP8] for base in (q, k, v)]
    beside = held[0].weight.beside
    assert beside is not None and all(one.weight.beside is beside for one in held)
    assert beside.widths == tuple(base.weight.shape[0] for base in (q, k, v))
    memory = beside.columns.data_ptr(), beside.scale.data_ptr()
    with torch.no_grad():
        v.weight.mul_(100.0)
    for one, base in zip(held, (q, k, v), strict=True):
        assert one.current(base.weight) is one.weight and one.weight.beside is beside
    assert (beside.columns.data_ptr(), beside.scale.data_ptr()) == memory
    columns = torch.cat([base.weight.detach() for base in (q, k, v)]).t()
    torch.testing.assert_close(beside.columns.float() * beside.scale[:, None], _rounded(columns))
    torch.testing.assert_close(held[2].weight.dequantized_columns(), _rounded(columns).t()[-v.weight.shape[0]:])
    # A neighbour of another shape: what was written stands alone from then on.
    k.weight = torch.nn.Parameter(torch.zeros(16, k.weight.shape[1] + 16, device=device), requires_grad=False)
    with torch.no_grad():
        q.weight.add_(1.0)
    alone = held[0].current(q.weight)
    assert isinstance(alone, Fp8Weight) and alone.beside is None and held[0].bases == []
    torch.testing.assert_close(alone.dequantized_columns(), _rounded(q.weight.t()).t())


def test_a_copied_model_s_copies_lie_side_by_side_too(device):
    model = adapted(device)
    install(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        layers = one.base_model.model.model.layers[0].mlp
        gate, up = (layer.base_layer for layer in (layers.gate_proj, layers.up_proj))
        assert gate.__dict__[lora.FP8].bases[0] is gate and gate.__dict__[lora.FP8].bases[1] is up
        assert gate.__dict__[lora.FP8].weight.beside is up.__dict__[lora.FP8].weight.beside


def test_detaching_takes_the_copies_and_attaching_again_keeps_them(device):
    model = adapted(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    install(model)
    held = [base.__dict__[lora.FP8] for base in bases(model).values()]
    attach(model)
    attach(model)
    assert [base.__dict__[lora.FP8] for base in bases(model).values()] == held
    assert install(model) == (7, 0) and [base.__dict__[lora.FP8] for base in bases(model).values()] == held
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    detach(model)
    assert not any(lora.FP8 in module.__dict__ for module in model.modules())


def test_layers_that_cannot_stay_as_loaded(device):
    model = adapted(device, target_modules=["q_proj", "lm_head"])  # lm_head makes 101 numbers
    assert install(model) == (1, 1)
    report = attach(model).report
    assert [line.op for line in report if "q_proj" in line.modules] == ["lora, fp8 base"]
    assert lora.FP8 not in model.base_model.model.lm_head.base_layer.__dict__
    assert isinstance(lora.ready_to_read(model.base_model.model.model.layers[0].self_attn.q_proj).weight, Fp8Weight)


def trainer(model: Any, **settings: Any) -> Any:
    return SimpleNamespace(**{"model": model, "is_fsdp_enabled": False, "is_deepspeed_enabled": False,
                              "args": SimpleNamespace(bf16=True, fp16=False)} | settings)


def test_what_is_asked_for_is_had_or_refused(device):
    assert quantize_base(trainer(adapted(device)), None) is None
    assert quantize_base(trainer(adapted(device)), "fp8") == "base: e4m3 by rows in 7 linear layers"
    bare = build("llama", **SIDES)
    odd = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    for given, reason in ((trainer(bare), "needs LoRA"), (trainer(odd), "multiples of 16"),
                          (trainer(adapted(), is_fsdp_enabled=True), "sharded"),
                          (trainer(adapted(), precompute_ref_logps=True), "scored the reference over the base as it")):
        with pytest.raises(ConfigError, match=f"base_precision = 'fp8'.*{reason}"):
            quantize_base(given, "fp8")
        assert reason in quantize_base(given, "auto")
        assert not any(lora.FP8 in module.__dict__ for module in given.model.modules())


def test_the_card_must_multiply_e4m3(monkeypatch):
    weight = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.bfloat16)
    layer = SimpleNamespace(base_layer=SimpleNamespace(weight=weight))
    monkeypatch.setattr(fp8_base.lora, "kind_of", lambda module: "lora" if module is layer else "plain")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "An A100")
    given = trainer(SimpleNamespace(modules=lambda: [layer]))
    for capability, reason in (((8, 0), "An A100 has compute capability 8.0.*8.9"), ((8, 9), None), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        if reason is None:
            assert fp8_base.unsupported_because(given) is None
        else:
            with pytest.raises(ConfigError, match=reason):
                quantize_base(given, "fp8")
    weight.dtype, given.args.bf16 = torch.float32, False
    assert "precision is fp32" in fp8_base.unsupported_because(given)


def test_the_option():
    asked = {"algorithm": "sft", "model_name": "m", "dataset_name": "d", "base_precision": "fp8"}
    assert resolve({**asked, "use_peft": True}).options.base_precision == "fp8"
    assert resolve({**asked, "base_precision": "auto"}).options.base_precision == "auto"
    with pytest.raises(ConfigError, match="base_precision = 'fp8'.*use_peft=True"):
        resolve(asked)
    with pytest.raises(ConfigError, match="base_precision = 'fp8' with quantization = 'nf4'"):
        resolve({**asked, "quantization": "nf4"})
    with pytest.raises(ConfigError, match="base_precision.*'e4m3'"):
        resolve({**asked, "base_precision": "e4m3", "use_peft": True})
    with pytest.raises(UnsupportedAlgorithmError, match="base_precision='fp8': TRL multiplies the base as it is"):
        require(TRL, "sft", {"base_precision": "fp8"})
    require(TRL, "sft", {"base_precision": "auto"})


def test_rounding_by_hand_is_the_ops():
    x = torch.randn(9, 64)
    values, scale = quantize_rows_reference(x)
    assert (_rounded(x) - values.float() * scale[:, None]).abs().max() < 2e-2 * x.abs().max()
    assert ((_rounded(x) - values.float() * scale[:, None]).abs() > 1e-6).float().mean() < 0.01


def test_a_run_says_so_and_learns(tmp_path):
    """Through the factory: copies are there before the model is attached, and what is saved holds none of them."""
    run = create_sft_trainer(
        tiny.llama(num_hidden_layers=1, hidden_size=32, intermediate_size=48), [{"text": "one two three"}] * 8,
        backend="fast", tokenizer_name=tiny.tokenizer(), use_peft=True, lora_r=4, max_steps=2,
        batch_size=2, learning_rate=1e-2, output_dir=str(tmp_path), base_precision="fp8", logging_steps=1,
        progress=False, max_seq_length=32, precision="fp32",
    )  # fmt: skip
    run.train()
    found = run.attestation()
    assert "base: e4m3 by rows in 7 linear layers" in found["layout"]
    assert any("lora, fp8 base" in line for line in found["modules"])
    assert not found["step"]["problems"] and found["step"]["kernels"]["quantize_rows_kernel"] >= 6
    assert found["step"]["kernels"]["quantize_rows_together_kernel"] >= 1
    assert sum(lora.FP8 in base.__dict__ for base in bases(run.model).values()) == 7
    detach(run.model)
    assert not any(lora.FP8 in base.__dict__ for base in bases(run.model).values())


@pytest.mark.parametrize("attached", [True, False])
def test_a_script_asks_for_it_too(attached, tmp_path):
    """On a model of FastLanguageModel, which is attached by then, and on a plain one."""
    made = tiny.llama(num_hidden_layers=1, hidden_size=32, intermediate_size=48)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model, peft = (FastLanguageModel.get_peft_model(attach(made).model, **options), None) if attached else (
        made, LoraConfig(**options))

    def trainer(**given):
        return FastSFTTrainer(
            model, FastTrainingArguments(
                str(tmp_path), per_device_train_batch_size=2, max_steps=1, bf16=False, report_to="none",
                max_seq_length=32, learning_rate=1e-2, **given),
            processing_class=tiny.tokenizer(), train_dataset=Dataset.from_list([{"text": "one two three"}] * 8),
            peft_config=peft)  # fmt: skip

    run = trainer(base_precision="fp8")
    assert "; base: e4m3 by rows in 3 linear layers" in run.layout
    assert launches(run.train)["quantize_rows_kernel"] >= 3
    rebuilt = FastTrainingArguments(**json.loads(json.dumps(run.args.to_dict())))
    assert rebuilt.base_precision == "fp8"


def test_a_script_that_cannot_have_it(tmp_path):
    settings = {"bf16": False, "report_to": "none", "max_seq_length": 32}
    with pytest.raises(ConfigError, match="unknown base_precision 'fp9'; did you mean 'fp8'"):
        FastTrainingArguments(str(tmp_path), base_precision="fp9", **settings)
    why = "it needs LoRA, and the model has no adapters: only a frozen base under some is quantised"
    for asked, found in (("fp8", pytest.raises(ConfigError, match=f"^base_precision = 'fp8': {why}; leave it out")),
                         ("auto", nullcontext())):
        with found:
            run = FastSFTTrainer(
                tiny.llama(num_hidden_layers=1), FastTrainingArguments(str(tmp_path), base_precision=asked, **settings),
                processing_class=tiny.tokenizer(), train_dataset=Dataset.from_list([{"text": "one"}] * 2))
            assert "base: as loaded, it needs LoRA" in run.layout


@pytest.mark.parametrize("way", ["attach_trainer", "accelerate_trl"])
def test_trl_s_own_trainer_has_it_too(way, tmp_path, caplog):
    """In a block, and made fast later, as `fast_train` does."""
    def trainer(asked: str, peft: Any = None) -> Any:
        args = FastTrainingArguments(str(tmp_path), bf16=False, report_to="none", max_steps=1, base_precision=asked,
                                     per_device_train_batch_size=2)
        with accelerate_trl() if way == "accelerate_trl" else nullcontext():
            made = SFTTrainer(
                tiny.llama(num_hidden_layers=1), args, processing_class=tiny.tokenizer(), peft_config=peft,
                train_dataset=Dataset.from_list([{"text": "one two three"}] * 4))
        if way == "attach_trainer":
            attach_trainer(made)
        return made

    with caplog.at_level("INFO", logger="aligntune"):
        run = trainer("fp8", LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert "base: e4m3 by rows in 3 linear layers" in caplog.messages
    assert launches(run.train)["quantize_rows_kernel"] >= 3
    with pytest.raises(ConfigError, match="base_precision = 'fp8'.*it needs LoRA"):
        trainer("fp8")
    assert attachment_of(trainer("auto").model) is not None


# ------------------------------------------------------------------------------------------------------------- the card


def _relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 999])
def test_outputs_and_input_gradients_on_the_gpu(tokens):
    """bf16 with an fp8 base against fp64: no farther than the definition in fp32 with the same rounding of rows."""
    maker = Maker("cuda", seed=1)
    linears = [maker.linear(name, n, 1024, ranks=(16,)) for name, n in (("q", 1024), ("k", 256), ("v", 256))]
    x = maker.tensor("x", tokens, 1024)
    douts = [torch.randn(tokens, one.weight.shape[0], device="cuda") for one in linears]

    def run(outs: Any, at: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        (grad,) = torch.autograd.grad(outs, [at], [dout.to(out.dtype) for dout, out in zip(douts, outs, strict=True)])
        return list(outs), grad

    low = x.detach().bfloat16().requires_grad_()
    half = [one._replace(weight=Fp8Weight.of(one.weight.detach().bfloat16())) for one in linears]
    wide = x.detach().double().requires_grad_()
    double = [LoraLinear(one.weight.detach().double(), None, tuple(
        a._replace(a=a.a.double(), b=a.b.double()) for a in one.adapters)) for one in linears]
    truth, truth_dx = run(lora_linear_group_reference(wide, double), wide)
    wanted, wanted_dx = run(rounded_group(x, linears), x)
    ours, dx = run(lora_linear_group(low, half), low)
    for one, other, true in zip([*ours, dx], [*wanted, wanted_dx], [*truth, truth_dx], strict=True):
        assert 0.005 < _relative(one, true) < 1.1 * _relative(other, true) + 2**-9


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(60,), (3, 5, 40, 60)], ids=["equal", "ragged"])
def test_replayed_steps_with_an_fp8_base(lengths, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)
    data = test_graphs.rows(lengths)
    captured = test_graphs.train(tmp_path / "captured", data, base_precision="fp8")
    assert captured.trainer.graphed.pairs
    attested = captured.attestation()["step"]
    assert not attested["problems"], attested["problems"]
    # Three layers: four inputs each; and four gradients each, two of them together, less that of the first q, k, v.
    assert attested["kernels"]["quantize_rows_kernel"] >= 3 * 4 + 3 * 2
    assert attested["kernels"]["quantize_rows_together_kernel"] >= 3 * 2 - 1
    bf16 = test_graphs.train(tmp_path / "bf16", data)
    losses, wanted = test_graphs.history(captured, "loss"), test_graphs.history(bf16, "loss")
    # The first loss is of the same weights, so that what differs is the rounding. Where the rows are learnt by heart,
    # rounding is a large share of what is left of a loss.
    assert losses[0] != wanted[0] and sum(loss > 0.5 for loss in wanted) >= 3
    assert losses == pytest.approx(wanted, rel=5e-2, abs=2e-2)
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    launched = test_graphs.train(tmp_path / "launched", data, base_precision="fp8")
    assert launched.trainer.graphed is None
    test_graphs.assert_same_run(captured, launched)
