"""Rows end to end: a micro-batch without padding, made on the CPU with everything the step would have to wait for.

The rows are the micro-batch's own, in their order, so a step trains the same rows as a padded one. Behind them the flat
length is filled up to a bucket, so that few shapes occur; the filling is a row of its own that nothing is learnt from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from aligntune.backends.fast.attachment import Attachment

Array: TypeAlias = npt.NDArray[np.int64]
IGNORED = -100
_ROWS_STEP = 8
_LEAST_LONGEST = 1024
_SMALLEST = 64
LONG = 8192
"""Flat lengths beyond this are filled up as little as kernels like."""


def bucket(tokens: int) -> int:
    """The flat length that `tokens` are filled up to: at most 1/8 more, beyond `_SMALLEST`; beyond `LONG` 1/32.

    Eight lengths an octave: a step of 16 ragged rows then comes in about ten shapes, which are soon all captured; with
    sixteen it is twice as many, and each costs a launched step and a capture before it is replayed once. A long step
    computes for as long as launching it takes: there filling costs more time than it saves, and memory.
    """
    step = max(_SMALLEST, 1 << max(0, tokens.bit_length() - (4 if tokens <= LONG else 6)))
    return -(-tokens // step) * step


def quarter_of(tokens: int) -> int:
    """The steps in which the number of kept positions grows, of a flat length of `tokens`."""
    return max(64, -(-tokens // 4))


@dataclass
class RowsEndToEnd:
    """Collates rows of `input_ids` and `labels` (and `seq_lengths`, for packed ones) into one flat row.

    A batch holds, with T the flat length:
        input_ids, labels, shift_labels, position_ids: (1, T) int64; `labels` is -100 where a row starts, as TRL's
            padding-free collator has it, `shift_labels` is the label of the next token of the same row.
        cu_seq_lens_q, cu_seq_lens_k: (rows + 1,) int32; for ragged rows filled up with T to the most that came so far.
        max_length_q, max_length_k: int, the longest row; for ragged rows a power of two that holds it and all before
            it, at least 1,024.
        kept: (K,) int64, positions with a label, filled with -1 to a quarter, a half or three quarters of T; absent
            where there are more.
        num_tokens: int, tokens that are not filling.

    Args:
        packed: `seq_lengths` are read; else a row is one sequence, whatever its other columns hold.
        joined: rows are parts of sequences, laid as ragged ones whatever their lengths: a row's first label is that of
            the position before it.
    """

    pad_token_id: int
    longest: int = _LEAST_LONGEST
    rows: int = 0
    packed: bool = True
    joined: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows as lists of ints, or as 1-dimensional arrays."""
        lengths: list[int] = []
        ids, labels = [], []
        for example in examples:
            row = np.asarray(example["input_ids"], dtype=np.int64)
            given = example.get("seq_lengths") if self.packed else None
            own = [len(row)] if given is None or not len(given) else [int(length) for length in given]
            assert sum(own) == len(row), "seq_lengths do not add up to the row"
            lengths += own
            ids.append(row)
            labels.append(np.asarray(example["labels"], dtype=np.int64) if "labels" in example else row)
        real = sum(lengths)
        ragged = self.joined or len(set(lengths)) > 1
        filling = bucket(real) - real if ragged else 0
        if filling:
            lengths.append(filling)
            ids.append(np.full(filling, self.pad_token_id, dtype=np.int64))
            labels.append(np.full(filling, IGNORED, dtype=np.int64))
        return self._tensors(lengths, np.concatenate(ids), np.concatenate(labels), ragged) | {"num_tokens": real}

    def _tensors(self, lengths: list[int], ids: Array, labels: Array, ragged: bool) -> dict[str, Any]:
        # In numpy: each of torch's operators wakes a thread a core, which takes longer than all of this.
        sizes = np.array(lengths)
        ends = sizes.cumsum()
        starts = ends - sizes
        total = len(ids)
        position_ids = np.arange(total) - np.repeat(starts, sizes)
        if not self.joined:
            labels[starts] = IGNORED
        next_T = np.append(labels[1:], IGNORED)
        rows = len(lengths)
        if ragged:  # both only grow: soon the flat length is all that tells one batch's shape from another's
            # One end more than rows: a captured step of a greater length gets its filling behind them.
            self.rows = max(self.rows, -(-(rows + 1) // _ROWS_STEP) * _ROWS_STEP)
            self.longest = max(self.longest, 1 << (max(lengths) - 1).bit_length())
        padded_rows = self.rows if ragged else rows
        ends = np.concatenate([[0], ends, np.full(padded_rows - rows, total)]).astype(np.int32)
        cu_seq_lens = torch.from_numpy(ends)
        # Attention takes any bound. Rows of one length are told by the exact one.
        longest = self.longest if ragged else max(lengths)
        flat = {"input_ids": ids, "labels": labels, "shift_labels": next_T, "position_ids": position_ids}
        batch: dict[str, Any] = {name: torch.from_numpy(values)[None] for name, values in flat.items()} | {
            "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest, "max_length_k": longest,
        }
        kept = np.flatnonzero(next_T != IGNORED)
        size = max(1, -(-len(kept) // quarter_of(total))) * quarter_of(total)
        if size < total:
            batch["kept"] = torch.from_numpy(np.concatenate([kept, np.full(size - len(kept), -1)]))
        return batch


def attention_padded_because(attachment: Attachment) -> str | None:
    """Why a model's attention cannot keep apart rows that lie end to end, or None where it can."""
    config = attachment.model.config.get_text_config()
    attended = sum(patch.spec.kind == "attention" for patch in attachment.patches)
    if attended != config.num_hidden_layers:
        return f"{config.num_hidden_layers - attended} attention modules are not ours"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention caps scores, which no launch over ragged rows does"
    if config._attn_implementation not in ("sdpa", "flash_attention_2", "flash_attention_3"):
        return f"attn_implementation {config._attn_implementation!r} was asked for"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    return None


def noise_padded_because(trainer: Any) -> str | None:
    """Why noise on the embeddings keeps rows padded, or None where there is none.

    transformers scales it by 1 / sqrt(length x width) of what the embedding returns, where NEFTune (arXiv 2310.05914,
    algorithm 1) has the length of a row: that of all rows end to end gives sqrt(rows) times less.
    """
    if trainer.neftune_noise_alpha is None:
        return None
    return "neftune_noise_alpha scales its noise by the length of a padded row"
