"""`FastSFTTrainer` and `FastTrainingArguments`: TRL's SFTTrainer over our kernels, under the names old scripts use."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from aligntune.backends.fast.attachment import Attachment
from aligntune.backends.fast.build import lay_rows, recompute_as_asked, recompute_layers, steps_of
from aligntune.backends.fast.fp8_base import quantize_base
from aligntune.backends.fast.optim import check_embedding_rate
from aligntune.backends.fast.recompute import recompute_asked
from aligntune.backends.fast.scripts import attach_trainer
from aligntune.backends.fast.trainers import FastSFT
from aligntune.backends.loading import steps_lost
from aligntune.core.model_hygiene import forget_patched_forward
from aligntune.core.out_of_memory import explained
from aligntune.errors import ConfigError, unknown

logger = logging.getLogger("aligntune")

OLDER_NAMES = ("tokenizer", "dataset_text_field", "max_seq_length", "packing", "eval_packing", "dataset_num_proc")
_DEFAULTS = {item.name: item.default for item in fields(SFTConfig)}


@dataclass
class FastTrainingArguments(SFTConfig):
    """TRL's SFTConfig and five fields more; `gradient_checkpointing` takes "offload" and "auto" as the factories do.

    Args:
        embedding_learning_rate: peak rate of embed_tokens and lm_head where they train (whole, or as
            `modules_to_save` beside adapters); None is `learning_rate`.
        max_seq_length: longest row in tokens, what TRL calls `max_length`.
        recompute: how the layers are recomputed, "offload" (inputs in host memory; "unsloth" is another name) or "auto"
            (as many as memory asks); None is every layer. A string in `gradient_checkpointing` is kept here, with True
            in its place, which is what transformers knows.
        memory_budget_gib: what "auto" plans with, in GiB at the peak of a step; None is what is free.
        base_precision: "fp8" multiplies the frozen base under LoRA in e4m3, "auto" does where it can be had; None is as
            loaded.

    Raises:
        ConfigError: `max_seq_length` and another `max_length` are given; `gradient_checkpointing` or `recompute` is
            another string, or they contradict each other; the budget is no positive number; `base_precision` is another
            string; `embedding_learning_rate` is no finite number from 0.
    """

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of embed_tokens and lm_head; None is learning_rate."}
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "Longest row in tokens: max_length."})
    recompute: str | None = field(
        default=None, metadata={"help": "How layers are recomputed: 'offload' or 'auto'; None is every layer."}
    )
    memory_budget_gib: float | None = field(
        default=None, metadata={"help": "GPU memory that recompute='auto' plans with; None is what is free."}
    )
    base_precision: str | None = field(
        default=None, metadata={"help": "'fp8' or 'auto': the frozen base under LoRA in e4m3; None is as loaded."}
    )

    def __post_init__(self) -> None:
        recompute_asked(self)
        budget = self.memory_budget_gib
        if budget is not None and not (isinstance(budget, int | float) and 0 < budget < math.inf):
            raise ConfigError(f"memory_budget_gib = {budget!r}: must be a finite number > 0")
        if self.embedding_learning_rate is not None:
            check_embedding_rate(self.embedding_learning_rate)
        if self.base_precision not in (None, "auto", "fp8"):
            raise ConfigError.from_faults([unknown("base_precision", self.base_precision, ("auto", "fp8"))],
                                          "the arguments")
        super().__post_init__()
        if self.max_seq_length is not None:
            _set(self, "max_seq_length", "max_length", self.max_seq_length)


class FastSFTTrainer(FastSFT):
    """TRL's SFTTrainer with its model attached to our kernels and its rows end to end where the model allows it.

    The loss, the rows of a step and the metrics are TRL's. `attachment` says what runs on which kernel, `layout` how
    rows lie, how steps are launched and who makes the optimizer's.

    Args:
        model: a model (from `FastLanguageModel` or anywhere), or a name that TRL loads.
        args: `FastTrainingArguments`, TRL's `SFTConfig`, or plain `TrainingArguments`.
        data_collator, train_dataset, eval_dataset, processing_class, **kwargs: as TRL's. With a collator of your own
            rows stay as it lays them.
        tokenizer: `processing_class` under its older name.
        dataset_text_field, max_seq_length, packing, eval_packing, dataset_num_proc: fields of the config that TRL's
            trainer once took itself (`max_seq_length` is `max_length` there).
        strict: a module that no kernel covers is an error.

    Raises:
        ConfigError: a setting is given twice, with two values; `embedding_learning_rate` where no embedding trains;
            `base_precision="fp8"` where it cannot be had; with `strict`, what would run eager; `formatting_func`
            returns something else than a string.
        BackendUnavailableError: there is no CUDA device.
    """

    attachment: Attachment
    layout: str

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        packing: bool | None = None,
        eval_packing: bool | None = None,
        dataset_num_proc: int | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        config, processing_class = in_todays_names(
            model, args, processing_class, tokenizer=tokenizer, dataset_text_field=dataset_text_field,
            max_seq_length=max_seq_length, packing=packing, eval_packing=eval_packing,
            dataset_num_proc=dataset_num_proc,
        )  # fmt: skip
        if kwargs.get("formatting_func") is not None:
            kwargs["formatting_func"] = _one_string_a_row(kwargs["formatting_func"])
        if not isinstance(model, str):
            forget_patched_forward(model)  # another trainer's would stay under this one's, and follow that trainer
        super().__init__(
            model=model, args=config, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, **kwargs,
        )  # fmt: skip
        if lost := steps_lost(self.model, self.args.learning_rate):
            logger.warning(lost)
        rate = getattr(config, "embedding_learning_rate", None)
        if rate is not None:
            logger.info(self.train_embeddings_at(rate))
        base = quantize_base(self, getattr(config, "base_precision", None))
        self.attachment = attach_trainer(self, strict=strict)
        recomputed = recompute_as_asked(self, self.attachment) or recompute_layers(self, self.attachment)
        self.layout = f"{lay_rows(self, self.attachment)}; {recomputed}" + (f"; {base}" if base else "")
        self.layout += steps_of(self)
        logger.info(self.layout)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's.

        Raises:
            StepMemoryError: the GPU's memory ran out; names what would lower it. It is torch's OutOfMemoryError, too.
        """
        with explained(self):
            return super().train(*args, **kwargs)


def _one_string_a_row(function: Callable[[Any], Any]) -> Callable[[Any], str]:
    """A `formatting_func` whose results are looked at: TRL once called it with a batch, for a list of strings."""

    @functools.wraps(function)
    def formatted(row: Any) -> str:
        text = function(row)
        if not isinstance(text, str):
            raise ConfigError(f"formatting_func returned a {type(text).__name__}: TRL calls it with one row, no longer "
                              "with a batch; return that row's text, one string")
        return text

    return formatted


def in_todays_names(
    model: Any, args: TrainingArguments | None, processing_class: Any, *, tokenizer: Any = None, **older: Any
) -> tuple[SFTConfig, Any]:
    """`(args, processing_class)` for TRL's SFTTrainer, out of what a script passed in `OLDER_NAMES`; None is not given.

    Raises:
        ConfigError: a setting is given twice, or `args` are no training arguments.
    """
    if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
        raise ConfigError("tokenizer and processing_class are two names of one thing: give one")
    config = _config(args, model, {name: value for name, value in older.items() if value is not None})
    return config, tokenizer if processing_class is None else processing_class


def _config(args: TrainingArguments | None, model: Any, given: dict[str, Any]) -> SFTConfig:
    """TRL's config out of what the script passed; the script's own object stays as it is.

    Raises:
        ConfigError: a setting is given twice, `args` are no training arguments, or what `recompute_asked` raises.
    """
    loaded_for = getattr(model, "max_seq_length", None)
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        config: SFTConfig = FastTrainingArguments(f"{name.rstrip('/').split('/')[-1] or 'model'}-SFT")
    elif isinstance(args, SFTConfig):
        config = copy.copy(args)
    elif isinstance(args, TrainingArguments):
        # These know no length: the one that the model was loaded for is meant.
        given = {"max_seq_length": loaded_for, **given} if loaded_for is not None else given
        config = FastTrainingArguments(**args.to_dict() | {"hub_token": args.hub_token})  # to_dict hides the token
    else:
        raise ConfigError(f"args is a {type(args).__name__}: FastTrainingArguments, trl.SFTConfig and "
                          "transformers.TrainingArguments are taken")
    for name, value in given.items():
        _set(config, name, "max_length" if name == "max_seq_length" else name, value)
    if loaded_for is not None and "max_seq_length" not in given and config.max_length == _DEFAULTS["max_length"]:
        _warn_of_cut(config.max_length, loaded_for)
    recompute_asked(config)
    return config


def _warn_of_cut(length: int | None, loaded_for: int) -> None:
    if length is not None and length < loaded_for:
        logger.warning("rows are cut at %d tokens, TRL's default; the model was loaded for %d: max_seq_length=%d keeps "
                       "them", length, loaded_for, loaded_for)


def _set(config: SFTConfig, name: str, target: str, value: Any) -> None:
    """`config.target = value`, unless the config holds another value that is not its class's default."""
    held = getattr(config, target)
    if held != value and held != _DEFAULTS[target]:
        raise ConfigError(f"{name}={value!r}, and the training arguments hold {target}={held!r}: give one of the two")
    setattr(config, target, value)
