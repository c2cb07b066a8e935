"""Preference steps replayed as graphs: the launched steps' bits, and a pool that one pass at a time may use.

Without a GPU a stand-in takes the place of the captured graphs: its replay runs the model again.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from aligntune.backends.fast import graphs
from aligntune.backends.fast.graph_memory import GraphMemory
from aligntune.backends.fast.ledger import Ledger
from tests.backends.fast.preference_steps import built_of, pairs
from tests.backends.fast.test_graphs import model
from tests.backends.fast.test_preference_reward import scored, scorer
from tests.backends.fast.test_preference_unpaired import unpaired
from tests.backends.fast.test_rows_end_to_end import trainer_of


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_a_training_begins_without_the_graphs_of_the_one_before(
    algorithm: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two, adapters may be switched: what was captured trains the ones of before."""
    trainer = (trainer_of("fast", "llama", tmp_path) if algorithm == "sft" else
               built_of("fast", "dpo", tmp_path, use_peft=True)).trainer
    trainer.graphed, began = "the graphs of before", []
    monkeypatch.setattr(transformers.Trainer, "train", lambda self, *args, **given: began.append((args, given)))
    trainer.train("checkpoint", trial=None)
    assert began == [(("checkpoint",), {"trial": None})] and trainer.graphed is None


class StandIn:
    """A graph: `replay` calls `work`."""

    def __init__(self, work: Any) -> None:
        self.replay = work


class Pool:
    """The forwards that were replayed."""

    replays: list[str] = []


def capture(self: graphs.GraphedModel, batch: dict[str, Any], **_: Any) -> Any:
    inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
    trained = torch.is_grad_enabled()
    live: dict[str, torch.Tensor] = {}

    def forward() -> None:
        with torch.set_grad_enabled(trained):
            live.update(self._asked(inputs))
        pair.outputs.update({name: value.detach() for name, value in live.items()})
        Pool.replays.append("trained" if trained else "quiet")

    def backward() -> None:
        found = torch.autograd.grad(live[self.scored], self.parameters, pair.upstream, allow_unused=True)
        for buffer, gradient in zip(self.buffers, found, strict=True):
            if gradient is not None:
                buffer.add_(gradient)

    pair = graphs._Pair(inputs, {}, StandIn(forward), Ledger(), self.scored)
    forward()
    Pool.replays.pop()
    if trained:
        pair.upstream, pair.backward = torch.zeros_like(live[self.scored]), StandIn(backward)
        found = torch.autograd.grad(live[self.scored], self.parameters, pair.upstream, allow_unused=True)
        pair.reached = [(p, buffer) for p, buffer, gradient in zip(self.parameters, self.buffers, found, strict=True)
                        if gradient is not None]
    return pair


def stand_in(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(graphs.GraphedModel, "_capture", capture)
    monkeypatch.setattr(Pool, "replays", [])
    monkeypatch.setattr(GraphMemory, "plentiful", lambda self, tokens: False)  # no card tells what is free
    monkeypatch.setattr(GraphMemory, "suffices", lambda self, tokens: True)


class Toy(torch.nn.Module):
    """log p of a token is w times its id; `off` stands for adapters that are off."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0))
        self.off = False

    def forward(self, input_ids: torch.Tensor, fused_lm_head: bool, **lengths: Any) -> Any:
        return SimpleNamespace(log_probs=input_ids * (1.0 if self.off else self.w), mean_logits=input_ids + 0.5)


def batch_of(size: int, number: float = 1.0) -> dict[str, Any]:
    """Ragged rows, so far as graphs look at them."""
    lengths = torch.tensor([0, 1, size, size], dtype=torch.int32)
    return {"input_ids": torch.full((1, size), number), "cu_seq_lens_q": lengths, "max_length_q": 1024}


def test_a_backward_that_comes_again_or_too_late_is_refused(monkeypatch: Any) -> None:
    """As without graphs: what it would read has been written over."""
    stand_in(monkeypatch)
    toy = Toy()
    graphed = graphs.GraphedModel(toy, [toy.w])
    for _ in range(2):  # launched, then captured
        graphed(batch_of(3))["log_probs"].sum().backward()
    toy.w.grad = None
    first = graphed(batch_of(3))["log_probs"].sum()
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        first.backward()
    late = graphed(batch_of(3))["log_probs"].sum()
    with torch.no_grad():
        for _ in range(3):
            graphed.quiet(batch_of(3), "policy")
    with pytest.raises(RuntimeError, match="before the next replayed pass"):
        late.backward()
    assert toy.w.grad.item() == 3.0


def test_passes_of_one_shape_are_told_apart(monkeypatch: Any) -> None:
    stand_in(monkeypatch)
    toy = Toy()
    graphed = graphs.GraphedModel(toy, [toy.w])
    for number in range(1, 5):
        batch = batch_of(3, float(number))
        with torch.no_grad():
            toy.off = True
            reference = graphed.quiet(batch, "reference")
            toy.off = False
            policy = graphed.quiet(batch, "policy")
        assert not reference.requires_grad and not policy.requires_grad
        assert reference.tolist() == [[number] * 3] and policy.tolist() == [[2.0 * number] * 3]
        found = graphed(batch)
        assert found["mean_logits"].tolist() == [[number + 0.5] * 3]
        found["log_probs"].sum().backward()
        assert toy.w.grad.item() == 3.0 * sum(range(1, number + 1))
    # Each kind's first is launched.
    assert Pool.replays == ["quiet", "quiet", "trained"] * 3 and len(graphed.pairs) == 3
    with pytest.raises(AssertionError):
        graphed.quiet(batch, "reference")


class Pairs(Toy):
    """A second weight in the product, and one that is in none."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.spare = (torch.nn.Parameter(torch.tensor(number)) for number in (3.0, 5.0))

    def forward(self, input_ids: torch.Tensor, fused_lm_head: bool, **lengths: Any) -> Any:
        return SimpleNamespace(log_probs=input_ids * self.w * self.v)


def test_an_optimizer_passes_by_what_no_gradient_reaches(monkeypatch: Any) -> None:
    """A gradient of 0 is another thing: weight decay and moments go on."""
    stand_in(monkeypatch)
    toy = Pairs()
    graphed = graphs.GraphedModel(toy.requires_grad_(False), [])  # the first pass is one of the reference
    optimizer = torch.optim.AdamW(toy.parameters(), lr=0.1, weight_decay=0.5)
    seen = []
    for number in range(12):
        optimizer.zero_grad()
        with torch.no_grad():
            toy.requires_grad_(False)  # as PEFT freezes adapters for a pass of the reference
            graphed.quiet(batch_of(3), "reference")
            toy.requires_grad_(True)
        toy.v.requires_grad_(not 4 <= number < 8)
        graphed(batch_of(3))["log_probs"].sum().backward()
        assert toy.w.grad.item() == pytest.approx(3 * toy.v.item()) and toy.spare.grad is None
        assert (toy.v.grad is not None) == toy.v.requires_grad
        optimizer.step()
        seen.append(toy.v.item())
    assert toy.spare.item() == 5.0 and len(set(seen)) == 12 - 4 and seen[3] == seen[7] != seen[8]
    assert Pool.replays.count("trained") == 3 * 3, "the first step after each change is launched"


@pytest.mark.parametrize("kinds", [("trained",), ("reference", "trained")])
def test_the_most_graphs_are_of_each_kind(kinds: tuple[str, ...], monkeypatch: Any) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    toy = Toy()
    graphed = graphs.GraphedModel(toy, [toy.w])
    for _ in range(3):
        for size in (40, 20, 10, 5):
            batch = batch_of(size)
            if "reference" in kinds:
                with torch.no_grad():
                    graphed.quiet(batch, "reference")
            graphed(batch)["log_probs"].sum().backward()
    assert len(graphed.pairs) == 2 * len(kinds)


def run(algorithm: str, path: Any, **options: Any) -> Any:
    rows = {"kto": unpaired, "reward": scored}.get(algorithm, pairs)()
    options |= {"model_name": scorer()} if algorithm == "reward" else {}
    built = built_of("fast", algorithm, path, rows, max_steps=2, gradient_accumulation_steps=2, batch_size=2,
                     use_peft=True, **options)
    built.trainer.train()
    return built


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("algorithm", [slow("dpo"), slow("kto"), slow("orpo"), slow("simpo"), slow("reward")])
def test_replayed_steps_are_launched_ones(algorithm: str, tmp_path: Any, monkeypatch: Any) -> None:
    launched = run(algorithm, tmp_path / "launched")
    assert "launched one by one, the model is not on a GPU" in launched.attestation()["layout"]
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda trainer: None)
    stand_in(monkeypatch)
    replayed = run(algorithm, tmp_path / "replayed")
    assert "passes replayed as CUDA graphs" in replayed.attestation()["layout"]
    # Four micro-steps, of two shapes; the first of a shape is launched.
    quiet = {"dpo": 2, "kto": 3}.get(algorithm, 0)
    assert Pool.replays.count("trained") >= 2
    assert Pool.replays.count("quiet") >= quiet and bool(quiet) == ("quiet" in Pool.replays)
    assert_same_run(replayed.trainer, launched.trainer)


def assert_same_run(ours: Any, theirs: Any) -> None:
    found, expected = ([entry for entry in one.state.log_history if "loss" in entry] for one in (ours, theirs))
    answers = "logps/chosen" if "logps/chosen" in expected[0] else "mean_reward"
    others = ("rewards/margins", "logits/chosen") if answers == "logps/chosen" else ("margin", "max_reward", "accuracy")
    for name in ("loss", "grad_norm", answers, *others):
        assert [entry[name] for entry in found] == [entry[name] for entry in expected]
    assert expected[0]["grad_norm"] > 1e-4 and len({entry[answers] for entry in expected}) == len(expected) > 1
    weights = [dict(one.model.named_parameters()) for one in (ours, theirs)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def assert_near_run(ours: Any, theirs: Any) -> None:
    """Steps filled up to another flat length: cuBLAS multiplies in other tiles, and bits of bf16 go other ways."""
    found, expected = ([entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (ours, theirs))
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and len(found) == len(expected) == 16
    assert found == pytest.approx(expected, rel=3e-2) and found[-1] < found[0] / 4


@pytest.mark.gpu
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "kto", "orpo", "simpo", "reward"])
def test_captured_steps_are_launched_ones(algorithm: str, filled: bool, tmp_path: Any, monkeypatch: Any) -> None:
    """To the bit, where shapes are not filled up to another flat length, as only those of ORPO are here."""
    from aligntune import create_reward_trainer, create_rl_trainer
    from aligntune.builtin import load_tokenizer

    data = [{"prompt": f"say {i % 7} " * (i % 4 + 2), "chosen": " alpha beta" * (i % 5 + 1),
             "rejected": " gamma" * (i % 3 + 1)} for i in range(64)]

    def train(path: Any) -> Any:
        if algorithm == "reward":
            config = model().config
            config.num_labels, config.pad_token_id = 1, 0
            create, source = create_reward_trainer, transformers.LlamaForSequenceClassification(config).cuda()
        else:
            create, source = functools.partial(create_rl_trainer, algorithm=algorithm), model()
        trainer = create(
            source, data, backend="fast", tokenizer_name=load_tokenizer("builtin:tiny"),
            use_peft=True, lora_r=8, lora_dropout=0.0, batch_size=4, max_steps=16, learning_rate=3e-3,
            output_dir=str(path), overwrite=True, logging_steps=1, progress=False, gradient_checkpointing=False,
            lr_scheduler="constant", precision="bf16", gradient_accumulation_steps=2,
        )  # fmt: skip
        with torch.no_grad():
            torch.manual_seed(5)
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
        trainer.train()
        return trainer

    if not filled:
        monkeypatch.setattr("aligntune.backends.fast.graph_shapes.MOST_FILLING", 0.0)
    captured = train(tmp_path / "captured")
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    launched = train(tmp_path / "launched")
    assert launched.trainer.graphed is None and captured.trainer.graphed.pairs
    kinds = {key[0] for key in captured.trainer.graphed.pairs}
    assert kinds == {"dpo": {"trained", "reference"}, "ipo": {"trained", "reference"},
                     "kto": {"trained", "reference", "policy"}}.get(algorithm, {"trained"})
    shared = {"shared_before" in pair.inputs for pair in captured.trainer.graphed.pairs.values()}
    assert shared == ({True, False} if algorithm == "kto" else {True}), "a prompt is computed once, but by KTO's policy"
    assert_same = assert_near_run if filled and algorithm == "orpo" else assert_same_run
    assert_same(captured.trainer, launched.trainer)
    assert not captured.attestation()["step"]["problems"]
