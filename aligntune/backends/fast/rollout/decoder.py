"""The device's side of a rollout: the model's own modules over a paged cache, a step at a time, replayed as a graph.

The model runs as it stands, adapters unmerged, with the forwards that `attach` gave its modules. What differs from
training is attention: for as long as a rollout runs, the model's config names a function of ours, which puts keys and
values in the cache and reads them there. Tokens of all rows lie end to end in one line, in a prefill as in a step.

A step reads everything that changes (tokens, lengths, page tables, where the cache lies, the sampling's numbers) from
device memory at fixed addresses, so one captured graph serves every step of its batch size. It also reads the weights
where they are: an optimizer that writes in place needs no new capture. Before each rollout the addresses, the adapters'
state and the forwards are compared with those of the capture; where one differs, the graphs are dropped and captured
again.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast import ledger, lora
from aligntune.backends.fast.attachment import base_model
from aligntune.backends.fast.capture import Addresses, capturing
from aligntune.backends.fast.ops import decode_attention as paged
from aligntune.backends.fast.ops import sample as sampler
from aligntune.backends.fast.ops.attention import attention, attention_reference
from aligntune.backends.fast.ops.fp8 import Fp8Weight
from aligntune.backends.fast.rollout.cache import PAGE, PagePool, pages_for
from aligntune.backends.fast.rollout.projections import Projections
from aligntune.backends.fast.rollout.rope import frequencies_of_short_rows
from aligntune.backends.fast.rollout.sampling import Form, Numbers, Sampling, choices
from aligntune.errors import ConfigError

BUCKETS = (1, 4, 16, 32, 64, 128, 256)
"""Batch sizes that are captured; a smaller batch is filled up with rows that are done."""
CAPPED = "attention of a prefill, a row at a time: no launch over ragged rows caps scores"
"""What runs eager in a model with capped scores (Gemma 2)."""

_numbers = itertools.count()


def bucket(rows: int, most: int) -> int:
    """The batch size that a step of `rows` rows runs at, up to `most`."""
    return next((size for size in BUCKETS if rows <= size < most), most)


@dataclass
class Prefill:
    """Rows end to end: slot of each token, first token of each row, the longest row."""

    slots: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int


@dataclass
class Step:
    """One token of each row: its slot, and how many tokens it sees."""

    slots: torch.Tensor
    visible: torch.Tensor


@dataclass
class Capture:
    """Graphs by (batch size, form, number of stop tokens), with what they launch, and what they were captured of."""

    fingerprint: tuple[Any, ...] = ()
    projections: Projections | None = None
    graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, ledger.Ledger]] = field(default_factory=dict)
    count: int = 0
    seconds: float = 0.0


class Decoder:
    """Runs a model's prefills and steps.

    Args:
        model: a causal language model of a family in the table, under any wrappers.
        pool: the cache.
        slots: rows a step can hold.
        most: tokens a row can hold, and draw.
        kernels: Triton kernels (on a GPU, or interpreted), or their torch twins.
        graphs: capture steps.
        autocast: run under autocast to this type; None runs the modules as they are.
    """

    def __init__(
        self, model: nn.Module, pool: PagePool, *, slots: int, most: int, kernels: bool, graphs: bool,
        autocast: torch.dtype | None,
    ) -> None:
        self.model: Any = base_model(model)
        self.pool, self.slots, self.kernels, self.graphs, self.autocast = pool, slots, kernels, graphs, autocast
        device = next(self.model.parameters()).device
        self.state = torch.zeros((slots, len(sampler.FIELDS)), dtype=torch.int32, device=device)
        self.table = torch.zeros((slots, pages_for(most)), dtype=torch.int32, device=device)
        self.outputs = sampler.Outputs(torch.zeros((slots, most), dtype=torch.int32, device=device),
                                       torch.zeros((slots, most), device=device))
        self.numbers = Numbers.on(device)
        self.stops = torch.full((1,), -1, dtype=torch.int32, device=device)
        self.seen: torch.Tensor | None = None
        self.capture = Capture()
        # A mask of 4 dimensions: transformers hands it on as it is, and ours does not read it.
        self._mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        self._now: Prefill | Step | None = None
        self._attended: list[int] = []  # layers whose attention was ours in this forward
        self._pool_of_graphs: Any = None

    # -------------------------------------------------------------------------------------------- around a rollout

    @contextlib.contextmanager
    def rollout(self, sampling: Sampling, stops: tuple[int, ...]) -> Iterator[None]:
        """While open the model is in eval mode, its attention is ours, the cache stands, and `sampling` is set."""
        self._set(sampling, stops)
        config = self.model.config
        training = [module for module in self.model.modules() if module.training]
        autocast = contextlib.nullcontext() if self.autocast is None else torch.autocast(
            self.state.device.type, dtype=self.autocast, cache_enabled=False)
        with (self.pool.standing(), _registered(self._attend) as name, frequencies_of_short_rows(self.model),
              torch.no_grad(), autocast):  # fmt: skip
            before = config._attn_implementation
            try:
                for module in training:
                    module.training = False
                config._attn_implementation = name
                self._keep_graphs()
                yield
            finally:
                config._attn_implementation = before
                for module in training:
                    module.training = True
                self._now = None

    def _set(self, sampling: Sampling, stops: tuple[int, ...]) -> None:
        self.numbers.set(sampling)
        size = 1 << max(0, len(stops) - 1).bit_length()
        if size != self.stops.numel():
            self.stops = self.stops.new_full((size,), -1)
            self.capture.graphs.clear()
        self.stops.copy_(torch.tensor([*stops, *[-1] * (size - len(stops))], dtype=torch.int32))
        if sampling.form.penalty and self.seen is None:
            vocab = self.model.get_output_embeddings().weight.shape[0]
            self.seen = torch.zeros((self.slots, vocab), dtype=torch.bool, device=self.state.device)
        self.state.zero_()

    def _keep_graphs(self) -> None:
        """Drop the graphs if the model is not, address for address, the one they were captured of; cast the factors."""
        state: list[Any] = [*Addresses(self.model).now()]
        for module in self.model.modules():
            state += [id(module.__dict__.get("forward")), id(type(module).forward)]
            if hasattr(module, "lora_A"):
                state += [tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters),
                          tuple(module.scaling.items())]
                # Reading makes stale fp8 copies anew, which a replayed step would not.
                found = lora.read(module)
                if not isinstance(found, str) and isinstance(found.weight, Fp8Weight):
                    state.append(found.weight.rows.data_ptr())
        fingerprint = tuple(state)
        if fingerprint != self.capture.fingerprint:
            self.capture.graphs.clear()
            self.capture.fingerprint = fingerprint
            self.capture.projections = Projections(self.model, autocast=self.autocast, kernels=self.kernels)
        if self.capture.projections is not None:
            self.capture.projections.refresh()

    # ---------------------------------------------------------------------------------------------------- attention

    def _attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *,
        scaling: float, sliding_window: int | None = None, softcap: float | None = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """What transformers calls: query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D)."""
        k_pages, v_pages, place = self.pool.layer(module.layer_idx)  # type: ignore[arg-type]
        self._attended.append(module.layer_idx)  # type: ignore[arg-type]
        # Under autocast a rotated query may come in fp32 (cos and sin are); attention runs in the cache's type.
        query, key, value = (x.to(k_pages.dtype) for x in (query, key, value))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        now = self._now
        assert now is not None, "the model was called outside a prefill or a step"
        if self.kernels:
            ledger.promise(module, "decode attention" if isinstance(now, Step) else "prefill")
        (paged.write_kv if self.kernels else paged.write_kv_reference)(
            k, v, now.slots, k_pages, v_pages, place=place)
        if isinstance(now, Step):
            attend = paged.decode_attention if self.kernels else paged.decode_attention_reference
            out = attend(q, k_pages, v_pages, self.table, now.visible, scale=scaling, window=sliding_window,
                         softcap=softcap, place=place)
            return out.unsqueeze(0), None
        if softcap:
            spec = module.__dict__.get(lora.KEY)
            if spec is not None:
                spec.fall_out(CAPPED)
            return _capped_rows(query, key, value, now.cu_seqlens, scaling, sliding_window, softcap), None
        run = attention if query.is_cuda else attention_reference
        return run(query, key, value, now.cu_seqlens, max_seqlen=now.longest, scale=scaling,
                   window=sliding_window), None

    def _forward(self, model: nn.Module, now: Prefill | Step, **inputs: Any) -> Any:
        """One call of `model` over the tokens of `now`.

        Raises:
            ConfigError: attention of a layer was another than ours: its rows saw each other, and no cache.
        """
        self._now, self._attended = now, []
        out = type(model).forward(model, attention_mask=self._mask, use_cache=False, **inputs)
        layers = self.pool.layers
        if self._attended != list(range(layers)):
            raise ConfigError(
                f"rollout_engine='fast': layers {self._attended} of {layers} called its attention, not each once: "
                "something has replaced the family's; rollout_engine='hf' generates with transformers")
        return out

    # ------------------------------------------------------------------------------------------------------ prefill

    def prefill(self, prefixes: list[tuple[list[int], list[int]]]) -> None:
        """Compute keys and values of prefixes, (tokens, pages) each, in one call of the backbone."""
        device = self.state.device
        ids = [token for tokens, _ in prefixes for token in tokens]
        positions = [at for tokens, _ in prefixes for at in range(len(tokens))]
        slots = [pages[at // PAGE] * PAGE + at % PAGE for tokens, pages in prefixes for at in range(len(tokens))]
        lengths = [len(tokens) for tokens, _ in prefixes]
        ends = [0, *itertools.accumulate(lengths)]
        now = Prefill(torch.tensor(slots, device=device), torch.tensor(ends, dtype=torch.int32, device=device),
                      max(lengths))
        with self._projections():  # short prompts are bound by launching, and it launches less
            self._forward(self.model.base_model, now, input_ids=torch.tensor([ids], device=device),
                          position_ids=torch.tensor([positions], device=device))

    def mark_seen(self, slot: int, tokens: list[int]) -> None:
        """The tokens that a row's repetition penalty falls on, at its start."""
        assert self.seen is not None
        self.seen[slot] = False
        self.seen[slot, torch.tensor(tokens, device=self.seen.device)] = True

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Move rows' outputs and marks between slots, (from, to) each; state and table are written anew."""
        if not moves:
            return
        source, target = (torch.tensor(side, device=self.state.device) for side in zip(*moves, strict=True))
        for buffer in (self.outputs.tokens, self.outputs.log_probs, self.seen):
            if buffer is not None:
                buffer.index_copy_(0, target, buffer.index_select(0, source))

    # -------------------------------------------------------------------------------------------------------- steps

    def steps(self, count: int, rows: int, form: Form) -> None:
        """`count` steps of the rows in slots 0 .. `rows` - 1."""
        if not self.graphs:
            with self._projections():
                for _ in range(count):
                    self._step(rows, form)
            return
        size = bucket(rows, self.slots)
        key = (size, form, self.stops.numel())
        found = self.capture.graphs.get(key)
        if found is None:
            found = self.capture.graphs[key] = self._captured(size, form)
        graph, promises = found
        for _ in range(count):
            graph.replay()
            ledger.replayed(promises)

    def _step(self, rows: int, form: Form) -> None:
        state = self.state[:rows]
        token, length, active = state[:, 0].long(), state[:, 1].long(), state[:, 5] != 0
        # A row that is full may stand one past its table; like all that are done it writes to page 0.
        at = (length // PAGE).clamp(max=self.table.shape[1] - 1)
        page = self.table[:rows].gather(1, at[:, None])[:, 0].long()
        slots = torch.where(active, page * PAGE + length % PAGE, 0)
        now = Step(slots, torch.where(active, state[:, 1] + 1, 0))  # rows that are done see nothing
        logits = self._forward(self.model, now, input_ids=token[None], position_ids=length[None]).logits[0]
        seen = self.seen[:rows] if form.penalty and self.seen is not None else None
        scores = choices(logits, form, self.numbers, seen, kernels=self.kernels) if form.filters else None
        if self.kernels:
            ledger.promise(self.model, "sample")
        draw = sampler.sample_step if self.kernels else sampler.sample_step_reference
        draw(logits, self.state, self.outputs, seed=self.numbers.seed, temperature=self.numbers.temperature,
             stops=self.stops, greedy=form.greedy, choices=scores)
        if seen is not None:
            seen.scatter_(1, state[:, :1].long(), True)

    def _projections(self) -> contextlib.AbstractContextManager[None]:
        projections = self.capture.projections
        return contextlib.nullcontext() if projections is None else projections.in_use()

    def _captured(self, rows: int, form: Form) -> tuple[torch.cuda.CUDAGraph, ledger.Ledger]:
        started = time.perf_counter()
        if self._pool_of_graphs is None:
            self._pool_of_graphs = torch.cuda.graph_pool_handle()
            # One stream for every capture, or each graph keeps its own intermediates.
            self._side = torch.cuda.Stream()
        state, seen = self.state.clone(), None if self.seen is None else self.seen.clone()
        self.state.zero_()  # warm-up steps move no row
        self._side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._side), self._projections():
                for _ in range(2):
                    self._step(rows, form)
        finally:  # after an error too the cache goes to whoever launches next on this stream
            torch.cuda.current_stream().wait_stream(self._side)
        self.state.copy_(state)
        if self.seen is not None and seen is not None:
            self.seen.copy_(seen)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (self._projections(), ledger.writing() as promises,
              capturing(graph, pool=self._pool_of_graphs, stream=self._side)):  # fmt: skip
            self._step(rows, form)
        self.capture.count += 1
        self.capture.seconds += time.perf_counter() - started
        return graph, promises


@contextlib.contextmanager
def _registered(attend: Any) -> Iterator[str]:
    """A name of its own under which transformers finds `attend` while this is open."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"aligntune_rollout_{next(_numbers)}"
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield name
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def _capped_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float,
    window: int | None, softcap: float,
) -> torch.Tensor:
    """Causal attention with capped scores."""
    group = query.shape[1] // key.shape[1]
    outs = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        q, k, v = (x[0, :, start:stop] for x in (query, key, value))
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        scores = torch.tanh(torch.matmul(q, k.transpose(1, 2)) * scale / softcap) * softcap
        at = torch.arange(stop - start, device=q.device)
        hidden = at[:, None] < at
        if window is not None:
            hidden |= at[:, None] - at >= window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        outs.append(torch.matmul(weights, v))
    return torch.cat(outs, dim=1).transpose(0, 1).unsqueeze(0)
