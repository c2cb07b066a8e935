"""What the recorder writes down is what the trainer did, and it leaves no trace behind."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from aligntune.compare import probes, recorder
from aligntune.compare.recorder import Recorder
from tests.core import tiny


def trained(path: Path, **options: Any) -> tuple[Any, Recorder]:
    steps = options.pop("gradient_steps", (1, 3))
    stop, trace = options.pop("stop_after", None), options.pop("trace_step", None)
    every = options.pop("read_every", None)
    trainer = tiny.sft(path, **options)
    watch = Recorder(trainer, started=time.time() - 5, gradient_steps=steps, stop_after=stop,
                     trace_step=trace, read_every=every)
    watch.install()
    try:
        trainer.train()
    finally:
        watch.remove()
    return trainer, watch


def test_losses_norms_and_tokens_are_the_trainers_own(tmp_path: Path) -> None:
    trainer, watch = trained(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(watch.steps) == len(logged) == 4
    for step, line in zip(watch.steps, logged, strict=True):
        assert step["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
        assert step["rows"] == step["documents"] == 4 and step["slots"] >= step["tokens"] > step["learnt"] > 0
        assert 0 < sum(step["phases"].values()) <= step["seconds"] * 1.05
        assert {"data", "forward", "backward", "optimizer"} <= step["phases"].keys()
    assert watch.steps[-1]["metrics"]["mean_token_accuracy"] >= 0
    assert sum(step["tokens"] for step in watch.steps) == logged[-1]["num_tokens"]
    assert watch.cold_start is not None and 5 < watch.cold_start < 60


def test_steps_that_are_read_later_are_written_down_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 9, "logging_steps": 2}
    _, now = trained(tmp_path / "now", **options)
    trainer, later = trained(tmp_path / "later", read_every=4, **options)
    assert len(now.steps) == len(later.steps) == trainer.state.global_step == 9
    times = ("seconds", "phases")
    for one, two in zip(now.steps, later.steps, strict=True):
        assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in two.items() if k not in times}
        assert two["metrics"] and 0 < sum(two["phases"].values()) <= two["seconds"] * 1.05


def test_what_lies_between_two_steps_is_the_next_ones_unless_the_recorder_read_then(tmp_path: Path) -> None:
    class Pause(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            time.sleep(0.3)

    trainer = tiny.sft(tmp_path, max_steps=9)
    trainer.add_callback(Pause())
    watch = Recorder(trainer, started=time.time(), read_every=4, gradient_steps=(1, 3))
    waits: list[int] = []
    watch._line.wait = lambda: waits.append(trainer.state.global_step)  # type: ignore[method-assign]
    watch.install()
    trainer.train()
    watch.remove()
    # 1 and 3 are read for their gradients, 7 is the fourth after them, 9 the last.
    assert waits == [1, 3, 7, 9]
    assert [step["step"] for step in watch.steps if step["seconds"] > 0.3] == [3, 5, 6, 7, 9]


def test_busy_and_idle_time_of_a_trace() -> None:
    spans = [("b", 30.0, 50.0), ("a", 0.0, 10.0), ("a", 5.0, 20.0), ("c", 35.0, 40.0), ("b", 60.0, 61.0)]
    found = recorder.busy(spans)
    assert found["busy"] == pytest.approx(41e-6) and found["idle"] == pytest.approx(20e-6)
    assert found["kernels"] == pytest.approx({"a": 25e-6, "b": 21e-6, "c": 5e-6})
    assert list(found["kernels"]) == ["a", "b", "c"]
    assert [(gap["after"], gap["before"]) for gap in found["gaps"]] == [("a", "b"), ("b", "b")]
    assert [gap["seconds"] for gap in found["gaps"]] == pytest.approx([10e-6, 10e-6])
    spans = [("a", 0.0, 9.0), ("b", 1.0, 2.0), ("c", 10.0, 11.0)]
    assert recorder.busy(spans)["gaps"] == [{"seconds": pytest.approx(1e-6), "after": "a", "before": "c"}]
    many = recorder.busy([("a", 3.0 * i * i, 3.0 * i * i + 1) for i in range(30)])["gaps"]
    assert len(many) == recorder.GAPS and many[0]["seconds"] == pytest.approx((3 * 57 - 1) * 1e-6)
    assert recorder.busy([]) == {"busy": 0.0, "idle": 0.0, "gaps": [], "kernels": {}}


def test_gradients_are_those_before_clipping(tmp_path: Path) -> None:
    _, watch = trained(tmp_path, max_grad_norm=1e-3, max_steps=3)
    assert {name.partition("/")[0] for name in watch.gradients} == {"1", "3"}
    for step in (1, 3):
        squares = sum(norm**2 for name, norm in watch.norms.items() if name.startswith(f"{step}/"))
        assert squares**0.5 == pytest.approx(watch.steps[step - 1]["grad_norm"], rel=1e-4)
        assert squares**0.5 > 0.1  # far above what they are clipped to
    for name, gradient in watch.gradients.items():
        assert float(gradient.norm()) == pytest.approx(watch.norms[name], rel=1e-5)


def test_memory_is_what_the_tensors_hold(tmp_path: Path) -> None:
    trainer, watch = trained(tmp_path, max_steps=1)
    numbers = sum(p.numel() for p in trainer.model.parameters())
    assert watch.memory["gradients"] == 4 * numbers
    assert watch.memory["weights"] >= 4 * numbers
    assert 8 * numbers <= watch.memory["optimizer"] <= 8 * numbers + 4096  # two moments, and a step count each
    assert "peak_allocated" not in watch.memory  # no card: nothing is made up


def test_it_stops_when_told_and_takes_itself_off(tmp_path: Path) -> None:
    trainer, watch = trained(tmp_path, stop_after=2)
    assert trainer.state.global_step == 2 == len(watch.steps)
    assert "compute_loss" not in trainer.__dict__ and "backward" not in trainer.accelerator.__dict__
    assert watch not in trainer.callback_handler.callbacks


def test_training_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    plain = tiny.sft(tmp_path / "plain")
    plain.train()
    watched, _ = trained(tmp_path / "watched")
    for one, two in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_fingerprint_sees_one_changed_weight() -> None:
    model = tiny.llama()
    before = recorder.fingerprint(model)
    assert recorder.fingerprint(tiny.llama()) == before
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    assert recorder.fingerprint(model)["trained"] != before["trained"]
    assert before["dtypes"] == ["float32"]


def test_large_tensors_are_sampled_the_same_way_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SAMPLE", 16)
    tensor = torch.arange(1000.0)
    one, two = recorder.sampled("layer", tensor), recorder.sampled("layer", tensor.clone())
    assert len(one) == 16 and torch.equal(one, two)
    assert not torch.equal(one, recorder.sampled("other", tensor))


def test_divergence_of_known_distributions() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = probes.divergence(p, q)
    by_hand = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert found["kl"] == pytest.approx(float(by_hand) / 2, rel=1e-5)
    assert found["kl_max"] == pytest.approx(float(by_hand), rel=1e-5)
    assert found["top1"] == 0.5 or found["top1"] == 1.0  # the first row of p is a tie
    assert probes.divergence(q, q) == {"kl": 0.0, "kl_max": 0.0, "top1": 1.0, "positions": 2}
    with pytest.raises(ValueError, match="cannot be compared"):
        probes.divergence(p, q[:1])


def test_the_traced_step_is_marked_and_names_what_ran(tmp_path: Path) -> None:
    _, watch = trained(tmp_path, trace_step=2, max_steps=3)
    assert [step["traced"] for step in watch.steps] == [False, True, False]
    assert watch.trace is not None and watch.trace["step"] == 2 and watch.trace["device"] == "cpu"
    assert watch.trace["names"]["aten::mm"] > 10 and any("attention" in name for name in watch.trace["names"])


def test_what_a_profiler_leaves_is_collected_outside_of_the_steps(tmp_path: Path) -> None:
    collected: list[int] = []
    trainer = tiny.sft(tmp_path, max_steps=4)

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            time.sleep(1)
            collected.append(trainer.state.global_step)

    watch = Recorder(trainer, started=time.time(), trace_step=2)
    watch.install()
    gc.callbacks.append(note)
    try:
        trainer.train()
    finally:
        gc.callbacks.remove(note)
        watch.remove()
    assert 2 in collected and watch.trace is not None
    assert all(step["seconds"] < 1 for step in watch.steps if step["step"] > 1)
