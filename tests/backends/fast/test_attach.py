"""attach changes instances only, says what it did, and detach leaves nothing behind."""

from __future__ import annotations

import ast
import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from aligntune.backends.fast import attach, attachment_of, detach
from aligntune.backends.fast import attachment as attachment_module
from aligntune.errors import ConfigError
from tests.backends.fast.minis import MINIS, VOCAB, batch, build


def snapshot(model: nn.Module) -> dict[str, dict[str, int]]:
    """Every attribute of every module, by identity, with its class's methods."""
    return {
        path: {
            **{key: id(value) for key, value in vars(module).items()},
            **{f"class.{key}": id(value) for key, value in vars(type(module)).items()},
        }
        for path, module in model.named_modules()
    }


def process_state() -> dict[str, object]:
    """Flags and generators that a patch could move."""
    modeling = sys.modules["transformers.models.llama.modeling_llama"]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return {
        "rng": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "module": {key: id(value) for key, value in vars(modeling).items()},
        "functional": {key: id(value) for key, value in vars(torch.nn.functional).items()},
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        "env": dict(os.environ),
    }


def step(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    loss = model(**(inputs or batch())).loss
    loss.backward()
    return loss.detach()


def test_detach_restores_every_attribute_of_instances_classes_and_process():
    model = build("llama")
    before, process = snapshot(model), process_state()
    attachment = attach(model)
    patched = [path for path, module in model.named_modules() if "forward" in vars(module)]
    assert len(patched) == 1 + 2 * (1 + 1 + 1 + 2) + 1  # root; per layer itself, attention, MLP, two norms; last norm
    assert attachment.attached and attachment_of(model) is attachment
    classes = {path: {k: v for k, v in found.items() if k.startswith("class.")} for path, found in before.items()}
    after = snapshot(model)
    assert {p: {k: v for k, v in found.items() if k.startswith("class.")} for p, found in after.items()} == classes
    assert process_state() == process
    detach(model)
    assert snapshot(model) == before
    assert process_state() == process
    assert attachment_of(model) is None and not attachment.attached


def test_process_state_is_the_same_after_a_trained_step():
    model = build("llama")
    process = process_state()
    attach(model)
    step(model)
    detach(model)
    assert process_state() == process


def test_detaching_what_is_not_attached_is_harmless():
    model = build("llama")
    before = snapshot(model)
    detach(model)
    assert snapshot(model) == before


def test_attaching_twice_is_attaching_once():
    model = build("llama")
    before = snapshot(model)
    first = attach(model)
    report = [str(line) for line in first.report]
    assert attach(model) is first
    assert [str(line) for line in first.report] == report
    assert len(first.patches) == len({id(patch.module) for patch in first.patches})
    loss = step(model)
    assert torch.isfinite(loss)
    detach(model)
    assert snapshot(model) == before


def test_the_report_says_what_each_module_got():
    lines = [str(line) for line in attach(build("llama")).report]
    assert lines == [
        "model.layers.*: add + rms_norm in one launch (x2)",
        "model.layers.*.self_attn: rope (x2)",
        "model.layers.*.mlp: glu, silu (x2)",
        "model.layers.*.input_layernorm: rms_norm, llama convention (x2)",
        "model.layers.*.post_attention_layernorm: rms_norm, llama convention (x2)",
        "model.norm: rms_norm, llama convention (x1)",
        "head: linear + log-probs, behind plain labels (x1)",
    ]


@pytest.mark.parametrize("name", MINIS)
def test_only_experts_stay_eager_in_the_families_of_the_table(name):
    eager = [str(line) for line in attach(build(name)).report if line.eager]
    experts = name in ("qwen3_moe", "mixtral")
    assert eager == (["model.layers.*.mlp: eager, routed experts have no kernel"] if experts else [])


def test_an_activation_without_a_kernel_is_a_line_and_an_error_under_strict():
    model = build("llama", hidden_act="relu2")
    before = snapshot(model)
    line = "model.layers.*.mlp: eager, activation 'relu2' has no kernel"
    assert [str(line) for line in attach(model).report if line.eager] == [line]
    step(model)
    detach(model)
    with pytest.raises(ConfigError, match="activation 'relu2' has no kernel"):
        attach(model, strict=True)
    assert {p: {k for k in found if k != "_modules"} for p, found in snapshot(model).items()} == {
        p: {k for k in found if k != "_modules"} for p, found in before.items()
    }
    assert attachment_of(model) is None


@pytest.mark.parametrize("attached", [False, True])
def test_an_error_halfway_leaves_nothing_attached(attached, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("halfway")

    model = build("llama")
    before = snapshot(model)
    if attached:
        attach(model)
    monkeypatch.setattr(attachment_module.head, "install", fails)
    with pytest.raises(RuntimeError, match="halfway"):
        attach(model)
    assert snapshot(model) == before


def test_a_step_asks_nothing_that_transformers_deprecates():
    model = build("llama")
    attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        step(model)


def test_strict_names_every_fault_at_once():
    model = build("llama", hidden_act="relu2")
    model.model.norm.forward = lambda x: x
    with pytest.raises(ConfigError) as caught:
        attach(model, strict=True)
    assert len(caught.value.faults) == 2
    assert "model.norm: eager, a forward of its own was set on the instance" in str(caught.value)


def test_a_forward_set_by_someone_else_stays_and_runs():
    model = build("llama")
    calls = []

    def own(hidden_states):
        calls.append(1)
        return type(model.model.norm).forward(model.model.norm, hidden_states)

    model.model.norm.forward = own
    attachment = attach(model)
    assert "model.norm: eager, a forward of its own was set on the instance" in str(attachment)
    step(model)
    assert calls == [1]
    detach(model)
    assert model.model.norm.forward is own


def test_a_forward_put_on_top_afterwards_survives_detach():
    model = build("llama")
    attachment = attach(model)
    ours = model.model.norm.forward

    def on_top(x):
        return ours(x)

    model.model.norm.forward = on_top
    assert not attachment.attached
    detach(model)
    assert model.model.norm.forward is on_top


def test_trls_forward_stays_where_trl_put_it():
    model = build("llama")
    add_fused_lm_head(model)
    trls = vars(model)["forward"]
    attach(model)
    assert vars(model)["forward"] is not trls
    detach(model)
    assert vars(model)["forward"] is trls


def test_trls_forward_put_on_top_stays_and_ours_below_only_passes_on():
    model = build("llama")
    inputs = batch()
    plain = model(**inputs)
    attachment = attach(model)
    add_fused_lm_head(model)
    trls = vars(model)["forward"]
    assert [str(line) for line in attachment.report if line.eager] == ["head: TRL's own (attached before the trainer)"]
    assert torch.allclose(model(**inputs, fused_lm_head=True).loss, plain.loss, atol=1e-5)
    detach(model)
    assert vars(model)["forward"] is trls
    again = model(**inputs)
    assert torch.equal(again.loss, plain.loss) and torch.equal(again.logits, plain.logits)


def test_under_strict_trls_own_head_is_an_error_at_the_first_call():
    model = build("llama")
    attach(model, strict=True)
    step(model)
    add_fused_lm_head(model)
    with pytest.raises(ConfigError, match=r"head: TRL's own \(attached before the trainer\)"):
        model(**batch(), fused_lm_head=True)
    attach(model, strict=True)
    assert torch.isfinite(model(**batch(), fused_lm_head=True).loss)
    detach(model)
    assert not any("aligntune" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("with_trl", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_deep_copy_does_not_follow_the_model_it_was_copied_from(with_trl):
    model = build("qwen3")
    if with_trl:
        add_fused_lm_head(model)
    attach(model)
    clone = copy.deepcopy(model)
    inputs = batch()

    def answers(who: nn.Module) -> list[torch.Tensor]:
        found = [who(**inputs).loss, who(input_ids=inputs["input_ids"]).logits]
        return [*found, who(**inputs, fused_lm_head=True).log_probs] if with_trl else found

    before = answers(clone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    assert all(torch.equal(a, b) for a, b in zip(answers(clone), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(answers(model), before, strict=True))
    assert attachment_of(clone) is not attachment_of(model)
    assert attachment_of(clone).attached and attachment_of(clone).model is clone
    detach(clone)
    assert not any("forward" in vars(module) for module in clone.modules())
    assert attachment_of(model).attached
    assert torch.allclose(clone(**inputs).loss, before[0], atol=1e-5)
    detach(model)
    assert ("forward" in vars(model)) is with_trl


def test_a_copy_taken_without_its_forwards_attaches_anew():
    from aligntune.core.model_hygiene import copy_model, forget_patched_forward

    model = build("llama")
    loss = attach(model) and model(**batch()).loss
    clone = copy_model(model)
    assert attachment_of(model).attached and not any("forward" in vars(m) for m in clone.modules())
    assert torch.allclose(clone(**batch()).loss, loss, atol=1e-5)
    assert attach(clone).attached
    assert forget_patched_forward(model) == 12
    assert not attachment_of(model).attached
    assert attach(model).attached
    assert torch.equal(model(**batch()).loss, loss)


def test_hooks_on_a_module_that_an_op_passes_by_are_honoured_and_said():
    model = build("qwen3")
    attachment = attach(model)
    seen = []
    handle = model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: seen.append("norm"))
    model.model.layers[1].self_attn.q_norm.register_forward_hook(lambda *_: seen.append("q_norm"))
    plain = build("qwen3")
    assert torch.allclose(step(model), step(plain), atol=1e-5)
    assert seen == ["norm", "q_norm"]
    lines = [str(line) for line in attachment.report if line.eager]
    assert len(lines) == 2 and all("1 calls since attach" in line and "hooks" in line for line in lines)
    handle.remove()
    attach(model, strict=False)
    assert not [line for line in attachment.report if line.eager]
    attach(model, strict=True)
    with pytest.raises(ConfigError, match="hooks"):
        step(model)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_hooks_on_an_activation_are_honoured_and_said(family):
    ours, theirs = build(family), build(family)
    attachment = attach(ours)
    name = "act_fn" if family == "llama" else "activation_fn"
    for model in (ours, theirs):
        getattr(model.model.layers[1].mlp, name).register_forward_hook(lambda module, inputs, output: 2 * output)
    loss = step(theirs)
    assert abs(float(loss - step(build(family)))) > 0.005
    assert torch.allclose(step(ours), loss, atol=1e-5)
    assert [str(line) for line in attachment.report if line.eager] == [
        "model.layers.*.mlp: eager, 1 calls since attach: its activation has hooks"]


def test_parametrized_linears_are_called_and_named():
    ours, theirs = build("llama"), build("llama")
    for model in (ours, theirs):
        layers = model.model.layers
        for linear in (layers[0].self_attn.q_proj, layers[0].self_attn.o_proj, layers[1].mlp.up_proj):
            torch.nn.utils.parametrizations.weight_norm(linear)
    attachment = attach(ours)
    assert torch.allclose(step(ours), step(theirs), atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert float(q.grad.norm()) > 0 and torch.allclose(p.grad, q.grad, atol=1e-5, rtol=1e-4), name
    assert [str(line) for line in attachment.report if line.eager] == [
        f"model.layers.*.{path}: eager, its weight is parametrized"
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]


def test_class_patches_of_others_are_named(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward

    def liger_forward(self, x):
        return original(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", liger_forward)
    lines = [str(line) for line in attach(build("llama")).report if line.eager]
    assert len(lines) == 1 and "its class's forward was replaced by" in lines[0] and "liger_forward" in lines[0]


def test_a_family_outside_the_table_takes_what_structure_shows():
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=44, intermediate_size=70, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    plain = copy.deepcopy(model)
    lines = [str(line) for line in attach(model).report]
    assert lines == [
        "model.layers.*: eager, GemmaDecoderLayer is in no family of the table",
        "model.layers.*.self_attn: eager, GemmaAttention is in no family of the table",
        "model.layers.*.mlp: glu, gelu_tanh (x2)",
        "model.layers.*.input_layernorm: rms_norm, gemma convention (x2)",
        "model.layers.*.post_attention_layernorm: rms_norm, gemma convention (x2)",
        "model.norm: rms_norm, gemma convention (x1)",
        "head: eager, GemmaForCausalLM is in no family of the table, so how it scales logits is not known",
    ]
    assert torch.allclose(step(model), step(plain), atol=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert theirs.grad.norm() > 0 and torch.allclose(ours.grad, theirs.grad, atol=1e-5)


def test_models_without_a_language_model_head_get_their_layers():
    import transformers

    config = build("llama").config
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    lines = [str(line) for line in attach(model).report]
    assert not any("head" in line or "eager" in line for line in lines) and len(lines) == 6
    inputs = batch()
    del inputs["labels"]
    attached = model(**inputs).logits
    detach(model)
    assert torch.allclose(attached, model(**inputs).logits, atol=1e-5)
    bare = transformers.LlamaModel(config)
    assert len(attach(bare).report) == 6


@pytest.mark.parametrize("dtype", [torch.float64])
def test_dtypes_without_a_kernel_are_said(dtype):
    lines = [str(line) for line in attach(build("llama", dtype=dtype)).report if line.eager]
    assert "model.norm: eager, its weight is torch.float64" in lines


@pytest.mark.parametrize("interpret", ["0", None])
def test_without_a_gpu_and_without_the_interpreter_attach_raises(interpret):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret is not None:
        env["TRITON_INTERPRET"] = interpret
    code = (
        "from aligntune.backends.fast import attach\nfrom aligntune.errors import BackendUnavailableError\n"
        "from torch import nn\nmodel = nn.Linear(2, 2)\n"
        "try:\n    attach(model)\nexcept BackendUnavailableError as error:\n"
        "    assert 'forward' not in vars(model)\n    print('refused:', error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:") and "TRITON_INTERPRET=1" in done.stdout and "trl" in done.stdout


def test_importing_the_package_imports_no_torch():
    code = "import sys, aligntune.backends.fast as f; dir(f); assert 'torch' not in sys.modules; print(f.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "accelerate_trl" in done.stdout, done.stderr


def test_the_errors_on_the_page_are_those_of_the_code():
    root = Path(__file__).resolve().parents[3]
    section = (root / "docs" / "kernels.md").read_text().partition("## Errors\n")[2].partition("\n## ")[0]
    told = [message.removesuffix(" ...") for message in re.findall(r"^\| `([^`]+)` \|", section, re.M)]
    assert len(told) >= 10
    texts = [
        node.value
        for path in (root / "aligntune" / "backends" / "fast").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [message for message in told if not any(message in text for text in texts)] == []
