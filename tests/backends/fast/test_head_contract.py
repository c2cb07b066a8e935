"""Our head behind the two calls that exist: TRL's `fused_lm_head=True`, and transformers' labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from aligntune.backends.fast import attach, recompute
from aligntune.backends.fast import head as head_module
from tests.backends.fast.minis import VOCAB, batch, build

EVERYTHING = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def one_layer(family: str, **settings: Any) -> Any:
    """What lies under the head matters little here, and the interpreter is slow."""
    return build(
        family, **({"num_hidden_layers": 1} if family in ("llama", "gemma2", "granite", "qwen2") else {}), **settings
    )


def twins(family: str = "llama", *, settings: dict[str, Any] | None = None, **trl: Any) -> tuple[Any, Any]:
    """The same model twice, both with TRL's head; ours goes over the first."""
    ours = one_layer(family, **(settings or {}))
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        add_fused_lm_head(model, **trl)
    attach(ours)
    return ours, theirs


def assert_same_answers(ours: Any, theirs: Any, inputs: dict[str, Any], *, atol: float = 2e-5) -> FusedCausalLMOutput:
    """Every field, and every parameter's gradient of a loss that uses log-probs, entropy and the loss itself."""
    results = [model(**inputs, fused_lm_head=True) for model in (ours, theirs)]
    assert isinstance(results[0], FusedCausalLMOutput)
    assert set(results[0].keys()) == set(results[1].keys())
    for name in results[1]:
        a, b = results[0][name], results[1][name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert torch.equal(a, b) if b.dtype == torch.bool else torch.allclose(a, b, atol=atol), name
    for result in results:
        weights = torch.linspace(0.5, 1.5, result.log_probs.numel()).view_as(result.log_probs)
        objective = result.loss + (result.log_probs.exp() * weights).sum()
        if result.entropy is not None:
            objective = objective + 0.1 * result.entropy.sum()
        objective.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None, name
            continue
        assert float(b.grad.norm()) > 0, f"{name}: the reference gradient is 0"
        assert torch.allclose(a.grad, b.grad, atol=5 * atol), name
    return results[0]


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy", "is_top1"), EVERYTHING])
def test_every_field_and_gradient_is_trls(outputs):
    ours, theirs = twins(outputs=outputs, temperature=0.7)
    result = assert_same_answers(ours, theirs, batch())
    assert result.log_probs.shape == (2, 10) and float(result.log_probs.detach().sum()) < -20
    assert result.label_mask.sum() == 14  # 7 + 7 of the 20 next tokens
    assert not result.log_probs[~result.label_mask].any()
    assert ("entropy" in result) == ("entropy" in outputs)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_softcap_and_logit_scale_are_the_models(family):
    ours, theirs = twins(family, settings={"final_logit_softcapping": 2.0} if family == "gemma2" else None)
    assert_same_answers(ours, theirs, batch())
    options = vars(ours)[head_module.KEY]
    assert (options.softcap, options.logit_scale) == ((2.0, 1.0) if family == "gemma2" else (None, 1 / 3))


@pytest.mark.parametrize("items", [50, torch.tensor(37)])
def test_num_items_in_batch_is_the_denominator(items):
    ours, theirs = twins()
    result = assert_same_answers(ours, theirs, {**batch(), "num_items_in_batch": items})
    assert torch.allclose(result.loss, -result.log_probs.sum() / items)


def test_shift_labels_are_scored_as_they_are():
    ours, theirs = twins()
    inputs = batch()
    inputs["shift_labels"] = inputs.pop("labels").roll(-1, dims=1)
    assert assert_same_answers(ours, theirs, inputs).log_probs.shape == (2, 11)


def test_a_batch_without_a_single_label_has_loss_and_gradient_zero():
    ours, _ = twins(outputs=EVERYTHING)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    result = ours(**inputs, fused_lm_head=True)
    result.loss.backward()
    assert result.loss == 0 and not result.log_probs.any() and not result.label_mask.any()
    gradients = [parameter.grad for parameter in ours.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bucket", [4, 8, 64])
def test_rows_left_out_change_nothing(bucket, monkeypatch):
    """The head sees the labelled positions only, in whole buckets, and says the same."""
    seen = []
    original = head_module.token_log_probs
    monkeypatch.setattr(head_module, "token_log_probs", lambda *a, **k: seen.append(k["kept"]) or original(*a, **k))
    monkeypatch.setattr(head_module, "_BUCKET", bucket)
    ours, theirs = twins()
    inputs = batch()
    inputs["labels"][:, :7] = -100
    wanted = torch.nonzero(torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100).view(-1) != -100)
    assert_same_answers(ours, theirs, inputs)
    if bucket == 64:
        assert seen == [None]  # 22 rows are fewer than one bucket
    else:
        assert seen[0].shape == (8,) and seen[0][:5].tolist() == wanted.view(-1).tolist() and (seen[0][5:] == -1).all()


@pytest.mark.parametrize("fused", [True, False])
def test_everything_goes_to_the_device_of_the_heads_weight(fused, monkeypatch):
    """Layers spread over devices by `device_map`: labels and the rows that count come in on the first."""
    class Reached(Exception):
        pass

    def head(*tensors, kept, **options):
        assert [t.device.type for t in (*tensors, kept)] == ["meta"] * 4
        raise Reached

    model = one_layer("llama")
    add_fused_lm_head(model)
    attach(model)
    model.lm_head.to("meta")
    monkeypatch.setattr(head_module, "token_log_probs" if fused else "linear_cross_entropy", head)
    monkeypatch.setattr(head_module, "_BUCKET", 4)
    inputs = batch()
    inputs["labels"][:, :7] = -100
    with pytest.raises(Reached):
        model(**inputs, **({"fused_lm_head": True} if fused else {}))


def test_the_caller_may_know_which_rows_count():
    ours, theirs = twins()
    inputs = batch()
    positions = torch.nonzero(torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100).view(-1) != -100)
    kept = torch.nn.functional.pad(positions.view(-1), (0, 2), value=-1)
    a = ours(**inputs, fused_lm_head=True, kept=kept)
    b = theirs(**inputs, fused_lm_head=True)
    assert torch.allclose(a.log_probs, b.log_probs, atol=1e-5) and torch.allclose(a.loss, b.loss, atol=1e-5)


def test_the_head_in_fp32_under_autocast():
    ours, theirs = twins(cast_lm_head_to_fp32=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [model(**batch(), fused_lm_head=True) for model in (ours, theirs)]
    assert vars(ours)[head_module.KEY].fp32
    assert torch.allclose(results[0].log_probs, results[1].log_probs, atol=0.08)
    assert float((results[0].log_probs - results[1].log_probs).abs().mean()) < 0.02


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_losses_of_moe_models(family):
    ours, theirs = twins(family, settings={"output_router_logits": True, "router_aux_loss_coef": 0.3})
    result = assert_same_answers(ours, theirs, batch())
    assert float(result.aux_loss.detach()) > 0.5
    plain = build(family, output_router_logits=True, router_aux_loss_coef=0.3)
    attached = attach(copy.deepcopy(plain)).model
    a, b = attached(**batch()), plain(**batch())
    assert torch.allclose(a.loss, b.loss, atol=1e-5) and torch.allclose(a.aux_loss, b.aux_loss, atol=1e-5)
    assert type(a) is type(b) and len(a.router_logits) == len(b.router_logits)


def test_without_the_keyword_the_forward_is_the_models_own():
    ours, theirs = twins()
    inputs = batch()
    del inputs["labels"]
    assert torch.allclose(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5)
    import inspect

    assert inspect.signature(ours.forward) == inspect.signature(type(ours).forward.__get__(ours))


def test_options_that_this_version_of_trl_keeps_elsewhere_leave_its_head_in_place():
    model = one_layer("llama")

    def other(self, *args, fused_lm_head=False, **kwargs):
        return type(model).forward(self, *args, **kwargs)

    model.forward = other.__get__(model)
    attachment = attach(model)
    assert "head: TRL's own (this version keeps" in str(attachment)
    assert model.forward.__func__ is other


# --------------------------------------------------------------------------------------------- transformers' own labels


def test_labels_give_the_same_loss_and_gradients_and_no_logits():
    ours, theirs = one_layer("llama"), one_layer("llama")
    attach(ours)
    a, b = ours(**batch()), theirs(**batch())
    assert type(a) is type(b) and a.logits is None and b.logits is not None
    assert torch.allclose(a.loss, b.loss, atol=1e-5) and float(b.loss.detach()) > 3
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert q[1].grad.norm() > 0 and torch.allclose(p.grad, q[1].grad, atol=1e-5), name


@pytest.mark.parametrize("how", ["eval", "no_grad", "asked", "kept", "no labels"])
def test_logits_are_there_when_they_are_wanted(how):
    ours, theirs = one_layer("gemma2"), one_layer("gemma2")
    attach(ours)
    inputs: dict[str, Any] = batch()
    if how == "eval":
        ours.eval(), theirs.eval()
    if how == "no labels":
        del inputs["labels"]
    if how == "kept":
        inputs |= {"logits_to_keep": 4, "labels": inputs["labels"][:, -4:]}
    asked = {"output_logits": True} if how == "asked" else {}
    with torch.set_grad_enabled(how != "no_grad"):
        a, b = ours(**inputs, **asked), theirs(**inputs)
    assert a.logits.shape == ((2, 4, VOCAB) if how == "kept" else (2, 11, VOCAB))
    assert torch.allclose(a.logits, b.logits, atol=2e-5)
    assert (a.loss is None) == (how == "no labels")
    assert a.loss is None or torch.allclose(a.loss, b.loss, atol=1e-5)


def test_tuples_items_and_shifted_labels_as_transformers_takes_them():
    ours, theirs = one_layer("qwen2"), one_layer("qwen2")
    attach(ours)
    inputs = batch()
    assert torch.allclose(ours(**inputs, return_dict=False)[0], theirs(**inputs).loss, atol=1e-5)
    a, b = (model(**inputs, num_items_in_batch=100).loss for model in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-6) and float(b.detach()) < 1
    shifted = {**inputs, "shift_labels": inputs["labels"].roll(-1, 1)}
    assert torch.allclose(ours(**shifted).loss, theirs(**shifted).loss, atol=1e-5)


@pytest.mark.parametrize("why", ["hook", "loss", "ignore_index", "forward"])
def test_what_the_head_cannot_express_stays_the_models_own(why):
    ours, theirs = one_layer("llama"), one_layer("llama")
    inputs: dict[str, Any] = batch()
    attach(ours)
    for model in (ours, theirs):
        if why == "hook":
            model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
        if why == "loss":
            model.loss_function = lambda logits, labels, **_: logits.float().logsumexp(-1).mean()
        if why == "forward":
            model.lm_head.forward = lambda x, own=model.lm_head: torch.nn.functional.linear(x, own.weight) * 2
    if why == "ignore_index":
        inputs |= {"ignore_index": 7, "labels": inputs["labels"].masked_fill(inputs["labels"] == -100, 7)}
    a, b = ours(**inputs), theirs(**inputs)
    assert torch.allclose(a.loss, b.loss, atol=1e-5) and torch.allclose(a.logits, b.logits, atol=1e-5)


@pytest.mark.parametrize("call", ["fused", "labels"])
def test_a_plan_that_measures_is_told_what_the_logits_take(call: str) -> None:
    """In the step that is measured alone, of the rows that were scored."""
    model, _ = twins()
    model.train()
    plan = recompute.install(model)
    assert plan is not None
    model.gradient_checkpointing_enable()
    inputs = batch()
    fused = {"fused_lm_head": True} if call == "fused" else {}
    model(**inputs, **fused).loss.backward()
    assert plan.head is None
    plan.measure = True
    with torch.no_grad():
        model(**inputs, **fused)
    assert plan.head is None and plan.measure
    model(**inputs, **fused).loss.backward()
    rows = inputs["input_ids"].numel()
    assert plan.head is not None and 0 < plan.head.rows <= rows and plan.head.trained
    assert plan.head.hidden == model.config.hidden_size and plan.head.row_bytes >= 4 * VOCAB
    assert plan.head.most(rows, 1 << 30) == rows * plan.head.row_bytes
    noted, inputs = plan.head, {name: value[:1] for name, value in inputs.items()}
    model(**inputs, **fused).loss.backward()
    assert plan.head is noted
