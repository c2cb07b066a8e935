"""Rows end to end: the same rows, loss and gradients as padded batches, and nothing crosses from row to row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.neftune import activate_neftune

from aligntune.backends.base import Prepared
from aligntune.backends.fast.attachment import attachment_of
from aligntune.backends.fast.build import build as build_fast
from aligntune.backends.fast.build import lay_rows
from aligntune.backends.fast.ops.attention import attention, attention_reference
from aligntune.backends.fast.packing import IGNORED, RowsEndToEnd, bucket
from aligntune.backends.fast.recompute import recompute_of
from aligntune.backends.trl.build import build as build_trl
from aligntune.core.resolve import resolve
from aligntune.errors import ConfigError
from tests.backends.fast.minis import build as build_mini
from tests.core import tiny

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LENGTHS = (5, 11, 3, 1, 8, 8, 2, 7)


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return tiny.llama(intermediate_size=48)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8))
    return MistralForCausalLM(MistralConfig(**SHAPE, head_dim=8, sliding_window=4))


def rows(lengths: tuple[int, ...] = LENGTHS) -> Dataset:
    made = []
    for i, length in enumerate(lengths):
        ids = [3 + (7 * i + 5 * j) % 250 for j in range(length)]
        made.append({"input_ids": ids, "labels": [IGNORED if j < length // 3 else t for j, t in enumerate(ids)]})
    return Dataset.from_list(made)


def trainer_of(backend: str, family: str, tmp_path: Any, data: Dataset | None = None, **options: Any) -> Any:
    job = resolve(
        {
            "model_name": model_of(family),
            "dataset_name": "in memory",
            "algorithm": "sft",
            "backend": backend,
            "output_dir": str(tmp_path / backend),
            "max_steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "tokenizer_name": tiny.tokenizer(),
            "optimizer": "sgd",
            **options,
        }
    )
    builder = {"trl": build_trl, "fast": build_fast}[backend]
    return builder(job, Prepared(tiny.tokenizer(), data if data is not None else rows(), None))


def run(built: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    trainer = built.trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach().cpu() for n, p in trainer.model.named_parameters()}, trainer.state.log_history


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "qwen3", "mistral"))])
def test_losses_weights_and_metrics_are_those_of_padded_trl(family: str, tmp_path: Any) -> None:
    built = trainer_of("fast", family, tmp_path)
    ours, our_weights, our_log = run(built)
    theirs, their_weights, their_log = run(trainer_of("trl", family, tmp_path))
    assert built.attestation()["layout"].startswith("rows: end to end, one attention launch; step: launched one by one")
    assert built.attestation()["step"]["problems"] == ()
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert len(ours) == 2 and ours[0] > 1
    start = dict(model_of(family).named_parameters())
    for name, value in their_weights.items():
        moved = (value - start[name]).norm()
        assert moved > 0, name
        assert (our_weights[name] - value).norm() < 1e-4 * moved, name
    for ours_entry, theirs_entry in zip(our_log[:2], their_log[:2], strict=True):
        for key in ("entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
            assert ours_entry[key] == pytest.approx(theirs_entry[key], rel=1e-5), key


@pytest.mark.slow
def test_accumulation_with_a_partial_last_window(tmp_path: Any) -> None:
    """7 rows, micro-batches of 2, windows of 3: the last window has one micro-batch of one row."""
    options = {"batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": -1, "num_epochs": 1}
    ours, our_weights, _ = run(trainer_of("fast", "llama", tmp_path, rows(LENGTHS[:7]), **options))
    theirs, their_weights, _ = run(trainer_of("trl", "llama", tmp_path, rows(LENGTHS[:7]), **options))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert all(torch.allclose(our_weights[n], w, rtol=1e-4, atol=1e-6) for n, w in their_weights.items())


def test_one_row_does_not_move_another(tmp_path: Any) -> None:
    """Change one row's tokens: the log-probs of the others stay to the bit."""
    trainer = trainer_of("fast", "llama", tmp_path).trainer
    collate = RowsEndToEnd(0)
    examples = [dict(row) for row in rows()][:4]
    changed = [dict(row) for row in examples]
    changed[1]["input_ids"] = [9] * len(changed[1]["input_ids"])
    outs = []
    for batch in (collate(examples), collate(changed)):
        batch.pop("num_tokens")
        outs.append(
            trainer.model(
                **batch, attention_mask=torch.empty(1, 1, 1, 0, dtype=torch.bool), use_cache=False, fused_lm_head=True
            ).log_probs.detach()[0]
        )
    ends = torch.tensor(LENGTHS[:4]).cumsum(0)
    other = torch.ones(int(ends[-1]), dtype=torch.bool)
    other[int(ends[0]) : int(ends[1])] = False
    assert torch.equal(outs[0][: len(other)][other], outs[1][: len(other)][other])
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.slow
def test_rows_of_one_length_and_packed_rows(tmp_path: Any) -> None:
    equal = rows((6, 6, 6, 6))
    ours, _, _ = run(trainer_of("fast", "llama", tmp_path, equal))
    theirs, _, _ = run(trainer_of("trl", "llama", tmp_path, equal))
    assert ours == pytest.approx(theirs, rel=2e-6)
    packed = trainer_of("fast", "llama", tmp_path / "p", packing=True, max_seq_length=16, batch_size=2)
    theirs_packed = trainer_of("trl", "llama", tmp_path / "q", packing=True, max_seq_length=16, batch_size=2)
    assert run(packed)[0] == pytest.approx(run(theirs_packed)[0], rel=2e-6)


@pytest.mark.parametrize(("said", "why"), [
    ({"padding_free": False}, "padding_free is false"),
    ({"attn_implementation": "eager", "strict": True}, "attn_implementation 'eager' was asked for"),
])
def test_what_stays_padded_says_so(said: dict, why: str, tmp_path: Path) -> None:
    """Of a model that is loaded; the same one without the option lies end to end."""
    model_of("llama").save_pretrained(tmp_path / "model")
    built = trainer_of("fast", "llama", tmp_path, model_name=str(tmp_path / "model"), **said)
    assert_padded(built, why)
    plain = trainer_of("fast", "llama", tmp_path / "plain", model_name=str(tmp_path / "model"))
    assert plain.attestation()["layout"].startswith("rows: end to end, ")


def test_packed_rows_without_our_layout_are_trls(tmp_path: Path) -> None:
    options = {"packing": True, "max_seq_length": 16, "batch_size": 2, "padding_free": False}
    built = trainer_of("fast", "llama", tmp_path, **options)
    assert built.attestation()["layout"].startswith(
        "rows: end to end, as TRL lays packed ones and not by ours, padding_free is false; ")
    batch = next(iter(built.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch and not built.trainer.rows_end_to_end


def assert_padded(built: Any, why: str) -> None:
    assert built.attestation()["layout"].startswith(f"rows: padded, {why}; ")
    batch = next(iter(built.trainer.get_train_dataloader()))
    assert "attention_mask" in batch and "cu_seq_lens_q" not in batch


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_scores_that_are_capped_keep_rows_padded(implementation: str, tmp_path: Path) -> None:
    model = build_mini("gemma2", vocab_size=259, max_position_embeddings=256)
    model.config._attn_implementation = implementation  # transformers has none of sdpa that caps: ours must not either
    built = trainer_of("fast", "llama", tmp_path, model_name=model)
    assert_padded(built, "its attention caps scores, which no launch over ragged rows does")


def test_a_model_object_with_an_attention_of_its_own_stays_padded(tmp_path: Path) -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    built = trainer_of("fast", "llama", tmp_path, model_name=model, attn_implementation="eager")
    assert_padded(built, "attn_implementation 'eager' was asked for")


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_seq_length": 16, "batch_size": 2}],
                         ids=["ragged", "packed"])
def test_noise_on_embeddings_is_trls(options: dict[str, Any], tmp_path: Any) -> None:
    """Its size goes by the length of a padded row, which is not that of rows end to end; packed ones are TRL's too."""
    noisy = {"trainer_options": {"neftune_noise_alpha": 5.0}, **options}
    built = trainer_of("fast", "llama", tmp_path, **noisy)
    how = "end to end, as TRL lays packed ones and not by ours" if options else "padded"
    assert built.attestation()["layout"].startswith(f"rows: {how}, neftune_noise_alpha scales its noise by")
    ours, theirs = run(built)[0], run(trainer_of("trl", "llama", tmp_path, **noisy))[0]
    assert ours == pytest.approx(theirs, rel=2e-6)
    quiet = run(trainer_of("trl", "llama", tmp_path / "quiet", **options))[0]
    assert abs(theirs[0] - quiet[0]) > 1e-2
    with pytest.raises(ConfigError, match="neftune_noise_alpha"):
        trainer_of("fast", "llama", tmp_path, padding_free=True, **noisy)


@pytest.mark.slow
def test_an_evaluation_has_no_noise(tmp_path: Any) -> None:
    trainer = trainer_of("fast", "llama", tmp_path, trainer_options={"neftune_noise_alpha": 5.0}).trainer
    trainer.model.train()
    quiet = trainer.evaluate(rows())["eval_loss"]
    trainer.model.train()
    activate_neftune(trainer.model, 5.0)
    assert trainer.evaluate(rows())["eval_loss"] == quiet


def test_a_batch_is_copied_while_the_step_before_it_runs(tmp_path: Any) -> None:
    """From pinned memory, by a copy that nothing waits for; TRL's waits."""
    ours, theirs = (trainer_of(backend, "llama", tmp_path).trainer for backend in ("fast", "trl"))
    assert not ours.get_train_dataloader()._non_blocking  # memory is not pinned on a CPU
    ours.args.dataloader_pin_memory = theirs.args.dataloader_pin_memory = True
    lay_rows(ours, attachment_of(ours.model))
    assert ours.get_train_dataloader()._non_blocking and not theirs.get_train_dataloader()._non_blocking


def test_padding_free_that_cannot_be_is_an_error(tmp_path: Any) -> None:
    model = tiny.llama(attention_dropout=0.1)
    with pytest.raises(ConfigError, match="its attention has dropout"):
        trainer_of("fast", "llama", tmp_path, model_name=model, padding_free=True)
    # The model is the caller's: nothing of ours stays on it.
    assert attachment_of(model) is None and recompute_of(model) is None
    assert not any("_aligntune" in name for module in model.modules() for name in vars(module))


# The collator


def test_the_flat_batch() -> None:
    batch = RowsEndToEnd(0)([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}])
    assert batch["num_tokens"] == 5
    assert batch["input_ids"].shape == (1, 64)
    assert batch["input_ids"][0, :6].tolist() == [5, 6, 7, 8, 9, 0]
    assert batch["position_ids"][0, :7].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch["labels"][0, :6].tolist() == [-100, 6, 7, -100, 9, -100]
    assert batch["shift_labels"][0, :6].tolist() == [6, 7, -100, 9, -100, -100]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 64, 64, 64, 64, 64, 64]
    assert batch["max_length_q"] == 1024
    assert "kept" not in batch


def test_arrays_lie_as_lists_do_and_stay_as_they_were() -> None:
    data = rows()
    lists = [dict(row, seq_lengths=[2, 3]) if len(row["input_ids"]) == 5 else row for row in data]
    arrays = [{name: np.array(values) for name, values in row.items()} for row in lists]
    arrays[1].pop("labels"), lists[1].pop("labels")
    before = [{name: values.copy() for name, values in row.items()} for row in arrays]
    ours, theirs = (RowsEndToEnd(0)(given) for given in (arrays, lists))
    assert ours.keys() == theirs.keys() and ours["num_tokens"] == theirs["num_tokens"] == sum(LENGTHS)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype if torch.is_tensor(value) else (
            ours[name] == value and type(ours[name]) is int)
    assert all(np.array_equal(row[name], old[name]) for row, old in zip(arrays, before, strict=True) for name in old)


def test_training_reads_arrays_and_the_rows_keep_their_format(tmp_path: Any) -> None:
    trainer = trainer_of("fast", "llama", tmp_path).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].dtype == torch.int64 and batch["num_tokens"] > 0
    assert trainer.train_dataset.format["type"] is None and isinstance(trainer.train_dataset[0]["input_ids"], list)
    assert trainer.get_train_dataloader().dataset.format["type"] == "numpy"


def last_label_only(batch: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"],
            "labels": [[IGNORED] * (len(ids) - 1) + list(ids[-1:]) for ids in batch["input_ids"]]}


FORMATS = {
    "a transform": lambda data: data.with_transform(last_label_only),
    "a transform to tensors": lambda data: data.with_transform(
        lambda batch: {name: [torch.tensor(row) for row in rows] for name, rows in last_label_only(batch).items()}),
    "torch": lambda data: data.with_format("torch"),
    "torch without labels": lambda data: data.with_format("torch", columns=["input_ids"]),
    "lists without labels": lambda data: data.with_format(columns=["input_ids"]),
    "arrays, labels as lists": lambda data: data.with_format("numpy", columns=["input_ids"], output_all_columns=True),
    "lengths of somebody else's": lambda data: data.add_column(
        "seq_lengths", [[1, len(ids) - 1] if len(ids) > 1 else [1] for ids in data["input_ids"]]),
}
AS_PLAIN = ("torch", "arrays, labels as lists", "lengths of somebody else's")


@pytest.mark.slow
@pytest.mark.parametrize("how", FORMATS)
def test_the_labels_are_those_that_trl_trains_on(how: str, tmp_path: Any) -> None:
    data = FORMATS[how](rows())
    shown = data.format
    built = trainer_of("fast", "llama", tmp_path, data)
    ours, theirs = run(built)[0], run(trainer_of("trl", "llama", tmp_path, data))[0]
    assert built.attestation()["layout"].startswith("rows: end to end")
    assert ours == pytest.approx(theirs, rel=2e-6)
    plain = run(trainer_of("trl", "llama", tmp_path / "plain"))[0]
    assert (theirs == pytest.approx(plain, rel=2e-6)) == (how in AS_PLAIN)
    assert data.format == shown and built.trainer.train_dataset is data


def test_kept_names_every_position_with_a_label() -> None:
    labels = [-100] * 900 + list(range(3, 103))
    batch = RowsEndToEnd(0)([{"input_ids": [4] * 1000, "labels": labels}])
    kept = batch["kept"]
    assert kept[kept >= 0].tolist() == (batch["shift_labels"][0] != IGNORED).nonzero().flatten().tolist()
    assert len(kept) == 250  # a quarter


@pytest.mark.parametrize(("labelled", "size"), [(0, 256), (256, 256), (257, 512), (768, 768), (769, None)])
def test_kept_comes_in_few_sizes(labelled: int, size: int | None) -> None:
    labels = [-100] * (1024 - labelled) + [5] * labelled
    batch = RowsEndToEnd(0)([{"input_ids": [4] * 1024, "labels": labels}])
    assert (len(batch["kept"]) if size else "kept" not in batch) == (size or True)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 4097, 8192, 8193, 9260, 100_000])
def test_buckets_hold_and_waste_little(tokens: int) -> None:
    size = bucket(tokens)
    assert size >= tokens
    assert size - tokens < max(64, tokens / (8 if tokens <= 8192 else 32) + 1)
    assert len({bucket(t) for t in range(1, 8193)}) < 60 and len({bucket(t) for t in range(4096, 8192)}) == 9


# The op


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (1, 7, 3), (9,), (5, 0, 2)])
def test_attention_is_softmax_within_rows(lengths: tuple[int, ...], window: int | None, device: str) -> None:
    torch.manual_seed(1)
    total = sum(lengths)
    q = torch.randn(1, 4, total, 8, device=device, requires_grad=True)
    k = torch.randn(1, total, 2, 8, device=device).transpose(1, 2).requires_grad_()
    v = torch.randn(1, 2, total, 8, device=device, requires_grad=True)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    out = attention(q, k, v, cu, max_seqlen=max(lengths), scale=0.3, window=window)
    at, row = torch.arange(total), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (row[:, None] == row) & (at[:, None] >= at)
    if window:
        allowed &= at[:, None] - at < window
    scores = 0.3 * torch.einsum("hqd,hkd->hqk", q[0], k[0].repeat_interleave(2, 0))
    weights = scores.masked_fill(~allowed.to(device), -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,hkd->qhd", weights, v[0].repeat_interleave(2, 0))[None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), gradient)
    theirs = torch.autograd.grad(expected, (q, k, v), gradient)
    for one, two in zip(ours, theirs, strict=True):
        assert two.norm() > 0
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lengths", "window"), [((512, 512), None), ((300, 7, 1, 700), None), ((300, 500), 128)])
def test_attention_on_a_gpu(lengths: tuple[int, ...], window: int | None, dtype: torch.dtype) -> None:
    from tests.backends.fast.ops.harness import assert_close_to_truth

    total = sum(lengths)
    leaves = [torch.randn(1, heads, total, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2)]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    args = {"max_seqlen": max(lengths), "scale": 0.125, "window": window}
    gradient = torch.randn(1, total, 8, 64, device="cuda", dtype=dtype)

    def both(op: Any, inputs: list[torch.Tensor], g: torch.Tensor) -> list[torch.Tensor]:
        out = op(*inputs, cu, **args)
        return [out, *torch.autograd.grad(out, inputs, g)]

    ours = both(attention, leaves, gradient)
    eager = both(attention_reference, leaves, gradient)
    truth = both(attention_reference, [x.detach().float().requires_grad_() for x in leaves], gradient.float())
    for one, two, three in zip(ours, eager, truth, strict=True):
        assert_close_to_truth(one, two, three)
