"""For people with TRL scripts: make a trainer that TRL built fast, or every trainer that a block builds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aligntune.backends.base import refuse_gated
from aligntune.backends.fast.attachment import Attachment, attach, detach
from aligntune.backends.fast.fp8_base import quantize_base
from aligntune.backends.fast.recompute import recompute_asked
from aligntune.backends.fast.support import BACKEND
from aligntune.core.out_of_memory import explained
from aligntune.errors import AlignTuneError, ConfigError

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import TrainOutput

logger = logging.getLogger("aligntune")

# FastSFTTrainer too, which has more to set when TRL's `__init__`, its outermost otherwise, is done.
_WATCHED = ("trl.", f"{__package__}.sft_trainer")


def attach_trainer(trainer: Trainer, *, strict: bool = False) -> Attachment:
    """Attach the model of a trainer, and its reference model where it holds one; returns the model's attachment.

    Raises what `attach` raises, with nothing attached, and:
        UnsupportedAlgorithmError: its arguments hold what backend "fast" does not run, as sequence-level ratios.
        ConfigError: its arguments hold an `embedding_learning_rate`, which its class does not know; or it would train
            on several GPUs from one process, or under DeepSpeed's stage 3; or they ask for a recompute of layers, or a
            base in fp8, that cannot be had.
    """
    refuse_gated(BACKEND, vars(trainer.args))
    quantised = any(getattr(trainer.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if getattr(trainer.args, "n_gpu", 1) > 1 and not quantised:
        # A replica's bound forwards are those of the original: its weights, on another GPU.
        raise ConfigError(f"{trainer.args.n_gpu} GPUs in one process: transformers would train on nn.DataParallel's "
                          "replicas, which instance forwards do not follow. Start one process a GPU (torchrun, "
                          "accelerate launch), or let CUDA_VISIBLE_DEVICES show one")
    if getattr(getattr(trainer.args, "deepspeed_plugin", None), "zero_stage", None) == 3:
        raise ConfigError("DeepSpeed's stage 3 gathers a weight when its module is called, and our head and MLPs read "
                          "weights themselves. Take stage 1 or 2 or FSDP2; backend='trl' runs it")
    rate = getattr(trainer.args, "embedding_learning_rate", None)
    if rate is not None and getattr(trainer, "embedding_learning_rate", None) != rate:
        raise ConfigError(f"embedding_learning_rate = {rate!r}: a {type(trainer).__name__} trains every parameter at "
                          "learning_rate; FastSFTTrainer takes it")
    asks = recompute_asked(trainer.args) or getattr(trainer.args, "memory_budget_gib", None)
    _quantize(trainer)
    attachment = attach(trainer.model, strict=strict)
    reference = getattr(trainer, "ref_model", None)
    try:
        if reference is not None:
            attach(reference, strict=strict)
        if asks:
            _recompute(trainer, attachment)
    except AlignTuneError:
        detach_trainer(trainer)
        raise
    modules = [cls.__module__.partition(".")[0] for cls in type(trainer).__mro__]
    if "trl" in modules and __package__.partition(".")[0] not in modules:
        logger.info(_theirs(trainer))
    return attachment


def _theirs(trainer: Trainer) -> str:
    """What stays TRL's of its own trainer, in words."""
    from trl import SFTTrainer

    ours = "FastSFTTrainer" if isinstance(trainer, SFTTrainer) else "a trainer of create_rl_trainer(backend='fast')"
    return (f"{type(trainer).__name__}: the model runs on our kernels; batches are TRL's, padded where TRL pads, and "
            f"its steps are launched one by one. {ours} lays rows end to end and replays steps as CUDA graphs")


def _quantize(trainer: Trainer) -> None:
    """As the arguments ask; FastSFTTrainer sees to that itself, and the factories do."""
    from aligntune.backends.fast.trainers import FastSFT

    wanted = getattr(trainer.args, "base_precision", None)
    if wanted is not None and not isinstance(trainer, FastSFT):
        logger.info(quantize_base(trainer, wanted))


def _recompute(trainer: Trainer, attachment: Attachment) -> None:
    """As the arguments ask; FastSFTTrainer sees to that itself."""
    from aligntune.backends.fast.build import recompute_as_asked
    from aligntune.backends.fast.trainers import FastSFT

    if not isinstance(trainer, FastSFT):
        logger.info(recompute_as_asked(trainer, attachment))


def detach_trainer(trainer: Trainer) -> None:
    """Undo `attach_trainer`."""
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            detach(model)


def fast_train(trainer: Trainer, *, strict: bool = False, **train_arguments: Any) -> TrainOutput:
    """Attach a built trainer's model and train: `fast_train(trainer)` in the place of `trainer.train()`.

    Args:
        trainer: any transformers or TRL trainer of a causal language model.
        strict: a module that no kernel covers is an error.
        train_arguments: handed to `trainer.train`, such as `resume_from_checkpoint`.

    Raises what `attach_trainer` raises, and:
        StepMemoryError: the GPU's memory ran out; names what would lower it. It is torch's OutOfMemoryError, too.
    """
    attach_trainer(trainer, strict=strict)
    with explained(trainer):
        return trainer.train(**train_arguments)


@contextmanager
def accelerate_trl(*, strict: bool = False) -> Iterator[list[Attachment]]:
    """Make every TRL trainer that is built inside the block fast; yields the list of their attachments.

    The models stay attached after the block, until `detach`, and `train()` of the trainers raises StepMemoryError where
    the GPU's memory runs out, as `fast_train` does. For the length of the block the `__init__` of TRL's
    trainer classes attaches when it is done, and that of SFTTrainer takes the older names that `FastSFTTrainer` takes;
    after it those classes are, by identity, what they were.
    """
    from transformers import Trainer

    attachments: list[Attachment] = []
    patched: list[tuple[type, Any]] = []
    building: set[int] = set()

    def watch(cls: type) -> None:
        original = cls.__dict__.get("__init__")
        if original is None or not cls.__module__.startswith(_WATCHED):
            return
        patched.append((cls, original))
        older = cls.__module__.startswith("trl.") and cls.__name__ == "SFTTrainer"
        taken = _taking_older_names(original) if older else original
        cls.__init__ = _attaching(taken, building, attachments, strict)  # type: ignore[misc]

    def watch_new(cls: type, **kwargs: Any) -> None:
        super(Trainer, cls).__init_subclass__(**kwargs)
        watch(cls)

    own_hook = Trainer.__dict__.get("__init_subclass__")
    for cls in _subclasses(Trainer):
        watch(cls)
    Trainer.__init_subclass__ = classmethod(watch_new)  # type: ignore[assignment]  # TRL imports trainers on first use
    try:
        yield attachments
    finally:
        if own_hook is None:
            del Trainer.__init_subclass__
        else:
            Trainer.__init_subclass__ = own_hook
        for cls, original in reversed(patched):
            cls.__init__ = original  # type: ignore[misc]


def _subclasses(cls: type) -> list[type]:
    """Every class under `cls` that is loaded, each once."""
    found: dict[type, None] = {}
    waiting: list[type] = [cls]
    while waiting:
        children: list[type] = type.__subclasses__(waiting.pop())
        for child in children:
            if child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def _taking_older_names(original: Callable[..., None]) -> Callable[..., None]:
    """`original`, TRL's `SFTTrainer.__init__`, for a call in older names too; any other call is handed on as it is."""

    @functools.wraps(original)
    def __init__(
        self: Any, model: Any, args: Any = None, data_collator: Any = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, *rest: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        from aligntune.backends.fast.sft_trainer import OLDER_NAMES, in_todays_names

        older = {name: kwargs.pop(name) for name in OLDER_NAMES if name in kwargs}
        if older:
            args, processing_class = in_todays_names(model, args, processing_class, **older)
        original(self, model, args, data_collator, train_dataset, eval_dataset, processing_class, *rest, **kwargs)

    return __init__


def _attaching(
    original: Callable[..., None], building: set[int], attachments: list[Attachment], strict: bool
) -> Callable[..., None]:
    """`original`, and an attachment once the outermost such `__init__` of a trainer is done: TRL sets its head last."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = id(self) not in building
        building.add(id(self))
        try:
            original(self, *args, **kwargs)
        finally:
            if outermost:
                building.discard(id(self))
        if outermost:
            attachments.append(attach_trainer(self, strict=strict))
            self.train = _explaining(self)

    return __init__


def _explaining(trainer: Trainer) -> Callable[..., TrainOutput]:
    """The trainer's own `train`, with torch's error of memory explained."""
    train = trainer.train

    @functools.wraps(train)
    def explaining(*args: Any, **kwargs: Any) -> TrainOutput:
        with explained(trainer):
            return train(*args, **kwargs)

    return explaining
