"""The same numbers: losses and every parameter's gradient of an attached model against the unpatched one, over steps.

fp32 in the interpreter for three families in CI and for all when slow; on a GPU all, and bf16 against an fp32 oracle.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from aligntune.backends.fast import attach
from tests.backends.fast.minis import MINIS, batch, build

IN_CI = ("llama", "qwen3", "gemma2")
FAMILY = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in MINIS]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]

# Parameters whose reference gradient is 0 by nature; none is. A row here must say why.
ZERO_GRADIENTS: dict[str, str] = {}


def with_lora(model: Any) -> Any:
    """Adapters on every projection; B is drawn N(0, 0.02), for at 0 no gradient of A could be compared."""
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    torch.manual_seed(5)
    peft_model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=[n for n in LINEARS if n in names]))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return peft_model.train()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_same_training(ours: Any, theirs: Any, *, steps: int = 3, tolerance: float = 1e-5, **sizes: Any) -> None:
    """`steps` of SGD on other rows each: the losses, and every gradient relative to its norm."""
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    losses = []
    for step in range(steps):
        inputs = batch(seed=step, **sizes)
        pair = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            pair.append(loss.detach())
        assert torch.isfinite(pair[1]) and abs(float(pair[0] - pair[1])) < tolerance * float(pair[1])
        losses.append(float(pair[1]))
        compared = 0
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == (not q.requires_grad), name
            if q.grad is None:
                continue
            compared += 1
            if name in ZERO_GRADIENTS:
                assert not q.grad.any() and not p.grad.any(), name
                continue
            assert float(q.grad.norm()) > 1e-6, f"step {step}: the reference gradient of {name} is 0"
            assert relative(p.grad, q.grad) < 10 * tolerance, f"step {step}: {name}"
        assert compared > 4
        for optimizer in optimizers:
            optimizer.step()
    assert len(set(losses)) == steps


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILY)
def test_three_steps_in_fp32(family, lora):
    ours = with_lora(build(family)) if lora else build(family)
    theirs = copy.deepcopy(ours)
    attach(ours)
    assert_same_training(ours, theirs, length=6)


def test_documents_laid_end_to_end():
    """One row of several documents, told apart by their positions."""
    ours = build("qwen3")
    theirs = copy.deepcopy(ours)
    attach(ours)
    inputs = batch(rows=1, length=14)
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5]])
    losses = [model(**inputs).loss for model in (ours, theirs)]
    assert torch.allclose(losses[0], losses[1], atol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert q.grad.norm() > 0 and relative(p.grad, q.grad) < 1e-4, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_stays_the_models_own(implementation):
    ours, theirs = (build("mistral", attn_implementation=implementation) for _ in range(2))
    attach(ours)
    assert_same_training(ours, theirs, steps=1, length=9)
    with torch.no_grad():
        a, b = (model.eval()(**batch(length=9), output_attentions=True) for model in (ours, theirs))
    assert len(a.attentions) == len(b.attentions) == (2 if implementation == "eager" else 0)
    if implementation == "eager":
        assert torch.allclose(a.attentions[1], b.attentions[1], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- on a GPU

GPU_SIZES: dict[str, Any] = {"hidden_size": 252, "intermediate_size": 690, "head_dim": 60}


def gpu_build(family: str, **settings: Any) -> Any:
    sizes = dict(GPU_SIZES)
    if family in EXPERTS:
        sizes |= {"hidden_size": 256, "intermediate_size": 704, "moe_intermediate_size": 96}
    return build(family, **sizes, **settings).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", MINIS)
def test_fp32_on_a_gpu(family, lora):
    ours = with_lora(gpu_build(family)) if lora else gpu_build(family)
    theirs = copy.deepcopy(ours)
    attachment = attach(ours)
    assert_same_training(ours, theirs, tolerance=3e-5, rows=4, length=57, device="cuda")
    result = attachment.attest(lambda: ours(**batch(device="cuda")).loss.backward())
    assert result.ok, result.problems


EXPERTS = ("qwen3_moe", "mixtral")
# In half precision a router picks other experts here and there, whoever computes: no distance of gradients is small.
# Where each token goes to every expert there is nothing to pick.
HALF_PRECISION: dict[str, dict[str, Any]] = {
    name: {"num_experts_per_tok": 4} if name in EXPERTS else {} for name in MINIS
}


@pytest.mark.parametrize("family", EXPERTS)
def test_nothing_is_picked_where_every_expert_is_taken(family):
    config = build(family, **HALF_PRECISION[family]).config
    assert config.num_experts_per_tok == getattr(config, "num_experts", getattr(config, "num_local_experts", None))


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["cast", "autocast"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", HALF_PRECISION)
def test_bf16_is_no_further_from_an_fp32_oracle_than_eager(family, lora, how):
    oracle = gpu_build(family, **HALF_PRECISION[family])
    oracle = with_lora(oracle) if lora else oracle
    low = copy.deepcopy(oracle)
    if how == "cast":
        for name, parameter in low.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        # The oracle starts from the same rounded weights: what is judged is the arithmetic.
        for p, q in zip(oracle.parameters(), low.parameters(), strict=True):
            p.data.copy_(q.data.float())
    fast = copy.deepcopy(low)
    attach(fast)
    inputs = batch(rows=6, length=120, device="cuda")
    oracle(**inputs).loss.backward()
    truth = [p.grad.double().flatten() for p in oracle.parameters() if p.grad is not None]
    distances = []
    for model in (low, fast):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=how == "autocast"):
            loss = model(**inputs).loss
        loss.backward()
        found = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        assert len(found) == len(truth) > 4
        distances.append(relative(torch.cat(found), torch.cat(truth)))
    eager, ours = distances
    assert 0 < eager < 0.3
    assert ours <= 1.25 * eager + 1e-6, f"ours {ours:.4f}, eager {eager:.4f}"


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", [name for name in MINIS if name not in EXPERTS])
def test_fp16_under_a_scaled_loss(family, lora):
    oracle = with_lora(gpu_build(family)) if lora else gpu_build(family)
    low = copy.deepcopy(oracle).half()
    with torch.no_grad():
        for p, q in zip(oracle.parameters(), low.parameters(), strict=True):
            p.copy_(q)
    fast = copy.deepcopy(low)
    attach(fast)
    inputs = batch(rows=4, length=57, device="cuda")
    oracle(**inputs).loss.backward()
    truth = torch.cat([p.grad.double().flatten() for p in oracle.parameters() if p.grad is not None])
    distances = []
    for model in (low, fast):
        (model(**inputs).loss * 128).backward()
        found = [p.grad.double().flatten() / 128 for p in model.parameters() if p.grad is not None]
        distances.append(relative(torch.cat(found), truth))
    assert distances[1] <= 1.25 * distances[0] + 1e-6, distances
