"""Optimizer steps of one launch: torch's numbers, state, hooks and checkpoints; and torch's own where it must be."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from aligntune import create_sft_trainer
from aligntune.backends.fast import FastSFTTrainer, FastTrainingArguments, updates
from aligntune.backends.fast.steps import QuickSteps
from aligntune.backends.fast.trainers import FAST_TRAINERS
from aligntune.backends.fast.updates import UpdatesAtOnce, by_torch_because, clip_at_once, step_at_once
from aligntune.compare.recorder import Recorder
from tests.backends.fast.ops.harness import launches
from tests.core import tiny

ROWS = [{"text": f"row {i:02d}" + " and more" * (i % 3)} for i in range(16)]
ON_CARD = torch.cuda.is_available()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on this machine, in the interpreter where it has no GPU."""
    monkeypatch.setattr(updates, "_on_gpu", lambda tensor: True)


def sft(path: Path, **options: Any) -> Any:
    settings = {
        "backend": "fast", "max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
        "logging_steps": 1, "max_seq_length": 48, "tokenizer_name": tiny.tokenizer(), "output_dir": str(path),
        "seed": 3, "precision": "fp32", "optimizer": "adamw_fused", "weight_decay": 0.1, "max_grad_norm": 0.05,
        "lr_scheduler": "linear",
    }  # fmt: skip
    model = tiny.llama(num_hidden_layers=1)
    if options.get("model_dtype") == "bf16":
        model = model.bfloat16()
    return create_sft_trainer(model, ROWS, **(settings | options))


def run(path: Path, **options: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, norms and trained weights."""
    made = sft(path, **options)
    made.train()
    logs = [log for log in made.trainer.state.log_history if "grad_norm" in log]
    weights = {n: p.detach().clone() for n, p in made.trainer.model.named_parameters() if p.requires_grad}
    return [log["loss"] for log in logs], [log["grad_norm"] for log in logs], weights


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often clipping and steps of one launch are called."""
    calls: Counter[str] = Counter()

    def counted(name: str, call: Any) -> Any:
        return lambda *args, **kwargs: (calls.update([name]), call(*args, **kwargs))[1]

    for name in ("clip_grads_", "adamw_tensors_"):
        monkeypatch.setattr(updates, name, counted(name, getattr(updates, name)))
    return calls


@pytest.mark.parametrize(("options", "launched"), [
    # The first step, which makes the state, is torch's. A group without weight decay is a launch of its own.
    pytest.param({"use_peft": True, "lora_r": 2, "optimizer": "adamw"}, 2, marks=pytest.mark.slow),
    pytest.param({"embedding_learning_rate": 1e-3}, 6, marks=pytest.mark.slow),
    pytest.param({"max_grad_norm": 0.0}, 4, marks=pytest.mark.slow),
    pytest.param({"gradient_accumulation_steps": 2, "max_grad_norm": 1e4}, 4, marks=pytest.mark.slow),
], ids=lambda one: ",".join(one) if isinstance(one, dict) else "")
def test_a_run_is_the_one_with_torch_s_launches(
    options: dict[str, Any], launched: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counting(monkeypatch)
    monkeypatch.setattr(updates, "_on_gpu", lambda tensor: False)
    theirs = run(tmp_path / "torch", **options)
    assert not calls
    monkeypatch.setattr(updates, "_on_gpu", lambda tensor: True)
    ours = run(tmp_path / "ours", **options)
    assert calls == {"clip_grads_": 3, "adamw_tensors_": launched}
    (losses, norms, weights), (of_losses, of_norms, wanted) = ours, theirs
    assert len(set(losses)) == 3 and min(norms) > 0.1, "clipped, where that is asked for"
    assert losses == pytest.approx(of_losses, rel=1e-6) and norms == pytest.approx(of_norms, rel=1e-5)
    began = dict(sft(tmp_path / "began", **options).trainer.model.named_parameters())
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        moved = (value - began[name].to(value)).norm()
        assert moved > 0 and (weights[name] - value).norm() < 1e-3 * moved, name


@pytest.mark.slow
def test_resumed_is_uninterrupted_and_the_checkpoint_torch_s(here: None, tmp_path: Path) -> None:
    made = sft(tmp_path / "whole", max_steps=4, save_steps=2)
    made.train()
    whole = made.trainer.optimizer.state_dict()
    half = sft(tmp_path / "half", max_steps=4, save_steps=2)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in made.trainer.model.state_dict().items():
        torch.testing.assert_close(half.trainer.model.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)
    found = half.trainer.optimizer.state_dict()
    assert found["state"].keys() == whole["state"].keys() and len(found["state"]) > 5
    for number, state in whole["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and float(state["step"]) == 4
        assert float(found["state"][number]["step"]) == 4
        torch.testing.assert_close(found["state"][number]["exp_avg"], state["exp_avg"], rtol=1e-5, atol=1e-8)


def test_clipping_is_accelerate_s_where_it_must_be(here: None) -> None:
    device = "cuda" if ON_CARD else "cpu"
    parameters = [torch.nn.Parameter(torch.ones(4, device=device)), torch.nn.Parameter(torch.ones(3, 5, device=device))]
    calls: list[Any] = []
    accelerator = SimpleNamespace(
        scaler=None, distributed_type=DistributedType.NO,
        clip_grad_norm_=lambda given, most, norm_type: calls.append((list(given), most, norm_type)))
    clip_at_once(accelerator)

    def clipped(*args: Any, **options: Any) -> Any:
        calls.clear()
        for p in parameters:
            p.grad = torch.full_like(p, 2.0)
        return accelerator.clip_grad_norm_(iter(parameters), *args, **options)

    assert float(clipped(1.0)) == pytest.approx((19 * 4) ** 0.5) and not calls
    assert float(parameters[1].grad[2, 4]) == pytest.approx(2 / (19 * 4) ** 0.5)
    assert float(clipped(float("inf"), norm_type=2)) == pytest.approx((19 * 4) ** 0.5) and not calls
    assert parameters[1].grad[2, 4] == 2
    for change in ({"scaler": object()}, {"distributed_type": DistributedType.FSDP}, {"norm_type": float("inf")}):
        own = {name: change[name] for name in change if name != "norm_type"}
        before = {name: getattr(accelerator, name) for name in own}
        vars(accelerator).update(own)
        assert clipped(1.0, **{name: value for name, value in change.items() if name == "norm_type"}) is None
        assert calls == [(parameters, 1.0, change.get("norm_type", 2))] and parameters[1].grad[2, 4] == 2
        vars(accelerator).update(before)
    calls.clear()
    for p in parameters:
        p.grad = None
    assert accelerator.clip_grad_norm_(parameters, 1.0) is None and len(calls) == 1, "without gradients, as its own"


def test_a_comparison_still_sees_the_norm(here: None, tmp_path: Path) -> None:
    """`aligntune compare` wraps the accelerator's clipping, of which it takes gradients and norms."""
    made = sft(tmp_path, max_steps=1, use_peft=True, lora_r=2)
    seen = Recorder(made.trainer, started=time.time())
    seen.install()
    made.train()
    assert seen.norms and sum(norm**2 for norm in seen.norms.values()) ** 0.5 == pytest.approx(
        made.trainer.state.log_history[0]["grad_norm"], rel=1e-5)


# ---------------------------------------------------------------------------------------------- the optimizer by itself


def optimizers(**options: Any) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
    """One with steps of one launch, and its twin of torch's; each of two groups."""
    device = "cuda" if ON_CARD else "cpu"
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in ((4, 8), (5,), (3, 3))]
        groups = [{"params": params[:2], "eps": 1e-3},
                  {"params": params[2:], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.7, 0.8)}]
        found.append(torch.optim.AdamW(groups, **{"lr": 1e-2, "weight_decay": 0.1, "fused": True, **options}))
    step_at_once(found[0])
    return found[0], found[1]


def gradients(*pair: torch.optim.AdamW, without: int | None = None) -> None:
    numbers = [[p for group in one.param_groups for p in group["params"]] for one in pair]
    for number, same in enumerate(zip(*numbers, strict=True)):
        grad = None if number == without else torch.randn_like(same[0])
        for p in same:
            p.grad = None if grad is None else grad.clone()


def same(ours: torch.optim.AdamW, theirs: torch.optim.AdamW) -> None:
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found["param_groups"] == wanted["param_groups"] and found["state"].keys() == wanted["state"].keys()
    for number, state in wanted["state"].items():
        for name, value in state.items():
            # torch's fused step on a GPU takes 1 - beta2 from the rounded beta2, which for 0.999 is 1.3e-5 less.
            rtol = 1.5e-5 if name == "exp_avg_sq" and theirs.defaults["fused"] and ON_CARD else 2e-6
            atol = 1e-7 if name == "exp_avg" else 1e-9
            torch.testing.assert_close(found["state"][number][name], value, rtol=rtol, atol=atol)
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def steps_of(ours: torch.optim.AdamW) -> int:
    return launches(ours.step).get("tensors_adamw_kernel", 0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_groups_and_a_parameter_that_now_and_then_has_no_gradient(fused: bool, here: None) -> None:
    ours, theirs = optimizers(fused=fused)
    for number, without in enumerate((None, 1, None, 2, 0)):
        gradients(ours, theirs, without=without)
        theirs.step()
        # Without its one gradient the second group launches nothing.
        assert steps_of(ours) == (0 if number == 0 else 1 if without == 2 else 2)
        same(ours, theirs)
    assert {float(state["step"]) for state in ours.state.values()} == {4.0}
    assert all(state["step"].is_cuda is (fused and ON_CARD) for state in ours.state.values())
    # Where several processes resume, what they load goes to the GPU, counts too.
    for one in (ours, theirs):
        for p, state in one.state.items():
            state["step"] = state["step"].to(p.device)
    # From a checkpoint, and with another number of gradients than before.
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    gradients(ours, theirs, without=1)
    theirs.step()
    assert steps_of(ours) == 2
    same(ours, theirs)


def test_hooks_of_steps_run_once_and_a_schedule_sees_them(here: None, recwarn: pytest.WarningsRecorder) -> None:
    ours, _ = optimizers()
    seen: list[str] = []

    def before(optimizer: Any, given: Any, named: Any) -> None:
        seen.append("before")
        assert optimizer is ours and given == (ours,) and not named
        ours.param_groups[1]["params"][0].grad = None  # which the step then goes by

    ours.register_step_pre_hook(before)
    ours.register_step_post_hook(lambda *_: seen.append("after"))
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 0.5**step)
    for number in range(3):
        gradients(ours)
        assert steps_of(ours) == (number > 0)
        schedule.step()
    assert seen == ["before", "after"] * 3 and ours.param_groups[0]["lr"] == 1e-2 * 0.5**3
    assert not [warning for warning in recwarn if "lr_scheduler.step()" in str(warning.message)]


def test_what_asks_for_more_is_torch_s(here: None) -> None:
    ours, theirs = optimizers()
    for one in (ours, theirs):  # what accelerate's and torch's scalers leave
        one.found_inf = torch.zeros((), device=one.param_groups[0]["params"][0].device)
        one.grad_scale = torch.full_like(one.found_inf, 2.0)
    for _ in range(2):
        gradients(ours, theirs)
        theirs.step()
        assert steps_of(ours) == 0
        same(ours, theirs)
    del ours.found_inf, ours.grad_scale
    gradients(ours)
    assert steps_of(ours) == 2
    for name in ("lr", "eps"):
        kept = ours.param_groups[0][name]
        ours.param_groups[0][name] = torch.tensor(kept, device=ours.param_groups[0]["params"][0].device)
        gradients(ours)
        assert steps_of(ours) == 0
        ours.param_groups[0][name] = kept
    ours.param_groups[1]["maximize"] = True
    gradients(ours)
    assert steps_of(ours) == 0
    ours.param_groups[1]["maximize"] = False
    closures: list[int] = []
    gradients(ours)
    assert launches(lambda: ours.step(lambda: closures.append(1))).get("tensors_adamw_kernel", 0) == 0
    assert closures == [1]
    p = ours.param_groups[0]["params"][0]
    for odd in (torch.randn_like(p.T.contiguous()).T, torch.randn_like(p).to_sparse()):
        gradients(ours)
        p.grad = odd
        if odd.is_sparse:
            with pytest.raises(RuntimeError, match="sparse"):
                ours.step()
        else:
            assert steps_of(ours) == 0


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True), lambda p: torch.optim.AdamW(p, maximize=True),
    lambda p: torch.optim.Adam(p, fused=True),
    lambda p: torch.optim.SGD(p, fused=True), lambda p: type("Own", (torch.optim.AdamW,), {})(p, fused=True),
])  # fmt: skip
def test_other_optimizers_stay_as_they_are(make: Any) -> None:
    optimizer = make([torch.nn.Parameter(torch.ones(3))])
    step_at_once(optimizer)
    assert "step" not in vars(optimizer)


def test_why_steps_are_torch_s() -> None:
    def because(*, scaler: Any = None, kind: Any = DistributedType.NO, optim: str = "adamw_torch_fused") -> str | None:
        return by_torch_because(SimpleNamespace(
            accelerator=SimpleNamespace(scaler=scaler, distributed_type=kind), args=SimpleNamespace(optim=optim)))

    assert because() is None is because(kind=DistributedType.MULTI_GPU)
    assert because(optim="adamw_torch") is None
    assert because(optim="adamw_8bit") == "adamw_8bit is not torch's AdamW"
    assert because(scaler=object()) == "fp16's gradients are scaled"
    assert because(kind=DistributedType.FSDP) == "the model is sharded" == because(kind=DistributedType.DEEPSPEED)


def test_every_trainer_s_clipping_and_steps_are_before_transformers() -> None:
    for name, kind in FAST_TRAINERS.items():
        order = kind.__mro__
        for ours in (UpdatesAtOnce, QuickSteps) if name != "gspo" else ():
            assert order.index(ours) < order.index(Trainer), (name, ours)


def test_an_optimizer_goes_with_its_last_name(here: None) -> None:
    ours, _ = optimizers()
    gradients(ours)
    ours.step()
    torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1.0)  # as every run has one
    moment = weakref.ref(ours.state[ours.param_groups[0]["params"][0]]["exp_avg"])
    gc.disable()
    try:
        del ours
        assert moment() is None
    finally:
        gc.enable()


def test_a_script_s_layout_says_who_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)

    def layout(optim: str, **given: Any) -> str:
        args = FastTrainingArguments(str(tmp_path), optim=optim, bf16=False, report_to="none", max_seq_length=32)
        return FastSFTTrainer(tiny.llama(num_hidden_layers=1), args, train_dataset=tiny.text_rows(4),
                              processing_class=tiny.tokenizer(), **given).layout

    assert layout("adamw_torch").endswith("; optimizer: AdamW in one launch")
    assert layout("sgd").endswith("; optimizer: torch's launches, sgd is not torch's AdamW")
    mine = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for given in ({"optimizers": (mine, None)}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}):
        assert layout("adamw_torch", **given).endswith("; optimizer: as it was given")


@pytest.mark.gpu
def test_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run makes its steps there, full training in bf16 and adapters; and what the attestation says of it."""
    adapters = {"precision": "bf16", "use_peft": True, "lora_r": 8, "optimizer": "adamw"}
    for options in (adapters, {"precision": "bf16", "model_dtype": "bf16"}):
        made = sft(tmp_path / ("adapters" if "use_peft" in options else "full"), **options)
        assert "optimizer: AdamW in one launch" in made.attestation()["layout"]
        calls = counting(monkeypatch)
        made.train()
        assert calls["clip_grads_"] == 3 and calls["adamw_tensors_"] in (2, 4)
        monkeypatch.undo()
    made = sft(tmp_path / "other", optimizer="sgd")
    assert "optimizer: torch's launches, sgd is not torch's AdamW" in made.attestation()["layout"]
    for fused in (True, False):
        test_groups_and_a_parameter_that_now_and_then_has_no_gradient(fused, None)
