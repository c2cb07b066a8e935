"""What names a mistake, on losses whose difference is known; and what is no mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aligntune.compare import findings
from tests.compare import made_up

BETA = 0.04


def arm(losses: list[float], kls: list[float | None], *, label: str = "trl", span: int = 1) -> dict[str, Any]:
    steps = [made_up.step(n, loss, metrics={} if kl is None else {"kl": kl})
             for n, (loss, kl) in enumerate(zip(losses, kls, strict=True), 1)]
    return {"steps": steps, "beta": BETA, "round": span, "label": label}


def test_a_loss_that_lacks_its_kl_differs_by_it() -> None:
    kls: list[float | None] = [0.0, 0.5, 2.0, 1.0]
    whole = arm([1.0 + BETA * (kl or 0.0) for kl in kls], kls)
    lacking, half = arm([1.0] * 4, kls), arm([1.0 + 0.5 * BETA * (kl or 0.0) for kl in kls], kls)
    for a, b, who in ((whole, lacking, "b"), (lacking, whole, "a")):
        (found,) = findings.missing_kl(a, b, 4, 1e-6)
        assert found.kind == "kl-missing" and found.text.startswith(f"{who} (trl): the KL term is missing")
        assert f"{'-' if who == 'b' else '+'}1.00 x beta x KL over 3 steps" in found.text
    assert findings.missing_kl(whole, half, 4, 1e-6) == findings.missing_kl(whole, whole, 4, 1e-6) == []
    assert findings.missing_kl(whole, lacking, 4, 1.0) == []  # too small to tell anything
    # From the third step on the arms sampled otherwise: its difference is not the KL's.
    whole["steps"][2]["loss"] = 9.0
    assert len(findings.missing_kl(whole, lacking, 2, 1e-6)) == 1 and findings.missing_kl(whole, lacking, 3, 1e-6) == []


def test_a_kl_that_no_later_step_tells_is_missing() -> None:
    full = arm([1.0] * 3, [0.0, 0.1, 0.1])
    for kls, missing in (([0.0, 0.0, 0.0], True), ([None, None, None], True), ([0.0, 0.0, 0.1], False)):
        found = findings.missing_kl(full, arm([1.0] * 3, kls), 0, 1e-6)
        assert [one.text.startswith("b (trl): beta is 0.04") for one in found] == [True] * missing
    assert findings.missing_kl(arm([1.0] * 2, [0.0, 0.1]), arm([1.0] * 2, [0.0, 0.0]), 0, 1e-6) == []
    first_only = [0.0, None, None, None]
    assert findings.missing_kl(arm([1.0] * 4, first_only, span=4), arm([1.0] * 4, first_only, span=4), 0, 1e-6) == []


def test_a_multiple_of_the_losses_is_told_with_its_factor() -> None:
    mine = np.array([3.0, 2.5])
    (found,) = findings.scaled_loss(mine, 1.01 * mine, 1e-4)
    assert (found.kind, found.text) == ("loss-scale", "every loss of b is 1.0100 times a's")
    assert findings.scaled_loss(mine, mine + np.array([0.03, -0.03]), 1e-4) == []
    assert findings.scaled_loss(mine, 1.01 * mine, 0.1) == findings.scaled_loss(mine[:1], 1.01 * mine[:1], 1e-4) == []


def test_a_mistake_that_the_oracle_cannot_tell_from_none_is_not_named() -> None:
    def named(wrong: float, theirs: float) -> list[str]:
        one, two = arm([2.0, 2.0], [None, None]), arm([theirs, 2.0], [None, None])
        return [found.kind for found in findings.mask_mistake(one, two, {"right": 2.0, "all": wrong}, 0.1)]

    assert named(2.5, 2.5) == ["mask"] and named(2.5, 2.3) == named(2.08, 2.15) == named(2.5, 2.0) == []
    assert findings.mask_mistake(arm([9.0], [None]), arm([2.5], [None]), {"right": 2.0, "all": 2.5}, 0.1) == []
    assert findings.mask_mistake(arm([2.0], [None]), arm([2.5], [None]), None, 0.1) == []


@pytest.mark.parametrize(("moved", "kinds"), [(1e-6, []), (1e-3, ["document-leak"])])
def test_a_leak_is_what_moves_beyond_rounding(moved: float, kinds: list[str]) -> None:
    one = {"label": "fast", "leak": {"documents": 2, "moved": moved, "scale": 8.0}}
    assert [found.kind for found in findings.leaks(one, "b", 2e-6)] == kinds
    assert findings.leaks({"label": "fast", "leak": None}, "b", 2e-6) == []
