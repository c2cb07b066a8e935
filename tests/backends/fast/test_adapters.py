"""PEFT models: what the adapters' state says is what runs, and the numbers are PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from aligntune.backends.fast import attach, detach
from aligntune.errors import ConfigError
from tests.backends.fast.minis import batch, build

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(family: str = "llama", *, model: Any = None, name: str = "default", **settings: Any) -> Any:
    """A mini model under an adapter whose B is drawn N(0, 0.02): at init it is 0, and so is every gradient of A."""
    settings = {"r": 3, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": "gaussian"} | settings
    config = LoraConfig(**settings)
    if model is None:
        torch.manual_seed(7)
        model = get_peft_model(build(family, num_hidden_layers=1), config)
    else:
        model.add_adapter(name, config)
    draw_b(model)
    return model.train()


def draw_b(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.copy_(torch.normal(0.0, 0.02, parameter.shape, generator=generator))  # on a card too


def assert_same_step(ours: Any, theirs: Any, *, atol: float = 1e-5, expect_grads: bool = True) -> float:
    """Loss and the gradient of every parameter that trains, none of which may be 0."""
    for model in (ours, theirs):
        model.zero_grad()
    a, b = ours(**batch(), output_logits=False), theirs(**batch())
    assert torch.allclose(a.loss, b.loss, atol=atol)
    a.loss.backward()
    b.loss.backward()
    compared = 0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            compared += 1
            assert float(q.grad.norm()) > 0, f"{name}: the reference gradient is 0"
            assert torch.allclose(p.grad, q.grad, atol=atol, rtol=1e-4), name
    assert (compared > 0) == expect_grads
    return float(b.loss.detach())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 5, "use_rslora": True, "lora_alpha": 4},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["o_proj", "down_proj"]},
        {"target_modules": ["gate_proj"], "rank_pattern": {"gate_proj": 2}},
        {"rank_pattern": {"q_proj": 7, "down_proj": 1}, "alpha_pattern": {"up_proj": 40}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["k_proj"]},
        {
            "lora_bias": True,
            "init_lora_weights": True,
            "target_modules": ["q_proj", "gate_proj"],
            "modules_to_save": ["model.norm"],
        },
    ],
    ids=str,
)
def test_one_adapter(settings):
    ours = adapted(**settings)
    theirs = copy.deepcopy(ours)
    attachment = attach(ours, strict=True)
    assert assert_same_step(ours, theirs) > 3
    result = attachment.attest(lambda: ours(**batch()).loss.backward())
    assert result.ok, result.problems
    assert "LoraLinearGroup" in result.kernels or "LoraMLP" in result.kernels


@pytest.mark.parametrize("family", ["qwen2", "phi3", "qwen3_moe"])
def test_biases_packed_projections_and_experts(family):
    targets = (
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if family == "phi3" else ["q_proj", "v_proj", "o_proj"]
    )
    overrides = {"target_modules": targets}
    torch.manual_seed(0)
    ours = get_peft_model(build(family), LoraConfig(r=4, **overrides))
    draw_b(ours)
    theirs = copy.deepcopy(ours)
    attach(ours)
    assert_same_step(ours, theirs)


def test_a_family_outside_the_table_takes_its_layers_one_by_one():
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=101, hidden_size=44, intermediate_size=70, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    ours = get_peft_model(transformers.GemmaForCausalLM(config), LoraConfig(r=4, target_modules=ALL)).train()
    draw_b(ours)
    theirs = copy.deepcopy(ours)
    attachment = attach(ours)
    assert_same_step(ours, theirs)
    assert "model.layers.*.self_attn.k_proj: lora (x1)" in str(attachment)
    result = attachment.attest(lambda: ours(**batch()).loss.backward())
    assert result.ok and result.kernels["LoraLinearGroup"] == 4 and result.kernels["LoraMLP"] == 1


def test_attached_before_the_adapters_came_and_again_after():
    model = build("llama", num_hidden_layers=1)
    attachment = attach(model)
    ours = get_peft_model(model, LoraConfig(r=3, target_modules=ALL))
    draw_b(ours)
    theirs = copy.deepcopy(ours)
    detach(theirs)
    assert_same_step(ours, theirs)
    assert attach(ours) is attachment and "model.layers.*.self_attn.o_proj: lora (x1)" in str(attachment)
    assert_same_step(ours, theirs)


def test_copies_that_peft_makes_of_attached_modules_are_attached_and_detached_too():
    """As `FastLanguageModel` goes: attached when it is loaded, then `modules_to_save` copies what is there."""
    model = build("qwen3", num_hidden_layers=1)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    attach(model)
    config = LoraConfig(r=3, target_modules=["k_proj"], modules_to_save=["q_norm", "post_attention_layernorm", "mlp"])
    ours = get_peft_model(model, config)
    draw_b(ours)
    for _ in range(2):
        attachment = attach(ours)
        text = str(attachment)
        assert "model.layers.*.mlp.modules_to_save.default: glu, silu (x1)" in text
        assert "model.layers.*.self_attn.q_norm.modules_to_save.default: rms_norm" in text
        assert "model.layers.*.self_attn: rope (x1)" in text
        assert [str(line) for line in attachment.report if line.eager] == [
            "model.layers.*: eager, its second norm has no kernel"]
        theirs = copy.deepcopy(ours)
        detach(theirs)
        assert not any("forward" in vars(module) for module in theirs.modules())
        assert_same_step(ours, theirs)
        assert [line for line in attachment.report if line.eager][1:] == []
    detach(ours)
    kept = ours.merge_and_unload()
    assert {path: set(vars(module)) - {"_is_hf_initialized"} for path, module in kept.named_modules()} == {
        path: names - {"_is_hf_initialized"} for path, names in before.items()}


def other_adapters(config: Any, family: str = "llama") -> Any:
    """A mini model under adapters of another kind, moved from where they do nothing."""
    torch.manual_seed(5)
    model = get_peft_model(build(family, num_hidden_layers=1), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def assert_eager_and_named(ours: Any, projection: str, reason: str) -> None:
    """A projection of attention and `down_proj` stay PEFT's and are named with the reason; under strict an error."""
    theirs = copy.deepcopy(ours)
    attachment = attach(ours)
    assert [str(line) for line in attachment.report if line.eager] == [
        f"model.layers.*.{path}: eager, {reason}" for path in (f"self_attn.{projection}", "mlp.down_proj")]
    assert_same_step(ours, theirs)
    with pytest.raises(ConfigError, match=reason):
        attach(ours, strict=True)


def test_adapters_of_another_kind_stay_pefts_and_are_named():
    ours = other_adapters(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    assert_eager_and_named(ours, "k_proj", "ia3 adapters on Linear have no kernel")


def test_linear_layers_of_another_make_are_named():
    class EightBits(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    ours = build("llama", num_hidden_layers=1)
    mlp = ours.model.layers[0].mlp
    mlp.up_proj = EightBits(44, 70, bias=False)
    theirs = copy.deepcopy(ours)
    attachment = attach(ours)
    lines = [str(line) for line in attachment.report if line.eager]
    assert lines == ["model.layers.*.mlp.up_proj: eager, EightBits has no kernel"]
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("family", ["qwen2", "llama"], ids=["tied", "apart"])
def test_tokens_that_train_by_themselves(family):
    """Tied, the head carries them too: its weight alone is not what it multiplies by."""
    tokens = batch()["input_ids"][0, :3].tolist()
    ours = other_adapters(LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=tokens), family)
    theirs = copy.deepcopy(ours)
    lines = [str(line) for line in attach(ours).report if line.eager]
    assert ("head: eager, lm_head carries an adapter" in lines) == (family == "qwen2")
    assert "model.embed_tokens.token_adapter: eager, trainable_tokens adapters on Embedding have no kernel" in lines
    assert_same_step(ours, theirs)


def test_disabled_adapters_are_the_base_model():
    ours = adapted()
    attach(ours)
    base = build("llama", num_hidden_layers=1).eval()
    ours.eval()
    inputs = batch()
    with ours.disable_adapter(), torch.no_grad():
        disabled = ours(**inputs).logits
    assert torch.allclose(disabled, base(**inputs).logits, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(ours(**inputs).logits, disabled, atol=1e-3)


def test_several_adapters_switched_and_at_once():
    ours = adapted()
    adapted(model=ours, name="other", r=6, target_modules=["q_proj", "down_proj"])
    theirs = copy.deepcopy(ours)
    attach(ours, strict=True)
    found = []
    for active in ("default", "other", ["default", "other"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        found.append(assert_same_step(ours, theirs))
    assert len(set(found)) == 3


def test_merged_and_unmerged():
    ours = adapted()
    theirs = copy.deepcopy(ours)
    attach(ours)
    before = assert_same_step(ours, theirs)
    for model in (ours, theirs):
        model.merge_adapter()
    with torch.no_grad():
        merged = ours(**batch(), output_logits=True)
        assert torch.allclose(merged.logits, theirs(**batch()).logits, atol=1e-5)
        assert float(merged.loss) == pytest.approx(before, abs=1e-4)
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert assert_same_step(ours, theirs) == pytest.approx(before, abs=1e-4)


def test_merged_and_disabled_is_left_to_peft():
    ours = adapted()
    base = build("llama", num_hidden_layers=1).eval()
    attachment = attach(ours.eval())
    ours.merge_adapter()
    with ours.disable_adapter(), torch.no_grad():
        assert torch.allclose(ours(**batch()).logits, base(**batch()).logits, atol=1e-4)
    assert any("merged and disabled" in str(line) for line in attachment.report)


def test_merge_and_unload_gives_an_ordinary_model(tmp_path):
    from transformers import AutoModelForCausalLM

    ours = adapted()
    attach(ours)
    ours.eval()
    with torch.no_grad():
        logits = ours(**batch()).logits
    detach(ours)
    merged = ours.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(**batch()).logits, logits, atol=1e-4)


def test_dora_is_eager_and_says_so():
    ours = adapted(use_dora=True, target_modules=["q_proj", "down_proj"])
    assert_eager_and_named(ours, "q_proj", "Dora has no kernel")


def test_several_adapters_in_one_batch_go_through_peft():
    ours = adapted()
    adapted(model=ours, name="other", r=2)
    theirs = copy.deepcopy(ours).eval()
    attachment = attach(ours.eval())
    inputs = {**batch(), "adapter_names": ["default", "other"]}
    with torch.no_grad():
        assert torch.allclose(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5)
        assert torch.allclose(ours(**batch()).logits, theirs(**batch()).logits, atol=1e-5)
    assert any("q_proj has hooks" in str(line) for line in attachment.report)


def test_hooks_inside_an_adapter_are_honoured():
    ours = adapted(target_modules=["q_proj", "down_proj"])
    theirs = copy.deepcopy(ours)
    attachment = attach(ours)
    for model in (ours, theirs):
        layer = model.base_model.model.model.layers[0]
        layer.self_attn.q_proj.lora_A["default"].register_forward_hook(lambda m, a, out: out * 3)
        layer.mlp.down_proj.base_layer.register_forward_hook(lambda m, a, out: out * 2)
    assert_same_step(ours, theirs)
    text = str(attachment)
    assert "its adapter has hooks" in text and "its base layer has hooks" in text


def test_dropout_trains_through_the_op_and_is_off_in_eval():
    ours = adapted(lora_dropout=0.5, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    plain = copy.deepcopy(ours).eval()
    attachment = attach(ours, strict=True)
    torch.manual_seed(0)
    first, second = ours(**batch()).loss, ours(**batch()).loss
    torch.manual_seed(0)
    again = ours(**batch()).loss
    assert not torch.equal(first, second) and torch.equal(first, again)
    result = attachment.attest(lambda: ours(**batch()).loss.backward())
    assert result.ok and result.kernels["lora_dropout_down_kernel"] >= 3
    assert result.kernels["lora_dropout_grad_a_kernel"] >= 3 and result.kernels["lora_dropout_grad_x_kernel"] >= 1
    ours.eval()
    with torch.no_grad():
        assert torch.allclose(ours(**batch()).logits, plain(**batch()).logits, atol=1e-5)


def test_a_recomputed_layer_draws_the_masks_it_drew():
    ours = adapted(lora_dropout=0.5, target_modules=["q_proj", "down_proj"])
    twin = copy.deepcopy(ours)
    for model in (ours, twin):
        attach(model)
    twin.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (ours, twin):
        torch.manual_seed(11)
        model(**batch()).loss.backward()
    compared = 0
    for (name, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        if p.grad is not None:
            compared += 1
            assert float(p.grad.norm()) > 0 and torch.allclose(p.grad, q.grad, atol=1e-6), name
    assert compared == 4


def test_gradients_accumulate():
    ours = adapted()
    theirs = copy.deepcopy(ours)
    attach(ours)
    for seed in (0, 1, 2):
        for model in (ours, theirs):
            (model(**batch(seed=seed)).loss / 3).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert q.grad is None or (q.grad.norm() > 0 and torch.allclose(p.grad, q.grad, atol=1e-5)), name


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_the_numbers_are_as_close_to_fp32_as_peft_under_autocast(base):
    truth = adapted()
    results = []
    for fast in (False, True):
        model = adapted()
        model.base_model.model.to(base)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        if fast:
            attach(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
        results.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    truth(**batch()).loss.backward()
    exact = [p.grad for n, p in truth.named_parameters() if "lora_" in n]
    theirs, ours = (
        sum(float((g - e).norm() ** 2) for g, e in zip(grads, exact, strict=True)) ** 0.5 for grads in results
    )
    assert 0 < ours < 2 * theirs  # the interpreter truncates where a GPU rounds; gpu tests hold 1.25


def test_an_nf4_base():
    bnb = pytest.importorskip("bitsandbytes")

    def quantised() -> Any:
        torch.manual_seed(7)
        model = build("llama", num_hidden_layers=1, hidden_size=64, head_dim=16, intermediate_size=128)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear and name != "lm_head":
                    linear = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, bias=False, quant_type="nf4",
                        compute_dtype=torch.float32, compress_statistics=True,
                    )  # fmt: skip
                    linear.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, linear.to("cpu"))
        model.is_loaded_in_4bit = True
        model.requires_grad_(False)
        torch.manual_seed(9)
        peft_model = get_peft_model(model, LoraConfig(r=3, target_modules=[n for n in ALL if n != "k_proj"]))
        draw_b(peft_model)
        return peft_model.train()

    ours, theirs = quantised(), quantised()
    attachment = attach(ours, strict=True)
    text = str(attachment)
    assert "model.layers.*.self_attn.q_proj: lora on nf4 (x1)" in text
    assert "model.layers.*.self_attn.k_proj: nf4 (x1)" in text
    assert_same_step(ours, theirs)
    result = attachment.attest(lambda: ours(**batch()).loss.backward())
    assert result.ok, result.problems
    # Forward 7; backward gate, up, down and o, but not q, k, v: nothing below the first layer trains.
    assert result.kernels["nf4_dequant_kernel"] == 11 == result.promised["nf4_dequant_kernel"]
    # In eval mode bitsandbytes would answer with its bf16 CPU kernel.
    with torch.no_grad(), ours.disable_adapter(), theirs.disable_adapter():
        assert torch.allclose(ours(**batch()).logits, theirs(**batch()).logits, atol=1e-4)
