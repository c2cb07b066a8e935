"""The head on the card: realistic vocabularies in half precision, memory, and nothing that waits for the GPU."""

from __future__ import annotations

import pytest
import torch

from aligntune.backends.fast.ops.head import linear_cross_entropy, token_log_probs, token_loss
from tests.backends.fast.ops.harness import assert_close_to_truth
from tests.backends.fast.ops.head_cases import CAPPED, KINDS, kept_rows, make, ratio_loss, run, token_constants

pytestmark = pytest.mark.gpu
GIB = 2**30


@pytest.fixture(autouse=True)
def fresh_numbers():
    torch.seed()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [128_256, 151_936, 262_144, 50_257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_the_truth(dtype, vocab, kind, trained, device):
    """700 tokens in chunks of 256: err(ours) < 2 err(eager) for every output and gradient."""
    tensors = make(700, 512, vocab, device, dtype=dtype, bias=trained)
    # Where gradients are made in the forward an upstream that is no power of two rounds a second time: the next test.
    options = {"outputs": ("log_probs", "entropy", "mean_logits"), "trained": trained, "upstream": 2.0}
    # sums over the vocabulary that eager takes in half precision would set a bound that anybody keeps
    ours = run(kind, *tensors, reference=False, memory_budget=1, **options)
    eager = run(kind, *tensors, reference=True, **options)
    truth = run(kind, *[None if t is None else t.double() for t in tensors[:3]], tensors[3], reference=True, **options)
    for name in ("log_probs", "entropy", "dx", *(("dweight", "dbias") if trained else ())):
        assert_close_to_truth(ours[name], eager[name], truth[name], what=f"{kind} {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_option_against_the_truth(dtype, kind, device):
    """Cap, scale and temperature, rows named by an index; for the loss smoothing, z-loss and a denominator as well."""
    x, weight, bias, targets = make(700, 512, 32_000, device, dtype=dtype, bias=True)
    options = {"outputs": ("log_probs", "entropy"), "upstream": 2.0, "kept": kept_rows(targets), **CAPPED}
    if kind == "loss":
        options |= {"label_smoothing": 0.1, "z_loss": 1e-3, "num_items_in_batch": torch.tensor(300, device=device)}
    ours = run(kind, x, weight, bias, targets, reference=False, memory_budget=1, **options)
    eager = run(kind, x, weight, bias, targets, reference=True, **options)
    truth = run(kind, x.double(), weight.double(), bias.double(), targets, reference=True, **options)
    for name in ("log_probs", "entropy", "dx", "dweight", "dbias"):
        assert_close_to_truth(ours[name], eager[name], truth[name], what=f"{kind} {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_any_upstream_gradient_costs_one_rounding_more_at_most(kind, device):
    tensors = make(700, 512, 32_000, device, dtype=torch.bfloat16, bias=True)
    options = {"reference": False, "memory_budget": 1, "outputs": ("log_probs", "entropy")}
    by_upstream = [run(kind, *tensors, upstream=upstream, **options) for upstream in (1.0, 3.0)]
    for name in ("dx", "dweight", "dbias"):
        one, three = (found[name].double() for found in by_upstream)
        assert three.any() and float((three - 3 * one).norm() / three.norm()) < 2**-8, name


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_logits_against_the_truth(kind, device):
    tensors = make(300, 512, 32_000, device, dtype=torch.bfloat16)
    options = {"outputs": ("log_probs", "entropy"), "fp32_logits": True}
    ours, eager = (run(kind, *tensors, reference=reference, **options) for reference in (False, True))
    truth = run(kind, *[None if t is None else t.double() for t in tensors[:3]], tensors[3], reference=True, **options)
    for name in ("log_probs", "entropy", "dx", "dweight"):
        assert_close_to_truth(ours[name], eager[name], truth[name], eps=1e-5, what=f"{kind} {name}")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_host_sync(kind, trained, device):
    x, weight, bias, targets = make(600, 256, 32_000, device, dtype=torch.bfloat16, bias=True)
    named, constants, items = kept_rows(targets), token_constants(targets), torch.tensor(77)
    leaves = [t.requires_grad_(t is x or trained) for t in (x, weight, bias)]

    def step(**options):
        args = (*leaves[:2], targets)
        if kind == "loss":
            out = linear_cross_entropy(*args, bias=leaves[2], num_items_in_batch=items, **options).loss
        elif kind == "tokens":
            out = token_loss(*args, ratio_loss, per_token=constants, entropy=True, denominator=items, **options).loss
        else:
            found = token_log_probs(*args, bias=leaves[2], outputs=("log_probs", "entropy"), **options)
            out = found.log_probs.sum() + found.entropy.sum()
        out.backward()

    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(memory_budget=1)
            step(kept=named, softcap=10.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x.grad).all() and x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_captured(kind, device):
    """Forward and backward in one CUDA graph, replayed on other inputs."""
    x, weight, _, targets = make(600, 256, 32_000, device, dtype=torch.bfloat16)
    constants = token_constants(targets)
    leaf = x.clone().requires_grad_()

    def step():
        if kind == "loss":
            loss = linear_cross_entropy(leaf, weight, targets).loss
        elif kind == "tokens":
            loss = token_loss(leaf, weight, targets, ratio_loss, per_token=constants, entropy=True).loss
        else:
            loss = token_log_probs(leaf, weight, targets).log_probs.square().mean()
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        assert wanted.any()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trained", "gib"), [(False, 0.5), (True, 3.5)])
def test_peak_memory(kind, trained, gib, device):
    """8192 tokens of H = 4096 and V = 151,936, whose bf16 logits are 2.3 GiB and whose bf16 weight is 1.2."""
    torch.cuda.empty_cache()
    targets = torch.randint(0, 151_936, (8192,), device=device)
    constants = token_constants(targets)
    x = torch.randn(8192, 4096, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(151_936, 4096, device=device, dtype=torch.bfloat16).normal_(std=0.02).requires_grad_(trained)

    def step():
        x.grad = weight.grad = None
        if kind == "loss":
            loss = linear_cross_entropy(x, weight, targets, outputs=("entropy", "is_top1")).loss
        elif kind == "tokens":
            loss = token_loss(x, weight, targets, ratio_loss, per_token=constants, entropy=True).loss
        else:
            loss = token_log_probs(x, weight, targets, outputs=("log_probs", "entropy")).log_probs.mean()
        loss.backward()

    step()
    x.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    assert x.grad.any()
    assert 0.25 < peak <= gib, f"{peak:.2f} GiB above inputs and weight"
