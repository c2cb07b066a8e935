"""DAPO's dynamic sampling on backend fast: every round is our engine's, and TRL trains the same on what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from aligntune.backends.fast.rollout.engine import RolloutEngine
from tests.backends.fast.forced import Pair
from tests.backends.trl.test_dynamic_sampling import number, spread_unless
from tests.core import tiny

GROUP, PROMPTS = 4, 2


def test_flat_groups_are_drawn_anew_by_the_engine(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts in three earn one reward throughout: what is drawn for them is counted by hand."""
    tokenizer, rounds, generate = tiny.tokenizer(), [], RolloutEngine.generate

    def recorded(self: RolloutEngine, prompt_ids: Any, **options: Any) -> Any:
        rollout = generate(self, prompt_ids, **options)
        assert options["num_generations"] == [GROUP] * len(prompt_ids)
        rounds.append([(number(tokenizer.decode(ids)), rollout.completion_ids[i * GROUP :][:GROUP])
                       for i, ids in enumerate(prompt_ids)])
        return rollout

    monkeypatch.setattr(RolloutEngine, "generate", recorded)
    pair = Pair("dapo", tmp_path, use_peft=True, lora_r=4, batch_size=PROMPTS * GROUP, overlong_buffer_len=0,
                reward_functions=[spread_unless(lambda n: n % 3 != 0)])
    told = {key: pair.logged(f"dynamic_sampling/{key}")[0] for key in (
        "rounds", "bound_reached", "drawn_completions", "discarded_completions", "discarded_tokens", "flat_groups",
        "reward_drawn")}
    assert len(told["rounds"]) == 2 and sum(told["rounds"]) >= 2 and len(rounds) == 2 + sum(told["rounds"])
    left = iter(rounds)
    for step, fresh in enumerate(told["rounds"]):
        groups = [group for _ in range(1 + int(fresh)) for group in next(left)]
        assert len({n for n, _ in groups}) == len(groups), "fresh prompts"
        spread = [completions for n, completions in groups if n % 3 == 0]
        assert len(spread) >= PROMPTS
        tokens = sum(len(ids) for _, completions in groups for ids in completions)
        kept = sum(len(ids) for completions in spread[:PROMPTS] for ids in completions)
        share = 1 - len(spread) / len(groups)
        expected = {"bound_reached": 0, "drawn_completions": len(groups) * GROUP, "discarded_tokens": tokens - kept,
                    "discarded_completions": (len(groups) - PROMPTS) * GROUP, "flat_groups": share,
                    "reward_drawn": 1 + 1.5 * (1 - share)}
        assert {key: told[key][step] for key in expected} == pytest.approx(expected)
    assert sum(told["discarded_completions"]) > 0
    # What was kept is scored with the log-probs of its own round.
    apart = pair.logged("sampling/sampling_logp_difference/max")[0]
    assert len(apart) == 2 and 0 < max(apart) < 1e-4
    assert "rollouts: our engine" in pair.built.attestation()["layout"]
    # TRL, with the same rounds, discards the same and trains the same.
    for key in ("loss", "grad_norm", "reward", "frac_reward_zero_std", *(f"dynamic_sampling/{key}" for key in told)):
        ours, theirs = pair.logged(key)
        assert ours and ours == pytest.approx(theirs, rel=2e-4, abs=2e-6), key
    assert pair.logged("reward")[0] == [2.5] * 2 and min(pair.logged("grad_norm")[0]) > 1e-3
    for name, apart_by, moved in pair.weights():
        assert moved > 1e-4 and apart_by < 0.02 * moved, name
