"""The longest batch first: that memory runs out at once, and that a run is the same with the pass and without."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler
from transformers import TrainerCallback

from aligntune.backends.fast import rehearsal
from aligntune.backends.fast.packing import RowsEndToEnd
from aligntune.backends.fast.rehearsal import traceless, wanted
from aligntune.backends.fast.trainers import FastSFT
from aligntune.compare.recorder import Recorder, Timeline
from aligntune.core import row_lengths
from aligntune.core.row_lengths import lengths_of, longest_batch
from tests.backends.fast.test_rows_end_to_end import rows, run, trainer_of

# Of 24 rows a few are long: no batch of the first steps is as long as the longest of all draws.
UNEVEN = tuple(60 if i in (17, 18, 20) else 3 + i % 4 for i in range(24))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Flat lengths of the passes before a first step, which a CPU makes too."""
    found: list[int] = []
    real = rehearsal.rehearse

    def rehearse(*args: Any, **kwargs: Any) -> int | None:
        tokens = real(*args, **kwargs)
        found.append(-1 if tokens is None else tokens)
        return tokens

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    monkeypatch.setattr(rehearsal, "wanted", traceless)
    return found


@pytest.fixture
def longest_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pass does and leaves is looked at in runs of so few steps that their own longest is their first."""
    monkeypatch.setattr(rehearsal, "longest_drawn",
                        lambda trainer, lengths: np.argsort(lengths, kind="stable")[-trainer._train_batch_size :])


def test_lengths_are_the_table_s() -> None:
    data = rows((5, 11, 3, 1))
    assert lengths_of(data).tolist() == [5, 11, 3, 1]  # type: ignore[union-attr]
    assert lengths_of(data.select([3, 1])).tolist() == [1, 11]  # type: ignore[union-attr]
    assert lengths_of(data.shuffle(seed=1)).tolist() == [len(ids) for ids in data.shuffle(seed=1)["input_ids"]]  # type: ignore[union-attr]
    assert lengths_of(data.with_format("numpy").filter(lambda row: len(row["input_ids"]) > 3)).tolist() == [5, 11]  # type: ignore[union-attr]
    assert lengths_of(data.with_transform(lambda batch: batch)) is None
    assert lengths_of(data.remove_columns("input_ids")) is None and lengths_of([{"input_ids": [1]}]) is None
    assert lengths_of(data.to_iterable_dataset()) is None


def test_the_longest_of_the_drawn() -> None:
    lengths = np.array([1, 2, 3, 1000])
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert sorted(longest_batch(lengths, size=2, batches=1000)) == [2, 3]
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert sorted(longest_batch(lengths, size=9, batches=5)) == [0, 1, 2, 3]
    assert longest_batch(lengths, size=3, batches=1).shape == (3,)


def test_an_epoch_has_each_row_once() -> None:
    lengths = np.array([60 if i == 17 else 3 + i % 4 for i in range(24)])
    for seed in range(20):
        shuffled = np.random.default_rng(seed).permutation(lengths)
        assert 60 + 3 * 3 <= shuffled[longest_batch(shuffled, size=4, batches=6)].sum() <= 60 + 3 * 6
    assert lengths[longest_batch(lengths, size=4, batches=200)].sum() == 78  # further epochs, further neighbours


def test_no_more_batches_are_drawn_than_a_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.arange(1000)
    few, all_of_it = (int(longest_batch(lengths, size=1, batches=batches)[0]) for batches in (3, 1000))
    assert few < all_of_it == 999
    monkeypatch.setattr(row_lengths, "DRAWS", 3)
    assert int(longest_batch(lengths, size=1, batches=1000)[0]) == few


def test_a_backward_that_does_more_than_fill_gradients_is_not_rehearsed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of("fast", "llama", tmp_path).trainer
    weight = next(trainer.model.parameters())
    assert traceless(trainer) and not wanted(trainer)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    assert wanted(trainer)
    for register in (weight.register_post_accumulate_grad_hook, weight.register_hook):
        handle = register(lambda *_: None)
        assert not traceless(trainer) and not wanted(trainer)
        handle.remove()
        assert traceless(trainer)
    weight.grad = torch.zeros_like(weight)
    assert not traceless(trainer)
    weight.grad = None
    for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "MULTI_GPU"):
        with monkeypatch.context() as patched:
            patched.setattr(trainer.accelerator.state, "distributed_type", DistributedType[kind])
            assert not traceless(trainer), kind
            if kind == "MULTI_GPU":  # the others' wrappers are not DDP's
                patched.setattr(trainer, "model_wrapped", object.__new__(DistributedDataParallel))
                assert traceless(trainer)
                patched.setattr(trainer.args, "gradient_checkpointing_kwargs", {"use_reentrant": True})
                assert not traceless(trainer)
    assert traceless(trainer)
    assert Accelerator().has_lomo_optimizer is False
    monkeypatch.setattr(trainer.accelerator, "has_lomo_optimizer", True)
    assert not traceless(trainer)


@pytest.mark.parametrize("options", [
    pytest.param({}, id="full", marks=pytest.mark.slow),
    pytest.param({"gradient_accumulation_steps": 2, "max_steps": 3}, id="accumulated", marks=pytest.mark.slow),
    pytest.param({"use_peft": True, "lora_dropout": 0.3, "lora_r": 4, "optimizer": "adamw"}, id="dropout",
                 marks=pytest.mark.slow),
])
@pytest.mark.usefixtures("longest_of_all")
def test_a_run_is_the_same_with_the_pass_and_without(
    options: dict[str, Any], passes: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, weights, log = run(trainer_of("fast", "llama", tmp_path, rows(UNEVEN), **options))
    assert len(passes) == 1 and passes[0] >= 100
    monkeypatch.setattr(rehearsal, "wanted", lambda trainer: False)
    plain_losses, plain_weights, plain_log = run(trainer_of("fast", "llama", tmp_path, rows(UNEVEN), **options))
    assert len(passes) == 1
    assert losses == plain_losses and losses[0] > 1
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    for entry, plain in zip(log, plain_log, strict=True):
        assert {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name} \
            == {name: value for name, value in plain.items() if "runtime" not in name and "per_second" not in name}


@pytest.mark.parametrize(("options", "sampler"), [
    ({"max_steps": -1, "num_epochs": 3, "seed": 3}, "SeedableRandomSampler"),
    ({"max_steps": 5}, "SeedableRandomSampler"),
    ({"max_steps": -1, "num_epochs": 2, "trainer_options": {"shuffle_dataset": False}}, None)])
def test_the_longest_batch_is_the_one_that_a_run_draws(
    options: dict[str, Any], sampler: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of a length of its own: the longest of batches drawn at random would have other rows."""
    lengths = [3 + 2 * i for i in range(25)]
    built = trainer_of("fast", "llama", tmp_path, rows(lengths), batch_size=3, gradient_accumulation_steps=2, **options)
    trainer, drawn, expected = built.trainer, [], []
    get_batch_samples, collate = trainer.get_batch_samples, RowsEndToEnd.__call__

    def collated(self: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
        drawn.append(sum(len(example["input_ids"]) for example in examples))
        return collate(self, examples)

    def samples(*args: Any) -> Any:
        if not expected:
            trainer._to_rehearse = None
            known = lengths_of(trainer.train_dataset)
            before = torch.get_rng_state()
            expected.append(known[rehearsal.longest_drawn(trainer, known)])  # type: ignore[index]
            assert torch.equal(torch.get_rng_state(), before)
        return get_batch_samples(*args)

    monkeypatch.setattr(RowsEndToEnd, "__call__", collated)
    trainer.training_step, trainer.get_batch_samples = lambda *_: torch.zeros(()), samples
    trainer.train()
    found = trainer.callback_handler.train_dataloader
    assert sampler is None or type(found.batch_sampler.sampler).__name__ == sampler
    assert rehearsal._sampler(found, 3, 25) is not None and rehearsal._sampler(found, 4, 25) is None
    assert len(drawn) == 9 * (3 if "seed" in options else trainer.state.epoch) and len(set(expected[0].tolist())) == 3
    assert max(drawn) == expected[0].sum()


@pytest.mark.parametrize("seed", range(8))
def test_the_longest_batch_of_several_processes(seed: int) -> None:
    """Of what accelerate hands to each of three, the last batches filled up; the sampler itself is not moved on."""
    lengths, drawn = 2 ** np.arange(25), []  # a sum tells its rows
    sampler = SeedableRandomSampler(range(25), generator=torch.Generator(), data_seed=seed)
    plain = BatchSampler(sampler, 4, drop_last=False)
    shards = [BatchSamplerShard(plain, 3, index) for index in range(3)]
    for epoch in range(3):
        for shard in shards:
            plain.sampler.set_epoch(epoch)
            drawn += [lengths[batch].sum() for batch in shard]
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(gradient_accumulation_steps=2), _train_batch_size=4,
        accelerator=SimpleNamespace(num_processes=3), state=SimpleNamespace(max_steps=3 * 2, global_step=0),
        callback_handler=SimpleNamespace(train_dataloader=SimpleNamespace(batch_sampler=shards[1])))
    plain.sampler.set_epoch(0)
    found = lengths[rehearsal.longest_drawn(trainer, lengths)]
    assert found.sum() == max(drawn) and len(found) == 4 and plain.sampler.epoch == 0


@pytest.mark.slow
def test_rows_of_about_one_length_need_no_pass(passes: list[int], tmp_path: Any) -> None:
    run(trainer_of("fast", "llama", tmp_path, rows((20,) * 12), max_steps=1))
    assert passes == [-1]


@pytest.mark.usefixtures("longest_of_all")
def test_memory_that_does_not_suffice_shows_before_the_first_step(
    passes: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    compute_loss = FastSFT.compute_loss

    def scarce(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FastSFT, "compute_loss", scarce)
    built = trainer_of("fast", "llama", tmp_path, rows(UNEVEN))
    with caplog.at_level("INFO"), pytest.raises(torch.OutOfMemoryError):
        built.trainer.train()
    assert built.trainer.state.global_step == 0 and "the longest batch first: 4 rows, " in caplog.text
    assert all(p.grad is None for p in built.trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("longest_of_all")
def test_what_watches_a_run_does_not_see_the_pass(passes: list[int], tmp_path: Any) -> None:
    built = trainer_of("fast", "llama", tmp_path, rows(UNEVEN), max_steps=1)
    seen = []
    compute_loss = built.trainer.compute_loss
    built.trainer.compute_loss = lambda *args, **kwargs: (seen.append(1), compute_loss(*args, **kwargs))[1]
    built.trainer.train()
    assert passes[0] >= 100 and len(seen) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("longest_of_all")
def test_a_subset_of_columns_is_enough(passes: list[int], tmp_path: Any) -> None:
    data = rows(UNEVEN)
    without = Dataset.from_list([{"input_ids": ids} for ids in data["input_ids"]])
    run(trainer_of("fast", "llama", tmp_path, without, max_steps=1))
    assert passes[0] >= 100


class _Each(TrainerCallback):
    """Calls `at(name)` at the end of steps and of what is accumulated."""

    def __init__(self, at: Any) -> None:
        self.at = at

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at("substep")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at("step")


@pytest.mark.usefixtures("longest_of_all")
def test_an_optimizer_that_works_in_the_backward_makes_no_step_more(passes: list[int], tmp_path: Any) -> None:
    """It is there only when the training has begun: transformers makes it after the rows."""
    trainer = trainer_of("fast", "llama", tmp_path, rows(UNEVEN), max_steps=1).trainer
    updates: list[torch.Tensor] = []
    create_optimizer = trainer.create_optimizer

    def create(*args: Any, **kwargs: Any) -> Any:
        for parameter in trainer.model.parameters():
            parameter.register_post_accumulate_grad_hook(updates.append)
        return create_optimizer(*args, **kwargs)

    trainer.create_optimizer = create
    trainer.train()
    assert len(updates) == len(list(trainer.model.parameters())) > 10 and passes == []


@pytest.mark.slow
@pytest.mark.usefixtures("longest_of_all")
def test_no_steps_time_has_the_pass_in_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison tells it apart: of the first step, whose data it lies in, neither the time nor that of its data."""
    hours: list[float] = []
    monkeypatch.setattr(Timeline, "mark", lambda _: time.perf_counter() + sum(hours))
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_, **__: hours.append(3600.0))
    monkeypatch.setattr(rehearsal, "wanted", traceless)
    trainer = trainer_of("fast", "llama", tmp_path).trainer
    watch = Recorder(trainer, started=time.time())
    watch.install()
    trainer.train()
    watch.remove()
    assert hours == [3600.0] and watch.rehearsal_seconds == pytest.approx(3600, abs=60)
    assert len(watch.steps) == 2 and all(0 < step["seconds"] < 3000 for step in watch.steps)
    assert all(sum(step["phases"].values()) <= step["seconds"] * 1.05 for step in watch.steps)


@pytest.mark.slow
def test_a_training_rehearses_once(passes: list[int], tmp_path: Any) -> None:
    """Also where its rows are looked at in its midst, between passes whose gradients are still to be added to."""
    data = rows((4,) * 20 + (60,) * 4)
    trainer = trainer_of("fast", "llama", tmp_path, data, batch_size=2, gradient_accumulation_steps=2).trainer
    looked = []
    trainer.add_callback(_Each(lambda name: looked.append((name, next(iter(trainer.get_train_dataloader()))))))
    trainer.train()
    assert [name for name, _ in looked] == ["substep", "step"] * 2 and len(passes) == 1 and passes[0] >= 60
    trainer.train()
    assert len(looked) == 8 and len(passes) == 2


@pytest.mark.slow
def test_the_batch_size_that_is_found_is_rehearsed(
    passes: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    compute_loss = FastSFT.compute_loss

    def scarce(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if inputs["num_tokens"] > 110:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FastSFT, "compute_loss", scarce)
    data = rows(tuple(60 if i == 17 else 20 for i in range(24)))  # 120 tokens of 4 rows, 100 of 3
    trainer = trainer_of("fast", "llama", tmp_path, data, max_steps=30).trainer
    trainer.args.auto_find_batch_size = True
    trainer.add_callback(_Each(lambda _: setattr(trainer.control, "should_training_stop", True)))
    with caplog.at_level("INFO"):
        trainer.train()
    assert [line.split("first: ")[1] for line in caplog.messages if "the longest batch first" in line] \
        == ["4 rows, 120 tokens", "3 rows, 100 tokens"]
    assert trainer._train_batch_size == 3 and trainer.state.global_step == 1 and len(passes) == 1


class _Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.usefixtures("longest_of_all")
def test_the_pass_is_within_what_a_step_is_within(
    passes: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of("fast", "llama", tmp_path, rows(UNEVEN), max_steps=1).trainer
    seen: list[Any] = []

    class Offload:
        def __enter__(self) -> None:
            seen.append("in")

        def __exit__(self, *raised: Any) -> None:
            seen.append("out")

    compute_loss, backward = FastSFT.compute_loss, Accelerator.backward

    def forward_of(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(model))
        assert model.training
        return compute_loss(self, model, *args, **kwargs)

    def backward_of(*args: Any, **kwargs: Any) -> None:
        seen.append("backward")
        backward(*args, **kwargs)

    trainer.maybe_activation_offload_context = Offload()
    monkeypatch.setattr(FastSFT, "compute_loss", forward_of)
    monkeypatch.setattr(Accelerator, "backward", backward_of)
    monkeypatch.setattr(trainer, "_wrap_model", lambda model, *args, **kwargs: _Wrapped(model))
    trainer.train()
    assert len(passes) == 1 and passes[0] >= 100
    assert seen == ["in", _Wrapped, "backward", "out"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.usefixtures("longest_of_all")
def test_no_kernel_of_the_pass_is_attested(
    resumed: bool, passes: list[int], tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step that is traced is the first, where it is the last or the run goes on from a checkpoint."""
    options = {"max_steps": 40, "save_steps": 3} if resumed else {"max_steps": 1}

    def kernels() -> Any:
        built = trainer_of("fast", "llama", tmp_path, rows(UNEVEN), **options)
        built.trainer.add_callback(_Each(lambda _: setattr(built.trainer.control, "should_training_stop", True)))
        built.trainer.train(resume_from_checkpoint=str(tmp_path / "fast" / "checkpoint-3") if resumed else None)
        assert built.trainer.state.global_step == (4 if resumed else 1)
        return built.attestation()["step"]["kernels"]

    if resumed:
        trainer_of("fast", "llama", tmp_path, rows(UNEVEN), **options | {"max_steps": 3}).trainer.train()
        passes.clear()
    found = kernels()
    assert len(passes) == 1 and passes[0] >= 100
    monkeypatch.setattr(rehearsal, "wanted", lambda trainer: False)
    assert found == kernels() and found["rms_norm_forward"] == 5 and len(passes) == 1


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_make_the_pass_and_exchange_nothing(tmp_path: Any) -> None:
    """Both of them, though to one of them its first batch would be long enough; the runs are those without it."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
               str(root / "tests/backends/fast/rehearsed_processes.py"), str(tmp_path)]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
             "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    firsts = [found[True]["passes"][0]["first"] for found in ranks]
    for found in ranks:
        rehearsed, plain = found[True], found[False]
        assert (rehearsed["processes"], plain["processes"], plain["passes"]) == (2, 2, [])
        (seen,) = rehearsed["passes"]
        assert (seen["exchanged"], seen["drew"], seen["gradients"]) == (0, False, 0)
        assert min(firsts) < 30 < 60 <= seen["tokens"] < rehearsal.LONGER * max(firsts)
        assert rehearsed["exchanged"] == plain["exchanged"] >= 2
        assert rehearsed["losses"] == plain["losses"] and rehearsed["losses"][0] > 1
        assert len(rehearsed["gradients"]) == len(plain["gradients"]) == 2
        for ours, theirs in zip([*rehearsed["gradients"], rehearsed["weights"]],
                                [*plain["gradients"], plain["weights"]], strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(float(value.norm()) > 0 for value in rehearsed["gradients"][1].values())
        for entry, bare in zip(rehearsed["log"], plain["log"], strict=True):
            assert {name: value for name, value in entry.items() if not name.startswith("train_")} \
                == {name: value for name, value in bare.items() if not name.startswith("train_")}
    assert ranks[0][True]["losses"] == ranks[1][True]["losses"]
