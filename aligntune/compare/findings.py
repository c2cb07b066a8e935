"""Names what went wrong: each detector looks for the trace that one kind of mistake leaves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Arm = Mapping[str, Any]

INVALID, FAILED, SAID = "invalid", "failed", "said"
"""Severities: the comparison means nothing; an arm does not train the same model; something a reader should know."""


@dataclass(frozen=True)
class Finding:
    """Something about an arm, in words.

    Args:
        kind: its name for programs ("data-order", "zero-gradient", ...).
        severity: INVALID, FAILED or SAID.
        text: one sentence.
    """

    kind: str
    severity: str
    text: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class Data:
    """Whether two runs saw the same data, and up to where."""

    same: bool
    common_steps: int
    findings: tuple[Finding, ...]


def compare_data(a: Arm, b: Arm, *, online: bool, repacked: bool) -> Data:
    """Hold the documents of each step of A against B's.

    Args:
        online: the arms sample their own completions; only the prompts must agree.
        repacked: the arms differ in how rows fill a step; the rows may come in other steps.
    """
    one, two = a["steps"], b["steps"]
    if repacked:
        return _repacked(a, b)
    part = "prompts" if online else "ids"
    # Online, TRL mixes the rows of a round of generation with the random state that sampling left.
    span = a["round"] if online else 1
    for number in range(0, min(len(one), len(two)), span):
        x, y = ([name for step in steps[number : number + span] for name in step["data"][part]] for steps in (one, two))
        if (sorted(x) != sorted(y)) if online else (x != y):
            mine, theirs = a.get("dataset"), b.get("dataset")
            held = None if mine is None or theirs is None else mine == theirs
            return Data(False, number, (_other_rows(one, two, part, number, held=held),))
        if not online and one[number]["data"]["labels"] != two[number]["data"]["labels"]:
            return Data(False, number, (_other_labels(a, two[number], number),))
    if len(one) != len(two):
        return Data(False, min(len(one), len(two)), (Finding(
            "data", INVALID, f"the arms trained {len(one)} and {len(two)} steps"),))
    if online:
        common = next((number for number, (x, y) in enumerate(zip(one, two, strict=True))
                       if x["data"]["ids"] != y["data"]["ids"]), len(one))
        if common < len(one):
            return Data(True, common, (Finding(
                "rollouts", SAID, f"the arms sampled other completions from step {common + 1} on (a token's "
                "probability rounded differently): losses are compared up to there, then rewards over seeds"),))
    return Data(True, len(one), ())


def _other_rows(one: Sequence[Arm], two: Sequence[Arm], part: str, number: int, *, held: bool | None) -> Finding:
    """`held`: whether the arms' datasets hold the same rows, None where that is not known."""
    mine, theirs = (Counter(name for step in steps for name in step["data"][part]) for steps in (one, two))
    where = f"from step {number + 1} on"
    if mine == theirs:
        return Finding("data-order", INVALID, f"the arms saw the same rows in another order {where}")
    # With fewer steps than rows an other order also means other rows: those of the whole run are what can be told.
    shared = sum((mine & theirs).values())
    if held is False:
        return Finding("data", INVALID, f"the arms saw different data {where}: their datasets hold other rows "
                       f"({shared:,} of {sum(mine.values()):,} are common to both runs)")
    if shared:
        return Finding("data-order", INVALID, f"the arms saw other rows, or the same in another order, {where} "
                       f"({shared:,} of {sum(mine.values()):,} rows are common to both runs)")
    if held:
        return Finding("data-order", INVALID, f"the arms saw other rows {where}: their datasets hold the same ones, in "
                       "another order, and no row of one run came in the other")
    return Finding("data", INVALID, f"the arms saw different data {where}: no row is common to both")


def _other_labels(a: Arm, step: Arm, number: int) -> Finding:
    text = f"the same tokens, but other ones are learnt from step {number + 1} on: the loss mask differs"
    moved = [name for name, digests in a.get("shifted", {}).items()
             if number == 0 and digests == step["data"]["labels"]]
    if moved:
        text += f"; b's is a's shifted by one token ({moved[0][4:]})"
    return Finding("mask", INVALID, text)


def _repacked(a: Arm, b: Arm) -> Data:
    mine, theirs = (Counter(name for step in one["steps"] for name in step["data"]["ids"]) for one in (a, b))
    shared = sum((mine & theirs).values())
    held = [one.get("dataset") for one in (a, b)]
    if None not in held and held[0] != held[1]:
        return Data(False, 0, (Finding(
            "data", INVALID, "the arms fill their steps differently (packing), and with documents of different data: "
            f"{shared:,} of {sum(mine.values()):,} are common to both runs"),))
    return Data(True, 0, (Finding(
        "packing", SAID, f"the arms fill their steps differently (packing): {sum(mine.values()):,} and "
        f"{sum(theirs.values()):,} documents, {shared:,} common to both; their losses are not paired step by step"),))


# -------------------------------------------------------------------------------------------------- what ran, and where


def compare_starts(a: Arm, b: Arm) -> list[Finding]:
    """Different weights before the first step."""
    mine, theirs = a["weights"], b["weights"]
    if mine["dtypes"] != theirs["dtypes"]:
        return [Finding("start", SAID, f"weights are stored in {'/'.join(mine['dtypes'])} and "
                        f"{'/'.join(theirs['dtypes'])}: their values before the first step are not compared")]
    parts = [part for part in ("trained", "frozen") if mine[part] != theirs[part]]
    if not parts:
        return []
    return [Finding("start", INVALID, f"the arms start from different weights (those that are {' and '.join(parts)})")]


def attested(arm: Arm, name: str, backend: str, peer: str | None = None) -> list[Finding]:
    """What an arm's attestation, or the trace of a step, says against it."""
    paper = arm["attestation"]
    label = f"{name} ({arm['label']})"
    trace = arm.get("trace")
    if peer is not None and trace is not None and trace["device"] == "cuda":
        from aligntune.compare.peers import PEERS

        if not any(re.search(PEERS[peer].kernels, kernel) for kernel in trace["names"]):
            return [Finding("eager", INVALID, f"{label} ran eager: no kernel of {peer} is among those that step "
                            f"{trace['step']} launched")]
    if paper["backend"] != backend and backend != "auto":
        return [Finding("eager", INVALID, f"{label} ran on backend {paper['backend']!r}, not {backend!r}")]
    if paper["backend"] != "fast":
        return []
    step = paper.get("step")
    if step is None:
        return [Finding("eager", INVALID, f"{label}: no step was traced, so nothing shows what ran")]
    found = [Finding("eager", INVALID, f"{label} fell back: {problem}") for problem in step["problems"][:5]]
    if not found and not step["promised"]:
        found.append(Finding("eager", INVALID, f"{label} ran eager: not one of our kernels was promised or launched"))
    eager = paper.get("eager", [])
    if eager:
        found.append(Finding("partly-eager", SAID, f"{label}: {len(eager)} kinds of module stay eager, as announced "
                             f"when it was built: {'; '.join(eager[:3])}"))
    return found


def machine_findings(results: Mapping[str, Sequence[Arm]]) -> list[Finding]:
    """A shared or throttling card, an interpreter."""
    found = []
    for role in ("a", "b"):
        for one in results[role]:
            machine = one.get("machine") or {}
            run = f"{role}{one['repeat'] + 1}"
            if machine.get("shared"):
                others = "".join(f"; {other}" for other in (machine.get("others") or [])[:3])
                found.append(Finding("card-shared", SAID, f"{run}: somebody else was on the card "
                                     f"({machine['memory_before_mib']:,.0f} MiB in use before it started{others})"))
            if machine.get("throttled"):
                found.append(Finding("card-throttled", SAID, f"{run}: the card slowed down: "
                                     f"{', '.join(machine['throttled'])}"))
            elif machine.get("power_capped"):
                found.append(Finding("card-power", SAID, f"{run}: the card ran into its power limit"))
            if one.get("interpreter") and one["attestation"]["backend"] == "fast":
                found.append(Finding("interpreter", SAID, f"{run} ran in Triton's interpreter, about 1000x slower: "
                                     "its speed says nothing"))
    return found


# ----------------------------------------------------------------------------------------------------------- the losses


def leaks(arm: Arm, name: str, floor: float) -> list[Finding]:
    """Documents of a flat row that see each other."""
    leak = arm.get("leak")
    # Exchanged tokens leave untouched documents' log-probs alone up to rounding.
    if leak is None or leak["moved"] <= 10 * floor * max(leak["scale"], 1.0):
        return []
    return [Finding("document-leak", FAILED, f"{name} ({arm['label']}): attention leaks across documents: with the "
                    f"first document of a row exchanged, log-probs of later ones move by up to {leak['moved']:.3g}")]


def mask_mistake(a: Arm, b: Arm, hypotheses: Mapping[str, float] | None, tolerance: float) -> list[Finding]:
    """The first loss of an arm is what the oracle computes under a known mistake, the other's what it is without."""
    if not hypotheses or "right" not in hypotheses:
        return []
    wrong, name_of = b, "b"
    mine, theirs = a["steps"][0]["loss"], b["steps"][0]["loss"]
    right = hypotheses["right"]
    if abs(mine - right) > tolerance:
        wrong, name_of, mine, theirs = a, "a", theirs, mine
    words = {"mask+1": "the loss mask is shifted by one token (+1)",
             "mask-1": "the loss mask is shifted by one token (-1)",
             "all": "every token is learnt, the prompt too", "leak": "attention leaks across documents"}
    if abs(mine - right) > tolerance or abs(theirs - right) <= tolerance:
        return []
    for name, text in words.items():
        # A trainer that counts tokens before it masks them divides the wrong sum by the right count.
        values = [hypotheses[key] for key in (name, f"{name}, right count") if key in hypotheses]
        value = next((one for one in values if abs(theirs - one) <= tolerance < abs(right - one)), None)
        if value is not None:
            kind = "document-leak" if name == "leak" else "mask"
            return [Finding(kind, FAILED, f"{name_of} ({wrong['label']}): {text}: its first loss is {theirs:.6g}; the "
                            f"oracle gets {value:.6g} under that mistake and {right:.6g} without")]
    return []


def scaled_loss(mine: np.ndarray, theirs: np.ndarray, tolerance: float) -> list[Finding]:
    """Every loss of B is the same multiple of A's."""
    count = min(len(mine), 10)
    x, y = mine[:count], theirs[:count]
    if count < 2 or not float(x @ x):
        return []
    factor = float(x @ y) / float(x @ x)
    apart, left = np.abs(y - x).max(), np.abs(y - factor * x).max()
    if apart <= tolerance or left > 0.2 * apart or abs(factor) < 0.05:
        return []
    return [Finding("loss-scale", FAILED, f"every loss of b is {factor:.4f} times a's")]


def missing_kl(a: Arm, b: Arm, common: int, tolerance: float) -> list[Finding]:
    """The KL term is in one arm's loss and not in the other's although beta > 0; below `tolerance` it tells nothing."""
    found = []
    for one, name in ((a, "a"), (b, "b")):
        # The model has not moved at the first step, and a KL of rollouts is told with the next round's alone.
        later = [step["metrics"].get("kl") for step in one["steps"][max(1, one["round"]):]]
        if one["beta"] > 0 and len(later) >= 2 and not any(later):
            found.append(Finding("kl-missing", FAILED, f"{name} ({one['label']}): beta is {one['beta']:g}, but "
                                 "the KL to the reference is 0 or absent in every step after the first"))
    if found or max(a["beta"], b["beta"]) <= 0:
        return found
    terms, rest = [], []
    for x, y in list(zip(a["steps"], b["steps"], strict=False))[:common]:
        kl = x["metrics"].get("kl") or y["metrics"].get("kl")
        if kl:
            terms.append(max(a["beta"], b["beta"]) * kl)
            rest.append(y["loss"] - x["loss"])
    k, r = np.array(terms), np.array(rest)
    if not len(k) or np.abs(k).max() <= tolerance:
        return []
    share = float(k @ r) / float(k @ k)
    for name, one, wanted in (("b", b, -1.0), ("a", a, 1.0)):
        # The metric weighs tokens alike, the loss may weigh sequences alike: the share is near 1, not 1.
        if abs(share - wanted) < 0.3:
            found.append(Finding("kl-missing", FAILED, f"{name} ({one['label']}): the KL term is missing from its "
                                 f"loss: b's losses differ from a's by {share:+.2f} x beta x KL over {len(k)} steps"))
    return found


def zero_gradients(table: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Parameters whose gradient is 0 in one arm only."""
    found = []
    for name, other in (("b", "a"), ("a", "b")):
        lost = [row["name"] for row in table if row[f"norm_{name}"] == 0 and row[f"norm_{other}"] > 0]
        if lost:
            found.append(Finding("zero-gradient", FAILED, f"{name}: the gradient of {len(lost)} parameters is exactly "
                                 f"0, in {other} it is not: {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}"))
    return found
