"""The head against the same numbers from full logits in float64, and against TRL's own chunked head."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from aligntune.backends.fast.ops import _projection, _runtime, head
from aligntune.backends.fast.ops._logits_pass import STATISTICS
from aligntune.backends.fast.ops.head import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_log_probs,
    token_log_probs_reference,
    token_loss,
    token_loss_reference,
)
from aligntune.errors import BackendUnavailableError
from tests.backends.fast.ops.harness import launches, relative_error
from tests.backends.fast.ops.head_cases import (
    CAPPED,
    KINDS,
    as_dict,
    assert_equal_to_truth,
    kept_rows,
    make,
    ratio_loss,
    run,
    token_constants,
)


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in CI each time; fresh ones on a GPU."""
    torch.manual_seed(0) if request.node.get_closest_marker("gpu") is None else torch.seed()


@pytest.fixture
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(head, "plan_rows", lambda *_: 4)


# ---------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", [{}, CAPPED])
def test_against_the_truth(kind, trained, options, device, chunks_of_four):
    """9 tokens are chunks of 4, 4 and 1."""
    tensors = make(9, 31, 1000, device, bias=trained)
    assert_equal_to_truth(kind, *tensors, trained=trained, outputs=STATISTICS, upstream=0.37, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_named_by_an_index(kind, trained, padding, device, chunks_of_four):
    x, weight, bias, targets = make(11, 17, 200, device)
    targets[0] = 5  # padding must not be taken for row 0, nor written over it
    named = kept_rows(targets, padding=padding)
    out = assert_equal_to_truth(
        kind, x, weight, bias, targets, trained=trained, outputs=STATISTICS, kept=named, **CAPPED
    )
    assert not out["dx"][targets == -100].any() and not out["log_probs"][targets == -100].any()
    everything = run(kind, x, weight, bias, targets, reference=False, trained=trained, outputs=STATISTICS, **CAPPED)
    for name in ("log_probs", "entropy", "dx"):
        torch.testing.assert_close(out[name], everything[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.get("loss"), everything.get("loss"))


def test_fewer_rows_are_projected_when_they_are_named(device):
    x, weight, _, targets = make(12, 8, 50, device)
    targets[2:] = -100
    seen = []
    plain = _projection.Projection.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_projection.Projection, "logits", lambda self, x, out: seen.append(len(x)) or plain(self, x, out))
        linear_cross_entropy(x, weight, targets, kept=kept_rows(targets, padding=1))
        linear_cross_entropy(x, weight, targets)
    assert seen == [2, 12]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab"), [(1, 255, 1000), (5, 255, 3), (2, 1, 129), (3, 8, 8200), (1, 4, 1)]
)
def test_odd_shapes(kind, tokens, hidden, vocab, device, chunks_of_four):
    tensors = make(tokens, hidden, vocab, device, bias=vocab == 3)
    if vocab == 1:
        out = run(kind, *tensors, reference=False, outputs=STATISTICS)
        assert not out["log_probs"].any() and not out["dx"].any() and not out["dweight"].any()
        return
    assert_equal_to_truth(kind, *tensors, outputs=STATISTICS)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 0.02, "reduction": "sum"},
        {"label_smoothing": 0.2, "z_loss": 0.01, **CAPPED},
        {"num_items_in_batch": 21},
        {"num_items_in_batch": torch.tensor(21)},
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_the_losses_options(options, trained, device, chunks_of_four):
    assert_equal_to_truth("loss", *make(6, 16, 300, device), trained=trained, **options)


def test_chunks_do_not_change_the_loss(device, monkeypatch):
    tensors = make(9, 16, 300, device)
    whole = run("loss", *tensors, reference=False)
    for rows in (1, 4, 8):
        monkeypatch.setattr(head, "plan_rows", lambda *_, rows=rows: rows)
        parts = run("loss", *tensors, reference=False)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=2e-6, atol=1e-7, msg=f"{name}, {rows} rows")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", [True, False])
def test_all_rows_ignored(kind, named, device, chunks_of_four):
    x, weight, bias, targets = make(5, 16, 100, device, bias=True)
    targets[:] = -100
    options = {"kept": kept_rows(targets, padding=2)} if named else {}
    out = run(kind, x, weight, bias, targets, reference=False, outputs=STATISTICS, **options)
    for name in out:
        # the ratio of a token that is not there is not looked at
        assert out[name] is not None and not out[name].any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_at_all(kind, device):
    x, weight = torch.empty(0, 8, device=device), torch.randn(30, 8, device=device)
    targets = torch.empty(0, dtype=torch.int64, device=device)
    leaf = weight.requires_grad_()
    if kind == "loss":
        linear_cross_entropy(x, leaf, targets).loss.backward()
    elif kind == "tokens":
        token_loss(x, leaf, targets, lambda log_probs, _: -log_probs).loss.backward()
    else:
        token_log_probs(x, leaf, targets).log_probs.sum().backward()
    assert leaf.grad is not None and not leaf.grad.any()


def test_the_gradient_is_that_of_finite_differences(device):
    x, weight, bias, targets = make(4, 3, 7, device, bias=True)
    for kind in KINDS:
        found = run(kind, x, weight, bias, targets, reference=False, outputs=("log_probs", "entropy"), **CAPPED)
        tensors = [x.double(), weight.double(), bias.double()]
        for index, name in enumerate(("dx", "dweight", "dbias")):
            direction = torch.randn_like(tensors[index])
            ends = []
            for step in (1e-6, -1e-6):
                moved = list(tensors)
                moved[index] = moved[index] + step * direction
                out = run(kind, *moved, targets, reference=True, outputs=("log_probs", "entropy"), **CAPPED)
                ends.append(float(out["loss"] if "loss" in out else (out["log_probs"] + out["entropy"]).sum()))
            slope = (ends[0] - ends[1]) / 2e-6
            assert abs(slope) > 1e-3
            assert float((found[name].double() * direction).sum()) == pytest.approx(slope, rel=1e-5), (kind, name)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["log_probs", "entropy"])
def test_one_upstream_gradient_at_a_time(name, trained, device, chunks_of_four):
    """The other output is computed, and nobody differentiates it."""
    x, weight, _, targets = make(6, 16, 300, device)
    g = torch.randn(6, device=device)
    found = []
    for fn, wide in ((token_log_probs, False), (token_log_probs_reference, True)):
        leaves = [t.double() if wide else t for t in (x, weight)]
        leaves = [leaves[0].detach().requires_grad_(), leaves[1].detach().requires_grad_(trained)]
        out = as_dict(fn(*leaves, targets, outputs=("log_probs", "entropy")))[name]
        (out * g).sum().backward()
        found.append([t.grad for t in leaves])
    for ours, truth in zip(*found, strict=True):
        assert (ours is None) == (truth is None)
        assert ours is None or relative_error(ours, truth) < 1e-5


@pytest.mark.parametrize("trained", [True, False])
def test_an_expanded_gradient(trained, device, chunks_of_four):
    """sum().backward() sends one number with stride 0."""
    x, weight, bias, targets = make(6, 16, 300, device)
    grads = (torch.ones((), device=device).expand(6), torch.full((), 0.5, device=device).expand(6))
    assert_equal_to_truth("log_probs", x, weight, bias, targets, trained=trained, grads=grads, outputs=STATISTICS)
    leaf = x.clone().requires_grad_()
    token_log_probs(leaf, weight, targets).log_probs.sum().backward()
    wide = x.double().requires_grad_()
    token_log_probs_reference(wide, weight.double(), targets)["log_probs"].sum().backward()
    assert relative_error(leaf.grad, wide.grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_dimensions(kind, device, chunks_of_four):
    """(batch, seq, hidden) cut from wider memory, as a shifted or sliced hidden state is."""
    memory, _, _, _ = make(24, 24, 90, device)
    wide = torch.randn(90, 40, device=device)
    targets = torch.randint(0, 90, (2, 3), device=device)
    targets[1, 2] = -100
    for x in (memory.view(2, 12, 24)[:, :3, :16], memory.view(2, 12, 24)[:, ::4, 3:19], memory[:6, :16].view(2, 3, 16)):
        for w in (wide[:, :16], wide[:, 7:23], wide[:, :16].t().contiguous().t()):
            assert_equal_to_truth(kind, x, w, None, targets, outputs=("log_probs", "entropy"), **CAPPED)


def test_frozen_everything(device, chunks_of_four):
    x, weight, bias, targets = make(6, 8, 50, device, bias=True)
    for out in (
        linear_cross_entropy(x, weight, targets, bias=bias).loss,
        token_loss(x, weight, targets, ratio_loss, per_token=token_constants(targets)).loss,
        token_log_probs(x, weight, targets).log_probs,
    ):
        assert not out.requires_grad and out.any()
    leaf = x.clone().requires_grad_()
    out = linear_cross_entropy(leaf, weight, targets, outputs=STATISTICS)
    assert [name for name, value in out._asdict().items() if value is not None and value.requires_grad] == ["loss"]
    with torch.no_grad():
        assert not token_log_probs(leaf, weight, targets).log_probs.requires_grad
        assert not linear_cross_entropy(leaf, weight, targets).loss.requires_grad


@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("x", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("kind", KINDS)
def test_any_part_may_train(kind, wanted, device, chunks_of_four):
    tensors = dict(zip(("x", "weight", "bias", "targets"), make(6, 8, 50, device, bias=True), strict=True))
    targets = tensors.pop("targets")
    grads = {}
    for reference in (False, True):
        leaves = {
            name: (t.double() if reference else t).detach().requires_grad_(name in wanted)
            for name, t in tensors.items()
        }
        args = (leaves["x"], leaves["weight"], targets)
        if kind == "loss":
            out = (linear_cross_entropy_reference if reference else linear_cross_entropy)(*args, bias=leaves["bias"])
            loss = as_dict(out)["loss"]
        elif kind == "tokens":
            fn = token_loss_reference if reference else token_loss
            loss = as_dict(fn(*args, ratio_loss, per_token=token_constants(targets), bias=leaves["bias"]))["loss"]
        else:
            fn = token_log_probs_reference if reference else token_log_probs
            loss = as_dict(fn(*args, bias=leaves["bias"]))["log_probs"].square().sum()
        loss.backward()
        grads[reference] = {name: t.grad for name, t in leaves.items()}
    for name in tensors:
        assert (grads[False][name] is not None) == (name in wanted), name
        if name in wanted:
            assert relative_error(grads[False][name], grads[True][name]) < 1e-5, name


# ------------------------------------------------------------------------------------------------- log-probs first


def test_kept_logits_and_made_again_agree(device):
    tensors = make(6, 16, 300, device)
    grads = torch.randn(2, 6, device=device)
    counted, plain, found = [], _projection.Projection.logits, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_projection.Projection, "logits", lambda self, x, out: counted.append(1) or plain(self, x, out))
        for budget in (1 << 30, 1):
            counted.clear()
            found.append(
                run("log_probs", *tensors, reference=False, grads=grads, outputs=STATISTICS, memory_budget=budget)
            )
            found[-1]["projections"] = len(counted)
    assert (found[0].pop("projections"), found[1].pop("projections")) == (1, 2)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-6, atol=1e-7, msg=name)


def test_a_frozen_weight_is_projected_once(device):
    """4THV: the backward of the log-probs has nothing left to project."""
    x, weight, _, targets = make(6, 16, 300, device)
    leaf = x.requires_grad_()

    def step():
        # the entropy is logged: it must not come back with a gradient of zeros, which would cost 4THV
        token_log_probs(leaf, weight, targets, outputs=("log_probs", "entropy")).log_probs.square().sum().backward()

    assert launches(step) == {"logits_loss": 1}


@pytest.mark.parametrize("trained", [True, False])
def test_log_probs_can_be_differentiated_twice_over(trained, device):
    """retain_graph: kept logits are used up by the first backward, and made again for the second."""
    x, weight, _, targets = make(6, 16, 300, device)
    leaves = [x.requires_grad_(), weight.requires_grad_(trained)]
    out = token_log_probs(*leaves, targets, outputs=("log_probs", "entropy"))
    total = (out.log_probs * 2 + out.entropy).sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    second = torch.autograd.grad(total, wanted)
    for a, b in zip(first, second, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_losses_hand_their_gradients_out_once(device):
    x, weight, _, targets = make(6, 16, 300, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_nothing_outlives_the_graph(device):
    """An output that hung on its own node would keep the hidden states alive until the garbage collector runs."""
    x, weight, _, targets = make(6, 16, 300, device)
    gc.disable()
    try:
        for trained in (True, False):
            hidden = x.clone().requires_grad_() * 1.0
            watched = weakref.ref(hidden)
            out = token_log_probs(hidden, weight.requires_grad_(trained), targets, outputs=STATISTICS)
            del hidden
            assert watched() is not None
            del out
            assert watched() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------- token-level losses


def test_a_loss_function_that_ignores_the_log_probs(device):
    x, weight, _, targets = make(5, 8, 50, device)
    leaf = x.requires_grad_()
    out = token_loss(
        leaf, weight, targets, lambda log_probs, _, w: w * 2, per_token={"w": torch.ones(5, device=device)}
    )
    out.loss.backward()
    assert out.loss.item() == 2 and not leaf.grad.any()


def test_the_entropy_alone(device):
    x, weight, _, targets = make(5, 8, 50, device)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    token_loss(leaf, weight, targets, lambda _, entropy: -entropy, entropy=True, denominator=2.0).loss.backward()
    stats = token_log_probs_reference(wide, weight.double(), targets, outputs=("entropy",))
    (-stats["entropy"].sum() / 2).backward()
    assert relative_error(leaf.grad, wide.grad) < 1e-5


def test_what_the_loss_function_makes_of_ignored_rows_is_dropped(device):
    """0/0 there must not reach the sum, the metrics, or a gradient."""
    x, weight, _, targets = make(6, 8, 50, device)
    weights = (targets != -100).float()

    def fn(log_probs, _, w):
        return -log_probs / w * w, {"inverse": 1 / w}

    leaf = x.requires_grad_()
    out = token_loss(leaf, weight, targets, fn, per_token={"w": weights})
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(leaf.grad).all() and leaf.grad.any()
    assert torch.equal(out.metrics["inverse"], weights)


def test_token_loss_of_the_negative_log_prob_is_cross_entropy(device, chunks_of_four):
    x, weight, _, targets = make(9, 16, 300, device)
    found = []
    for call in (
        lambda x, w: token_loss(x, w, targets, lambda log_probs, _: -log_probs),
        lambda x, w: linear_cross_entropy(x, w, targets),
    ):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = call(*leaves).loss
        loss.backward()
        found.append([loss, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ misuse


def test_misuse_is_named(device, monkeypatch):
    x, weight, _, targets = make(4, 8, 50, device)
    for call in (linear_cross_entropy, token_log_probs, lambda *a, **k: token_loss(*a, lambda p, _: -p, **k)):
        with pytest.raises(ValueError, match="do not fit"):
            call(x, weight, targets[:3])
        with pytest.raises(ValueError, match="do not fit"):
            call(x[:, :7], weight, targets)
        with pytest.raises(ValueError, match="does not fit weight"):
            call(x, weight, targets, bias=torch.zeros(49, device=device))
        with pytest.raises(ValueError, match="unknown outputs.*logprobs.*known are.*log_probs"):
            call(x, weight, targets, outputs=("logprobs",))
        with pytest.raises(ValueError, match="softcap"):
            call(x, weight, targets, softcap=-1.0)
    with pytest.raises(ValueError, match="gave shape"):
        token_loss(x, weight, targets, lambda log_probs, _: log_probs.sum())
    with pytest.raises(ValueError, match="shaped like the targets"):
        token_loss(x, weight, targets, lambda p, _, w: p * w, per_token={"w": torch.ones(3, device=device)})
    if device == "cpu":
        monkeypatch.setattr(_runtime, "_INTERPRETING", False)
        with pytest.raises(BackendUnavailableError):
            linear_cross_entropy(x, weight, targets)


# ------------------------------------------------------------------------------------------------------ TRL's own head


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"temperature": 0.8, "logit_scale": 1.3, "softcap": 6.0}])
def test_equal_to_trls_chunked_head(options, trained, device, chunks_of_four):
    """Every output and gradient of the function under TRL's fused head, on the same fp32 numbers."""
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

    assert set(STATISTICS) == {"log_probs", *OPTIONAL_OUTPUTS}, "TRL's head has outputs that ours has not"
    x, weight, bias, targets = make(9, 31, 700, device, bias=trained)
    targets = targets.abs()
    targets[2] = (x @ weight.t() + (0 if bias is None else bias))[2].argmax()
    grads = torch.randn(2, 9, device=device)
    results = []
    for theirs in (False, True):
        leaves = [x.clone().requires_grad_()] + [
            None if t is None else t.clone().requires_grad_(trained) for t in (weight, bias)
        ]
        if theirs:
            found = ChunkedLogProbFunction.apply(
                *leaves, targets, options.get("temperature", 1.0), 256, options.get("softcap"),
                options.get("logit_scale", 1.0), OPTIONAL_OUTPUTS,
            )  # fmt: skip
            out = dict(zip(("log_probs", *OPTIONAL_OUTPUTS), found, strict=True))
        else:
            out = token_log_probs(*leaves[:2], targets, bias=leaves[2], outputs=STATISTICS, **options)._asdict()
        differentiable = {name for name in STATISTICS if out[name].requires_grad}
        (out["log_probs"] * grads[0] + out["entropy"] * grads[1]).sum().backward()
        results.append(({name: out[name].detach() for name in STATISTICS}, [t.grad for t in leaves if t is not None],
                        differentiable))  # fmt: skip
    ours, theirs = results
    assert ours[2] == theirs[2] == {"log_probs", "entropy"}
    assert theirs[0]["is_top1"].any() and not theirs[0]["is_top1"].all()
    for name in STATISTICS:
        assert ours[0][name].dtype == theirs[0][name].dtype
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=1e-5, atol=1e-6, msg=name)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < 1e-5
