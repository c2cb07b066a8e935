"""Recomputing decoder layers in the backward: which of them, and where their inputs wait.

transformers asks each layer's `_gradient_checkpointing_func` to run it. Ours keeps the layer's input, on the GPU or in
pinned host memory, and nothing else; torch's own hooks every tensor that the layer would save (2,000 a step of a 1B
model) and restores the random state with a wait, which no CUDA graph can hold. Numbers are the same: the backward runs
the layer again from the same input, under the same autocast and, outside of a graph, the same random state. Where rows
are many, a layer whose halves are known runs by tiles of rows, in the forward and in its recomputation (`tiles`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from aligntune.backends.fast import tiles
from aligntune.backends.fast.host_buffers import HostBuffers, Waiting, capturing
from aligntune.backends.fast.ops.head import LogitsBuffer, logits_buffer
from aligntune.errors import ConfigError, unknown

KEY = "_aligntune_recompute"
_WAYS = {"auto": "auto", "offload": "offload", "unsloth": "offload"}
_METHODS = ("_set_gradient_checkpointing", "enable_input_require_grads")


@dataclass
class Recompute:
    """How a model's decoder layers are recomputed. `first`: so many of the first layers; None is all.

    The first ones, because the backward comes to them last, when what the others kept is free again.

    `measure`: the next forward with gradients writes down what a layer keeps (`measured`) and takes beside it while it
    is computed (`passing`, at most), the head's logits (`head`), the peak before them and what stood, with the gradient
    of the head's input (`before_head`), and its backward the peak so far (`forward_peak`) and what stood when it came
    to a layer (`standing`). All in bytes that are allocated on the GPU.
    """

    layers: list[nn.Module]
    offload: bool = False
    first: int | None = None
    buffers: HostBuffers = field(default_factory=HostBuffers)
    last_out: Waiting | None = None
    measured: int | None = None
    measure: bool = False
    passing: int = 0
    forward_peak: int | None = None
    standing: int | None = None
    head: LogitsBuffer | None = None
    before_head: tuple[int, int] | None = None
    shape: dict[str, Any] | None = None

    def choose(self, first: int | None) -> None:
        """Recompute the `first` layers from the next forward on; None is all."""
        self.first = first
        count = len(self.layers) if first is None else first
        for number, layer in enumerate(self.layers):
            wanted = number < count
            if layer.gradient_checkpointing != wanted:
                layer.gradient_checkpointing = wanted

    @property
    def on(self) -> bool:
        """Whether any layer is recomputed now."""
        return any(layer.gradient_checkpointing for layer in self.layers)

    def run(self, number: int, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, layer `number` of the model, recomputed in the backward."""
        function = tiles.parts_of(function)
        if not torch.is_grad_enabled():
            return self._once(function, args)
        if self.measure:
            self._measure(number, function, args)
        if number == 0:
            self.last_out = None
            self.buffers.leaving.clear()
        parameters = [p for p in self.layers[number].parameters() if p.requires_grad]
        if not parameters and not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            # No gradient comes here, and nobody would wait for an input that the next layer's backward had fetched.
            return self._once(function, args)
        return _Layer.apply(self, number, function, len(args), *args, *parameters)

    def _measure(self, number: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Of two layers in the middle what the one keeps that keeps more: dense and routed ones may take turns."""
        first = (len(self.layers) - 1) // 2
        last = min(first + 1, len(self.layers) - 1)
        if number == first:
            self.measured = self.forward_peak = self.standing = self.head = self.before_head = None
        if first <= number <= last:
            kept, passing = kept_bytes(function, args)
            if self.measured is None or kept > self.measured:
                self.measured, self.passing, self.shape = kept, passing, tile_shape(function, args)
            self.measure = number < last

    @staticmethod
    def _once(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A layer that no backward comes to."""
        tiled = tiles.plan(function, args)
        return function(*args) if tiled is None else tiles.forward(function, args[0], tiled)  # type: ignore[arg-type]

    def __call__(self, number: int) -> Callable[..., Any]:
        """What a layer has as its `_gradient_checkpointing_func`."""
        return functools.partial(self.run, number)


def tile_shape(function: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any] | None:
    """What `tiles.tile_bytes` wants to know of a layer beside the tokens; None where it is not tiled."""
    if not isinstance(function, tiles.Halves) or not function.width or not isinstance(args[0], torch.Tensor):
        return None
    return {"width": function.width, "hidden": args[0].shape[-1], "element_size": args[0].element_size(),
            "unpacks": function.unpacks}


def kept_bytes(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[int, int]:
    """Bytes on the GPU that a layer would keep for its backward, and takes beside them at most while it is computed.

    Runs it once more, random state restored. Its output, which is the next layer's input and kept there, is in neither.
    The second goes by the peak so far, which may be of before.
    """
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    if device.type != "cuda":
        return 0, 0
    args = tuple(arg.detach().requires_grad_(arg.is_floating_point()) if isinstance(arg, torch.Tensor) else arg
                 for arg in args)
    with torch.random.fork_rng([device], device_type="cuda"):
        before = torch.cuda.memory_allocated(device)
        result = function(*args)
        kept = torch.cuda.memory_allocated(device) - before
        passing = torch.cuda.max_memory_allocated(device) - before - kept
        output = result[0] if isinstance(result, tuple) else result
        del result
    return kept - output.nbytes, passing


class _Layer(torch.autograd.Function):
    """One layer: its input is kept, it runs without a graph, and once more with one when the gradient comes."""

    @staticmethod
    def forward(ctx: Any, owner: Recompute, number: int, function: Any, count: int, *inputs: Any) -> Any:
        args = inputs[:count]
        ctx.owner, ctx.function, ctx.number = owner, function, number
        hidden = next(arg for arg in args if isinstance(arg, torch.Tensor))
        ctx.autocast = _autocast(hidden.device.type)
        ctx.random = _random_state(hidden)
        ctx.waiting = None
        ctx.before = None
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        # The last layer's input is wanted first: it stays, and what is on its way out has arrived before it is.
        last = number == (len(owner.layers) if owner.first is None else owner.first) - 1
        if owner.offload:
            if not last and len(tensors) == 1 and hidden.is_contiguous():
                ctx.waiting = owner.buffers.out(hidden.detach())
            if ctx.waiting is not None:
                tensors = []
            elif owner.buffers.stream is not None and last:
                owner.buffers.settle()
            ctx.before, owner.last_out = owner.last_out, ctx.waiting
        ctx.save_for_backward(*tensors, *inputs[count:])
        ctx.tensors = len(tensors)
        ctx.args = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        ctx.are_tensors = [isinstance(arg, torch.Tensor) for arg in args]
        ctx.tiles = tiles.plan(function, args, inputs[count:])
        return function(*args) if ctx.tiles is None else tiles.forward(function, hidden, ctx.tiles)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if ctx.owner.forward_peak is None and ctx.owner.measured is not None:
            ctx.owner.forward_peak = torch.cuda.max_memory_allocated()
            ctx.owner.standing = torch.cuda.memory_allocated()
        saved = ctx.saved_tensors
        tensors, parameters = list(saved[: ctx.tensors]), saved[ctx.tensors :]
        if ctx.waiting is not None:
            tensors = [ctx.waiting.take()]
        needs = ctx.needs_input_grad[4:]
        if ctx.tiles is not None:
            (hidden,), (gradient,) = tensors, gradients
            with _as_it_was(ctx.random), ctx.autocast():
                to_hidden, found = tiles.backward(ctx.function, hidden, gradient, parameters, ctx.tiles,
                                                  wanted=needs[0], fetch=functools.partial(_fetch, ctx))
            return (None, None, None, None, to_hidden, *found)
        _fetch(ctx)
        args, given = [], iter(tensors)
        for number, other in enumerate(ctx.args):
            args.append(next(given).detach().requires_grad_(needs[number]) if ctx.are_tensors[number] else other)
        with torch.enable_grad(), _as_it_was(ctx.random), ctx.autocast():
            result = ctx.function(*args)
        outputs = [(out, gradient) for out, gradient in
                   zip(result if isinstance(result, tuple) else (result,), gradients, strict=True)
                   if isinstance(out, torch.Tensor) and out.requires_grad and gradient is not None]
        wanted = [arg for arg, need in zip(args, needs, strict=False) if need]
        found = iter(torch.autograd.grad([out for out, _ in outputs], [*wanted, *parameters],
                                         [gradient for _, gradient in outputs], allow_unused=True))
        to_args = [next(found) if need else None for need in needs[: len(args)]]
        return (None, None, None, None, *to_args, *found)


def _fetch(ctx: Any) -> None:
    """Start the input of the layer before on its way, to arrive while this layer is computed."""
    if ctx.before is not None:
        ctx.before.fetch()


def _autocast(device_type: str) -> Callable[[], Any]:
    """The autocast that is on now, to be entered again."""
    return functools.partial(
        torch.autocast, device_type, enabled=torch.is_autocast_enabled(device_type),
        dtype=torch.get_autocast_dtype(device_type), cache_enabled=torch.is_autocast_cache_enabled())


def _random_state(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.device] | None:
    """The random state; None while a graph is captured (its steps draw nothing: `graphs.eager_because`)."""
    if capturing(tensor.device):
        return None
    on_gpu = torch.cuda.get_rng_state(tensor.device) if tensor.is_cuda else None
    return torch.get_rng_state(), on_gpu, tensor.device


@contextlib.contextmanager
def _as_it_was(state: tuple[torch.Tensor, torch.Tensor | None, torch.device] | None) -> Iterator[None]:
    """The random state of then; afterwards that of now."""
    if state is None:
        yield
        return
    on_cpu, on_gpu, device = state
    with torch.random.fork_rng([device] if on_gpu is not None else [], device_type="cuda"):
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
        yield


# ------------------------------------------------------------------------------------------------------------- install


def install(model: nn.Module, *, offload: bool = False) -> Recompute | None:
    """Have ours recompute the layers of `model` whenever its checkpointing is enabled, until `remove`.

    Returns None, with the model as it was, where no layer asks a function of its own.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not hasattr(model, "_set_gradient_checkpointing"):
        return None
    remove(model)
    recompute = model.__dict__[KEY] = Recompute(layers, offload)
    # Torch's function, when it is the reentrant one, needs an input that asks for a gradient; ours does not, and would
    # compute that gradient for nobody.
    if "_require_grads_hook" in model.__dict__:
        model.disable_input_require_grads()  # type: ignore[operator]
    model.__dict__["enable_input_require_grads"] = MethodType(_enable_input_require_grads, model)
    model.__dict__["_set_gradient_checkpointing"] = MethodType(_set_gradient_checkpointing, model)
    if any(layer.gradient_checkpointing for layer in layers):
        _hand_out(recompute)
    return recompute


def remove(model: nn.Module) -> None:
    """Undo `install`; layers that are being recomputed are so by torch's function from now on."""
    recompute: Recompute | None = model.__dict__.pop(KEY, None)
    if recompute is None:
        return
    for name in _METHODS:
        model.__dict__.pop(name, None)
    for layer in recompute.layers:
        function = layer.__dict__.get("_gradient_checkpointing_func")
        if getattr(function, "func", None) == recompute.run:
            layer._gradient_checkpointing_func = functools.partial(
                torch.utils.checkpoint.checkpoint, use_reentrant=False)


def recomputes(model: nn.Module) -> bool:
    """Whether any layer is recomputed in the backward, by ours or by torch's function.

    transformers' own property has another name from 5.23 on, and warns under the old one.
    """
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def recompute_asked(args: Any) -> str | None:
    """How training arguments ask for layers to be recomputed: "auto", "offload", or None where no string says.

    A string in `gradient_checkpointing` moves to `args.recompute` and leaves True behind, all that transformers knows.

    Raises:
        ConfigError: another string, two that differ, or one beside `gradient_checkpointing=False`.
    """
    # Newer transformers has a second name for the first; where it is set it wins.
    fields = {name: getattr(args, name, None) for name in ("gradient_checkpointing", "activation_checkpointing")}
    on = [bool(value) for value in fields.values() if value is not None]
    fields["recompute"] = getattr(args, "recompute", None)
    said = {name: value for name, value in fields.items() if isinstance(value, str)}
    for name, value in said.items():
        if value not in _WAYS:
            raise ConfigError(f"{name}: {unknown('value', value, [*_WAYS, 'True', 'False'])}")
    if not said:
        return None
    ways = {_WAYS[value] for value in said.values()}
    if len(ways) > 1 or not all(on[-1:]):
        held = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value is not None)
        raise ConfigError(f"{held}: these contradict each other")
    for name in said:
        setattr(args, name, True)
    args.recompute = ways.pop()
    return args.recompute


def note_logits(model: nn.Module, *inputs: torch.Tensor, **common: Any) -> None:
    """In a step that is measured: what the logits of a head of these arguments take (`ops.head.logits_buffer`)."""
    ours = recompute_of(model)
    if ours is not None and ours.measured is not None and ours.forward_peak is None and torch.is_grad_enabled():
        ours.head = logits_buffer(*inputs, **common)
        ours.before_head = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + inputs[0].nbytes


def recompute_of(model: nn.Module) -> Recompute | None:
    """What `install` made for this model, or None."""
    return model.__dict__.get(KEY)


def _set_gradient_checkpointing(self: Any, enable: bool = True, *args: Any, **kwargs: Any) -> None:
    type(self)._set_gradient_checkpointing(self, enable, *args, **kwargs)
    recompute: Recompute = self.__dict__[KEY]
    if enable:
        _hand_out(recompute)
        recompute.choose(recompute.first)


def _enable_input_require_grads(self: Any) -> None:
    """Nothing: see `install`."""


# A bound method is pickled by its function's name: under the class's own, a pickled model loads with its own method.
_enable_input_require_grads.__name__ = "enable_input_require_grads"


def _hand_out(recompute: Recompute) -> None:
    for number, layer in enumerate(recompute.layers):
        layer._gradient_checkpointing_func = recompute(number)
