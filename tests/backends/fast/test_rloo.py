"""RLOO on backend fast: TRL's numbers on the same completions, and what is said of how it runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.fast.forced import Pair

_SLOW = pytest.mark.slow


@pytest.mark.parametrize(("adapters", "options"), [
    (True, {"max_steps": 2}), pytest.param(True, {}, marks=_SLOW), pytest.param(False, {}, marks=_SLOW),
    pytest.param(True, {"num_iterations": 2, "beta": 0.0, "learning_rate": 2e-4}, marks=_SLOW),
])
def test_steps_are_trls_on_the_same_completions(adapters: bool, options: dict[str, Any], tmp_path: Any) -> None:
    """Losses, rewards, KL and weights after three steps; the engine's log-probs are the trainer's."""
    lora: dict[str, Any] = {"use_peft": True, "lora_r": 4} if adapters else {}
    pair = Pair("rloo", tmp_path, **{"max_steps": 3} | lora | options)
    layout = pair.built.attestation()["layout"]
    assert layout.startswith("rows: end to end in log-prob and loss passes; ") and "; rollouts: our engine" in layout
    assert isinstance(pair.drawn[0][0], list), "TRL's RLOO takes completions alone"
    rounds = len(pair.drawn)
    assert rounds == (2 if "num_iterations" in options else options.get("max_steps", 3))
    apart = pair.logged("sampling/sampling_logp_difference/max")[0]
    assert len(apart) == rounds and 0 < max(apart) < 1e-4
    keys = ["loss", "reward", "grad_norm", "entropy", "completions/mean_length", "clip_ratio/region_mean"]
    for key in [*keys, *(["kl"] if "beta" not in options else [])]:
        ours, theirs = pair.logged(key)
        assert ours and ours == pytest.approx(theirs, rel=2e-4, abs=2e-6), key
    assert pair.logged("grad_norm")[0][0] > 1e-3
    for name, apart_by, moved in pair.weights():
        assert moved > 1e-4 and apart_by < 0.02 * moved, name
    step = pair.built.attestation()["step"]
    # The policy that drew, the reference (adapters off, or a model of its own), and the loss.
    assert step["ok"] and step["kernels"]["logits_loss"] == (2 if "beta" in options else 3)
    named = [line for line in step["summary"] if line.startswith("reference: ")]
    assert bool(named) == (not adapters)
