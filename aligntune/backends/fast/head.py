"""The head on a model instance: log-probs and losses from hidden states, behind two calls that exist already.

1. TRL's: `model(..., labels=, fused_lm_head=True)`, which `add_fused_lm_head` puts on the instance of every model that
   SFT, DPO, KTO, GRPO and RLOO train. Ours goes around it and answers with the same `FusedCausalLMOutput`.
2. transformers': `model(..., labels=)`. While training (train mode, gradients on) the loss comes from the head and
   `logits` is None; `output_logits=True` asks for them, and without labels, in eval mode and under `no_grad` the model
   answers as ever. `generate` passes no labels and is not touched.

Both take `kept`, the flat numbers of the positions that have a label (padded with -1), where the caller knows them.
Positions are those of the shifted labels: position t has a label if `labels[t + 1]` is not -100.

The forward is rebuilt from the model's own parts: the backbone is called, then the head's weight is read, as TRL does.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from aligntune.backends.fast import families
from aligntune.backends.fast.ledger import promise
from aligntune.backends.fast.lora import casts_of, hooked
from aligntune.backends.fast.memory import logits_budget
from aligntune.backends.fast.ops.head import (
    keeps_logits,
    linear_cross_entropy,
    token_log_probs,
    token_loss,
)
from aligntune.backends.fast.recompute import note_logits, recompute_of, recomputes
from aligntune.errors import ConfigError

KEY = "_aligntune_head"
_ROOT = "_aligntune_root"
_IGNORED = -100
_BUCKET = 64  # rows: the GEMMs stay aligned, and batches share a few lengths
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TRL_OPTIONS = ("temperature", "cast_lm_head_to_fp32", "outputs", "final_logit_softcapping", "logit_scale")


@dataclass(frozen=True)
class HeadOptions:
    """What the head computes. `plain`: why transformers' own label path stays as it is, or None where it is taken."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    fp32: bool = False
    outputs: tuple[str, ...] = ("log_probs",)
    trl: bool = False
    plain: str | None = None


@dataclass
class Head:
    """The root forward that was set. `original` is what the instance had: TRL's forward, or None for the class's."""

    forward: Callable[..., Any] | None
    original: Callable[..., Any] | None
    options: HeadOptions | None
    reason: str | None = None
    guarded: nn.Module | None = None
    # Under accelerate's mixed precision two attributes are set: name -> (what is there now, what was there).
    wrapped: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def describe(self, model: nn.Module) -> tuple[str, str | None]:
        """`(op, reason)` as it stands now: a trainer may have put its own head on top since."""
        if self.reason is not None:
            return "head", self.reason
        if covered_by_trl(model):
            return "head", "TRL's own (attached before the trainer)"
        late = _unread(model.get_output_embeddings())  # type: ignore[operator]
        if late is not None:
            return "head", late
        assert self.options is not None
        if self.options.trl:
            also = " and plain labels" if self.options.plain is None else ""
            return f"linear + log-probs, behind TRL's fused-head call{also}", None
        return "linear + log-probs, behind plain labels", self.options.plain

    def remove(self, model: nn.Module) -> None:
        """Put back what the instance had.

        Where TRL's or another forward lies on top of ours it stays; ours, below it, then only passes calls on.
        """
        state = model.__dict__
        state.pop(KEY, None)
        if self.guarded is not None:
            self.guarded.__dict__.pop("forward", None)
            self.guarded.__dict__.pop(_ROOT, None)
        if self.forward is None:
            return
        if self.wrapped and all(state.get(name) is now for name, (now, _) in self.wrapped.items()):
            state.update({name: was for name, (_, was) in self.wrapped.items()})
        elif state.get("forward") is self.forward:
            del state["forward"]
            if self.original is not None:
                state["forward"] = self.original
        elif state.get("_original_forward") is self.forward:
            _autocast_over(model, self.original or MethodType(type(model).forward, model))

    def __deepcopy__(self, memo: dict[int, Any]) -> Head:
        # TRL's forward holds the original model's in its closure: a copy never gets it back, nor wrappers over it.
        original = None if is_trl_forward(self.original) else copy.deepcopy(self.original, memo)
        forward, guarded = copy.deepcopy(self.forward, memo), copy.deepcopy(self.guarded, memo)
        return Head(forward, original, self.options, self.reason, guarded)


# ------------------------------------------------------------------------------------------------------------- install


def is_trl_forward(forward: Any) -> bool:
    """True for the forward that TRL's `add_fused_lm_head` makes (and not for ours, which takes the same keyword)."""
    function = getattr(forward, "__func__", forward)
    return _takes_fused(function) and not _is_ours(function)


def _takes_fused(function: Any) -> bool:
    return "fused_lm_head" in (getattr(function, "__kwdefaults__", None) or {})


def _is_ours(function: Any) -> bool:
    return getattr(getattr(function, "__code__", None), "co_filename", None) == __file__


def _under_autocast(model: nn.Module, forward: Any) -> Any:
    """The function inside accelerate's mixed-precision wrappers."""
    function = getattr(forward, "__func__", forward)
    while function is not type(model).forward and not _takes_fused(function):
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return function


def covered_by_trl(model: nn.Module) -> bool:
    """True where calls with `fused_lm_head=True` reach TRL's forward before ours."""
    forward = model.__dict__.get("forward")
    return forward is not None and is_trl_forward(_under_autocast(model, forward))


def install(model: nn.Module, *, strict: bool) -> Head | None:
    """Set the root forward of `model`; None where it has no language-model head (a reward model, a bare backbone)."""
    get_head = getattr(model, "get_output_embeddings", None)
    lm_head = get_head() if callable(get_head) else None
    if lm_head is None:
        return None
    current = model.__dict__.get("forward")
    prepared = "_original_forward" in model.__dict__
    inner = _under_autocast(model, current) if current is not None else None
    options, reason = _options(model, lm_head, inner)
    if options is None:
        return Head(None, None, None, reason)
    original = model.__dict__.get("_original_forward") if prepared else current
    if prepared and getattr(original, "__func__", None) is type(model).forward:
        original = None
    bound = MethodType(_root_forward(type(model)), model)  # type: ignore[arg-type]
    model.__dict__[KEY] = options
    head = Head(bound, original, options)
    if prepared:
        before = {name: model.__dict__.get(name) for name in ("forward", "_original_forward")}
        _autocast_over(model, bound)
        head.wrapped = {name: (model.__dict__[name], was) for name, was in before.items()}
    else:
        model.__dict__["forward"] = bound
    if strict:
        head.guarded = _guard(model)
    return head


def _options(model: nn.Module, lm_head: nn.Module, inner: Any) -> tuple[HeadOptions | None, str | None]:
    """The options of the head, or None and the reason why it cannot be set."""
    unread = _unread(lm_head)
    if unread is not None:
        return None, unread
    family = families.family_of(model.config.get_text_config().model_type)
    known = families.identify(model)
    plain = None
    if family is None or known is None or known[1] != "head":
        plain = f"{type(model).__name__} is in no family of the table, so how it scales logits is not known"
    elif not _loss_is_causal(model):
        plain = "the model's loss function is not transformers' causal-LM loss"
    if inner is not None and is_trl_forward(inner):
        found = inspect.getclosurevars(inner).nonlocals
        missing = [name for name in _TRL_OPTIONS if name not in found]
        if missing:
            return None, f"TRL's own (this version keeps {', '.join(missing)} elsewhere)"
        return (
            HeadOptions(
                softcap=found["final_logit_softcapping"],
                logit_scale=float(found["logit_scale"]),
                temperature=float(found["temperature"]),
                fp32=bool(found["cast_lm_head_to_fp32"]),
                outputs=tuple(dict.fromkeys(("log_probs", *found["outputs"]))),
                trl=True,
                plain=plain,
            ),
            None,
        )
    if inner is not None and not _is_ours(inner) and inner is not type(model).forward:
        return None, "another forward was set on the model"
    if plain is not None:
        return None, plain
    assert family is not None
    config = model.config.get_text_config()
    divisor = getattr(config, family.logits_divisor) if family.logits_divisor else 1.0
    softcap = getattr(config, family.logits_softcap, None) if family.logits_softcap else None
    return HeadOptions(softcap=softcap, logit_scale=1.0 / divisor), None


def _unread(lm_head: nn.Module) -> str | None:
    """Why `lm_head` is more than its weight; None where that is all. Asked at calls too: adapters may come later."""
    if type(lm_head).__module__.startswith("peft.") and "modules_to_save" not in lm_head._modules:
        return "lm_head carries an adapter"
    weight = getattr(lm_head, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return f"lm_head ({type(lm_head).__name__}) has no plain weight"
    if weight.dtype == torch.float64:
        return "lm_head's weight is torch.float64"
    return None


def _loss_is_causal(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return getattr(model, "loss_function", None) is ForCausalLMLoss


def _autocast_over(model: nn.Module, bound: Callable[..., Any]) -> None:
    """`bound` as the forward of a model that accelerate has prepared for mixed precision, wrapped as it wraps."""
    from accelerate.utils.modeling import get_mixed_precision_context_manager
    from accelerate.utils.operations import convert_outputs_to_fp32

    model.__dict__["_original_forward"] = bound
    under_autocast = get_mixed_precision_context_manager(native_amp=True)(bound.__func__)  # type: ignore[attr-defined]
    model.__dict__["forward"] = MethodType(convert_outputs_to_fp32(under_autocast), model)


def _guard(model: nn.Module) -> nn.Module | None:
    """Under strict, the backbone refuses to run for a head that is TRL's: nothing else sees that call coming."""
    backbone = model.base_model
    if backbone is model or "forward" in backbone.__dict__:
        return None
    backbone.__dict__[_ROOT] = model
    backbone.__dict__["forward"] = MethodType(_guarded_forward(type(backbone)), backbone)  # type: ignore[arg-type]
    return backbone


@functools.cache
def _guarded_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if covered_by_trl(self.__dict__[_ROOT]):
            raise ConfigError(
                "strict=True: head: TRL's own (attached before the trainer). Call attach(trainer.model), or "
                "fast_train(trainer), after the trainer is built"
            )
        return cls.forward(self, *args, **kwargs)

    return forward


# ------------------------------------------------------------------------------------------------------------ the calls


@functools.cache
def _root_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    plain_forward = cls.forward

    @functools.wraps(plain_forward)  # `generate` and the Trainer read the signature
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        output_logits: bool = False,
        kept: torch.Tensor | None = None,
        loss_over: torch.Tensor | None = None,
        token_rule: Any = None,
        **kwargs: Any,
    ) -> Any:
        options: HeadOptions | None = self.__dict__.get(KEY)
        with casts_of(self):
            if fused_lm_head and options is not None and options.trl:
                return _fused(self, options, args, labels, shift_labels, num_items_in_batch, kept, kwargs, loss_over,
                              token_rule)
            asked = output_logits or bool(kwargs.get("logits_to_keep", False))
            if options is not None and labels is not None and not asked and _trains(self, options, kwargs):
                return _plain(self, options, args, labels, shift_labels, num_items_in_batch, kept, kwargs)
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs.update({name: value for name, value in given.items() if value is not None})
            if fused_lm_head:
                kwargs["fused_lm_head"] = True  # the class's forward does with it what it would without us
            return plain_forward(self, *args, **kwargs)

    return forward


def _trains(model: nn.Module, options: HeadOptions, kwargs: dict[str, Any]) -> bool:
    """True where the caller wants a loss to train on, and this head computes that very loss."""
    lm_head = model.get_output_embeddings()
    return (
        model.training
        and torch.is_grad_enabled()
        and options.plain is None
        and kwargs.get("ignore_index", _IGNORED) == _IGNORED
        and not hooked(lm_head)
        and "forward" not in lm_head.__dict__
        and _unread(lm_head) is None
        and _loss_is_causal(model)
    )


def _trained(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _ScoredRows:
    """The flat numbers of the positions with a label, so that the head leaves the others out.

    How many there are is counted on the GPU before the backbone is launched and read after it: by then the count has
    long been there, and the GPU has the backbone to work on while the head is launched.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets
        self.event: torch.cuda.Event | None = None
        if not targets.is_cuda:
            self.count = (targets != _IGNORED).sum()
        elif not torch.cuda.is_current_stream_capturing():  # a captured graph cannot wait for a number
            self.count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self.count.copy_((targets != _IGNORED).sum(), non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def kept(self) -> torch.Tensor | None:
        """`(K,)` row numbers, padded with -1 to whole buckets; None where leaving rows out would save under 1/16."""
        if self.targets.is_cuda:
            if self.event is None:
                return None
            self.event.synchronize()
        size = -(-max(int(self.count), 1) // _BUCKET) * _BUCKET
        if size > self.targets.numel() * 15 // 16:
            return None
        found = torch.nonzero_static((self.targets != _IGNORED).view(-1), size=size, fill_value=-1)
        return found.view(-1)


def _kept(rows: _ScoredRows | None, given: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    kept = given if rows is None else rows.kept()
    return None if kept is None else kept.to(device)


def _budget(model: nn.Module) -> int:
    """Bytes that logits may take."""
    ours = recompute_of(model)
    return logits_budget(recomputes(model) if ours is None else ours.on)


def _targets(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """The label of the next token at every position; -100 at the last, so that the hidden states need no slice."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)


def _fused(
    model: nn.Module,
    options: HeadOptions,
    args: tuple[Any, ...],
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: Any,
    kept: torch.Tensor | None,
    kwargs: dict[str, Any],
    loss_over: torch.Tensor | None,
    token_rule: Any,
) -> Any:
    """TRL's contract: `trl.trainer.utils.FusedCausalLMOutput`.

    `loss_over` asks for - sum of log p / `loss_over` as `loss`, with the gradient; `log_probs` then carry none. With a
    weight that trains that is three products a token where log-probs first are four. `token_rule`, a `TokenRule` of
    flat tensors, does so for any loss that is a sum over tokens; it is taken where the logits would be made twice.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    text_config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    targets = _targets(labels, shift_labels)
    # Rows that lie end to end come with `kept` where it pays: whoever made the batch has counted.
    rows = _ScoredRows(targets) if kept is None and "cu_seq_lens_q" not in kwargs else None
    hidden = (backbone := model.base_model(*args, **kwargs)).last_hidden_state
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, lm_head.bias
    common: dict[str, Any] = {
        "bias": bias, "softcap": options.softcap, "logit_scale": options.logit_scale,
        "temperature": options.temperature, "outputs": options.outputs, "fp32_logits": options.fp32,
        "kept": _kept(rows, kept, weight.device), "memory_budget": _budget(model),
    }  # fmt: skip
    inputs = hidden.to(weight.device), weight, targets.to(weight.device)
    note_logits(model, *inputs, **common)
    if loss_over is not None and torch.is_grad_enabled():
        promise(model, "loss head", hidden, weight, bias)
        scored = linear_cross_entropy(*inputs, num_items_in_batch=loss_over, **common)
    elif token_rule is not None and _trained(weight, bias) and not keeps_logits(*inputs, **common):
        promise(model, "token loss head", hidden, weight, bias)
        scored = token_loss(*inputs, token_rule.loss_of, per_token=token_rule.per_token, entropy=token_rule.entropy,
                            denominator=1, **common)
    else:
        promise(model, "log-probs, trained head" if _trained(weight, bias) else "log-probs head", hidden, weight, bias)
        scored = token_log_probs(*inputs, **common)
    mask = targets.to(weight.device) != _IGNORED
    per_token = {name: value for name in _PER_TOKEN if (value := getattr(scored, name)) is not None}
    if shift_labels is None:
        per_token, mask = {name: value[:, :-1] for name, value in per_token.items()}, mask[:, :-1]
    loss = scored.loss
    if loss is None:
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -per_token["log_probs"].sum() / items
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _aux_loss(model, backbone.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **per_token)


def _plain(
    model: nn.Module,
    options: HeadOptions,
    args: tuple[Any, ...],
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: Any,
    kept: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """transformers' contract, with `logits=None`: `CausalLMOutputWithPast`, or the MoE one where routers answer."""
    from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

    return_dict = kwargs.pop("return_dict", None)
    kwargs.pop("logits_to_keep", None)
    if getattr(model.config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    targets = _targets(labels, shift_labels)
    rows = _ScoredRows(targets) if kept is None else None
    hidden = (backbone := model.base_model(*args, return_dict=True, **kwargs)).last_hidden_state
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, lm_head.bias
    promise(model, "loss head", hidden, weight, bias)
    inputs, places = (hidden.to(weight.device), weight, targets.to(weight.device)), _kept(rows, kept, weight.device)
    note_logits(model, *inputs, kept=places)
    scored = linear_cross_entropy(
        *inputs, bias=bias, softcap=options.softcap, logit_scale=options.logit_scale, kept=places,
        num_items_in_batch=num_items_in_batch, memory_budget=_budget(model))
    parts: dict[str, Any] = {
        "loss": scored.loss,
        "past_key_values": backbone.past_key_values,
        "hidden_states": backbone.hidden_states,
        "attentions": backbone.attentions,
    }
    output_class: type = CausalLMOutputWithPast
    if kwargs.get("output_router_logits"):
        output_class = MoeCausalLMOutputWithPast
        parts["aux_loss"] = _aux_loss(model, backbone.router_logits, kwargs.get("attention_mask"))
        parts["router_logits"] = backbone.router_logits
        parts["loss"] = parts["loss"] + model.router_aux_loss_coef * parts["aux_loss"]
    output = output_class(**parts)
    wants_dict = return_dict if return_dict is not None else getattr(model.config, "return_dict", True)
    return output if wants_dict else output.to_tuple()


def _aux_loss(model: nn.Module, router_logits: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The load-balancing loss, by the function of the model's own file."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", load_balancing_loss_func)
    experts = getattr(config, "num_experts", None) or model.num_experts
    return balance(router_logits, experts, config.num_experts_per_tok, attention_mask)
