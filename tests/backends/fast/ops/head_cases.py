"""Inputs for the head, its three entry points behind one call, and the comparison with full logits in float64."""

from __future__ import annotations

import torch

from aligntune.backends.fast.ops.head import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_log_probs,
    token_log_probs_reference,
    token_loss,
    token_loss_reference,
)
from tests.backends.fast.ops.harness import relative_error

CAPPED = {"softcap": 4.0, "logit_scale": 0.6, "temperature": 1.2}
KINDS = ("loss", "tokens", "log_probs")


def make(tokens, hidden, vocab, device, *, dtype=torch.float32, bias=False, scale=0.5):
    """hidden, weight, bias, targets; every third target is ignored, unless there is only one."""
    x = torch.randn(tokens, hidden, device=device)
    weight = torch.randn(vocab, hidden, device=device) * scale * 6 / hidden**0.5
    b = torch.randn(vocab, device=device) if bias else None
    targets = torch.randint(0, vocab, (tokens,), device=device)
    if tokens > 1:
        targets[::3] = -100
    return x.to(dtype), weight.to(dtype), None if b is None else b.to(dtype), targets


def kept_rows(targets, *, padding=3):
    """What a collator would make: the rows that count, padded to a bucket."""
    rows = (targets.flatten() != -100).nonzero().flatten()
    return torch.cat([rows, rows.new_full((padding,), -1)])


def ratio_loss(log_probs, entropy, *, old, advantages):
    """A clipped ratio with an entropy bonus, and a metric beside it."""
    ratio = (log_probs - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (loss if entropy is None else loss - 0.1 * entropy), {"ratio": ratio}


def token_constants(targets):
    g = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(targets.shape, generator=g).to(targets.device)  # noqa: E731
    return {"old": -3 + draw(), "advantages": draw()}


def as_dict(out):
    return out if isinstance(out, dict) else out._asdict()


def run(kind, x, weight, bias, targets, *, reference, trained=True, upstream=1.0, entropy=True, grads=None, **options):
    """Everything that comes out of one entry point: outputs, and the gradients of hidden, weight and bias."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(t is x or trained) for t in (x, weight, bias)]
    x, weight, bias = leaves
    if kind == "loss":
        fn = linear_cross_entropy_reference if reference else linear_cross_entropy
        out = as_dict(fn(x, weight, targets, bias=bias, **options))
        scalar = out["loss"]
    elif kind == "tokens":
        fn = token_loss_reference if reference else token_loss
        dtype = torch.promote_types(x.dtype, torch.float32) if reference else torch.float32
        constants = {name: value.to(dtype) for name, value in token_constants(targets).items()}
        out = as_dict(fn(x, weight, targets, ratio_loss, per_token=constants, entropy=entropy, bias=bias, **options))
        out["ratio"] = out.pop("metrics")["ratio"]
        scalar = out["loss"]
    else:
        fn = token_log_probs_reference if reference else token_log_probs
        out = as_dict(fn(x, weight, targets, bias=bias, **options))
        of_log_probs, of_entropy = torch.ones(2, *targets.shape, device=x.device) if grads is None else grads
        scalar = (out["log_probs"] * of_log_probs).sum()
        if entropy:
            scalar = scalar + (out["entropy"] * of_entropy).sum()
    (scalar * upstream).backward()
    found = {name: value.detach() for name, value in out.items() if value is not None}
    return found | {
        f"d{name}": t.grad for name, t in zip(("x", "weight", "bias"), leaves, strict=True) if t is not None
    }


def assert_equal_to_truth(kind, x, weight, bias, targets, *, tolerance=1e-5, **options):
    ours = run(kind, x, weight, bias, targets, reference=False, **options)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    truth = run(kind, *wide, targets, reference=True, **options)
    assert ours.keys() == truth.keys()
    for name, wanted in truth.items():
        found = ours[name]
        if wanted is None:
            assert found is None, name
            continue
        assert found.shape == wanted.shape and torch.isfinite(found).all(), name
        assert float(wanted.double().norm()) > 0 or name == "is_top1" or wanted.shape == (1,), f"{name}: compares zeros"
        if wanted.dtype == torch.bool:
            assert torch.equal(found, wanted), name
        elif wanted.any():
            assert relative_error(found, wanted) < tolerance, name
        else:
            assert not found.any(), name
    return ours
