"""Log-probs of completions with rows end to end: the numbers and the gradients of padded batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aligntune.backends.fast.online import Flat
from tests.backends.fast.rollout.test_trl import built_of

WIDTH, COLUMNS = 9, 5
PROMPTS, COMPLETIONS = (4, 1, 3), (5, 2, 0)  # left-padded to 4, right-padded to 5; the last is masked out


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 250, (3, WIDTH), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, WIDTH, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        mask[row, WIDTH - COLUMNS - prompt : WIDTH - COLUMNS + completion] = 1
    return ids, mask


def test_flat_by_hand() -> None:
    ids, mask = batch()
    flat = Flat.of(ids, mask, COLUMNS)
    kept = [ids[r, c].item() for r in range(3) for c in range(WIDTH) if mask[r, c]]
    assert flat.inputs["input_ids"].tolist() == [kept]
    assert flat.inputs["position_ids"].tolist() == [[*range(9), *range(3), *range(3)]]
    assert flat.inputs["cu_seq_lens_q"].tolist() == [0, 9, 12, 15]
    assert flat.inputs["max_length_q"] == 9
    assert flat.inputs["shift_labels"].tolist() == [[-100] * 3 + kept[4:9] + [-100] + kept[10:12] + [-100] * 4]
    values = torch.arange(1.0, 16.0)[None].requires_grad_()
    padded = flat.padded(values)
    assert padded.tolist() == [[4, 5, 6, 7, 8], [10, 11, 0, 0, 0], [0] * 5]
    (padded * torch.arange(1.0, 16.0).view(3, 5)).sum().backward()
    assert values.grad.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5, 0, 6, 7, 0, 0, 0, 0]]


def test_log_probs_and_gradients_are_those_of_padded_rows(tmp_path: Any) -> None:
    built = built_of("fast", "grpo", tmp_path)
    trainer = built.trainer
    assert built.attestation()["layout"].startswith("rows: end to end in log-prob and loss passes; rollouts: our")
    ids, mask = (x.to(trainer.accelerator.device) for x in batch())
    upstream = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1)).to(ids.device)
    found = []
    for flat in (True, False):
        trainer.rows_end_to_end = flat
        trainer.model.zero_grad()
        log_probs, entropies, aux = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, COLUMNS, compute_entropy=True)
        assert aux is None
        (log_probs * upstream).sum().backward()
        found.append((log_probs.detach().cpu(), entropies.cpu(), [p.grad.clone() for p in trainer.model.parameters()]))
    (ours, our_entropies, our_grads), (theirs, their_entropies, their_grads) = found
    scored = torch.tensor([[j < n for j in range(COLUMNS)] for n in COMPLETIONS])
    assert ours[scored].max() < 0 and not ours[~scored].any()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(our_entropies[scored], their_entropies[scored], atol=2e-5, rtol=2e-5)
    for mine, other in zip(our_grads, their_grads, strict=True):
        assert other.norm() > 0
        assert (mine - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("size", [1, 2])
def test_slices_of_a_batch(size: int, tmp_path: Any) -> None:
    trainer = built_of("fast", "grpo", tmp_path).trainer
    ids, mask = (x.to(trainer.accelerator.device) for x in batch())
    with torch.no_grad():
        whole, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COLUMNS)
        parts, nothing, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COLUMNS,
                                                                       batch_size=size)
        reference, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, mask, COLUMNS)
    assert nothing is None
    torch.testing.assert_close(reference, whole, atol=1e-5, rtol=1e-5)  # before any step the two are one
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
