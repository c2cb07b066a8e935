"""What a pair's chosen and rejected row begin with, computed once: the layout, and the numbers of whole rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from datasets import Dataset

from aligntune.backends.fast import forwards
from aligntune.backends.fast.graph_shapes import fill, fits, planned_tokens, tokens_of, with_room
from aligntune.backends.fast.ops.attention import attention
from aligntune.backends.fast.ops.segment_attention import segment_attention
from aligntune.backends.fast.packing import IGNORED, RowsEndToEnd
from aligntune.backends.fast.preference_rows import (
    PairsEndToEnd,
    PromptsOnce,
    Row,
    ScoredPairsEndToEnd,
    answer_row,
    lay_end_to_end,
    model_inputs,
)
from tests.backends.fast.preference_steps import assert_same_step, built_of, ids, pairs, step
from tests.backends.fast.test_adapters import draw_b
from tests.core import tiny

LONG = ((12, 4, 2), (9, 1, 6), (15, 7, 1), (1, 3, 3), (20, 2, 5), (11, 1, 1), (1, 8, 2), (14, 5, 9))
"""Tokens of prompt, chosen and rejected answer; prompts of one token, which nothing is shared of."""


def answers(*of: tuple[list[int], list[int], list[int]], **cut: Any) -> list[Row]:
    return [answer_row(one[0], one[side], cut.get("max_length"), keep_end=cut.get("keep_end", False))
            for side in (1, 2) for one in of]


def drawn(seed: int, scored: str) -> list[Row]:
    """Pairs of every kind: without prompt, without answer, alike as a whole, prompts that differ in the middle."""
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(1, 200) for _ in range(draw.randint(0, most))]

    rows: tuple[list[Row], list[Row]] = [], []
    for kind in range(7):
        prompt, answer = ids(12), ids(8)
        other = [*prompt[: len(prompt) // 2], *ids(3)] if kind == 1 else prompt
        for side, (one, text) in enumerate(((prompt, answer), (other, answer if kind == 2 else ids(8)))):
            whole = [*one, *text]
            start = {"answers": len(one), "chosen": 0 if side == 0 else len(one), "both": 0, "none": len(whole)}[scored]
            rows[side].append(Row(whole, len(whole) if scored == "none" else len(one), start))
    return [*rows[0], *rows[1]]


def test_the_layout_by_hand() -> None:
    once = PromptsOnce(0)(answers(([5, 6, 7], [8, 9], [8]), ([4], [1], [2, 3])))
    assert once is not None and tokens_of(once) == 64
    # What the first pair shares, then the chosen rows' own, then the rejected ones'.
    assert once["input_ids"][0, :13].tolist() == [5, 6, 7, 8, 9, 4, 1, 7, 8, 4, 2, 3, 0]
    assert once["position_ids"][0, :12].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert once["shift_labels"][0, :13].tolist() == [
        IGNORED, IGNORED, 8, 9, IGNORED, 1, IGNORED, 8, IGNORED, 2, 3, IGNORED, IGNORED]
    assert once["cu_seq_lens_q"].tolist() == [0, 2, 5, 7, 9, 12, 64, 64, 64]
    assert once["shared_before"].tolist() == [0, 2, 0, 2, 0, 0, 0, 0] and not once["shared_group"].any()
    assert once["shared_users"].tolist() == [[1, 3], [-1, -1]]
    assert {once[f"shared_{name}"].dtype for name in ("before", "group", "users")} == {torch.int32}
    assert once["places"][:12].tolist() == [8, 8, 0, 1, 8, 2, 8, 4, 8, 6, 7, 8]
    assert once["max_length_q"] == 1024


@pytest.mark.parametrize("scored", ["answers", "chosen", "both", "none"])
def test_every_row_is_there_once(scored: str) -> None:
    lay, flat = PromptsOnce(0), RowsEndToEnd(0)
    lay.begun = True
    shared_somewhere = 0
    for seed in range(40):
        rows = drawn(seed, scored)
        lasts = [max(len(row.ids) - 1 - seed % 3, 0) for row in rows]
        once, whole = lay(rows, lasts), lay_end_to_end(rows, flat)
        assert once is not None
        before, group, users = (once[f"shared_{name}"].tolist() for name in ("before", "group", "users"))
        total, queries = tokens_of(once), once["cu_seq_lens_q"].tolist()
        ids, positions = once["input_ids"][0], once["position_ids"][0]
        heads = sum(any(user >= 0 for user in both) for both in users)
        assert len(before) == len(group) == len(queries) - 1 and len(users) == len(rows) // 2
        for number, row in enumerate(rows):
            segment = heads + number
            mine = [*range(queries[segment], queries[segment + 1])]
            begin = queries[group[segment]]
            tokens = [*range(begin, begin + before[segment]), *mine]
            assert ids[tokens].tolist() == (row.ids or [0])
            assert positions[tokens].tolist() == list(range(max(len(row.ids), 1)))
            assert mine and tokens[lasts[number]] == once["last_tokens"][number]
        # Users of each head are the two rows of its pair, and of nothing else is there a user.
        assert users[heads:] == [[-1, -1]] * (len(users) - heads)
        found = {user: head for head, both in enumerate(users[:heads]) for user in both}
        assert found == {n: group[n] for n, length in enumerate(before) if length} and len(found) == 2 * heads
        assert all(queries[head + 1] - queries[head] == before[user] for user, head in found.items())
        assert not any(before[heads + len(rows) :]) and queries[-1] == total
        # What is scored, at the place of whole rows.
        found = dict(zip(once["places"].tolist(), once["shift_labels"][0].tolist(), strict=True))
        true = dict(zip(whole["places"].tolist(), whole["shift_labels"][0].tolist(), strict=True))
        nobody = len(rows) * whole["columns"]
        assert found.pop(nobody) == true.pop(nobody) == IGNORED and found == true
        shared_somewhere += heads
        if scored == "both":
            assert not heads
    assert scored == "both" or shared_somewhere > 40


def test_truncated_rows() -> None:
    """Rows cut at their beginning share nothing unless they are cut alike."""
    long, other = list(range(1, 30)), list(range(50, 60))
    cut = PromptsOnce(0)(answers((long, other, other[:3]), max_length=20, keep_end=True))
    assert cut is None
    alike = PromptsOnce(0)(answers((long, other, other[::-1]), max_length=20, keep_end=True))
    assert alike is not None and alike["input_ids"][0, :9].tolist() == long[-10:-1]
    nothing = PromptsOnce(0)(answers((long, other, other), max_length=20))  # no room for answers is left
    assert nothing is not None and nothing["cu_seq_lens_q"].tolist()[:4] == [0, 19, 20, 21]


def test_it_begins_where_it_pays_and_goes_on() -> None:
    collate = PairsEndToEnd(0)

    def batch(prompt: int, answer: int) -> dict[str, Any]:
        return collate([{"prompt_ids": [5] * prompt, "chosen_ids": [6] * answer, "rejected_ids": [7] * answer}])

    assert "once" not in batch(5, 30) and "once" not in batch(1, 9)
    first = batch(50, 30)["once"]
    assert tokens_of(first) == 128 < batch(50, 30)["input_ids"].shape[1]
    after = batch(5, 30)
    assert after["once"]["input_ids"].shape[1] == 128 and after["num_tokens"] == 70
    assert tokens_of(batch(500, 8)["once"]) == 576


def test_fewer_pairs_fit_what_was_captured() -> None:
    lay = PromptsOnce(0)
    captured = lay(answers(([5, 6, 7], [8], [9]), ([4, 3, 2, 1], [1], [2, 3]), ([7, 7, 7], [1], [2])))
    fewer = lay(answers(([9, 8, 7, 6, 5], [1, 2], [3])))
    assert captured is not None and fewer is not None and tokens_of(captured) == tokens_of(fewer) == 64
    assert captured["shared_users"].tolist() == [[3, 6], [4, 7], [5, 8]]
    for name in ("shared_before", "shared_group", "shared_users", "cu_seq_lens_q"):
        assert fits(name, captured[name], fewer[name], spare=False), name
        fill(name, captured[name], fewer[name], captured)
    assert captured["shared_before"].tolist()[:3] == [0, 4, 4] and captured["shared_before"].sum() == 8
    assert captured["shared_users"].tolist() == [[1, 2], [-1, -1], [-1, -1]] and not captured["shared_group"].any()
    assert not fits("shared_users", fewer["shared_users"], torch.zeros(3, 2), spare=False)
    assert not fits("shared_users", captured["shared_users"], torch.zeros(1, 3), spare=False)


def test_a_reward_model_s_rows() -> None:
    """The last token that is no padding may be among those that are shared."""
    batch = ScoredPairsEndToEnd(0)([{"chosen_ids": [5, 6, 7, 8, 0], "rejected_ids": [5, 6, 7, 9]},
                                    {"chosen_ids": [4, 3, 0, 0], "rejected_ids": [4, 3, 0, 0, 0]}])
    once = batch["once"]
    assert "shift_labels" not in once and "kept" not in once and "once" not in model_inputs(batch)
    assert once["input_ids"][0, :12].tolist() == [5, 6, 7, 4, 3, 0, 8, 0, 0, 9, 0, 0]
    assert once["last_tokens"].tolist() == [6, 4, 9, 4]
    assert batch["input_ids"][0, batch["last_tokens"]].tolist() == [8, 3, 9, 3]


@pytest.mark.parametrize(("algorithm", "options"), [
    ("dpo", {"use_peft": True}),
    pytest.param("dpo", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("dpo", {"use_peft": True, "precompute_ref_log_probs": True}, marks=pytest.mark.slow),
    pytest.param("orpo", {}, marks=pytest.mark.slow),
    pytest.param("simpo", {"use_peft": True}, marks=pytest.mark.slow),
    pytest.param("cpo", {}, marks=pytest.mark.slow),
])
def test_steps_are_those_of_trl(algorithm: str, options: dict[str, Any], tmp_path: Any) -> None:
    ours, theirs = (built_of(backend, algorithm, tmp_path, pairs(LONG), **options) for backend in ("fast", "trl"))
    batch = next(iter(ours.trainer.get_train_dataloader()))
    assert batch["once"]["shared_before"].sum() > 30
    assert_same_step(step(ours.trainer), step(theirs.trainer), loss=2e-6,
                     without=() if algorithm == "dpo" else ("logits/chosen", "logits/rejected"))


def test_under_dropout_each_row_has_a_prompt_of_its_own(tmp_path: Any) -> None:
    for dropout in (0.0, 0.1):
        built = built_of("fast", "dpo", tmp_path, pairs(LONG), use_peft=True, lora_dropout=dropout)
        assert ("once" in next(iter(built.trainer.get_train_dataloader()))) is (dropout == 0)


@pytest.mark.slow
def test_the_launch_that_reads_prompts_in_place_gives_the_same(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU attention in 16 bits is that launch; here fp32 goes through it."""

    def launched(q: Any, k: Any, v: Any, ends: Any, **options: Any) -> torch.Tensor:
        return segment_attention(q, k, v, ends, **options)

    found = []
    for attend in (launched, attention):
        monkeypatch.setattr(forwards, "attention", attend)
        built = built_of("fast", "dpo", tmp_path, pairs(LONG[:2]), use_peft=True, batch_size=2,
                         model_name=tiny.llama(num_hidden_layers=2))
        model = built.trainer.model
        draw_b(model)
        once = model_inputs(built.trainer._prepare_inputs(next(iter(built.trainer.get_train_dataloader()))))
        assert once["shared_before"].any()
        outputs = model(**once, fused_lm_head=True)
        log_probs = outputs.log_probs[0][once["shift_labels"][0] != IGNORED]
        (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
        found.append((log_probs.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_grads), (theirs, their_grads) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, grad in their_grads.items():
        assert (our_grads[name] - grad).norm() <= 1e-5 * grad.norm() and grad.norm() > 1e-6, name
    assert len(their_grads) == 28


@pytest.mark.slow
def test_a_step_filled_up_is_the_step(tmp_path: Any) -> None:
    """As graphs fill batches up: the filling reaches no gradient."""
    # Two layers: what prompts attend to is in the gradient of the first.
    built = built_of("fast", "dpo", tmp_path, pairs(LONG[:2]), use_peft=True, batch_size=2,
                     model_name=tiny.llama(num_hidden_layers=2))
    trainer = built.trainer
    once = model_inputs(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    assert planned_tokens(once, capture=True) == tokens_of(once) == 64
    roomy = with_room(once, 96)
    roomy["input_ids"][0, tokens_of(once) :] = 7  # a padding token's embedding may be 0, which hides what reaches it
    assert tokens_of(roomy) == 96 == roomy["cu_seq_lens_q"][-1] and roomy["shared_before"] is not once["shared_before"]
    found = []
    for batch in (once, roomy):
        trainer.model.zero_grad()
        outputs = trainer.model(**batch, fused_lm_head=True)
        scored = batch["shift_labels"][0] != IGNORED
        log_probs = outputs.log_probs[0][scored]
        (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((log_probs, gradients))
    (one, gradients), (other, filled) = found
    torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    assert len(gradients) > 4 and all(value.norm() > 1e-6 for value in gradients.values())
    for name, value in gradients.items():
        torch.testing.assert_close(filled[name], value, rtol=1e-5, atol=1e-7)


def test_a_reward_model_s_step_is_that_of_trl(tmp_path: Any) -> None:
    prompts, answers_of = [ids(i, 9) for i in range(4)], [ids(60 + i, 3) for i in range(8)]
    rows = Dataset.from_list([
        {"chosen_ids": [*prompt, *answers_of[i], 2], "rejected_ids": [*prompt, *answers_of[-i - 1]]}
        for i, prompt in enumerate(prompts)])
    ours, theirs = (built_of(backend, "reward", tmp_path, rows, model_name=tiny.scorer(num_hidden_layers=1))
                    for backend in ("fast", "trl"))
    assert "once" in next(iter(ours.trainer.get_train_dataloader()))
    found = step(theirs.trainer)
    assert_same_step(step(ours.trainer), found)
    assert found[2]["max_reward"] - found[2]["min_reward"] > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["dpo", "orpo"])
def test_in_bf16_it_is_as_near_to_fp32_as_whole_rows(algorithm: str, tmp_path: Any, monkeypatch: Any) -> None:
    found = {}
    for name, least, precision in (("fp32", 2.0, "fp32"), ("whole", 2.0, "bf16"), ("once", 0.1, "bf16")):
        monkeypatch.setattr("aligntune.backends.fast.preference_rows.LEAST_SAVED", least)
        built = built_of("fast", algorithm, tmp_path / name, pairs(LONG), use_peft=True, precision=precision)
        batch = next(iter(built.trainer.get_train_dataloader()))
        assert ("once" in batch) is (name == "once")
        found[name] = step(built.trainer)
    truth = found["fp32"][1]
    apart = {name: sum(float((found[name][1][key].float() - value).norm() ** 2) for key, value in truth.items()) ** 0.5
             for name in ("whole", "once")}
    size = sum(float(value.norm() ** 2) for value in truth.values()) ** 0.5
    assert 0 < apart["once"] < 1.5 * apart["whole"] + 1e-3 * size and size > 1e-3
    assert found["once"][0] == pytest.approx(found["fp32"][0], rel=2e-2)
