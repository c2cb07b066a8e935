"""A prompt that several rows begin with, computed once: the layout by hand, and the numbers of whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aligntune.backends.fast.online import Flat
from aligntune.backends.fast.ops.attention import attention, attention_reference
from aligntune.backends.fast.shared_prompts import SharedPrompts, segments_of, shared_in
from tests.backends.fast.rollout.test_trl import built_of


def batch(prompts: list[int], groups: list[int], completions: list[int], *, width: int = 9, columns: int = 5,
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a prompt of `prompts[g]` tokens for g in `groups` and so many tokens of completion."""
    draw = torch.Generator().manual_seed(0)
    edge = width - columns
    ids, mask = torch.zeros(len(groups), width, dtype=torch.long), torch.zeros(len(groups), width, dtype=torch.long)
    made = [torch.randint(3, 250, (length,), generator=draw) for length in prompts]
    for row, (group, completion) in enumerate(zip(groups, completions, strict=True)):
        if prompts[group]:
            ids[row, edge - prompts[group] : edge] = made[group]
        ids[row, edge : edge + completion] = torch.randint(3, 250, (completion,), generator=draw)
        mask[row, edge - prompts[group] : edge + completion] = 1
    return ids, mask


def test_the_layout_by_hand() -> None:
    ids, mask = batch([4, 3], [0, 1, 0], [2, 1, 3])
    flat = Flat.of(ids, mask, 5, share=True)
    whole = Flat.of(ids, mask, 5)
    assert whole.inputs["input_ids"].shape == (1, 17) and shared_in(whole.inputs) is None
    prompt, other = ids[0, :4].tolist(), ids[1, 1:4].tolist()
    one, two, three = ids[0, 4:6].tolist(), ids[1, 4:5].tolist(), ids[2, 4:7].tolist()
    assert flat.inputs["input_ids"].tolist() == [[*prompt[:3], prompt[3], *one, *other, *two, prompt[3], *three]]
    assert flat.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 3, 4, 5, 6]]
    assert flat.inputs["cu_seq_lens_q"].tolist() == [0, 3, 6, 10, 14]
    assert flat.inputs["max_length_q"] == 4
    shared = shared_in(flat.inputs)
    assert shared is not None and {x.dtype for x in shared} == {torch.int32}
    assert shared.before.tolist() == [0, 3, 0, 3] and shared.group.tolist() == [0, 0, 0, 0]
    assert shared.users.tolist() == [[1, 3]]
    values = torch.arange(1.0, 15.0)[None]
    # Each completion's first token is scored by its own copy of the prompt's last one.
    assert flat.padded(values).tolist() == [[4, 5, 0, 0, 0], [9, 0, 0, 0, 0], [11, 12, 13, 0, 0]]
    assert (flat.rows, flat.columns) == (3, 5)


@pytest.mark.parametrize(("prompts", "groups", "completions"), [
    ([4, 4], [0, 1], [5, 5]),  # no two alike
    ([1], [0, 0], [5, 5]), ([0], [0, 0, 0], [3, 2, 1]),  # nothing before the last token
    ([2], [0, 0], [5, 5]),  # one token of fourteen
    ([4], [0], [5]),
])
def test_what_spares_too_little_stays_whole(prompts: list[int], groups: list[int], completions: list[int]) -> None:
    ids, mask = batch(prompts, groups, completions)
    assert segments_of(ids, mask, 5) is None
    assert shared_in(Flat.of(ids, mask, 5, share=True).inputs) is None


def test_padding_is_no_token_of_a_prompt() -> None:
    """A prompt that begins with what another is padded with is another; what lies under the mask does not count."""
    ids, mask = batch([4, 4, 4], [0, 1, 2, 2], [1, 1, 1, 1])
    ids[0, :4] = torch.tensor([0, 7, 8, 9])
    ids[1, :4], mask[1, 0] = torch.tensor([0, 7, 8, 9]), 0
    ids[3, 0], mask[2:, 0] = 77, 0
    found = segments_of(ids, mask, 5)
    assert found is not None and found.prompts == 1
    assert found.before.tolist() == [0, 0, 0, 2, 2] and found.mask[1:3].tolist() == mask[:2].tolist()


def test_a_row_whose_prompt_is_its_own_stays_whole() -> None:
    ids, mask = batch([4, 3], [0, 1, 0], [2, 1, 3])
    flat = Flat.of(ids, mask, 5, share=True)
    assert flat.inputs["cu_seq_lens_q"].tolist() == [0, 3, 6, 10, 14]
    assert flat.inputs["input_ids"].shape == (1, 14)


def test_users_of_several_prompts() -> None:
    """In the order of the rows, whatever the order of the prompts; one is no other row's."""
    ids, mask = batch([4, 4, 4], [1, 0, 2, 1, 0, 1], [1] * 6)
    shared = shared_in(Flat.of(ids, mask, 5, share=True).inputs)
    assert shared is not None and shared.before.tolist() == [0, 0, 3, 3, 0, 3, 3, 3]
    assert shared.users.tolist() == [[2, 5, 7], [3, 6, -1]]
    assert [shared.group[n] for n, before in enumerate(shared.before) if before] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("window", [None, 2, 4])
def test_a_row_that_goes_on_from_another_is_one_row(window: int | None, device: str) -> None:
    """Rows of 3 + 2 and 3 + 1 tokens that share three, one of 4, an empty one."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 10, 8, device=device) for heads in (4, 2, 2))
    ends = torch.tensor([0, 3, 5, 5, 9, 10], dtype=torch.int32, device=device)
    shared = SharedPrompts(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (
        [0, 3, 0, 0, 3], [0] * 5, [[1, 4]])))
    found = attention(q, k, v, ends, max_seqlen=4, scale=0.4, window=window, shared=shared)
    for whole in ([0, 1, 2, 3, 4], [0, 1, 2, 9], [5, 6, 7, 8]):
        at, end = torch.tensor([0, len(whole)], dtype=torch.int32, device=device), torch.tensor(whole, device=device)
        wanted = attention_reference(*(x[:, :, end] for x in (q, k, v)), at, max_seqlen=5, scale=0.4, window=window)
        torch.testing.assert_close(found[:, end], wanted)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("options", [
    pytest.param({}, marks=pytest.mark.slow), {"use_peft": True, "lora_r": 4}], ids=["full", "lora"])
def test_log_probs_and_gradients_are_those_of_whole_rows(options: dict[str, Any], tmp_path: Any) -> None:
    """Two prompts in any order, one row without a completion, one without a prompt."""
    built = built_of("fast", "grpo", tmp_path, **options)
    trainer = built.trainer
    if options:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05)
    ids, mask = (x.to(trainer.accelerator.device) for x in batch(
        [9, 7, 0], [0, 1, 0, 0, 1, 2], [5, 2, 0, 4, 5, 3], width=14, columns=5))
    upstream = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(ids.device)
    scored = torch.tensor([[j < n for j in range(5)] for n in (5, 2, 0, 4, 5, 3)], device=ids.device)
    scored[5, 0] = False  # of an empty prompt the first token has nothing before it
    found = []
    for share in (True, False):
        flat = Flat.of(ids, mask, 5, share=share)
        assert ("shared_before" in flat.inputs) is share
        assert flat.inputs["input_ids"].shape[1] == (60 - 2 * 8 - 6 if share else 60)
        trainer.model.zero_grad()
        outputs = trainer.model(**flat.inputs, fused_lm_head=True)
        log_probs, entropy = flat.padded(outputs.log_probs), flat.padded(outputs.entropy)
        (log_probs * upstream + 0.3 * entropy * scored * upstream).sum().backward()
        found.append((log_probs.detach(), entropy.detach(), {
            name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}))
    (ours, our_entropy, our_grads), (theirs, their_entropy, their_grads) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_entropy, their_entropy, rtol=1e-5, atol=1e-5)
    assert theirs[scored].abs().min() > 0.1 and our_grads.keys() == their_grads.keys() and our_grads
    for name, grad in their_grads.items():
        assert (our_grads[name] - grad).norm() <= 2e-5 * grad.norm() + 1e-7, name
    assert sum(float(grad.norm()) for grad in their_grads.values()) > 0.1
