"""The same documents whatever the layout; any token, label or order that differs shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aligntune.backends.fast.packing import RowsEndToEnd
from aligntune.compare import batches

ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9, 3, 4, 2], "labels": [-100, -100, 3, 4, 2]}]


def padded(rows: list[dict[str, list[int]]] = ROWS) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"]))
                                        for row in rows]),
    }


def test_padded_and_end_to_end_are_the_same_documents() -> None:
    flat = RowsEndToEnd(pad_token_id=0)(ROWS)
    assert flat["input_ids"].shape[1] == 64  # filled up: the filling is no document
    one, two = batches.documents(padded()), batches.documents(batches.keep(flat))
    assert batches.fingerprint(one) == batches.fingerprint(two)
    assert batches.sizes(one) == batches.sizes(two) == {"tokens": 8, "documents": 2, "squared": 34, "learnt": 5}
    assert [document.prompt for document in two] == [3, 5] == [document.prompt for document in one]
    assert [document.row for document in one] == [0, 1] and [document.row for document in two] == [0, 0]


def test_trl_padding_free_is_the_same_too() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(ROWS)
    assert batches.fingerprint(batches.documents(flat)) == batches.fingerprint(batches.documents(padded()))


@pytest.mark.parametrize(("change", "part"), [
    (lambda rows: rows[0]["input_ids"].__setitem__(1, 9), "ids"), (lambda rows: rows.reverse(), "ids"),
    (lambda rows: rows[1]["labels"].__setitem__(1, 9), "labels"),
])
def test_what_differs_shows(change, part) -> None:
    rows = [{name: list(values) for name, values in row.items()} for row in ROWS]
    change(rows)
    one, two = (batches.fingerprint(batches.documents(padded(each))) for each in (ROWS, rows))
    assert one[part] != two[part]


def test_a_label_on_the_first_token_is_nobodys() -> None:
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}]
    learnt = batches.documents(padded(rows))
    assert batches.sizes(learnt)["learnt"] == 1
    other = batches.documents(padded([{"input_ids": [5, 6], "labels": [-100, 6]}]))
    assert batches.fingerprint(learnt) == batches.fingerprint(other)


def test_pairs_learn_their_completions() -> None:
    batch = padded()
    batch["completion_mask"] = (batch.pop("labels") != -100).long()
    assert batches.fingerprint(batches.documents(batch)) == batches.fingerprint(batches.documents(padded()))


def test_rollouts_tell_the_prompt_from_what_was_sampled() -> None:
    batch = {"prompt_ids": torch.tensor([[0, 5, 6]]), "prompt_mask": torch.tensor([[0, 1, 1]]),
             "completion_ids": torch.tensor([[7, 8, 0]]), "completion_mask": torch.tensor([[1, 1, 0]])}
    one = batches.documents(batch)[0]
    assert one.ids.tolist() == [5, 6, 7, 8] and one.labels.tolist() == [-100, -100, 7, 8] and one.prompt == 2
    two = {name: torch.cat([value, value]) for name, value in batch.items()}
    assert [document.row for document in batches.documents(two, 3)] == [3, 4]
    other = batches.documents({**batch, "completion_ids": torch.tensor([[9, 8, 0]])})
    first, second = batches.fingerprint([one]), batches.fingerprint(other)
    assert first["prompts"] == second["prompts"] and first["ids"] != second["ids"]


def test_shifted_masks_are_what_a_shift_would_give() -> None:
    document = batches.documents(padded())[0]
    later = np.array([-100, -100, 7], dtype=np.int32)
    assert batches.shifted([document])["mask+1"] == [batches.digest(later)]
    earlier = np.array([-100, 6, -100], dtype=np.int32)
    assert batches.shifted([document])["mask-1"] == [batches.digest(earlier)]
    assert {name: mask.tolist() for name, mask in batches.masks(document).items()} == {
        "right": [False, True, True], "mask+1": [False, False, True], "mask-1": [True, True, False],
        "all": [True, True, True]}
    long = batches.Document(np.arange(5, dtype=np.int32), np.array([-100, 1, 2, -100, 4], dtype=np.int32), 5, 0)
    found = {name: mask.tolist() for name, mask in batches.masks(long).items()}
    assert found["right"] == [False, True, True, False, True]
    assert found["mask+1"] == [False, False, True, True, False]
    assert found["mask-1"] == [True, True, False, True, False]


def test_a_datasets_digest_is_of_its_rows_and_not_of_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "note": "a"}, {"input_ids": [3], "labels": [3], "note": "b"}]
    digest = batches.rows_digest(rows)
    assert digest is not None and digest == batches.rows_digest(rows[::-1])
    assert digest == batches.rows_digest([{**row, "note": "other"} for row in rows])
    assert digest != batches.rows_digest([rows[0], rows[0]]) != batches.rows_digest(rows[:1])
    assert digest != batches.rows_digest([{**rows[0], "labels": [-100, -100]}, rows[1]])
    assert batches.rows_digest([{"text": "a"}]) != batches.rows_digest([{"text": "b"}])
    packed = [{"input_ids": [3, 1, 2], "labels": [-100, -100, 2], "seq_lengths": [1, 2]}]
    assert digest == batches.rows_digest(packed, packed=True)
    assert digest != batches.rows_digest([{**packed[0], "seq_lengths": [2, 1]}], packed=True)
    assert batches.rows_digest([{"input_ids": [3, 1, 2]}], packed=True) is None
    whole = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    assert batches.rows_digest(whole) == digest != batches.rows_digest([{"input_ids": [1, 2, 3]}])
    assert batches.rows_digest(iter(rows)) is None and batches.rows_digest(None) is None
    monkeypatch.setattr(batches, "MOST_ROWS", 1)
    assert batches.rows_digest(rows) is None


PREFERENCES = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9, 4]},
               {"prompt_ids": [3], "chosen_ids": [9, 9, 2], "rejected_ids": [2]}]


def test_pairs_padded_apart_and_end_to_end_are_the_same_documents() -> None:
    """TRL's DPO stacks both sides, its ORPO and CPO hold them apart, backend fast lays them end to end."""
    from trl.experimental.cpo.cpo_trainer import DPODataCollatorWithPadding
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from aligntune.backends.fast.preference_rows import LabelledPairsEndToEnd, PairsEndToEnd

    apart = [{**{f"{side}_input_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")},
              **{f"{side}_labels": [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
                 for side in ("chosen", "rejected")},
              **{f"{side}_attention_mask": [1] * len(row["prompt_ids"] + row[f"{side}_ids"])
                 for side in ("chosen", "rejected")},
              "prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
             for row in PREFERENCES]
    made = [DataCollatorForPreference(0)(PREFERENCES), PairsEndToEnd(0)(PREFERENCES),
            DPODataCollatorWithPadding(pad_token_id=0)(apart), LabelledPairsEndToEnd(0)(apart),
            LabelledPairsEndToEnd(0, prompts_too=True)(apart)]
    found = [batches.documents(batches.keep(batch)) for batch in made]
    assert [one.ids.tolist() for one in found[0]] == [[5, 6, 7], [3, 9, 9, 2], [5, 6, 8, 9, 4], [3, 2]]
    assert all(batches.fingerprint(one) == batches.fingerprint(found[0]) for one in found)
    assert {batches.sizes(one)["learnt"] for one in found} == {8}
    assert [batches.rows_of(batches.keep(batch)) for batch in made] == [4, 1, 4, 1, 1]
