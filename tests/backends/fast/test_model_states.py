"""A model attached, trained, detached, saved and reloaded is an ordinary model, and generates in every state."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from aligntune.backends.fast import attach, attachment_of, detach
from aligntune.errors import ConfigError
from tests.backends.fast.minis import MINIS, VOCAB, batch, build

PROMPT = torch.tensor([[0, 0, 5, 9, 12], [7, 8, 9, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def generated(model: Any) -> list[list[int]]:
    was = model.training
    model.eval()
    out = model.generate(PROMPT, attention_mask=MASK, max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.train(was)
    return out[:, 5:].tolist()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(), output_logits=True).logits if attachment_of(model) else model(**batch()).logits


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in MINIS if name != "llama")]
)
def test_generate_works_in_every_state(family):
    model = build(family)
    expected = generated(model)
    assert len({tuple(row) for row in expected}) == 2
    attach(model)
    assert generated(model) == expected
    model(**batch()).loss.backward()
    assert generated(model) == expected
    add_fused_lm_head(model)
    assert generated(model) == expected
    attach(model)
    assert generated(model) == expected
    detach(model)
    assert generated(model) == expected


def test_generation_without_a_cache_and_with_sampling():
    model, plain = build("qwen3").eval(), build("qwen3").eval()
    attach(model)
    for settings in ({"use_cache": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):
        found = []
        for one in (model, plain):
            torch.manual_seed(4)
            found.append(one.generate(PROMPT, attention_mask=MASK, max_new_tokens=2, eos_token_id=None, **settings))
        assert torch.equal(found[0], found[1])


def test_trained_detached_saved_and_reloaded(tmp_path):
    model, plain = build("llama"), build("llama")
    attach(model)
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(**batch()).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "attached")
    detach(model)
    model.save_pretrained(tmp_path / "detached")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("attached", "detached")]
    assert files[0] == files[1] and "model.safetensors" in files[0]
    for name in ("attached", "detached"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(again) is type(plain) and not any("forward" in vars(module) for module in again.modules())
        assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in plain.state_dict().items()
        }
        assert torch.equal(logits(again), logits(model))
        assert torch.allclose(logits(again), logits(plain), atol=1e-4)


def test_state_dicts_and_moves_know_nothing_of_it():
    model = build("llama")
    keys = list(model.state_dict())
    attach(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == [name for name, _ in build("llama").named_modules()]
    model.load_state_dict(build("llama", seed=1).state_dict())
    expected = logits(build("llama", seed=1))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert logits(model.to(torch.float16)).dtype == torch.float16


def gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_a_model_may_get_its_16_bits_before_or_after():
    before, after = build("llama").bfloat16(), build("llama")
    attach(before)
    attach(after)
    found = logits(after.bfloat16())
    assert found.dtype == torch.bfloat16 and torch.equal(found, logits(before))


def test_float64_is_refused_by_kernels_and_left_to_torch_by_attaching_anew():
    model, plain = build("qwen3"), build("qwen3").double()
    attach(model)
    with pytest.raises(ConfigError, match=r"was given float64, and computes in fp32: attach\(model\) anew"):
        model.double()(**batch())
    attachment = attach(model)
    assert all(line.eager for line in attachment.report) and len(attachment.report) == 9
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))
    attach(model.float())
    assert torch.isfinite(model(**batch()).loss) and not any(line.eager for line in attachment.report)


def test_kernels_read_the_weights_that_fsdp2_has_gathered():
    """In one process: weights are DTensors between calls, whoever else has a part of them."""
    plain, model = build("llama"), build("llama")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        attach(model)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        found = gradients(model)
        assert all(isinstance(gradient, DTensor) for gradient in found[1:])
        assert not any(line.eager for line in attachment_of(model).report)
        for ours, expected in zip(found, gradients(plain), strict=True):
            torch.testing.assert_close(getattr(ours, "full_tensor", lambda ours=ours: ours)(), expected, atol=1e-5,
                                       rtol=1e-4)
    finally:
        dist.destroy_process_group()


def test_a_pickled_model_loads_as_an_ordinary_one_and_attaches_again(tmp_path):
    model = build("llama")
    attach(model)
    expected = logits(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not attachment_of(again).attached
    with torch.no_grad():
        assert torch.allclose(again(**batch()).logits, expected, atol=1e-5)
    assert attach(again).attached
    assert torch.allclose(logits(again), expected, atol=1e-5)
    detach(again)
    assert not any("aligntune" in key for module in again.modules() for key in vars(module))


@pytest.mark.parametrize(
    ("family", "reentrant"),
    [
        ("llama", False),
        ("gemma2", True),
        pytest.param("llama", True, marks=pytest.mark.slow),
        pytest.param("gemma2", False, marks=pytest.mark.slow),
        pytest.param("phi3", False, marks=pytest.mark.slow),
    ],
)
def test_recomputed_activations_give_the_same_gradients(family, reentrant):
    model, plain = build(family), build(family)
    attach(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for one in (model, plain):
        one(**batch(), use_cache=True).loss.backward()
    assert len(calls) == 2
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad.norm() > 0 and torch.allclose(p.grad, q.grad, atol=1e-5), name


def test_dropouts_of_the_model_itself_draw_as_they_did():
    settings = {"resid_pdrop": 0.3, "attention_dropout": 0.2, "attn_implementation": "eager"}
    model, plain = build("phi3", **settings), build("phi3", **settings)
    attach(model)
    losses = []
    for one in (model, plain):
        torch.manual_seed(2)
        losses.append(one(**batch()).loss)
    assert torch.allclose(losses[0], losses[1], atol=1e-5)


def test_hidden_states_are_captured_as_before():
    model, plain = build("gemma2"), build("gemma2")
    attach(model)
    with torch.no_grad():
        found = [one(**batch(), output_hidden_states=True) for one in (model, plain)]
    assert len(found[0].hidden_states) == len(found[1].hidden_states) == 3
    for a, b in zip(*(one.hidden_states for one in found), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    training = model(**batch(), output_hidden_states=True)
    assert training.logits is None and len(training.hidden_states) == 3


@pytest.mark.parametrize("first", ["hooks", "attach"])
def test_device_hooks_of_accelerate_stay_around_our_forwards(first):
    model, plain = build("llama"), build("llama")
    if first == "attach":
        attach(model)
    hooked = [model.model.norm, model.model.layers[0].mlp, *model.model.layers[1].modules()]
    for module in hooked:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    if first == "hooks":
        attach(model)
    attachment = attachment_of(model)
    assert attachment.attached and len(attachment.patches) == 11
    result = attachment.attest(lambda: model(**batch()).loss.backward())
    assert result.ok and not result.eager
    assert result.kernels["LoraLinearGroup"] == result.kernels["LoraMLP"] == 2
    plain(**batch()).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert q.grad.norm() > 0 and torch.allclose(p.grad, q.grad, atol=1e-5), name
    detach(model)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    for module in hooked:
        remove_hook_from_module(module)
        assert module.forward.__func__ is type(module).forward


def test_weights_that_a_hook_moves_are_left_to_the_hook():
    model, plain = build("llama"), build("llama")
    attachment = attach(model)
    projection = model.model.layers[0].self_attn.v_proj
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(projection, hook)
    hook.offload, hook.weights_map, hook.tied_params_map = True, dict(projection.named_parameters()), None
    assert torch.allclose(model(**batch()).loss, plain(**batch()).loss, atol=1e-5)
    assert [line for line in map(str, attachment.report) if "v_proj has hooks" in line]


def test_weights_of_an_attached_model_can_be_shared_and_swapped():
    model = build("qwen2")  # tied embeddings
    attach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(**batch()).loss.backward()
    plain = build("qwen2")
    plain(**batch()).loss.backward()
    assert torch.allclose(model.lm_head.weight.grad, plain.lm_head.weight.grad, atol=1e-5)
    model.resize_token_embeddings(VOCAB + 7)
    assert logits(model).shape == (2, 11, VOCAB + 7)
    assert torch.isfinite(model(**batch()).loss)


def test_layers_alone_and_models_inside_others():
    """A submodule can be called by itself, copied out and put into another model."""
    model, other = build("llama"), build("llama", seed=3)
    attach(model)
    x = torch.randn(1, 3, 44)
    mlp = copy.deepcopy(model.model.layers[0].mlp)
    plain = build("llama").model.layers[0].mlp
    assert torch.allclose(mlp(x), plain(x), atol=1e-5)
    other.model.layers[0].mlp = mlp
    with torch.no_grad():
        mlp.gate_proj.weight.zero_()
    assert not torch.allclose(model.model.layers[0].mlp(x), mlp(x))
    assert torch.isfinite(other(**batch()).loss)


_SCRIPT = """
import hashlib, sys, torch
sys.path.insert(0, {root!r})
from tests.backends.fast.minis import build, batch

settings = {{"device": "cpu", "attention": "eager"}}
if {gpu!r}:
    settings = {{"device": "cuda", "attention": "sdpa"}}
    torch.use_deterministic_algorithms(True, warn_only=True)
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{{kind}}_sdp")(False)

def made():
    model = build("llama", attention_dropout=0.1, attn_implementation=settings["attention"])
    return model.to(settings["device"])

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()

def plain_run(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = model(**batch(seed=step, device=settings["device"])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return " ".join([*losses, digest(model.parameters()), digest(states)])

if {after!r}:
    from aligntune.backends.fast import attach, detach
    model = made()
    start = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}
    attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        model(**batch(seed=step, device=settings["device"])).loss.backward()
        optimizer.step()
    detach(model)
    model.zero_grad()
    model.load_state_dict(start)
    torch.manual_seed(0)
    print(plain_run(model))
torch.manual_seed(0)
model = made()
torch.manual_seed(0)
print(plain_run(model))
"""


def assert_fresh_again(*, gpu: bool) -> None:
    """A run after detach and one of a new model, in a process that has attached, are those of one that has not."""
    root = str(Path(__file__).resolve().parents[3])
    env = dict(os.environ) | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    runs = []
    for after in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT.format(root=root, after=after, gpu=gpu)],
            capture_output=True, text=True, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout.split("\n")[:-1])
    (fresh,), (detached, another) = runs
    assert len(fresh.split()) == 5 and len(set(fresh.split()[:3])) == 3
    assert detached == fresh and another == fresh


def test_a_plain_run_after_detach_is_bit_equal_to_one_in_a_fresh_process():
    assert_fresh_again(gpu=False)


@pytest.mark.gpu
def test_on_a_gpu_a_plain_run_after_detach_is_bit_equal_to_one_in_a_fresh_process():
    """Deterministic algorithms, attention by its definition."""
    assert_fresh_again(gpu=True)
