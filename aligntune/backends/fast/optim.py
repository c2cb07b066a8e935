"""A learning rate of their own for embed_tokens and lm_head: parameter groups behind those that transformers makes.

Each run's optimizer keeps to itself, too: what bitsandbytes is told about one is not left for the next. And its step
does not wait for the GPU after every parameter. Torch's AdamW steps in one launch (`updates`).
"""

from __future__ import annotations

import logging
import math
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from aligntune.backends.fast.updates import UpdatesAtOnce
from aligntune.errors import CheckpointError, ConfigError

logger = logging.getLogger("aligntune")


def embedding_weights(model: Any) -> list[nn.Parameter]:
    """The parameters of the input and the output embeddings that train; tied ones are one.

    Found by what the model calls its embeddings, so under PEFT it is the trained copy (`modules_to_save`). Low-rank
    factors beside a frozen embedding are an adapter like any other, and are not among them.
    """
    found: dict[int, nn.Parameter] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(module, LoraLayer):
            module = module.get_base_layer()
        if module is not None:
            found |= {id(p): p for p in module.parameters() if p.requires_grad}
    return list(found.values())


def check_embedding_rate(rate: Any) -> None:
    """Raise unless it is a rate.

    Raises:
        ConfigError: no number, or none that is finite and at least 0.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        raise ConfigError(f"embedding_learning_rate = {rate!r}: must be a finite number >= 0")


class EmbeddingRate(UpdatesAtOnce):
    """Mixin of trainers: after `train_embeddings_at(rate)` the embeddings train at that peak rate.

    The groups that transformers makes stay the first ones, so `learning_rate` in the logs is the others' rate; each of
    them that held an embedding is followed, behind all of them, by one with the embeddings, the same settings (weight
    decay, betas) and the other rate. Schedulers scale every group's own peak; clipping goes by the model's parameters
    and knows no groups; a checkpoint keeps the groups in this order.
    """

    embedding_learning_rate: float | None = None
    _first_embedding_group: int | None = None
    _embedding_rate_now = 0.0

    def train_embeddings_at(self: Any, rate: float) -> str:
        """Set the peak rate; returns what trains at it, in words.

        Raises:
            ConfigError: the rate is no rate, no embedding trains, or the optimizer is there already.
        """
        check_embedding_rate(rate)
        if self.optimizer is not None:
            raise ConfigError("embedding_learning_rate: the optimizer is made already; give its groups their rates, or "
                              "leave the optimizer to the trainer")
        weights = embedding_weights(self.model)
        if not weights:
            raise ConfigError(f"embedding_learning_rate = {rate:g}: {_nothing_trains(self.model)}, or leave it out")
        self.embedding_learning_rate = rate
        if any(p.dtype == torch.bfloat16 for p in weights):
            logger.warning("embeddings at a rate of %g: they are stored in bfloat16, which loses steps below "
                           "1/256 of a weight; storage in float32 keeps them", rate)
        return (f"embeddings: {sum(p.numel() for p in weights):,} weights train at {rate:g}, "
                f"the others at {self.args.learning_rate:g}")

    def create_optimizer(self: Any, model: Any = None) -> Any:
        """As transformers makes it, with the embeddings moved into groups of their own."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if made_here:
            _keep_overrides_to_itself(optimizer, self.model if model is None else model)
            _do_not_wait(optimizer)
        if made_here and self.embedding_learning_rate is not None:
            base = self.accelerator.unwrap_model(self.model if model is None else model)
            self._first_embedding_group = len(optimizer.param_groups)
            _move(optimizer, embedding_weights(base), self.embedding_learning_rate)
        return optimizer

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except ValueError as error:
            if "parameter group" not in str(error):  # torch's words
                raise
            mine = self.embedding_learning_rate
            raise CheckpointError(
                f"{checkpoint}: its optimizer has other parameter groups than this run's, which has "
                f"{'no embedding_learning_rate' if mine is None else f'embedding_learning_rate = {mine:g}'}; resume "
                "with the options that the run was started with"
            ) from error

    def _get_learning_rate(self: Any) -> float:
        # Read together: transformers asks before it moves the schedule on, and logs later.
        if self._first_embedding_group is not None:
            self._embedding_rate_now = float(self.optimizer.param_groups[self._first_embedding_group]["lr"])
        return super()._get_learning_rate()  # type: ignore[misc]

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `embedding_learning_rate` beside `learning_rate`."""
        if self._first_embedding_group is not None and "learning_rate" in logs:
            logs["embedding_learning_rate"] = self._embedding_rate_now
        super().log(logs, start_time)  # type: ignore[misc]


def _move(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], rate: float) -> None:
    """Move `weights` out of the optimizer's groups into new ones behind them, which differ in the rate alone.

    Raises:
        ConfigError: the optimizer's groups do not hold them: it makes its own out of the model.
    """
    wanted, moved = {id(p) for p in weights}, 0
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in wanted]
        if own:
            moved += len(own)
            group["params"] = [p for p in group["params"] if id(p) not in wanted]
            # "initial_lr" would be the peak that the others' schedule starts from.
            settings = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
            optimizer.add_param_group({**settings, "params": own, "lr": rate})
    if moved != len(wanted):
        raise ConfigError(f"embedding_learning_rate: {type(optimizer).__name__} keeps {len(wanted) - moved} of the "
                          "embeddings in no parameter group; choose another optimizer")


_MANAGER_PARTS = ("initialize", "module_weight_config_triple", "pid2config")


def _keep_overrides_to_itself(optimizer: Any, model: nn.Module) -> None:
    """Give a bitsandbytes optimizer a manager of its own, with the overrides of this model's modules.

    transformers registers "32-bit moments" for each embedding with the manager of the process, which holds the module
    for good and remembers its place in the groups: the weight of a later run at that place got 32 bits too.
    """
    shared = getattr(optimizer, "mng", None)
    if shared is None or not all(hasattr(shared, name) for name in _MANAGER_PARTS):
        return
    modules = {id(module) for module in model.modules()}
    triples = shared.module_weight_config_triple
    own = object.__new__(type(shared))
    own.initialize()
    own.module_weight_config_triple = [triple for triple in triples if id(triple[0]) in modules]
    own.pid2config = {id(p): shared.pid2config[id(p)] for group in optimizer.param_groups for p in group["params"]
                      if id(p) in shared.pid2config}
    shared.module_weight_config_triple = [triple for triple in triples if id(triple[0]) not in modules]
    optimizer.mng = own


_STEP_PARTS = ("initialized", "check_overrides", "to_gpu", "init_state", "prefetch_state", "update_step", "is_paged")


def _do_not_wait(optimizer: Any) -> None:
    """Give a bitsandbytes optimizer a step that waits for the GPU as often as it must: never, or once if it pages.

    Its own synchronises the device after each parameter's update: on an H100 55 ms of a 300 ms QLoRA step of an 8B
    model, in which the GPU has nothing to do. The updates are on one stream, in order.
    """
    made_by = getattr(getattr(type(optimizer).step, "__wrapped__", type(optimizer).step), "__module__", "")
    if made_by == "bitsandbytes.optim.optimizer" and all(hasattr(optimizer, name) for name in _STEP_PARTS):
        # The wrapper runs the hooks that were registered for steps.
        optimizer.step = MethodType(torch.optim.Optimizer.profile_hook_step(_step), optimizer)


@torch.no_grad()
def _step(self: Any, closure: Any = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if not self.initialized:
        self.check_overrides()
        self.to_gpu()
        self.initialized = True
    last = None
    for gindex, group in enumerate(self.param_groups):
        for pindex, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.init_state(group, p, gindex, pindex)
            self.prefetch_state(p)
            self.update_step(group, p, gindex, pindex)
            last = p
    if self.is_paged and last is not None and last.is_cuda:
        torch.cuda.synchronize(last.device)  # pages of the moments are moved behind the stream's back
    return loss


def _nothing_trains(model: Any) -> str:
    """Why no embedding trains, and what would change it."""
    if hasattr(model, "peft_config"):
        return ("neither embed_tokens nor lm_head trains; name them among the adapters' target modules "
                "(['q_proj', ..., 'embed_tokens', 'lm_head']) or in modules_to_save")
    return "neither embed_tokens nor lm_head trains; set requires_grad on their weights"
