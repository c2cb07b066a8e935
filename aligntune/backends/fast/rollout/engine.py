"""Completions from the model that is being trained, in its own memory: no copy of it, no weights to send.

    engine = RolloutEngine(model, tokenizer, max_batch=64, max_len=1024)
    rollout = engine.generate(prompt_ids, num_generations=8, sampling=Sampling(max_new_tokens=256))

A prompt is computed once for all its completions. All of it but its last token goes into the cache; that one is fed by
the first decode step, so logits are made and tokens drawn in one place only. Rows that finish make room for the next.

Memory: the cache is allocated when a call begins and given back to torch when it ends, so that training has it in
between; captured graphs read where it lies. `release()` lets go of the graphs too, and the next call captures again.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast import families
from aligntune.backends.fast.attachment import attachment_of, base_model
from aligntune.backends.fast.capture import router_waits_because
from aligntune.backends.fast.forwards import attention_forward
from aligntune.backends.fast.lora import instance_forward
from aligntune.backends.fast.memory import reachable
from aligntune.backends.fast.ops import sample as sampler
from aligntune.backends.fast.ops._runtime import interpreting, on_device
from aligntune.backends.fast.rollout.cache import PagePool, pages_for
from aligntune.backends.fast.rollout.decoder import CAPPED, Decoder
from aligntune.backends.fast.rollout.rope import length_limit
from aligntune.backends.fast.rollout.sampling import Sampling, is_whole
from aligntune.backends.fast.rollout.schedule import Row, Schedule
from aligntune.errors import ConfigError

STRIDE = 8
"""Steps between two looks at the device: a row that is done waits for half as many, and a look costs about 0.2 ms."""
PREFILL_TOKENS = 16_384
SPARE_PAGES = 2
"""Beside what rows hold: page 0, which is nobody's, and the last, partial one of a prompt, of which rows get a copy."""
SHARE_OF_FREE = 0.3
"""Of the memory that is free at the first call, where `memory_gib` does not say how much: an optimizer's state may be
yet to come, and stays."""
_REASONS = {sampler.STOPPED: "stop", sampler.FULL: "length"}


@dataclass
class RolloutStats:
    """What a call did. `graphs`: "replayed", or why steps were launched one by one."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    prefill_tokens: int = 0
    prefills: int = 0
    preemptions: int = 0
    captures: int = 0
    capture_seconds: float = 0.0
    pages: int = 0
    most_pages_used: int = 0
    cache_gib: float = 0.0
    graphs: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0}


@dataclass
class Rollout:
    """Completions, a prompt's next to each other.

    `completion_ids[i]` ends with the stop token, where `finish_reasons[i]` is "stop", or after `max_new_tokens`
    ("length"). `log_probs[i][t]` is log softmax(logits / temperature) of the drawn token, over the whole vocabulary:
    what TRL's loss computes for it (at temperature 0, that of temperature 1).
    """

    completion_ids: list[list[int]]
    log_probs: list[list[float]]
    finish_reasons: list[str]
    stats: RolloutStats = field(default_factory=RolloutStats)


def cannot_run_because(model: nn.Module, *, max_len: int | None = None) -> str | None:
    """Why the engine cannot generate with this model, or None where it can.

    `max_len`: the longest prompt + completion in tokens; None leaves what depends on it out.
    """
    base: Any = base_model(model)
    config = getattr(base, "config", None)
    if config is None or getattr(base, "get_output_embeddings", lambda: None)() is None:
        return f"{type(base).__name__} is no causal language model of transformers"
    if families.family_of(config.model_type) is None:
        known = ", ".join(sorted(family.model_type for family in families.FAMILIES))
        return f"model type {config.model_type!r} is not in the table of families ({known})"
    found = families.identify(base)
    if found is None or found[1] != "head":
        return f"the forward of {type(base).__name__} is not the family's own"
    foreign = _foreign_attention(base)
    if foreign is not None:
        return foreign
    attachment = attachment_of(base)
    if attachment is not None and attachment.strict and _caps_scores(base):
        return f"strict=True, and eager would run {CAPPED}"
    if getattr(model, "peft_config", None) and any(c.is_prompt_learning for c in model.peft_config.values()):
        return "adapters that prepend virtual tokens have no place in its cache"
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        return f"the model is spread over {sorted(map(str, devices))}: sharded and offloaded weights are not read"
    if any(type(parameter).__name__ == "DTensor" for parameter in base.parameters()):
        return "the model's weights are sharded (FSDP2)"
    return None if max_len is None else too_long_because(model, max_len)


def _attentions(base: nn.Module) -> list[tuple[str, Any]]:
    """The attention of each layer, by its path."""
    return [(path, module) for path, module in base.named_modules() if path.rpartition(".")[2] == "self_attn"]


def _foreign_attention(base: Any) -> str | None:
    """Which attention of a model would not call the engine's, once a layer in their order; None where all do."""
    for index, (path, module) in enumerate(_attentions(base)):
        own, found = instance_forward(module), families.identify(module)
        if own is not None and getattr(own, "__func__", None) is not attention_forward:
            return f"a forward of its own was set on {path}, in the place of the family's attention"
        if found is None or found[1] != "attention":
            forward = type(module).forward
            name = getattr(forward, "__qualname__", type(forward).__name__)
            return f"{path} runs {getattr(forward, '__module__', '?')}.{name}, not the family's attention"
        if module.config is not base.config:
            return f"{path} reads a configuration of its own (PEFT's layer_replication copies it), which we do not set"
        if module.layer_idx != index:
            return f"{path} is number {module.layer_idx} of its cache, in place {index}"
    return None


def too_long_because(model: nn.Module, max_len: int) -> str | None:
    """Why the engine cannot run rows of `max_len` tokens, or None where it can."""
    limit = length_limit(base_model(model).config)
    if limit is None or max_len <= limit[1]:
        return None
    return (f"rows of {max_len} tokens: beyond {limit[1]} its rotary embedding of type {limit[0]!r} takes other "
            "frequencies, for all rows of a batch")


def eager_because(model: nn.Module) -> str | None:
    """Why decode steps of this model cannot be captured, or None where they can."""
    base: Any = base_model(model)
    return router_waits_because(base) if next(base.parameters()).is_cuda else "the model is not on a GPU"


def described(model: nn.Module) -> str:
    """The engine in words, with what of `model` it runs eager."""
    return "our engine" + (f" (eager: {CAPPED})" if _caps_scores(base_model(model)) else "")


def _caps_scores(base: Any) -> bool:
    return bool(getattr(base.config, "attn_logit_softcapping", None))


def too_small_because(
    model: nn.Module, *, max_len: int, memory_gib: float | None = None, autocast: torch.dtype | None = None
) -> str | None:
    """Why the cache would hold no row of `max_len` tokens, or None where it does; as far as is known now.

    The engine can run `model`; the others are as `RolloutEngine` takes them.
    """
    room = _room_of(model, memory_gib)
    least = (pages_for(max_len) + SPARE_PAGES) * PagePool.page_bytes(**_cache_of(model, autocast))
    if room is None or room >= least:
        return None
    return (f"one row of {max_len} tokens needs {_size(least)}, {_size(room)} of cache are there; set "
            "rollout_memory_gib or shorten it")


def _cache_of(model: nn.Module, autocast: torch.dtype | None) -> dict[str, Any]:
    """What `PagePool` is told of a model."""
    base: Any = base_model(model)
    config = base.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"layers": len(_attentions(base)), "k_heads": config.num_key_value_heads, "head_dim": head_dim,
            "dtype": autocast or base.get_input_embeddings().weight.dtype}


def _room_of(model: nn.Module, memory_gib: float | None) -> float | None:
    """Bytes for the cache; None where nothing bounds them."""
    if memory_gib is not None:
        return memory_gib * 2**30
    device = next(base_model(model).parameters()).device
    if device.type != "cuda":
        return None
    return SHARE_OF_FREE * (reachable(device) - torch.cuda.memory_allocated(device))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.3g} MiB"


class RolloutEngine:
    """Generates with a model where it stands; keeps its graphs between calls, and no cache.

    Args:
        model: a causal language model of a family in the table, bare, attached or under PEFT.
        tokenizer: decodes for stop strings; None where none are used.
        max_batch: rows that run at once; more wait.
        max_len: longest prompt + completion in tokens.
        memory_gib: for the cache; None takes what `max_batch` rows of `max_len` need, up to 30% of what is free.
        kernels: Triton kernels or torch twins; None is kernels on a GPU, twins elsewhere.
        graphs: capture decode steps; None where they can be. False is for measuring.
        autocast: dtype to run under autocast in, as training does; None runs the modules as they are.
        stride: decode steps between two looks at the device.

    `ran_out`: memory did not suffice for the last call.

    Raises:
        ConfigError: the engine cannot run this model, or `memory_gib` holds no row of `max_len`; says why.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, max_batch: int = 64, max_len: int = 2048,
        memory_gib: float | None = None, kernels: bool | None = None, graphs: bool | None = None,
        autocast: torch.dtype | None = None, stride: int = STRIDE,
    ) -> None:
        why = cannot_run_because(model, max_len=max_len)
        if why is not None:
            raise ConfigError(f"rollout_engine='fast': {why}; rollout_engine='hf' generates with transformers")
        least = {"max_batch": (max_batch, 1), "max_len": (max_len, 2), "stride": (stride, 1)}
        faults = [f"{name} = {value!r}: must be a whole number from {bound}" for name, (value, bound) in least.items()
                  if not is_whole(value) or value < bound]
        if faults:
            raise ConfigError.from_faults(faults, "RolloutEngine")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_len, self.memory_gib, self.stride = max_batch, max_len, memory_gib, stride
        on_gpu = next(base_model(model).parameters()).is_cuda
        self.kernels = on_gpu if kernels is None else kernels
        if self.kernels and not on_gpu and not interpreting():
            raise ConfigError("kernels=True: the model is not on a GPU")
        twins = None if self.kernels else "torch twins do not read where the cache lies"
        self.eager = eager_because(model) or twins if graphs is not False else "graphs=False was asked for"
        if graphs and self.eager:
            raise ConfigError(f"graphs=True: {self.eager}")
        self.autocast = autocast
        self.ran_out = False
        self._decoder: Decoder | None = None
        if memory_gib is not None:  # what is free is looked at when it is taken
            self._room()

    # --------------------------------------------------------------------------------------------------------- memory

    def _ready(self) -> Decoder:
        if self._decoder is None:
            pool = self._new_pool()
            self._decoder = Decoder(self.model, pool, slots=self.max_batch, most=self.max_len, kernels=self.kernels,
                                    graphs=self.eager is None, autocast=self.autocast)
        return self._decoder

    def _room(self) -> float | None:
        why = too_small_because(self.model, max_len=self.max_len, memory_gib=self.memory_gib, autocast=self.autocast)
        if why is not None:
            raise ConfigError(f"rollout memory: {why}")
        return _room_of(self.model, self.memory_gib)

    def _new_pool(self) -> PagePool:
        kind, room = _cache_of(self.model, self.autocast), self._room()
        wanted = self.max_batch * pages_for(self.max_len) + SPARE_PAGES
        pages = wanted if room is None else min(wanted, int(room // PagePool.page_bytes(**kind)))
        device = base_model(self.model).get_input_embeddings().weight.device  # type: ignore[operator]
        return PagePool(**kind, pages=pages, device=device)

    @property
    def cache_bytes(self) -> int:
        """What the cache takes during a call; 0 before the first one."""
        return 0 if self._decoder is None else self._decoder.pool.nbytes

    def release(self) -> None:
        """Give the graphs back; the next call captures anew, and plans its cache by what is free then."""
        self._decoder = None

    # ------------------------------------------------------------------------------------------------------- generate

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], *, num_generations: int | Sequence[int] = 1,
        sampling: Sampling | None = None,
    ) -> Rollout:
        """`num_generations` completions of each prompt, which has no padding; a list gives one number a prompt.

        Raises:
            ConfigError: an empty prompt, one that leaves no room for its completion, ids that the model has no
                embedding of, a cache too small for one row; an attention that was replaced since.
        """
        sampling = sampling or Sampling()
        started = time.perf_counter()
        counts = num_generations if isinstance(num_generations, Sequence) else [num_generations] * len(prompt_ids)
        prompts = self._checked(prompt_ids, counts, sampling)
        self.ran_out = False
        decoder = self._ready()
        captures, seconds = decoder.capture.count, decoder.capture.seconds
        run = _Run(self, decoder, sampling)
        try:
            with on_device(decoder.state), decoder.rollout(sampling, self._stops(sampling)):
                rows = run.run(prompts, counts)
        except torch.OutOfMemoryError:
            self.ran_out = True
            raise
        stats = run.stats
        stats.captures = decoder.capture.count - captures
        stats.capture_seconds = decoder.capture.seconds - seconds
        stats.pages, stats.most_pages_used = decoder.pool.capacity, decoder.pool.most_used
        stats.cache_gib = decoder.pool.nbytes / 2**30
        stats.graphs = "replayed" if self.eager is None else f"none: {self.eager}"
        stats.tokens = sum(len(row.drawn) for row in rows)
        stats.seconds = time.perf_counter() - started
        return Rollout([row.drawn for row in rows], [row.log_probs for row in rows],
                       [row.reason or "length" for row in rows], stats)

    def _checked(
        self, prompt_ids: Sequence[Sequence[int]], counts: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """The prompts as lists of Python's integers."""
        base: Any = base_model(self.model)
        faults, foreign = [], _foreign_attention(base)
        if foreign is not None:
            faults.append(f"{foreign}; rollout_engine='hf' generates with transformers")
        if len(counts) != len(prompt_ids) or not all(is_whole(count) and count >= 1 for count in counts):
            faults.append(f"num_generations: {counts} for {len(prompt_ids)} prompts; a whole number from 1 is wanted "
                          "for each")
        known, prompts = base.get_input_embeddings().weight.shape[0], []
        for i, given in enumerate(prompt_ids):
            try:
                ids = list(map(operator.index, given))
            except TypeError:
                faults.append(f"prompt {i} is {given!r:.80}: a list of token ids is wanted")
                continue
            prompts.append(ids)
            if not ids:
                faults.append(f"prompt {i} is empty: a model needs at least one token to go on from")
            elif len(ids) + sampling.max_new_tokens > self.max_len:
                faults.append(f"prompt {i} has {len(ids)} tokens: with {sampling.max_new_tokens} new ones it passes "
                              f"max_len {self.max_len}")
            # On a GPU such a look-up would end in an assertion of the device, after which the process has no card.
            elif min(ids) < 0 or max(ids) >= known:
                wrong = next(one for one in ids if not 0 <= one < known)
                faults.append(f"prompt {i} holds token {wrong}: the model has embeddings of 0 to {known - 1}")
        if sampling.stop_strings and self.tokenizer is None:
            faults.append("stop_strings: the engine has no tokenizer")
        if faults:
            raise ConfigError.from_faults(faults, "RolloutEngine.generate")
        return prompts

    def _stops(self, sampling: Sampling) -> tuple[int, ...]:
        if sampling.stop_token_ids is not None:
            return tuple(sampling.stop_token_ids)
        base: Any = base_model(self.model)
        found = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
        found = base.config.eos_token_id if found is None else found
        ids = [] if found is None else [found] if isinstance(found, int) else list(found)
        own = getattr(self.tokenizer, "eos_token_id", None)
        return tuple(dict.fromkeys([*ids, *([own] if own is not None else [])]))


class _Run:
    """One call of `generate`."""

    def __init__(self, engine: RolloutEngine, decoder: Decoder, sampling: Sampling) -> None:
        self.engine, self.decoder, self.sampling = engine, decoder, sampling
        self.stats = RolloutStats()
        self.schedule = Schedule(decoder.pool, slots=engine.max_batch, stride=engine.stride, ahead=PREFILL_TOKENS,
                                 collect=lambda row: _read(decoder, [row]))  # not `self`: a cycle holds the cache
        self._left = False  # rows have left since the device was last told
        self._table = torch.zeros(decoder.table.shape, dtype=torch.int32)

    def run(self, prompts: list[list[int]], counts: Sequence[int]) -> list[Row]:
        """Every row, finished, in order."""
        rows: list[Row] = []
        try:
            for prompt, count in zip(prompts, counts, strict=True):
                group = [Row(len(rows) + g, prompt, self.sampling.max_new_tokens) for g in range(count)]
                self.schedule.add(prompt, group)
                rows += group
            while not self.schedule.done:
                self._fill()
                running = self.schedule.running
                count = min(self.engine.stride, max(row.limit - row.count for row in running))
                self.decoder.steps(count, len(running), self.sampling.form)
                self.stats.steps += count
                self._look()
        finally:
            self._give_back()
        self.stats.preemptions = self.schedule.preemptions
        return rows

    def _give_back(self) -> None:
        """After an error pages are still held: the next call starts with all of them."""
        held = [row.pages for row in self.schedule.running] + [prefix.pages for prefix in self.schedule.waiting]
        for pages in held:
            self.decoder.pool.drop(pages or [])

    def _fill(self) -> None:
        """Pages for running rows, rows for free slots; then the device is told."""
        schedule, decoder = self.schedule, self.decoder
        before = len(schedule.running)
        schedule.grow()
        left = len(schedule.running) != before or self._left
        admitted = schedule.admit()
        batch: list[tuple[list[int], list[int]]] = []
        for prefix in admitted.prefixes:
            if batch and sum(len(tokens) for tokens, _ in batch) + len(prefix[0]) > PREFILL_TOKENS:
                self._prefill(batch)
                batch = []
            batch.append(prefix)
        if batch:
            self._prefill(batch)
        decoder.pool.copy(admitted.copies)
        grown = set(schedule.grown)
        decoder.move(schedule.settle())
        if admitted.rows or left:
            self._write(schedule.running)
            if self.sampling.form.penalty:
                for row in admitted.rows:
                    decoder.mark_seen(row.slot, row.prompt + row.drawn)
        elif grown:
            self._write_tables(schedule.running)

    def _prefill(self, prefixes: list[tuple[list[int], list[int]]]) -> None:
        self.decoder.prefill(prefixes)
        self.stats.prefills += 1
        self.stats.prefill_tokens += sum(len(tokens) for tokens, _ in prefixes)

    def _write(self, running: list[Row]) -> None:
        state = torch.zeros(self.decoder.state.shape, dtype=torch.int32)
        lines = [[row.token, row.cached, row.count, row.limit, row.number, 1, 0, row.offset] for row in running]
        state[: len(lines)] = torch.tensor(lines, dtype=torch.int32)
        self.decoder.state.copy_(state)
        self._write_tables(running)

    def _write_tables(self, running: list[Row]) -> None:
        for row in running:
            if row.shown[0] != row.slot:
                row.shown = (row.slot, 0)
            # At 4,096 tokens a row has 256 pages, of which one is new every other time.
            self._table[row.slot, row.shown[1] : len(row.pages)] = torch.tensor(
                row.pages[row.shown[1] :], dtype=torch.int32)
            row.shown = (row.slot, len(row.pages))
        widest = max(len(row.pages) for row in running)
        self.decoder.table[: len(running), :widest].copy_(self._table[: len(running), :widest])

    def _look(self) -> None:
        """What the steps did: rows that finished leave."""
        running = list(self.schedule.running)
        lines = self.decoder.state[: len(running)].tolist()
        finished: list[tuple[Row, str]] = []
        for row, line in zip(running, lines, strict=True):
            row.token, row.count = line[0], line[2]
            if not line[5]:
                finished.append((row, _REASONS[line[6]]))
        stopped = self._stop_strings(running) if self.sampling.stop_strings else []
        reasons = dict.fromkeys(map(id, stopped), "stop")
        finished = [(row, why) for row, why in finished if id(row) not in reasons]
        _read(self.decoder, [row for row, _ in finished])
        for row, why in [*finished, *((row, "stop") for row in stopped)]:
            self.schedule.finish(row, why)
        self._left = bool(finished or stopped)

    def _stop_strings(self, rows: list[Row]) -> list[Row]:
        """Rows in whose text a stop string has come up, cut after the token that completed it."""
        strings, decode = self.sampling.stop_strings, self.engine.tokenizer.decode
        # A token is at least a byte, but for special ones, which decode to nothing or to their name.
        window = max(len(text.encode()) for text in strings) + 4
        checked = {id(row): len(row.drawn) for row in rows}
        _read(self.decoder, rows)
        stopped = []
        for row in rows:
            tokens = [row.prompt[-1], *row.drawn]
            for end in range(checked[id(row)] + 1, len(row.drawn) + 1):
                # Decoders of SentencePiece's kind drop a space at the front: the token before takes that place.
                first = max(0, end - window)
                before = decode(tokens[first : first + 1])
                text = decode(tokens[first : end + 1])[len(before) :]
                if any(string in text for string in strings):
                    row.drawn, row.log_probs, row.count = row.drawn[:end], row.log_probs[:end], end
                    stopped.append(row)
                    break
        return stopped


def _read(decoder: Decoder, rows: list[Row]) -> None:
    """Fetch what rows have drawn since they were last read."""
    if not rows:
        return
    slots = torch.tensor([row.slot for row in rows], device=decoder.state.device)
    first = min(len(row.drawn) - row.offset for row in rows)
    stop = max(row.count - row.offset for row in rows)
    tokens = decoder.outputs.tokens[:, first:stop].index_select(0, slots).tolist()
    log_probs = decoder.outputs.log_probs[:, first:stop].index_select(0, slots).tolist()
    for row, ids, scores in zip(rows, tokens, log_probs, strict=True):
        new = slice(len(row.drawn) - row.offset - first, row.count - row.offset - first)
        row.drawn += ids[new]
        row.log_probs += scores[new]
