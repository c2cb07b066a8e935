"""Each algorithm runs from a model, a dataset and, where it learns from one, a reward; the rest are its defaults.

The datasets are those that people have: ShareGPT conversations, pairs of them, and unpaired completions with labels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune import DataError, create_reward_trainer, create_rl_trainer, create_sft_trainer
from aligntune.algorithms import ALGORITHMS
from tests.core.test_trainer import weights


def sharegpt(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


CONVERSATIONS = [{"conversations": sharegpt(f"What is {i} + 1?", str(i + 1))} for i in range(16)]
PAIRS = [{side: sharegpt(f"What is {i} + 1?", answer) for side, answer in (("chosen", str(i + 1)), ("rejected", "No."))}
         for i in range(16)]
UNPAIRED = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1) if i % 2 else "No.", "label": bool(i % 2)}
            for i in range(16)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": CONVERSATIONS, "preference": PAIRS, "reward": PAIRS, "unpaired": UNPAIRED, "prompts": CONVERSATIONS,
}


def by_place(completions: list[Any], **columns: Any) -> list[float]:
    """Of a model that answers every prompt the same way each time, something is still to be learnt."""
    return [float(index % 3) for index in range(len(completions))]


@pytest.mark.parametrize("name", ALGORITHMS.names())
def test_model_and_dataset_and_reward_are_enough(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the run folder has a default too
    spec = ALGORITHMS.load(name)
    given: dict[str, Any] = {"max_steps": 1}  # the one thing that is not the default: a test ends
    if spec.needs_reward:
        given["reward_functions"] = [by_place]
    model, rows = "builtin:tiny-instruct", ROWS[spec.takes]
    if name in ("sft", "reward"):
        trainer = {"sft": create_sft_trainer, "reward": create_reward_trainer}[name](model, rows, **given)
    else:
        trainer = create_rl_trainer(model, rows, algorithm=name, **given)
    assert len(trainer.trainer.train_dataset) == len(rows)
    before = weights(trainer.trainer)
    out = trainer.train()
    assert out.global_step == 1 and math.isfinite(out.training_loss)
    logged = trainer.trainer.state.log_history[0]
    moved = any(not torch.equal(value, before[key]) for key, value in weights(trainer.trainer).items())
    # A warm-up starts at a rate of 0; what was learnt then shows in the gradient.
    assert logged["grad_norm"] > 0 and moved == (logged["learning_rate"] > 0)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "summary.json").is_file()


def test_pairs_as_sharegpt_writes_them_are_the_same_tokens(tmp_path: Path) -> None:
    """The conversation so far in one column, and one turn each in `chosen` and `rejected`."""
    turns = [{"conversations": row["chosen"][:1], "chosen": row["chosen"][1], "rejected": row["rejected"][1]}
             for row in PAIRS]
    for name in ("dpo", "kto"):
        given = {"algorithm": name, "max_steps": 1, "report_to": "none"}
        found = [list(create_rl_trainer("builtin:tiny-instruct", rows, output_dir=str(tmp_path / f"{name}{index}"),
                                        **given).trainer.train_dataset) for index, rows in enumerate((PAIRS, turns))]
        assert found[0] == found[1] and len(found[0]) == (32 if name == "kto" else 16)
    answered = [{**turns[0], "conversations": PAIRS[0]["chosen"]}]
    with pytest.raises(DataError, match="conversations: ends with an answer"):
        create_rl_trainer("builtin:tiny-instruct", answered, algorithm="dpo", output_dir=str(tmp_path / "bad"))


def test_unpaired_rows_keep_their_labels_and_pairs_give_two_each(tmp_path: Path) -> None:
    given = {"algorithm": "kto", "max_steps": 1, "report_to": "none"}
    single = create_rl_trainer("builtin:tiny-instruct", UNPAIRED, output_dir=str(tmp_path / "a"), **given)
    assert sorted(single.trainer.train_dataset["label"]) == [False] * 8 + [True] * 8
    pairs = create_rl_trainer("builtin:tiny-instruct", PAIRS, output_dir=str(tmp_path / "b"), **given)
    assert sorted(pairs.trainer.train_dataset["label"]) == [False] * 16 + [True] * 16
