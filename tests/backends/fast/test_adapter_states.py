"""PEFT models answer and generate in every state of their adapters, over a plain base and over NF4."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from aligntune.backends.fast import attach, attachment_of, detach
from aligntune.backends.fast.ops.nf4 import NF4Weight, dequantize_nf4_reference
from tests.backends.fast.minis import batch, build
from tests.backends.fast.test_adapters import ALL, adapted, assert_same_step, draw_b
from tests.backends.fast.test_model_states import generated

WHOLE = ["embed_tokens", "lm_head"]


def shaken(model: Any) -> Any:
    """`modules_to_save` moved away from the modules that they were copied from."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return model


@contextlib.contextmanager
def in_state(model: Any, state: str) -> Iterator[None]:
    with model.disable_adapter() if state == "disabled" else contextlib.nullcontext():
        if state == "merged":
            model.merge_adapter()
        yield
        if state == "merged":
            model.unmerge_adapter()


def test_generate_in_every_state_of_the_adapters():
    ours = shaken(adapted(target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=WHOLE))
    adapted(model=ours, name="other", r=2, target_modules=["o_proj"])
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.mul_(20)  # so that each state says something else
    plain = copy.deepcopy(ours)
    attach(ours)
    texts = []
    for active in ("default", "other"):
        for model in (ours, plain):
            model.set_adapter(active)
        for state in ("active", "disabled", "merged"):
            with in_state(ours, state), in_state(plain, state):
                texts.append(generated(plain))
                assert generated(ours) == texts[-1], (active, state)
    assert len({str(text) for text in texts}) >= 3
    detach(ours)
    assert generated(ours) == texts[3]
    merged = ours.merge_and_unload()
    assert attachment_of(merged) is None and generated(merged) == texts[3]


@pytest.mark.parametrize("state", ["active", "disabled"])
def test_a_head_among_the_modules_to_save_is_the_one_that_is_active(state):
    """By labels with gradients, without, and behind TRL's call."""
    ours = shaken(adapted(target_modules=["q_proj"], modules_to_save=WHOLE))
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        add_fused_lm_head(model.base_model.model)
    attach(ours)
    found = []
    for model in (ours, theirs):
        with in_state(model, state):
            numbers = [model(**batch()).loss, model(**batch(), fused_lm_head=True).log_probs]
            with torch.no_grad():
                numbers += [model(**batch()).loss, model(**batch(), fused_lm_head=True).log_probs]
            found.append([number.detach() for number in numbers])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), in_state(ours, "active" if state == "disabled" else "disabled"):
        assert abs(float(ours(**batch()).loss - found[0][0])) > 0.1


def test_an_adapter_on_the_head_leaves_the_head_to_the_model():
    ours = adapted(target_modules=["q_proj", "lm_head"])
    theirs = copy.deepcopy(ours)
    attachment = attach(ours)
    assert [str(line) for line in attachment.report if line.eager] == ["head: eager, lm_head carries an adapter"]
    assert "lm_head: lora (x1)" in str(attachment)
    for model in (ours, theirs):
        model(**batch()).loss.backward()
    compared = 0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            compared += 1
            assert float(q.grad.norm()) > 0 and torch.allclose(p.grad, q.grad, atol=1e-5, rtol=1e-4), name
    assert compared == 4


def test_an_adapter_that_came_to_the_head_after_attach_counts():
    model = build("llama", num_hidden_layers=1)
    attachment = attach(model)
    ours = adapted(model=get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "lm_head"])), name="other",
                   target_modules=["q_proj", "lm_head"])
    ours.set_adapter("other")
    theirs = copy.deepcopy(ours)
    detach(theirs)
    assert_same_step(ours, theirs)
    assert "head: eager, lm_head carries an adapter" in str(attachment)


# --------------------------------------------------------------------------------------------------------- an NF4 base


def four_bits(model: nn.Module, compute_dtype: torch.dtype, device: str) -> nn.Module:
    """Every linear but the head in NF4 with double quantisation, as a loaded 4-bit checkpoint has them."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, quant_type="nf4",
                    compute_dtype=compute_dtype, compress_statistics=True,
                )  # fmt: skip
                linear.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                if child.bias is not None:
                    linear.bias = child.bias
                setattr(parent, name, linear)
    model.is_loaded_in_4bit = True
    return model.to(device).requires_grad_(False)


def under_lora(model: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(9)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ALL} | settings))
    draw_b(peft_model)
    return peft_model.train()


def in_full(model: nn.Module) -> nn.Module:
    """The same model with plain fp32 weights: those that the four bits stand for."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Linear4bit":
                weight = dequantize_nf4_reference(NF4Weight.from_param(child.weight), dtype=torch.float32)
                linear = nn.utils.skip_init(nn.Linear, child.in_features, child.out_features, bias=False)
                linear.weight = nn.Parameter(weight, requires_grad=False)
                linear.bias = None if child.bias is None else nn.Parameter(child.bias.float(), requires_grad=False)
                setattr(parent, name, linear)
    return model.float()


SIZES: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


def test_nf4_in_every_state():
    """Held against the same weights in fp32: bitsandbytes answers in bf16 on a CPU outside training."""
    ours = under_lora(four_bits(build("llama", **SIZES), torch.float32, "cpu"), use_rslora=True)
    plain = under_lora(in_full(four_bits(build("llama", **SIZES), torch.float32, "cpu")), use_rslora=True)
    with torch.no_grad():
        for name, parameter in (*ours.named_parameters(), *plain.named_parameters()):
            if "lora_B" in name:
                parameter.mul_(20)
    attach(ours, strict=True)
    texts = []
    for state in ("active", "disabled"):
        with in_state(ours, state), in_state(plain, state):
            losses = [float(model(**batch()).loss.detach()) for model in (ours, plain)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-4)
            texts += [generated(ours), losses[1]]
            assert texts[-2] == generated(plain)
    assert texts[0] != texts[2] and abs(texts[1] - texts[3]) > 0.05


def test_layers_that_four_bits_left_out_keep_their_dtype():
    """As checkpoints that quantise layer by layer have them, loaded in another dtype than they multiply in."""
    def made() -> Any:
        model = build("llama", **SIZES)
        kept = {path: copy.deepcopy(model.get_submodule(path)) for path in ("self_attn.v_proj", "mlp.gate_proj")
                for path in [f"model.layers.0.{path}"]}
        model = four_bits(model, torch.float16, "cpu")
        for path, layer in kept.items():
            model.set_submodule(path, layer.requires_grad_(False))
        return under_lora(model)

    ours, theirs = made(), made()
    attachment = attach(ours, strict=True)  # layer by layer is no eager call
    assert_same_step(ours, theirs, atol=2e-3)
    assert "model.layers.*.self_attn.v_proj: lora (x1)" in str(attachment)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_over_nf4_no_further_from_an_fp32_oracle_than_peft(family, dtype):
    """Biases, packed projections and softcaps; the oracle multiplies by what the four bits stand for."""
    sizes = {**SIZES, "num_hidden_layers": 2, "hidden_size": 256, "head_dim": 64, "intermediate_size": 704}
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if family == "phi3" else ALL

    def made(full: bool) -> Any:
        model = four_bits(build(family, **sizes).to(dtype), dtype, "cuda")
        return under_lora(in_full(model) if full else model, target_modules=targets)

    oracle, theirs, ours = made(True), made(False), made(False)
    attachment = attach(ours)
    scale = 1.0 if dtype == torch.bfloat16 else 128.0
    gradients = []
    for model in (oracle, theirs, ours):
        (model(**batch(rows=6, length=120, device="cuda")).loss * scale).backward()
        found = [p.grad for n, p in model.named_parameters() if "lora_" in n]
        assert len(found) == 2 * 2 * len(targets) and all(float(g.norm()) > 0 for g in found)
        gradients.append(torch.cat([g.double().flatten() for g in found]) / scale)
    eager, fast = (float((g - gradients[0]).norm() / gradients[0].norm()) for g in gradients[1:])
    assert 0 < eager < 0.3 and fast <= 1.25 * eager + 1e-6, f"ours {fast:.4f}, PEFT {eager:.4f}"
    result = attachment.attest(lambda: ours(**batch(device="cuda")).loss.backward())
    assert result.ok and result.kernels["nf4_dequant_kernel"] >= 7
