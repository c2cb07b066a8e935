"""What a run asks of its data, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from aligntune.errors import ConfigError, unknown

if TYPE_CHECKING:
    import datasets

Takes = Literal["sft", "preference", "prompts", "unpaired", "reward"]
AssistantTurns = Literal["all", "last", "split"]
OnBadRow = Literal["raise", "skip", "quarantine"]
Truncation = Literal["right", "error"]


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """Everything that decides which tokens a run trains on.

    Args:
        algorithm: its name, for messages ("dpo").
        takes: the dataset shape that the algorithm trains on.
        dataset: hub id, local json/jsonl/csv/tsv/parquet file, folder of such files or of `save_to_disk`,
            "builtin:NAME", a `datasets.Dataset` or `DatasetDict`, or a list of dicts.
        dataset_config: configuration name of a hub dataset ("main" of openai/gsm8k).
        split: a split, slices and sums allowed ("train[:10%]"); None is "train", or the only split.
        max_samples: the first N rows of the split; None is all.
        column_mapping: {the dataset's column: the column that is meant}.
        system_prompt: a system turn put before conversations that bring none.
        chat_template: path of a Jinja file; None is the tokenizer's own template, or the default for base models.
        apply_chat_template: whether prompts and completions given as plain strings become turns of a conversation.
            None: questions with reference answers and prompts of online methods do where the model has a template,
            pairs and completions are taken as they stand (as TRL does); a `system_prompt` makes them turns.
        assistant_turns: sft on conversations: train every assistant turn, the last, or one row per turn.
        completion_only: sft: supervise completions (assistant turns) only. None: yes where a row has a prompt or
            turns; plain text is supervised whole. False: every token.
        max_seq_length: the longest row in tokens, prompt and completion together.
        max_completion_length: online methods: tokens kept free for the completion, so a prompt may have
            `max_seq_length - max_completion_length`. A longer prompt is a bad row.
        truncation: what happens to a row longer than `max_seq_length`: "right" cuts its end (counted in the report),
            "error" makes it a bad row. Prompts of online methods and rows of a reward model are never cut.
        on_bad_row: "raise" lists every bad row in one DataError; "skip" and "quarantine" leave them out and list them
            in the report, "quarantine" with the row itself (`DataReport.write_bad_rows`).
        eval_dataset: evaluation data, same types as `dataset`.
        eval_split: its split; given alone it names another split of `dataset`.
        max_eval_samples: its first N rows.
        val_split_ratio: the share of `dataset` that is held out for evaluation, drawn with `seed`.
        seed: draws the held-out share.
        trust_remote_code: accepted for old scripts; `datasets` no longer runs loading scripts.
        text_field: the column of plain text, where it is not called "text".

    Raises:
        ConfigError: every value that is not allowed, all at once.
    """

    algorithm: str
    takes: Takes
    dataset: str | Path | datasets.Dataset | list[dict[str, Any]]
    dataset_config: str | None = None
    split: str | None = None
    max_samples: int | None = None
    column_mapping: dict[str, str] | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    apply_chat_template: bool | None = None
    assistant_turns: AssistantTurns = "all"
    completion_only: bool | None = None
    max_seq_length: int = 1024
    max_completion_length: int | None = None
    truncation: Truncation = "right"
    on_bad_row: OnBadRow = "raise"
    eval_dataset: str | Path | datasets.Dataset | list[dict[str, Any]] | None = None
    eval_split: str | None = None
    max_eval_samples: int | None = None
    val_split_ratio: float | None = None
    seed: int = 42
    trust_remote_code: bool = False
    text_field: str | None = None

    def __post_init__(self) -> None:
        faults = [*self._choice_faults(), *self._number_faults()]
        if self.val_split_ratio is not None and (self.eval_dataset is not None or self.eval_split is not None):
            faults.append("val_split_ratio holds rows out of the training data; it cannot stand beside "
                          "eval_dataset or eval_split: give one of them")  # fmt: skip
        if faults:
            raise ConfigError.from_faults(faults, "the data options")

    def _choice_faults(self) -> list[str]:
        choices: dict[str, Any] = {
            "takes": Takes, "assistant_turns": AssistantTurns, "on_bad_row": OnBadRow, "truncation": Truncation,
        }  # fmt: skip
        return [
            unknown(name, getattr(self, name), get_args(allowed))
            for name, allowed in choices.items()
            if getattr(self, name) not in get_args(allowed)
        ]

    def _number_faults(self) -> list[str]:
        faults = []
        for name in ("max_samples", "max_eval_samples", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1, got {value}")
        if self.max_seq_length < 2:
            faults.append(f"max_seq_length must be at least 2, got {self.max_seq_length}")
        if self.val_split_ratio is not None and not 0 < self.val_split_ratio < 1:
            faults.append(f"val_split_ratio must lie between 0 and 1, got {self.val_split_ratio}")
        if self.takes == "prompts" and self.prompt_limit < 1:
            faults.append(
                f"max_seq_length {self.max_seq_length} leaves no room for a prompt beside max_completion_length "
                f"{self.max_completion_length}: max_seq_length counts both"
            )
        return faults

    @property
    def prompt_limit(self) -> int:
        """The most tokens that a prompt of an online method may have."""
        return self.max_seq_length - (self.max_completion_length or 0)
