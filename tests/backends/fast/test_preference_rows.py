"""The flat batches of preference data hold what TRL's padded ones hold, and each number finds its row again."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from trl.experimental.cpo.cpo_trainer import DPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from aligntune.backends.fast.packing import IGNORED, RowsEndToEnd
from aligntune.backends.fast.preference_rows import (
    LabelledPairsEndToEnd,
    PairsEndToEnd,
    Row,
    Scores,
    UnpairedEndToEnd,
    lay_end_to_end,
)

PAD = 0


def examples(seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(1, 200) for _ in range(draw.randint(least, most))]

    made = [{"prompt_ids": ids(1, 9), "chosen_ids": ids(0, 9), "rejected_ids": ids(1, 30)} for _ in range(5)]
    made.append({"prompt_ids": ids(1, 1), "chosen_ids": ids(1, 1), "rejected_ids": ids(1, 1)})
    made.append({"prompt_ids": [], "chosen_ids": ids(1, 1), "rejected_ids": ids(2, 2)})
    return made


def rows_of(batch: dict[str, Any], name: str) -> list[list[int]]:
    ends = batch["cu_seq_lens_q"].tolist()
    return [batch[name][0, a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)][: len(batch["scored"])]


def views_of(flat: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch as it is, and as one of whole rows."""
    return [flat, {name: value for name, value in flat.items() if name != "once"}][: 1 + ("once" in flat)]


def assert_same_rows(flat: dict[str, Any], padded: dict[str, Any]) -> None:
    lengths = padded["attention_mask"].sum(1).tolist()
    for name in ("input_ids", "completion_mask"):
        assert rows_of(flat, name) == [row[:n].tolist() for row, n in zip(padded[name], lengths, strict=True)]
    assert flat["num_tokens"] == sum(lengths)
    assert flat["lengths"].tolist() == padded["completion_mask"].sum(1).tolist()
    mask = padded["completion_mask"][:, 1:] == 1
    assert flat["scored"].tolist() == mask.sum(1).tolist()
    # A number that names its token, as the model would give it at the position before.
    for given in views_of(flat):
        labels = given.get("once", given)["shift_labels"]
        scores = Scores.of(given, labels.float() * (labels != IGNORED), {"twice": 2.0 * labels})
        assert scores.log_probs.shape == (len(lengths), max(1, int(flat["scored"].max())))
        assert scores.log_probs[scores.mask].tolist() == padded["input_ids"][:, 1:][mask].tolist()
        assert scores.others["twice"][scores.mask].tolist() == [2 * x for x in scores.log_probs[scores.mask].tolist()]
        assert not scores.log_probs[~scores.mask].any() and not scores.others["twice"][~scores.mask].any()
    assert (flat["position_ids"] == 0).sum() == len(lengths)  # by which evaluation counts rows
    assert "labels" not in flat


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("longest", [None, 8, 3, 100])
def test_pairs(longest: int | None, mode: str) -> None:
    padded = DataCollatorForPreference(PAD, max_length=longest, truncation_mode=mode)
    for seed in range(5):
        assert_same_rows(PairsEndToEnd(PAD, longest, mode)(examples(seed)), padded(examples(seed)))


def test_precomputed_references_go_along() -> None:
    given = [one | {"ref_chosen_logps": -float(i), "ref_rejected_logps": -2.0 * i} for i, one in enumerate(examples())]
    batch = PairsEndToEnd(PAD)(given)
    assert batch["ref_chosen_logps"].tolist() == [-float(i) for i in range(7)]
    assert batch["ref_rejected_logps"].tolist() == [-2.0 * i for i in range(7)]


@pytest.mark.parametrize("longest", [None, 6])
def test_unpaired(longest: int | None) -> None:
    given = [{"prompt_ids": one["prompt_ids"], "completion_ids": one["rejected_ids"], "label": i % 3 == 0,
              "KL_completion_ids": one["chosen_ids"]} for i, one in enumerate(examples())]
    padded = DataCollatorForUnpairedPreference(PAD, max_length=longest)(given)
    flat = UnpairedEndToEnd(PAD, longest)(given)
    assert_same_rows(flat, padded)
    mismatched = {name.removeprefix("KL_"): value for name, value in padded.items() if name.startswith("KL_")}
    assert_same_rows(flat["KL"], mismatched)
    assert rows_of(flat["both"], "input_ids") == rows_of(flat, "input_ids") + rows_of(flat["KL"], "input_ids")
    once = flat["both"]["once"]
    assert once["input_ids"].numel() < flat["both"]["input_ids"].numel() and "once" not in flat
    assert flat["label"].tolist() == padded["label"].tolist()
    scored = flat["scored"][flat["label"]].sum().item(), flat["scored"][~flat["label"]].sum().item()
    assert flat["tallies"] == [3, 4, *scored] and scored[0] > 0
    assert "KL" not in UnpairedEndToEnd(PAD)([{k: v for k, v in one.items() if "KL" not in k} for one in given])


@pytest.mark.parametrize("prompts_too", [False, True])
def test_labelled_pairs(prompts_too: bool) -> None:
    given = []
    for one in examples():
        row: dict[str, Any] = {"prompt_input_ids": one["prompt_ids"], "prompt_attention_mask": [1] * 3}
        for side in ("chosen", "rejected"):
            answer = one[f"{side}_ids"]
            row |= {f"{side}_input_ids": one["prompt_ids"] + answer,
                    f"{side}_attention_mask": [1] * len(one["prompt_ids"] + answer),
                    f"{side}_labels": [IGNORED] * len(one["prompt_ids"]) + answer}
        given.append(row)
    padded = DPODataCollatorWithPadding(pad_token_id=PAD)(given)
    flat = LabelledPairsEndToEnd(PAD, prompts_too)(given)
    labels = [one[1:] for side in ("chosen", "rejected") for one in padded[f"{side}_labels"].tolist()]
    answers = [[label for label in row if label != IGNORED] for row in labels]
    assert len(views_of(flat)) == 2
    for view in views_of(flat):
        scores = Scores.of(view, view.get("once", view)["shift_labels"].float(), {})
        for i, answer in enumerate(answers):
            found = scores.log_probs[i][scores.mask[i]].tolist()
            before = int(flat["prompt_scored"][i])
            assert found[before:] == answer
            prompt = given[i % 7]["prompt_input_ids"]
            assert found[:before] == (prompt[1:] if prompts_too and i < 7 else [])


def test_rows_without_tokens_keep_their_place() -> None:
    flat = lay_end_to_end([Row([], 0, 0), Row([5, 6], 1, 1), Row([], 0, 0)], RowsEndToEnd(9))
    assert flat["input_ids"][0, :4].tolist() == [9, 5, 6, 9] and flat["num_tokens"] == 2
    assert flat["scored"].tolist() == [0, 1, 0] and flat["lengths"].tolist() == [0, 1, 0]
    assert flat["shift_labels"][0, :4].tolist() == [IGNORED, 6, IGNORED, IGNORED]
    assert (flat["position_ids"] == 0).sum() == 3
    scores = Scores.of(flat, torch.ones(1, flat["input_ids"].shape[1]), {})
    assert scores.log_probs.tolist() == [[0.0], [1.0], [0.0]]


def test_gradients_find_their_token() -> None:
    flat = PairsEndToEnd(PAD)(examples())
    for view in views_of(flat):
        labels = view.get("once", view)["shift_labels"]
        log_probs = torch.zeros(labels.shape, requires_grad=True)
        scores = Scores.of(view, log_probs, {})
        (scores.log_probs.sum(1) * torch.arange(1.0, 15.0)).sum().backward()
        rows = torch.repeat_interleave(torch.arange(1.0, 15.0), flat["scored"])
        assert log_probs.grad is not None and log_probs.grad[labels != IGNORED].tolist() == rows.tolist()
        assert not log_probs.grad[labels == IGNORED].any()


def test_shapes_become_few() -> None:
    """What a batch with more rows or a longer one needed, later ones have too; each kind on its own."""
    collate = UnpairedEndToEnd(PAD)

    def batch(count: int, length: int) -> dict[str, Any]:
        return collate([{"prompt_ids": [5] * (i + 1), "completion_ids": [6] * length, "KL_completion_ids": [7],
                         "label": True} for i in range(count)])

    first, large, after = batch(2, 3), batch(9, 1500), batch(2, 3)
    assert len(first["cu_seq_lens_q"]) == 9 and len(large["cu_seq_lens_q"]) == len(after["cu_seq_lens_q"]) == 17
    assert len(after["both"]["cu_seq_lens_q"]) == 25
    assert [one["max_length_q"] for one in (first, large, after)] == [1024, 2048, 2048]
    assert after["KL"]["max_length_q"] == 1024
