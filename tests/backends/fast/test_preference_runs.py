"""Preference methods on backend "fast" from the factory to the log: runs, evaluation, resume, references."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aligntune import create_reward_trainer, create_rl_trainer
from aligntune.backends.fast import attachment_of
from aligntune.backends.fast.build import lay_rows
from aligntune.errors import ConfigError
from tests.backends.fast.preference_steps import assert_same_step, built_of, pairs, small, step
from tests.backends.fast.test_preference import passes_done_once
from tests.backends.fast.test_preference_reward import scored, scorer
from tests.backends.fast.test_preference_unpaired import unpaired
from tests.core import tiny
from tests.core.test_trainer import At, give_up, lines, same, weights

ALGORITHMS = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "reward")
PAIRS = [{"prompt": f"say {i}", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)} for i in range(12)]
HELD_OUT = [{"prompt": f"tell {i}", "chosen": f" {i}" * (i % 2 + 1), "rejected": " no" * (i % 3 + 1)} for i in range(5)]
NOT_OF_THE_MODEL = ("runtime", "per_second", "time", "total_flos", "epoch", "learning_rate", "memory")


def but(*quick: str) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    small().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def make(algorithm: str, source: Any, path: Path, backend: str = "fast", **options: Any) -> Any:
    given: dict[str, Any] = {
        "backend": backend, "output_dir": str(path), "max_steps": 3, "batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "max_seq_length": 64, "progress": False,
    } | options  # fmt: skip
    if algorithm == "reward":
        return create_reward_trainer(source, PAIRS, **given)
    return create_rl_trainer(source, PAIRS, algorithm=algorithm, **given)


def history(trainer: Any) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not any(word in key for word in NOT_OF_THE_MODEL)}
            for row in trainer.trainer.state.log_history]


ROWS = {"kto": unpaired, "reward": scored, "dpo": pairs}


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "reward"])
def test_a_collator_that_overrides_trls_lays_the_rows(algorithm: str, tmp_path: Path) -> None:
    options = {"model_name": scorer()} if algorithm == "reward" else {"use_peft": True}
    trainer = built_of("fast", algorithm, tmp_path, ROWS[algorithm](), **options).trainer
    attachment = attachment_of(trainer.model)
    assert trainer.rows_end_to_end and trainer.padded_because(attachment) is None
    mine = type("Mine", (type(trainer.theirs),), {})(pad_token_id=0)
    trainer.rows_end_to_end, trainer.data_collator = False, mine
    assert lay_rows(trainer, attachment) == "rows: padded, Mine makes the batches"
    assert trainer.data_collator is mine and not trainer.rows_end_to_end


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["reward", "dpo", "kto", "orpo"])
def test_noise_on_embeddings_is_trls(algorithm: str, tmp_path: Path) -> None:
    def made(backend: str) -> Any:
        model = {"model_name": scorer()} if algorithm == "reward" else {"use_peft": True}
        return built_of(backend, algorithm, tmp_path, ROWS.get(algorithm, pairs)(), **model,
                        trainer_options={"neftune_noise_alpha": 5.0})

    ours, theirs = made("fast"), made("trl")
    assert ours.attestation()["layout"].startswith("rows: padded, neftune_noise_alpha scales its noise by")
    losses = []
    for one in (ours, theirs):
        torch.manual_seed(0)
        one.trainer.train()
        losses.append([row["loss"] for row in one.trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[1][0] > 0.1


@pytest.mark.parametrize("algorithm", but())
def test_a_run_of_accumulated_steps_with_evaluation(algorithm: str, model: str, tmp_path: Path) -> None:
    """The history of a run is TRL's; the last batch of evaluation has another size than the others."""
    options = {"gradient_accumulation_steps": 2, "use_peft": algorithm != "kto", "eval_dataset_name": HELD_OUT,
               "eval_steps": 3, "eval_batch_size": 3}
    ours, theirs = (make(algorithm, model, tmp_path / backend, backend, **options) for backend in ("fast", "trl"))
    for trainer in (ours, theirs):
        trainer.train()
    assert not ours.attestation()["step"]["problems"]
    found, expected = history(ours), history(theirs)
    assert [set(row) for row in found] == [set(row) for row in expected]
    compared = 0
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            if key.startswith(("logits/", "eval_logits/")) and algorithm in ("orpo", "simpo", "cpo"):
                continue
            assert one[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key
            compared += isinstance(value, float) and value != 0
    assert compared > 20 and any("eval_loss" in row for row in expected) and expected[0]["grad_norm"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", but("reward"))
def test_a_run_that_was_cut_goes_on_bit_for_bit(algorithm: str, model: str, tmp_path: Path) -> None:
    """Logged every other step: what the logs average is on the GPU at the cut, and in the checkpoint."""
    options = {"save_steps": 3, "logging_steps": 2, "use_peft": True, "lora_r": 4, "max_steps": 5}
    whole = make(algorithm, model, tmp_path / "whole", **options)
    start = weights(whole.trainer)
    whole.train()
    broken = make(algorithm, model, tmp_path / "run", **options)
    broken.trainer.add_callback(At(4, give_up))
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    resumed = make(algorithm, model, tmp_path / "run", resume=True, **options)
    assert resumed.train().global_step == 5
    assert same(weights(whole.trainer), weights(resumed.trainer)) and not same(weights(whole.trainer), start)
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")


@pytest.mark.parametrize(("algorithm", "adapters"), [
    ("dpo", True), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("kto", True), ("dpo", False))),
])  # fmt: skip
def test_precomputed_references(algorithm: str, adapters: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """They are computed flat, over the kernels, while the trainer is built; a step then reads them."""
    from aligntune.backends.fast.preference import FlatPreference

    seen = []
    plain = FlatPreference._quiet_score
    monkeypatch.setattr(FlatPreference, "_quiet_score",
                        lambda self, model, flat, kind=None: seen.append(flat) or plain(self, model, flat, kind))
    rows = pairs() if algorithm == "dpo" else unpaired()
    rows = rows.add_column("tag", [str(tmp_path)] * len(rows))  # TRL keeps what it computes, by the rows' fingerprint
    options = {"precompute_ref_log_probs": True, "use_peft": adapters, "beta": 0.3, "size": 0.1}
    ours = built_of("fast", algorithm, tmp_path, rows, rows.select(range(3)), **options).trainer
    assert len(seen) == 3 and all("places" in flat for flat in seen)
    if not adapters:  # the reference is what the model was
        torch.nn.init.normal_(ours.model.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    batch = next(iter(ours.get_train_dataloader()))
    assert {name for name in batch if "ref_" in name} and "both" not in batch
    found = step(ours)
    assert len(seen) == (4 if algorithm == "kto" else 3)  # the policy's mismatched completions
    theirs = built_of("trl", algorithm, tmp_path, rows.add_column("other", [1] * len(rows)), **options).trainer
    if not adapters:
        torch.nn.init.normal_(theirs.model.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    expected = step(theirs)
    assert_same_step(found, expected)
    assert abs(expected[2]["rewards/margins"]) > 1e-3
    if algorithm == "dpo":
        ours.evaluate(rows.select(range(3, 6)))
        assert len(seen) == 4


def test_rows_that_were_asked_to_be_padded_stay_so_in_evaluation(tmp_path: Path) -> None:
    rows = pairs().add_column("tag", [str(tmp_path)] * len(pairs()))
    trainer = built_of("fast", "dpo", tmp_path, rows, precompute_ref_log_probs=True, use_peft=True,
                       padding_free=False).trainer
    assert not trainer.rows_end_to_end
    trainer._precompute_ref_logps(rows.select(range(2)), "eval", 2)  # as `evaluate(rows)` does
    assert not trainer.rows_end_to_end and type(trainer.data_collator) is trainer.padded_collator


LACKING = ((3, 0, 2), (0, 1, 3), (2, 4, 0), (1, 1, 1))
"""No chosen answer; no prompt, so that nothing scores the only token; no rejected answer."""


@pytest.mark.parametrize(("algorithm", "options"), [
    ("dpo", {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("dpo", {"loss_type": "sigmoid_norm"}), ("dpo", {"use_weighting": True}), ("cpo", {}))),
], ids=str)  # fmt: skip
def test_answers_without_tokens(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (built_of(backend, algorithm, tmp_path, pairs(LACKING), use_peft=True, **options).trainer
                    for backend in ("fast", "trl"))
    assert_same_step(step(ours), step(theirs), loss=5e-6, without=("logits/chosen", "logits/rejected"))


@pytest.mark.slow
def test_unpaired_answers_without_tokens(tmp_path: Path) -> None:
    rows = unpaired(lengths=((3, 2), (2, 0), (0, 1), (4, 3)))
    ours, theirs = (built_of(backend, "kto", tmp_path, rows, use_peft=True).trainer for backend in ("fast", "trl"))
    assert_same_step(step(ours), step(theirs))


class Waits(TorchDispatchMode):
    """Collects the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy.default")):
            self.found.append(name)
        if "index.Tensor" in name and any(getattr(one, "dtype", None) is torch.bool for one in args[1]):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_loss_and_its_metrics_wait_for_nothing(tmp_path: Path) -> None:
    for backend in ("fast", "trl"):
        trainer = built_of(backend, "dpo", tmp_path, use_peft=True, loss_type=["sigmoid", "sft"],
                           trainer_options={"ld_alpha": 0.5}).trainer
        model, batch, _ = passes_done_once(trainer)
        with Waits() as waits:
            trainer._compute_loss(model, batch, False).backward()
        waited = [name for name in waits.found if "_to_copy" not in name]
        assert bool(waited) == (backend == "trl"), waited


def test_what_stays_padded_says_so(tmp_path: Path) -> None:
    model = small(attention_dropout=0.1)
    built = built_of("fast", "dpo", tmp_path, model_name=model, use_peft=True)
    assert built.attestation()["layout"].startswith("rows: padded, its attention has dropout")
    assert "attention_mask" in next(iter(built.trainer.get_train_dataloader()))
    with pytest.raises(ConfigError, match="padding_free = True: its attention has dropout"):
        built_of("fast", "dpo", tmp_path / "b", model_name=small(attention_dropout=0.1), use_peft=True,
                 padding_free=True)
    asked = built_of("fast", "orpo", tmp_path / "c", use_peft=True, padding_free=False)
    assert asked.attestation()["layout"].startswith("rows: padded, padding_free is false")
    theirs = built_of("trl", "orpo", tmp_path / "c", use_peft=True)
    assert_same_step(step(asked.trainer), step(theirs.trainer))
    flat = built_of("fast", "simpo", tmp_path / "d", use_peft=True, padding_free=True)
    assert flat.attestation()["layout"].startswith("rows: end to end")


@pytest.mark.slow
def test_steps_run_within_the_memory_that_is_planned_with(tmp_path: Path) -> None:
    built = built_of("fast", "reward", tmp_path, scored(), model_name=scorer(), gradient_accumulation_steps=2)
    steps = []

    class Plan:
        def training_begins(self) -> None:
            steps.clear()

        @contextlib.contextmanager
        def step(self, tokens: int, *, number: int, most: int) -> Any:
            assert most == tokens
            steps.append((tokens, number))
            yield

    built.trainer.memory = Plan()
    built.trainer.train()
    assert [number for _, number in steps] == [0, 0, 1, 1]
    assert {tokens for tokens, _ in steps} <= {64, 128}
