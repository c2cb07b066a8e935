"""Log-probs of completions with rows end to end: the numbers and the gradients of padded batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aligntune.backends.fast import head
from aligntune.backends.fast.online import Flat
from tests.backends.fast.rollout.test_trl import built_of, logged
from tests.backends.trl.test_dynamic_sampling import spread_unless
from tests.core import tiny

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
    assert "kept" not in flat.inputs, "a bucket would not be less than all 15 tokens"
    assert not {"labels", "shift_labels", "kept"} & flat.trunk_inputs.keys() and "cu_seq_lens_q" in flat.trunk_inputs
    assert flat.inputs["shift_labels"].tolist() == [[-100] * 3 + kept[4:9] + [-100] + kept[10:12] + [-100] * 4]
    values = torch.arange(1.0, 16.0)[None].requires_grad_()
    padded = flat.padded(values)
    assert padded.tolist() == [[4, 5, 6, 7, 8], [10, 11, 0, 0, 0], [0] * 5]
    (padded * torch.arange(1.0, 16.0).view(3, 5)).sum().backward()
    assert values.grad.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5, 0, 6, 7, 0, 0, 0, 0]]


def test_the_head_is_told_where_completions_are() -> None:
    """Long prompts: 7 scored tokens of 217; the first token of an empty prompt has nothing before it to score it."""
    ids = torch.randint(3, 250, (3, 110), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 110, dtype=torch.long)
    mask[0, :107], mask[1, :109], mask[2, 105:106] = 1, 1, 1
    flat = Flat.of(ids, mask, 5)
    labels = flat.inputs["shift_labels"][0]
    assert flat.inputs["kept"].tolist() == [104, 105, *range(211, 215), *[-1] * 58]
    assert (labels != -100).nonzero().flatten().tolist() == [104, 105, *range(211, 215)]
    assert len(labels) == 217


def test_log_probs_and_gradients_are_those_of_padded_rows(tmp_path: Any) -> None:
    built = built_of("fast", "grpo", tmp_path)
    trainer = built.trainer
    layout = built.attestation()["layout"]
    assert layout.startswith("rows: end to end in log-prob and loss passes; ") and "; rollouts: our" in layout
    ids, mask = (x.to(trainer.accelerator.device) for x in batch())
    upstream = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1)).to(ids.device)
    found = []
    scored = torch.tensor([[j < n for j in range(COLUMNS)] for n in COMPLETIONS], device=ids.device)
    for flat in (True, False):
        trainer.rows_end_to_end = flat
        trainer.model.zero_grad()
        log_probs, entropies, aux = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, COLUMNS, compute_entropy=True)
        assert aux is None
        # A bonus on entropy is trained through it.
        (log_probs * upstream + 0.3 * entropies * scored * upstream).sum().backward()
        grads = [p.grad.clone() for p in trainer.model.parameters()]
        found.append((log_probs.detach().cpu(), entropies.detach().cpu(), grads))
    (ours, our_entropies, our_grads), (theirs, their_entropies, their_grads) = found
    scored = scored.cpu()
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


def test_without_the_prompts_the_head_gives_the_same(tmp_path: Any) -> None:
    trainer = built_of("fast", "grpo", tmp_path, model_name=tiny.llama(num_hidden_layers=1)).trainer
    ids = torch.randint(3, 250, (2, 36), generator=torch.Generator().manual_seed(2)).to(trainer.accelerator.device)
    mask = torch.ones_like(ids)
    mask[0, 34:] = 0
    assert Flat.of(ids, mask, 4).inputs["kept"].shape == (64,)
    found = []
    for flat in (True, False):
        trainer.rows_end_to_end = flat
        trainer.model.zero_grad()
        log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 4, compute_entropy=True)
        (log_probs * mask[:, -4:]).square().sum().backward()
        found.append((log_probs.detach() * mask[:, -4:], entropies.detach() * mask[:, -4:],
                      trainer.model.lm_head.weight.grad.clone(), trainer.model.model.embed_tokens.weight.grad.clone()))
    assert (found[1][0][mask[:, -4:].bool()] < 0).all()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


_SLOW = pytest.mark.slow
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4}
HALVES: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 4}


TWICE: dict[str, Any] = {"num_iterations": 2, "beta": 0.0}
EPOCHS: dict[str, Any] = {"num_ppo_epochs": 2, "num_mini_batches": 1, "num_generations": 1}
LOW: dict[str, Any] = {"precision": "bf16", "learning_rate": 1e-2}
OLD = {"ppo": "old_log_probs"}

# What rounding to bf16 makes of this model's log-probs. A rounding is off by 0.4 x 2^-8 = 0.0016 of a number (rms). Six
# of them lie one after the other in its layer and one in the last norm: the hidden state is off by sqrt(7) x 0.0016 =
# 0.0041 of itself, and so is a logit, a sum of 32 products, whose size is sqrt(32) x 0.2 = 1.13 (rms): 0.0047. Rounded
# itself it is off by 0.0018 more, together 0.005. Two passes that round apart differ by sqrt(2) x 0.005 = 0.0071 (rms),
# 0.0057 in the mean; a CPU's engine and trainer by 0.005 to 0.009, and 0.021 at most. Three and eight times as much is
# for other tokens and another order of sums; another policy is further off than twice the latter.
MEAN_IN_BF16, MOST_IN_BF16 = 3 * 0.0057, 8 * 0.0071


def gpu(algorithm: str, options: dict[str, Any]) -> Any:
    return pytest.param(algorithm, options, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", LORA | TWICE),
    *(pytest.param(algorithm, options, marks=_SLOW) for algorithm, options in (
        ("grpo", LORA | HALVES | TWICE), ("grpo", TWICE), ("dapo", LORA | TWICE), ("dr_grpo", LORA | TWICE),
        ("rloo", LORA | TWICE), ("ppo", LORA | EPOCHS))),
    *(gpu("grpo", one | TWICE | LOW) for one in (LORA, LORA | HALVES, {})),
    *(gpu("ppo", one | EPOCHS | LOW) for one in (LORA, {})),
], ids=str)
def test_the_first_pass_over_a_rollout_has_ratio_one(
    algorithm: str, options: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine that drew the rollout, the pass that scored it and the loss pass, whose rows may lie otherwise, are of
    one policy; the second loss pass is of another."""
    monkeypatch.setattr(head, "_budget", lambda model: 1)  # a head that trains makes its gradients in the forward
    low, adapters = options.get("precision") == "bf16", "use_peft" in options
    model = tiny.llama(num_hidden_layers=1)
    if low and adapters:  # all weights train in fp32, under autocast
        model = model.bfloat16()
    trainer = built_of("fast", algorithm, tmp_path, model_name=model, reward_functions=[spread_unless(lambda n: False)],
                       **options).trainer
    assert trainer.model.get_output_embeddings().weight.dtype == model.dtype
    loss_of, score, apart = trainer._compute_loss, trainer._get_per_token_logps_and_entropies, []

    def watched(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        def scored(*args: Any, **kwargs: Any) -> Any:
            found = score(*args, **kwargs)
            now = found[0].detach() * inputs["completion_mask"]
            old = inputs["old_logps"] - now.sum(1) if algorithm == "rloo" else (
                inputs[OLD.get(algorithm, "old_per_token_logps")] - now) * inputs["completion_mask"]
            apart.append(float(old.abs().max()))
            return found

        with monkeypatch.context() as patched:
            patched.setattr(trainer, "_get_per_token_logps_and_entropies", scored)
            return loss_of(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    first, second = apart[: len(apart) // 2], apart[len(apart) // 2 :]
    assert len(first) == len(second) == options.get("gradient_accumulation_steps", 1)
    most, mean = (MOST_IN_BF16, MEAN_IN_BF16) if low else (1e-5, 1e-5)
    assert max(first) < most < 2 * most < min(second), apart  # |log ratio|, that is |ratio - 1| to first order
    assert getattr(trainer, "in_forward", 0) == (0 if adapters else 2)
    (drawn_apart,), (drawn_most,) = (
        logged(trainer, f"sampling/sampling_logp_difference/{part}") for part in ("mean", "max"))
    assert 0 < drawn_apart < mean and drawn_most < most, (drawn_apart, drawn_most)
