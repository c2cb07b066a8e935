"""Captured steps: the same bits as launched ones, over accumulation, shapes seen once, and evaluation in between."""

from __future__ import annotations

import copy
import gc
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from aligntune import create_sft_trainer
from aligntune.backends.fast import graph_shapes, graphs
from aligntune.backends.fast.memory import Costs
from aligntune.builtin import load_tokenizer

pytestmark = pytest.mark.gpu
WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four"]


def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )).cuda()  # fmt: skip


def rows(lengths: tuple[int, ...], count: int = 64) -> list[dict[str, str]]:
    """Rows of so many words; where they are to be equal, of one and the same word."""
    draw, words = random.Random(0), WORDS if len(lengths) > 1 else WORDS[:1]
    return [{"text": " ".join(draw.choices(words, k=draw.choice(lengths)))} for _ in range(count)]


def train(
    tmp_path: Any, data: list[dict[str, str]], *, steps: int = 16, source: Any = None, **options: Any
) -> Any:
    """A run of `model()`, or of `source`, a model or the folder of one."""
    trainer = create_sft_trainer(
        source or model(), data, backend="fast", tokenizer_name=load_tokenizer("builtin:tiny"),
        max_steps=steps, output_dir=str(tmp_path), overwrite=True, logging_steps=1, progress=False,
        lr_scheduler="constant",
        **{"gradient_checkpointing": False, "batch_size": 4, "learning_rate": 3e-3}
        | ({"use_peft": True, "lora_r": 8, "lora_dropout": 0.0} if options.get("use_peft", True) else {}) | options,
    )  # fmt: skip
    with torch.no_grad():
        torch.manual_seed(5)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    trainer.train()
    return trainer


def history(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.trainer.state.log_history if name in entry]


def assert_same_run(captured: Any, launched: Any) -> None:
    losses = history(captured, "loss")
    assert losses[0] > 1 and losses[-1] < losses[0] - 0.5, losses
    assert losses == history(launched, "loss")
    assert history(captured, "grad_norm") == history(launched, "grad_norm")
    ours, theirs = (
        {name: p.detach() for name, p in one.model.named_parameters() if p.requires_grad}
        for one in (captured, launched)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("accumulation", "precision"), [(1, "bf16"), (3, "bf16"), (1, "fp16")])
@pytest.mark.parametrize("lengths", [(60,), (3, 5, 40, 60)], ids=["equal", "ragged"])
def test_replayed_steps_are_launched_ones_to_the_bit(lengths, accumulation, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)  # products over another number of rows round otherwise
    options = {"gradient_accumulation_steps": accumulation, "precision": precision}
    captured = train(tmp_path / "captured", rows(lengths), **options)
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    launched = train(tmp_path / "launched", rows(lengths), **options)
    assert launched.trainer.graphed is None and captured.trainer.graphed.pairs
    assert_same_run(captured, launched)
    attested = captured.attestation()["step"]
    assert not attested["problems"] and (attested["replayed"] or len(lengths) > 1)


class Freezing(TrainerCallback):
    """Freezes the first layer's adapters after step 6."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        if state.global_step == 6:
            for name, parameter in model.named_parameters():
                if "layers.0." in name:
                    parameter.requires_grad_(False)


def test_what_no_gradient_reaches_is_passed_by_and_what_is_frozen_stays(tmp_path, monkeypatch):
    """A gradient of 0 would let weight decay and moments act on both."""
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)

    def run(name: str) -> Any:
        made = model()
        made.spare = torch.nn.Linear(256, 256, device="cuda")
        return train(tmp_path / name, rows((60,)), source=made, weight_decay=0.5, steps=12, callbacks=[Freezing()],
                     lora_target_modules=["q_proj", "down_proj", "spare"])

    captured = run("captured")
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    launched = run("launched")
    assert launched.trainer.graphed is None and captured.trainer.graphed.captures == 2
    ours, theirs = (dict(one.model.named_parameters()) for one in (captured, launched))
    assert sum("spare.lora" in name for name in ours) == 2
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert history(captured, "loss") == history(launched, "loss")


def test_a_batch_filled_up_to_a_captured_shape_trains_the_same(tmp_path, monkeypatch):
    data = rows((3, 5, 40, 60, 90), count=96)
    filled = train(tmp_path / "filled", data, steps=24)
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)
    exact = train(tmp_path / "exact", data, steps=24)
    assert len(filled.trainer.graphed.pairs) < len(exact.trainer.graphed.pairs)
    assert history(filled, "loss") == pytest.approx(history(exact, "loss"), rel=1e-2)
    # Of no step before it: products of another length round otherwise, a logit by 2**-9, the mean of hundreds by less.
    assert history(filled, "loss")[0] == pytest.approx(history(exact, "loss")[0], rel=2e-4)
    assert history(filled, "num_tokens") == history(exact, "num_tokens")


@pytest.mark.parametrize("how", [True, "offload"])
@pytest.mark.parametrize("lengths", [(60,), (3, 5, 40, 60)], ids=["equal", "ragged"])
def test_recomputed_steps_are_replayed_too(lengths, how, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)
    captured = train(tmp_path / "captured", rows(lengths), gradient_checkpointing=how)
    assert captured.trainer.graphed.pairs and "recomputed in every layer" in captured.attestation()["layout"]
    attested = captured.attestation()["step"]
    assert not attested["problems"], attested["problems"]
    kept = train(tmp_path / "kept", rows(lengths))
    assert history(captured, "loss") == pytest.approx(history(kept, "loss"), rel=2e-3)
    assert attested["kernels"]["rms_norm_forward"] > kept.attestation()["step"]["kernels"]["rms_norm_forward"]
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    launched = train(tmp_path / "launched", rows(lengths), gradient_checkpointing=how)
    assert launched.trainer.graphed is None
    assert_same_run(captured, launched)


def standing() -> int:
    """Bytes on the GPU. Runs before leave cycles, and cuBLAS a workspace for each of their streams, for good."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@dataclass
class Alone:
    """A run of `auto` and what it took; `standing` are the bytes that others held when it began."""

    costs: Costs
    most: int
    losses: list[float]
    tokens: int
    peak: int
    standing: int

    @classmethod
    def run(cls, path: Any, data: list[dict[str, str]], **options: Any) -> Alone:
        before = standing()
        run = train(path, data, batch_size=32, steps=6, gradient_checkpointing="auto", **options)
        plan = run.trainer.memory
        tokens = max(int(dict(key[1:])["input_ids"][1]) for key in run.trainer.graphed.launched)
        return cls(plan.costs, plan.most, history(run, "loss"), tokens, torch.cuda.max_memory_allocated(), before)


def test_layers_are_recomputed_as_a_budget_asks(tmp_path):
    """A step with a budget between what two plans take does as the one says that fits, and takes no more."""
    data = rows((400,), count=128)
    layers = 3
    free = Alone.run(tmp_path / "free", data)
    assert free.most == 0 and free.costs.layer > 0 and free.costs.forward > 0 and free.costs.backward > 0
    takes = [free.costs.of(free.tokens, count) for count in range(layers + 1)]
    apart = [kept for kept in range(layers) if takes[kept + 1] - takes[kept] > free.tokens * free.costs.layer / 2]
    assert len(apart) >= 2, free  # the first layer that is kept may take no more than it would recomputed
    for kept in (apart[0], apart[-1]):
        between = (takes[kept] + takes[kept + 1]) / 2
        assert free.costs.kept(free.tokens, between) == kept, free
        budget = between + standing() - free.standing
        tight = Alone.run(tmp_path / f"tight-{kept}", data, memory_budget_gib=budget / 2**30)
        assert tight.most == layers - kept, (free, tight)
        assert tight.peak < budget
        assert tight.losses == pytest.approx(free.losses, rel=1e-2, abs=5e-3)  # of 10 at first


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_budget_holds_where_all_weights_train(accumulation, tmp_path):
    """Gradients as large as a layer's activations: made on the way back, or there beside the second micro-batch."""
    data = rows((400,), count=128)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
                         num_attention_heads=16, num_key_value_heads=4, pad_token_id=0)
    source = LlamaForCausalLM(config).to(torch.bfloat16)

    def run(name: str, **options: Any) -> tuple[Any, int, int]:
        before = standing()
        trainer = train(tmp_path / name, data, source=copy.deepcopy(source).cuda(), steps=4, batch_size=16,
                        use_peft=False, learning_rate=1e-4, gradient_accumulation_steps=accumulation,
                        gradient_checkpointing="auto", precision="bf16", **options)
        assert trainer.trainer.graphed is None
        return trainer.trainer.memory, torch.cuda.max_memory_allocated(), before

    free, _, stood = run("free")
    costs = free.costs
    assert free.most == 0 and costs.gradients > 100 << 20 and (costs.held > 0) == (accumulation > 1)
    takes = [costs.of(costs.tokens, kept) for kept in range(7)]
    kept = next(kept for kept in range(1, 6) if takes[kept + 1] - takes[kept] > 0.9 * costs.layer * costs.tokens)
    budget = (takes[kept] + takes[kept + 1]) / 2
    del free
    tight, peak, now = run("tight", memory_budget_gib=(budget + standing() - stood) / 2**30)
    assert tight.most == 6 - kept, (costs, tight.costs)
    assert budget - (takes[kept + 1] - takes[kept]) - (128 << 20) < peak - (now - stood) < budget


def test_under_auto_no_graph_recomputes_what_fits(tmp_path):
    """In the first optimizer step, of several micro-batches of one shape, every layer is recomputed."""
    recomputed = {}
    for how in ("auto", True):
        run = train(tmp_path / str(how), rows((60,)), steps=4, gradient_checkpointing=how,
                    gradient_accumulation_steps=3)
        pairs = run.trainer.graphed.pairs.values()
        entries = [entry for pair in pairs for entry in pair.promises.entries.values()]
        assert pairs and sum(entry.with_grad for entry in entries)
        recomputed[how] = sum(entry.recomputed_with_grad for entry in entries)
        assert how is True or run.trainer.memory.most == 0
    assert recomputed["auto"] == 0 < recomputed[True]


def test_fp32_is_launched_and_says_why(tmp_path):
    trainer = train(tmp_path, rows((3, 5, 40, 60)), steps=4, precision="fp32")
    assert trainer.trainer.graphed is None and "in fp32 attention over ragged rows" in trainer.attestation()["layout"]


def test_more_shapes_than_graphs(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)
    captured = train(tmp_path / "captured", rows((3, 5, 40, 60, 90)), steps=24)
    assert len(captured.trainer.graphed.pairs) == 1 == captured.trainer.graphed.captures
    monkeypatch.setattr("aligntune.backends.fast.build.eager_because", lambda _: "a test asked for it")
    assert_same_run(captured, train(tmp_path / "launched", rows((3, 5, 40, 60, 90)), steps=24))


def test_evaluation_between_replays_changes_nothing(tmp_path):
    data = rows((60,))
    plain = train(tmp_path / "plain", data)
    evaluated = train(tmp_path / "evaluated", data, eval_dataset_name=data[:8], eval_steps=2)
    assert history(evaluated, "eval_loss")
    assert_same_run(evaluated, plain)


def test_memory_does_not_grow_with_the_number_of_graphs(tmp_path, monkeypatch):
    """Every pair lives in one pool, captured from one stream."""
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)
    few = train(tmp_path / "few", rows((60,)))
    torch.cuda.synchronize()
    one = torch.cuda.memory_reserved()
    many = train(tmp_path / "many", rows((3, 20, 40, 60, 90), count=256), steps=64)
    assert len(many.trainer.graphed.pairs) >= 4 > len(few.trainer.graphed.pairs)
    assert torch.cuda.memory_reserved() < 2 * one + 2**28


class Keeping(torch.nn.Module):
    """log p of a token is the sum over its row after many layers; T tokens keep 2 x T x width x layers floats."""

    def __init__(self, width: int = 4096, layers: int = 32) -> None:
        super().__init__()
        self.width = width
        self.scales = torch.nn.ParameterList(torch.full((width,), 1.0 + i / 100) for i in range(layers)).cuda()

    def forward(self, input_ids: torch.Tensor, fused_lm_head: bool, **lengths: Any) -> Any:
        x = input_ids[0, :, None].sin().expand(-1, self.width)
        for scale in self.scales:
            x = (x * scale).sin()
        return SimpleNamespace(log_probs=x.sum(1)[None])


def ragged(tokens: int) -> dict[str, Any]:
    ends = torch.tensor([0, 1, tokens, tokens], dtype=torch.int32)
    return {"input_ids": torch.randn(1, tokens, device="cuda"), "cu_seq_lens_q": ends, "max_length_q": tokens}


def stepped(graphed: Any, made: Keeping, batch: dict[str, Any]) -> list[torch.Tensor]:
    for p in made.parameters():
        p.grad = None
    graphed(batch)["log_probs"].sum().backward()
    return [p.grad.clone() for p in made.parameters()]


def wanted(made: Keeping, batch: dict[str, Any]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(made(**batch, fused_lm_head=True).log_probs.sum(), list(made.parameters())))


@pytest.fixture
def reach():
    """The bytes that this process may have: 2 GiB more than it has."""
    standing()
    torch.cuda.reset_peak_memory_stats()
    bytes_ = torch.cuda.memory_reserved() + 2 * 2**30
    torch.cuda.set_per_process_memory_fraction(bytes_ / torch.cuda.mem_get_info()[1])
    yield bytes_
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_graphs_go_where_a_launched_step_needs_their_memory(reach, monkeypatch):
    """Two tensors a layer, 1 MiB a token: 1,200 tokens are captured, and 1,000 others do not fit beside their pool."""
    monkeypatch.setattr(graph_shapes, "MOST_FILLING", 0)
    made = Keeping()
    graphed = graphs.GraphedModel(made, list(made.parameters()))
    batches = {tokens: ragged(tokens) for tokens in (1200, 1000)}
    true = {tokens: wanted(made, batch) for tokens, batch in batches.items()}
    assert all(g.abs().max() > 0 for g in (*true[1200], *true[1000]))
    for tokens, captures in ((1200, 0), (1200, 1), (1200, 1), (1000, 1), (1000, 2), (1000, 2)):
        found = stepped(graphed, made, batches[tokens])
        assert graphed.captures == captures
        assert all(torch.equal(one, other) for one, other in zip(found, true[tokens], strict=True))
    assert len(graphed.pairs) == 1


class Hungry(Keeping):
    """Its first capture ends for want of memory."""

    hungry = True

    def forward(self, *args: Any, **given: Any) -> Any:
        found = super().forward(*args, **given)
        if self.hungry and torch.cuda.is_current_stream_capturing():
            self.hungry = False
            torch.empty(2**33, device="cuda")
        return found


def test_a_capture_without_memory_leaves_its_step_launched(reach):
    made = Hungry()
    graphed = graphs.GraphedModel(made, list(made.parameters()))
    batch = ragged(256)
    true = wanted(made, batch)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(stepped(graphed, made, batch), true, strict=True))
    assert not made.hungry and not graphed.pairs and len(graphed.unfit) == 1
    other = ragged(512)
    for _ in range(3):
        found = stepped(graphed, made, other)
    assert len(graphed.pairs) == 1, "a shape that there is memory for is captured"
    assert all(torch.equal(one, other) for one, other in zip(found, wanted(made, other), strict=True))
