"""The model's forward and backward as CUDA graphs, one pair a batch shape: two launches in the place of thousands.

Launching a LoRA step of a 1B model takes the CPU about 120 ms; the GPU works on 4,000 tokens for about half of that.

A shape is launched when it comes first, which loads its kernels, and captured when it comes again. Ragged rows are
laid with room for more (`room_for`), so that few shapes occur: the next batch is then likely to fit, filled up. One
whose filling has cost as much as a capture gets a shape of its own. Beyond `MOST_GRAPHS` shapes a step is launched.

The longest shape that was launched is captured first of all where memory is plentiful, so that the pool has place for
the others. All pairs share it: a forward is always followed by its own backward before another forward runs, so what
one pair keeps in between, another may write over later. Parameters are read where they are: the optimizer writes in
place, and where they come to lie elsewhere, or others train, all is captured anew. 4-bit weights are unpacked within
the graph, each into the block of the pool that the one before it gave back. Gradients are added to one set of buffers,
which `param.grad` names while it holds a gradient; where none reaches a parameter it stays None, as without graphs: an
optimizer passes it by. A pass without gradients (a reference's) is a forward alone; it has to come before the forward
whose backward is still to run. A backward that comes later, or again, is refused, as it is without graphs.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from aligntune.backends.fast import graph_shapes, ledger
from aligntune.backends.fast.attachment import base_model
from aligntune.backends.fast.capture import Addresses, capturing, waits_because
from aligntune.backends.fast.graph_memory import GraphMemory
from aligntune.backends.fast.graph_shapes import (
    Batch,
    equal_rows,
    fill,
    fits,
    planned_tokens,
    tokens_of,
    with_room,
)
from aligntune.backends.fast.ledger import writing_to
from aligntune.backends.fast.lora import kind_of, read
from aligntune.backends.fast.recompute import Recompute, recompute_of, recomputes
from aligntune.backends.fast.steps import QuickSteps

if TYPE_CHECKING:
    from transformers import Trainer

MOST_GRAPHS = 32
CAPTURE_COSTS = 15_000
"""A batch that a captured shape holds is filled up to it, by half of its tokens at most, until what batches of its
shape were filled up with comes to so many tokens: for a 1B model computing on them takes as long as launching a step
and capturing it. So a shape costs at most twice what it would if one knew how often it comes."""
_OUTPUTS = ("log_probs", "logits", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs", "label_mask")

LOG_PROBS = {"fused_lm_head": True}
"""What asks a model for log-probs of tokens, in the place of logits."""


def eager_because(trainer: Trainer) -> str | None:
    """Why this trainer's steps cannot be captured, or None where they can."""
    model, args = trainer.model, trainer.args
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained or not all(p.is_cuda for p in model.parameters()):
        return "the model is not on a GPU"
    if trainer.accelerator.num_processes > 1:
        return "several processes exchange gradients while the backward runs"
    if not (args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16)):
        return "in fp32 attention over ragged rows waits for their lengths"
    if waits := waits_because(base_model(model)):
        return waits
    if (args.gradient_checkpointing or recomputes(model)) and recompute_of(base_model(model)) is None:
        return "torch's recomputation restores the generator's state, which waits for the GPU"
    if sum(_numbers(p) for p in trained) * 8 > sum(_numbers(p) for p in model.parameters()):
        return "more than an eighth of the parameters train: the GPU is busy for longer than the CPU"
    if unread := _unread_four_bits(model):
        return f"bitsandbytes multiplies 4-bit weights itself, {unread}"
    if drops_out(model):
        return "dropout under replay is not covered by the parity tests"
    if args.neftune_noise_alpha is not None:
        return "noise on embeddings (neftune_noise_alpha) under replay is not covered by the parity tests"
    if getattr(args, "activation_offloading", False):  # a field of some of TRL's configs
        return "activation_offloading copies what the backward keeps on a stream of its own"
    return None


def drops_out(model: torch.nn.Module) -> bool:
    """Whether training draws masks: an adapter's dropout, or the model's."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def _numbers(parameter: torch.nn.Parameter) -> int:
    """How many numbers a parameter holds; a 4-bit one stores several in an element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _unread_four_bits(model: torch.nn.Module) -> str | None:
    """Why a layer with 4-bit weights is not computed by our op, or None where all are: no other has been captured."""
    under_lora = {id(module.base_layer) for module in model.modules() if kind_of(module) == "lora"}
    for path, module in model.named_modules():
        if id(module) in under_lora:
            continue
        holder: Any = module.base_layer if kind_of(module) == "lora" else module
        if not any(hasattr(p, "quant_state") for p in holder._parameters.values()):
            continue
        wrapped = path.endswith(".base_layer")  # by another adapter than LoRA
        found = read(module) if kind_of(module) in ("lora", "nf4") and not wrapped else "its layer has no kernel"
        if isinstance(found, str):
            return found
    return None


@dataclass
class _Pair:
    """A captured forward and backward, or a forward alone; the tensors are where the graphs read and write.

    `scored`: the output with the gradient. `recompute`: whose host memory they copy to and from; the model may get
    another one. `reached`: the parameters that the backward has gradients of, and the buffers that it adds them to.
    """

    inputs: Batch
    outputs: dict[str, torch.Tensor]
    forward: torch.cuda.CUDAGraph
    promises: ledger.Ledger
    scored: str = "log_probs"
    upstream: torch.Tensor | None = None
    backward: torch.cuda.CUDAGraph | None = None
    recompute: Recompute | None = None
    reached: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)

    def replay_forward(self, batch: Batch) -> torch.Tensor:
        """What is scored of `batch`; a copy, as the next replay writes over the graph's own."""
        for name, value in self.inputs.items():
            if isinstance(value, torch.Tensor):
                fill(name, value, batch[name], self.inputs)
        self.forward.replay()
        ledger.replayed(self.promises)
        return self.outputs[self.scored][..., : tokens_of(batch)].clone()

    def replay_backward(self, upstream: torch.Tensor) -> None:
        """Add gradients to the buffers, which become `param.grad`, with what that holds now."""
        assert self.upstream is not None and self.backward is not None
        if empty := [buffer for p, buffer in self.reached if p.grad is None]:
            torch._foreach_zero_(empty)
        for p, buffer in self.reached:
            if p.grad is not None and p.grad is not buffer:
                buffer.copy_(p.grad)
            p.grad = buffer
        self.upstream[..., : upstream.shape[-1]].copy_(upstream)
        self.upstream[..., upstream.shape[-1] :].zero_()
        self.backward.replay()

    @property
    def tokens(self) -> int:
        """T, the flat length that was captured."""
        return tokens_of(self.inputs)

    def more_for(self, batch: Batch) -> float | None:
        """The share of tokens that `batch` would be filled up with to be replayed here; None where it does not fit.

        Filling is a row of its own behind the others, which nothing is learnt from.
        """
        tokens = tokens_of(batch)
        more = self.tokens - tokens
        if self.inputs.keys() != batch.keys() or not 0 <= more <= tokens * graph_shapes.MOST_FILLING:
            return None
        # Rows of one length attend as a dense batch, which no other rows fit; filling is no longer than the longest.
        if equal_rows(self.inputs) or more > self.inputs["max_length_q"]:
            return None
        spare = more > 0 and equal_rows(batch)
        same = all(fits(name, self.inputs[name], value, spare=spare) for name, value in batch.items())
        return more / tokens if same else None


@dataclass
class GraphedModel:
    """Calls `model(**batch, **asks)` through graphs where the batch's shape has been captured.

    Args:
        model: the model as the trainer calls it.
        parameters: those that train, each on the GPU; a pass with gradients sees to it where these are others.
        memory: what launched steps and graphs have beside each other.
        asks: what the model is called with besides the batch.
        scored: the one of its outputs that has a gradient, (1, T) or (1, T - 1) as all of them.
        turn: replays so far, by which a backward knows that it is its forward's first, and that no other came between.
    """

    model: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    memory: GraphMemory = field(default_factory=GraphMemory)
    asks: Mapping[str, Any] = field(default_factory=lambda: LOG_PROBS)
    scored: str = "log_probs"
    pairs: dict[tuple[Any, ...], _Pair] = field(default_factory=dict)
    launched: set[tuple[Any, ...]] = field(default_factory=set)
    filled: dict[tuple[Any, ...], int] = field(default_factory=dict)
    captures: int = 0
    capture_seconds: float = 0.0
    unfit: set[tuple[Any, ...]] = field(default_factory=set)
    turn: int = 0
    _largest: int = 0
    _warmed: set[bool] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for every capture: the allocator hands a block that one stream freed to no other, and each pair
        # would keep its own activations (72 GiB after nine shapes of a 1B model).
        self._side = torch.cuda.Stream()
        self._addresses = Addresses(self.model)
        self._read_at: list[int] = []
        self._trained = self._addresses.trained()
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        self._anchor = torch.zeros((), device=next(self.model.parameters()).device, requires_grad=True)

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Per-token outputs of the head: `scored` (1, T - 1 or T) with a gradient, the others without."""
        pair, laid = self._pair("trained", batch)
        if pair is None:
            outputs = self._asked(laid)
            return {name: value[..., : tokens_of(batch)] for name, value in outputs.items()}
        scored = _Replay.apply(self._anchor, self, pair, batch)
        # Copies: the next replay writes over the graph's own outputs.
        return {self.scored: scored} | {name: value[..., : tokens_of(batch)].clone()
                                        for name, value in pair.outputs.items() if name != self.scored}

    def quiet(self, batch: Batch, kind: str) -> torch.Tensor:
        """What is scored, (1, T), of a pass under `no_grad`.

        Args:
            kind: tells passes of one shape apart, such as those with adapters on and with adapters off.
        """
        assert not torch.is_grad_enabled()
        pair, laid = self._pair(kind, batch)
        if pair is None:
            return self._asked(laid)[self.scored][..., : tokens_of(batch)]
        self.turn += 1
        return pair.replay_forward(batch)

    def _asked(self, batch: Batch) -> dict[str, torch.Tensor]:
        return named_outputs(self.model(**batch, **self.asks))

    def _pair(self, kind: str, batch: Batch) -> tuple[_Pair | None, Batch]:
        """What was captured of this kind that holds the batch, now or before; where there is none, what to launch."""
        self._forget_moved()
        pair, laid = (None, batch) if self.memory.waits else self._found_or_captured(kind, batch)
        if torch.is_grad_enabled():
            if pair is None and self.pairs and not self.memory.suffices(tokens_of(laid)):
                self._let_go()
            self.memory.ran(tokens_of(laid) if pair is None else pair.tokens, laid if pair is None else None)
        return pair, laid

    def _found_or_captured(self, kind: str, batch: Batch) -> tuple[_Pair | None, Batch]:
        key = self._key(kind, batch)
        near = self.pairs.get(key) or self._near(kind, batch)
        if near is not None and not self._filled_enough(key, near.tokens - tokens_of(batch)):
            return near, batch
        if self._room_for_graphs(kind) < 1:
            return near, batch
        laid = batch if near is not None or key in self.launched else self._with_room(batch)
        key = self._key(kind, laid)
        if key in self.unfit:
            return near, batch
        if key not in self.launched:
            self.launched.add(key)
            return None, laid
        for one in (*self._longest_before(kind, laid), laid):
            if not self._captured(kind, one):
                return None, laid
        return self.pairs[key], laid

    def _captured(self, kind: str, batch: Batch) -> bool:
        """Capture the batch; False where memory ran out: then nothing is captured any more, and this never again."""
        started, key = time.perf_counter(), self._key(kind, batch)
        self._make_room(tokens_of(batch))
        if key not in self.launched:  # the longest: with more room, or before layers were planned
            self._warmed.discard(torch.is_grad_enabled())
        with contextlib.suppress(torch.OutOfMemoryError):  # behind it, what the pass had kept by then is let go of
            self.pairs[key] = self._capture(batch)
            self.captures += 1
        self.capture_seconds += time.perf_counter() - started
        if key not in self.pairs:
            self.unfit.add(key)
            self._let_go()
        return key in self.pairs

    def _longest_before(self, kind: str, batch: Batch) -> list[Batch]:
        """What is captured before the batch: the longest that was launched, where it makes the pool at once."""
        longest = self.memory.longest
        if not torch.is_grad_enabled() or longest is None or self._room_for_graphs(kind) < 2:
            return []
        if tokens_of(longest) <= max(self._largest, tokens_of(batch)):
            return []
        longest = self._with_room(longest)
        fits = self._key(kind, longest) not in self.unfit and self.memory.plentiful(tokens_of(longest))
        return [longest] if fits else []

    def _room_for_graphs(self, kind: str) -> int:
        return MOST_GRAPHS - sum(other[0] == kind for other in self.pairs)

    def _filled_enough(self, key: tuple[Any, ...], more: int) -> bool:
        """Whether a shape that is filled up with `more` tokens now has cost as much by that as one of its own would."""
        self.filled[key] = self.filled.get(key, 0) + more
        return more > 0 and self.filled[key] > CAPTURE_COSTS

    @staticmethod
    def _key(kind: str, batch: Batch) -> tuple[Any, ...]:
        return (kind, *sorted((name, tuple(value.shape) if isinstance(value, torch.Tensor) else value)
                              for name, value in batch.items()))

    def _near(self, kind: str, batch: Batch) -> _Pair | None:
        """The captured shape that `batch` has to be filled up the least for."""
        found = [(more, pair) for key, pair in self.pairs.items()
                 if key[0] == kind and (more := pair.more_for(batch)) is not None]
        return min(found, key=lambda one: one[0])[1] if found else None

    def _with_room(self, batch: Batch) -> Batch:
        """`batch` filled up to `room_for` its tokens, or as it is where it cannot be or memory is scarce."""
        wanted = planned_tokens(batch, capture=True)
        return with_room(batch, wanted) if wanted > tokens_of(batch) and self.memory.plentiful(wanted) else batch

    def _forget_moved(self) -> None:
        """Let go of everything captured if a tensor of the model lies elsewhere than when it was, or others train."""
        now = self._addresses.now()
        # A pass without gradients may be the reference's, for which PEFT freezes the adapters.
        trained = self._addresses.trained() if torch.is_grad_enabled() else self._trained
        if others := trained != self._trained:
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if others or self.pairs and now != self._read_at:
            self._let_go()
            self.launched.clear()  # a step is launched before one is captured: copies in fp8 are then made anew
            self.filled.clear()
            self._warmed.clear()
            self.buffers = [torch.zeros_like(p) for p in self.parameters]  # `model.to` moves gradients as well
        self._read_at, self._trained = now, trained

    def _let_go(self) -> None:
        """Of everything captured, and of its memory."""
        torch.cuda.synchronize()
        self.pairs.clear()
        self._pool = torch.cuda.graph_pool_handle()
        self._largest = 0
        torch.cuda.empty_cache()

    def _make_room(self, tokens: int) -> None:
        """Before a capture: a larger shape than any before takes the pool anew, and what launched steps left goes.

        Blocks of a pool are cut, never joined: the activations of a larger shape would lie beside those of the smaller
        ones (30 GiB after nineteen shapes of a 1B model, whose largest takes 11). The smaller ones fit into the larger
        one's; they are captured again as they come.
        """
        if tokens > self._largest:
            if self.pairs:
                self._let_go()
            self._largest = tokens
        torch.cuda.empty_cache()

    def _capture(self, batch: Batch) -> _Pair:
        """Of a shape whose kernels are there: it was launched before, or is run once outside of the capture."""
        inputs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        if torch.is_grad_enabled() not in self._warmed:
            self._warm(inputs)
        forward = torch.cuda.CUDAGraph()
        with ledger.writing() as promises, capturing(forward, pool=self._pool, stream=self._side):
            outputs = self._asked(inputs)
        pair = _Pair(inputs, {name: value.detach() for name, value in outputs.items()}, forward, promises, self.scored,
                     recompute=recompute_of(base_model(self.model)))
        if torch.is_grad_enabled():
            pair.upstream, pair.backward = torch.zeros_like(outputs[self.scored]), torch.cuda.CUDAGraph()
            with writing_to(promises), capturing(pair.backward, pool=self._pool, stream=self._side):
                scored = outputs[self.scored]
                gradients = torch.autograd.grad(scored, self.parameters, pair.upstream, allow_unused=True)
                every = zip(self.parameters, self.buffers, gradients, strict=True)
                pair.reached = [(p, buffer) for p, buffer, g in every if g is not None]
                torch._foreach_add_([buffer for _, buffer in pair.reached], [g for g in gradients if g is not None])
        return pair

    def _warm(self, inputs: Batch) -> None:
        """Run once outside of a capture: kernels are loaded, the side stream's workspaces made, the backward's too."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            warm = self._asked(inputs)[self.scored]
            if torch.is_grad_enabled():
                torch.autograd.grad(warm, self.parameters, torch.zeros_like(warm), allow_unused=True)
        self._warmed.add(torch.is_grad_enabled())
        torch.cuda.current_stream().wait_stream(self._side)
        torch.cuda.synchronize()


class ReplayedSteps(QuickSteps):
    """Mixin before a transformers Trainer: with `capture`, passes of training go through graphs.

    What was captured goes when a training begins: adapters may have been switched since, and which parameters train.
    """

    capture = False
    graphed: GraphedModel | None = None
    asks: Mapping[str, Any] = LOG_PROBS
    scored = "log_probs"

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers'."""
        self.graphed = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _graphs(self: Any, model: Any) -> GraphedModel | None:
        """What replays passes of `model`, or None where they are launched."""
        if not (self.capture and self.model.training):
            return None
        if self.graphed is None or self.graphed.model is not model:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.graphed = GraphedModel(model, trained, asks=self.asks, scored=self.scored)
        self.graphed.memory.plan = getattr(self, "memory", None)
        return self.graphed


class _Replay(torch.autograd.Function):
    """Replays a pair; the gradients go to the parameters' buffers, not through autograd."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, model: GraphedModel, pair: _Pair, batch: Batch) -> torch.Tensor:
        model.turn += 1
        ctx.model, ctx.pair, ctx.turn = model, pair, model.turn
        return pair.replay_forward(batch)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, ...]:  # type: ignore[override]
        if ctx.turn != ctx.model.turn:
            raise RuntimeError("a replayed pass has one backward, and before the next replayed pass: what it kept for "
                               "it was written over")
        ctx.model.turn += 1
        ctx.pair.replay_backward(upstream)
        return None, None, None, None


def named_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """What the head answered, by name."""
    return {name: value for name in _OUTPUTS if (value := getattr(outputs, name, None)) is not None}
