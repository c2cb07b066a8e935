"""Online methods over a base in NF4: tokens are drawn from the policy that learns, and TRL learns the same of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.backends.fast.forced import Pair
from tests.core import tiny

_SLOW = pytest.mark.slow


@pytest.mark.parametrize(("algorithm", "options"), [
    ("grpo", {}), pytest.param("rloo", {}, marks=_SLOW),
    pytest.param("ppo", {"num_generations": 1, "num_ppo_epochs": 1, "num_mini_batches": 1}, marks=_SLOW),
], ids=str)
def test_steps_are_trls_on_the_same_completions(algorithm: str, options: dict[str, Any], tmp_path: Any) -> None:
    source = tmp_path / "model"
    tiny.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(source)
    pair = Pair(algorithm, tmp_path, model_name=str(source), quantization="nf4", use_peft=True, lora_r=4, **options)
    told = pair.built.attestation()
    assert "rollouts: our engine" in told["layout"] and not told["eager"]
    assert len([line for line in told["modules"] if "lora on nf4" in line]) == 7
    assert told["step"]["ok"] and told["step"]["kernels"]["nf4_dequant_kernel"] > 7
    # Of the base as it was before it was packed the log-probs are 0.4 from these, in the mean.
    apart = pair.logged("sampling/sampling_logp_difference/max")[0]
    assert len(apart) == 2 and 0 < max(apart) < 1e-4
    # TRL stores the adapters of a quantised base in bf16: in gradients that are nearly 0 Adam takes its rounding for a
    # direction, and the second step starts elsewhere.
    for key, near in (("reward", 1e-6), ("entropy", 1e-4), ("grad_norm", 2**-6)):
        ours, theirs = pair.logged(key)
        assert len(ours) == 2 and ours == pytest.approx(theirs, rel=near), key
    assert min(pair.logged("grad_norm")[0]) > 1e-3
    _, apart_by, moved = zip(*pair.weights(), strict=True)
    assert min(moved) > 1e-4 and math.hypot(*apart_by) < 0.2 * math.hypot(*moved)
