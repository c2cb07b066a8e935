"""What is asked of an arm's model beside training: its distribution on fixed text, and whether documents stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aligntune.compare.batches import IGNORED, Document, masks

POSITIONS = 256
_ROW = 128


def probe_rows(trainer: Any, limit: int = POSITIONS) -> list[list[int]]:
    """Token rows of up to `limit` tokens together: held-out rows where there are any, else the last training rows."""
    rows = trainer.trainer.eval_dataset
    if rows is None or not len(rows):
        rows = trainer.trainer.train_dataset
        rows = rows.select(range(max(0, len(rows) - 64), len(rows)))
    found: list[list[int]] = []
    left = limit
    for row in rows:
        ids = _ids(row, trainer.tokenizer)[: min(_ROW, left)]
        if len(ids) > 1:
            found.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return found


def _ids(row: dict[str, Any], tokenizer: Any) -> list[int]:
    if "input_ids" in row:
        return list(row["input_ids"])
    if "prompt_ids" in row:
        return [*row["prompt_ids"], *row.get("chosen_ids", row.get("completion_ids", []))]
    from aligntune.core.generation import encode

    return list(encode(tokenizer, row["prompt"]))


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """The model in evaluation mode without gradients, its mode and every random state as before afterwards."""
    training = model.training
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def distributions(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the next token after every token but the last of each row: (positions, vocabulary) fp32."""
    device = next(model.parameters()).device
    found = []
    with resting(model):
        for ids in rows:
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1]
            found.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(found)


def save_distributions(model: Any, rows: list[list[int]], path: Path) -> None:
    """Write `distributions` to a file."""
    from safetensors.torch import save_file

    save_file({"log_probs": distributions(model, rows)}, path)


def divergence(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """KL(first || second) per token in nats, its maximum, and the share of positions whose likeliest token agrees.

    Raises:
        ValueError: the two have other shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"probe sets of {tuple(first.shape)} and {tuple(second.shape)} cannot be compared")
    p, q = first.double(), second.double()
    kl = (p.exp() * (p - q)).sum(-1)
    return {"kl": float(kl.mean().clamp(min=0)), "kl_max": float(kl.max().clamp(min=0)),
            "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()), "positions": len(p)}


def leak_between_documents(
    trainer: Any, compute_loss: Callable[..., Any], inputs: dict[str, Any]
) -> dict[str, float] | None:
    """How far the log-probs of later documents of a flat row move when the first document's tokens are exchanged.

    None where the batch has no two documents in one row, or the loss hands back no log-probs. 0 is no leak.
    """
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(positions, torch.Tensor) or (mask is not None and mask.ndim == 2):
        return None
    real = int(inputs.get("num_tokens", positions.shape[1]))
    starts = (positions[0, :real] == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return None
    first = starts[1]
    vocabulary = trainer.model.config.get_text_config().vocab_size
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][0, :first] = (inputs["input_ids"][0, :first] + 1) % vocabulary
    found = []
    stored = _metric_lists(trainer)
    with resting(trainer.model):
        for batch in (dict(inputs), other):
            _, outputs = compute_loss(trainer.model, batch, return_outputs=True)
            log_probs = getattr(outputs, "log_probs", None)
            if log_probs is None:
                return None
            found.append(log_probs.detach().float()[0])
    stored()
    # Position t holds the log-prob of token t + 1; the first document ends at `first`.
    moved = (found[0] - found[1])[first : real - 1].abs()
    scale = found[0][first : real - 1].abs().max()
    if not len(moved) or not float(scale):
        return None
    return {"documents": len(starts), "moved": float(moved.max()), "scale": float(scale)}


def _metric_lists(trainer: Any) -> Callable[[], None]:
    """A call that takes out of the trainer's evaluation metrics what was put there since now."""
    lists = (getattr(trainer, "_metrics", None) or {}).get("eval")
    if lists is None:
        return lambda: None
    before = {name: list(values) for name, values in lists.items()}

    def restore() -> None:
        lists.clear()
        for name, values in before.items():
            lists[name] = values

    return restore


def hypotheses(model: Any, found: list[Document]) -> dict[str, float]:
    """The mean token loss of a step under the right labels and under mistakes that people make.

    `right`; `mask+1`, `mask-1`: the mask moved by one token; `all`: every token learnt; `leak`: documents of a row see
    those before them; each divided by its own count of tokens and by the right one. Every document is run by itself,
    in the model's own precision, the loss in fp32.
    """
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in ("right", "mask+1", "mask-1", "all", "leak")}
    device = next(model.parameters()).device
    rows: dict[int, list[Document]] = {}
    for one in found:
        rows.setdefault(one.row, []).append(one)
    with resting(model):
        for row in rows.values():
            for one in row:
                token_loss = _token_losses(model, one.ids, device)
                for name, mask in masks(one).items():
                    sums[name][0] += float(token_loss[mask[1:]].sum())
                    sums[name][1] += float(mask[1:].sum())
            if len(row) > 1:
                joined = _token_losses(model, np.concatenate([one.ids for one in row]), device)
                mask = np.concatenate([one.labels != IGNORED for one in row])
                sums["leak"][0] += float(joined[mask[1:]].sum())
                sums["leak"][1] += float(mask[1:].sum())
    known = {name: total / count for name, (total, count) in sums.items() if count}
    right = sums["right"][1]
    return known | {f"{name}, right count": sums[name][0] / right for name in known if right}


def _token_losses(model: Any, ids: np.ndarray, device: torch.device) -> np.ndarray:
    tokens = torch.from_numpy(ids.astype(np.int64))[None].to(device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return losses.double().cpu().numpy()

