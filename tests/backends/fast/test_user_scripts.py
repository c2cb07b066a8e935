"""Four scripts as users have them, with only names mapped, on tiny random models; and what FastSFTTrainer refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from aligntune.backends.fast import (
    FastLanguageModel,
    FastSFTTrainer,
    FastTrainingArguments,
    accelerate_trl,
    attachment_of,
    fast_train,
)
from aligntune.backends.fast.recompute import recompute_of
from aligntune.backends.fast.sft_trainer import _config
from aligntune.errors import ConfigError
from tests.core import tiny

NEAR = 1e-4 if torch.cuda.is_available() else 0  # a GPU adds in no fixed order
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HOST = "; activations: recomputed in every layer, their inputs in host memory"
FLAT = "rows: end to end, one attention launch; step: "


def rows(lengths: tuple[int, ...] = (8,) * 8) -> Dataset:
    return Dataset.from_list([{"story": f"{i:02d}".ljust(length, "ab"[i % 2])} for i, length in enumerate(lengths)])


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A model and its tokenizer on disk, as a script names them."""
    path = tmp_path / "model"
    tiny.llama(num_hidden_layers=1).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# ---------------------------------------------------------------------------------------------------- the four scripts


def test_embedding_rates(saved, tmp_path):
    """Continued pretraining: FastSFTTrainer for UnslothTrainer, FastTrainingArguments for UnslothTrainingArguments."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=saved, max_seq_length=64, dtype=torch.float32, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=4,
        target_modules=[*LINEARS, "embed_tokens", "lm_head"],
        lora_alpha=8,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=True,
        loftq_config=None,
    )
    trainer = FastSFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows(),
        dataset_text_field="story",
        max_seq_length=64,
        dataset_num_proc=1,
        args=FastTrainingArguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            warmup_steps=1,
            max_steps=2,
            learning_rate=5e-5,
            embedding_learning_rate=1e-5,
            bf16=False,
            logging_steps=1,
            optim="adamw_torch",
            weight_decay=0.01,
            lr_scheduler_type="constant_with_warmup",
            seed=3407,
            output_dir=str(tmp_path / "out"),
            report_to="none",
        ),
    )
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    trainer_stats = trainer.train()
    assert trainer_stats.global_step == 2 and trainer_stats.metrics["train_runtime"] > 0
    first, second = trainer.state.log_history[:2]
    assert (first["learning_rate"], first["embedding_learning_rate"]) == (0.0, 0.0)
    assert (second["learning_rate"], second["embedding_learning_rate"]) == (5e-5, 1e-5)
    # 4 rows of 8 letters and an end: the ids of the letters and the end took one step of AdamW, as long as the rate.
    assert (embedding.detach() - before).abs().max() == pytest.approx(1e-5, rel=0.05)
    assert trainer.layout.startswith(FLAT + "launched one by one") and f"{HOST};" in f"{trainer.layout};"
    assert "lora" in str(trainer.attachment) and not [line for line in trainer.attachment.report if line.eager]


@pytest.mark.slow
def test_embedding_rates_inside_the_block_of_trl_scripts(saved, tmp_path):
    """FastSFTTrainer in `accelerate_trl()` is what it is outside."""

    def train(out: str) -> Any:
        model, tokenizer = FastLanguageModel.from_pretrained(saved, max_seq_length=16, dtype=torch.float32)
        args = FastTrainingArguments(
            str(tmp_path / out), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, save_strategy="no",
            embedding_learning_rate=1e-3, bf16=False, logging_steps=1, report_to="none", lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = FastSFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows((3, 8) * 4), args=args,
                                 dataset_text_field="story")
        trainer.train()
        return trainer

    outside = train("outside")
    with accelerate_trl() as attachments:
        inside = train("inside")
    assert attachments == [inside.attachment] and inside.attachment.attached
    assert inside.layout == outside.layout and inside.layout.startswith(FLAT)
    assert losses(inside) == pytest.approx(losses(outside), rel=NEAR) and losses(inside)[0] > 4
    assert [row["embedding_learning_rate"] for row in inside.state.log_history[:2]] == [1e-3, 1e-3]
    assert "__wrapped__" not in vars(FastSFTTrainer.__init__)
    with pytest.raises(ConfigError, match="relu2"), accelerate_trl(strict=True):
        build(tmp_path, config(tmp_path), model=tiny.llama(hidden_act="relu2"))


def old_script(SFTTrainer: Any, saved: str, out: Path) -> Any:
    """A script of TRL's older names; `SFTTrainer` is what its import gives."""
    model, tokenizer = FastLanguageModel.from_pretrained(saved, max_seq_length=12, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    args = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, logging_steps=1,
        report_to="none", lr_scheduler_type="constant", save_strategy="no", seed=3,
    )  # fmt: skip
    before = args.to_dict()
    trainer = SFTTrainer(
        model=model, tokenizer=tokenizer, args=args, train_dataset=rows((8, 20) * 4), dataset_text_field="story",
        max_seq_length=12,
    )  # fmt: skip
    assert args.to_dict() == before
    trainer.train()
    return trainer


@pytest.mark.parametrize("mapped", [True, False], ids=["FastSFTTrainer as SFTTrainer", "in the block"])
def test_the_names_of_older_trl(mapped, saved, tmp_path):
    """With its import mapped, and nothing else, rows lie end to end; with TRL's own class, in the block, they are
    padded. Either run is that of a TRL script in today's names."""
    if mapped:
        trainer = old_script(FastSFTTrainer, saved, tmp_path / "old")
        assert trainer.layout.startswith(FLAT)
        attachments = [trainer.attachment]
    else:
        with accelerate_trl() as attachments:
            trainer = old_script(trl.SFTTrainer, saved, tmp_path / "old")
        assert type(trainer) is trl.SFTTrainer
    assert [attachment_of(trainer.model)] == attachments and not [one for one in attachments[0].report if one.eager]
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("cu_seq_lens_q" in batch) == mapped == ("attention_mask" not in batch)
    assert trainer.args.max_length == 12 and max(map(len, trainer.train_dataset["input_ids"])) == 12
    assert trainer.args.learning_rate == 1e-2 and not trainer.args.gradient_checkpointing  # as plain arguments have it
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    tokenizer = tiny.tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(3407)
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM"))
    today = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "new"), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2,
            logging_steps=1, report_to="none", lr_scheduler_type="constant", save_strategy="no", seed=3, max_length=12,
            dataset_text_field="story", bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=rows((8, 20) * 4),
        processing_class=tokenizer,
    )  # fmt: skip
    today.train()
    assert attachment_of(today.model) is None
    assert losses(trainer) == pytest.approx(losses(today), rel=2e-5) and losses(today)[0] > 4
    assert abs(losses(today)[1] - losses(today)[0]) > 1e-3


def test_a_plain_trl_trainer_on_a_fast_model(saved, tmp_path):
    """TRL's own class, in today's names: the kernels are under its model."""
    model, tokenizer = FastLanguageModel.from_pretrained(saved, dtype=torch.float32)
    settings = {"max_steps": 1, "bf16": False, "report_to": "none", "max_length": 12, "save_strategy": "no",
                "per_device_train_batch_size": 2, "dataset_text_field": "story", "gradient_checkpointing": False}
    args = trl.SFTConfig(str(tmp_path / "out"), **settings)
    with accelerate_trl() as attachments:
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows(), processing_class=tokenizer)
    result = attachments[0].attest(trainer.train)
    assert result.ok and result.kernels["logits_loss"] == 1 and attachment_of(model) is attachments[0]
    asks = FastTrainingArguments(str(tmp_path / "asks"), embedding_learning_rate=1e-5, **settings)
    trainer = trl.SFTTrainer(model=model, args=asks, train_dataset=rows(), processing_class=tokenizer)
    with pytest.raises(ConfigError, match="a SFTTrainer trains every parameter at learning_rate; FastSFTTrainer takes"):
        fast_train(trainer)


def test_older_names_and_trl_itself(tmp_path):
    class Mine(trl.SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    settings = {"model": tiny.llama(num_hidden_layers=1), "train_dataset": rows(), "dataset_text_field": "story",
                "tokenizer": tiny.tokenizer()}
    args = trl.SFTConfig(str(tmp_path), bf16=False, report_to="none", max_length=20)
    with accelerate_trl(), accelerate_trl():
        mine = Mine(args=args, max_seq_length=20, packing=True, **settings)
        assert (mine.args.packing, mine.args.max_length, args.packing) == (True, 20, False)
        assert "seq_lengths" in mine.train_dataset.column_names
        with pytest.raises(ConfigError, match="max_seq_length=30, and the training arguments hold max_length=20"):
            trl.SFTTrainer(args=args, max_seq_length=30, **settings)
        with pytest.raises(TypeError, match="max_seq_lenght"):
            trl.SFTTrainer(args=args, max_seq_lenght=20, **settings)
        today = trl.SFTTrainer(settings["model"], args, None, rows().rename_columns({"story": "text"}), None,
                               settings["tokenizer"])
        assert today.args is args and today.processing_class is settings["tokenizer"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'|'dataset_text_field'"):
        trl.SFTTrainer(args=args, **settings)


@pytest.mark.parametrize(("given", "arguments", "layout"), [
    ("unsloth", {}, HOST),  # plain arguments do not recompute: the model does
    ("unsloth", {"gradient_checkpointing": True}, HOST),
    (True, {}, "; activations: recomputed in every layer"),
    (False, {}, "; activations: kept"),
    (False, {"gradient_checkpointing": True}, "; activations: recomputed in every layer"),
    ("unsloth", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
     "; activations: recomputed by torch's function, gradient_checkpointing_kwargs are given"),
])
def test_who_recomputes(given, arguments, layout, saved, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(saved, max_seq_length=16, dtype=torch.float32)
    base = model
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=given)
    trainer = FastSFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows(), dataset_text_field="story",
        args=TrainingArguments(str(tmp_path), per_device_train_batch_size=2, max_steps=1, report_to="none",
                               save_strategy="no", **arguments),
    )  # fmt: skip
    assert f"{layout};" in f"{trainer.layout};"
    trainer.train()
    function = getattr(base.model.layers[0], "_gradient_checkpointing_func", None)
    ours = recompute_of(base)
    assert base.model.layers[0].gradient_checkpointing == ("kept" not in layout)
    if "every layer" in layout:
        assert function.func == ours.run and ours.offload == (layout == HOST)
    else:
        assert ours is None


def test_packing(saved, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(saved, max_seq_length=32, dtype=torch.float32)
    data = rows((3, 9, 5, 12, 7, 7))
    with torch.no_grad():
        ids = [tokenizer(text + "<eos>", return_tensors="pt").input_ids.to(model.device) for text in data["story"]]
        summed = [float(model(input_ids=i, labels=i).loss) * (i.numel() - 1) for i in ids]
    expected = sum(summed) / sum(i.numel() - 1 for i in ids)
    trainer = FastSFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=data, dataset_text_field="story", max_seq_length=32,
        packing=True,
        args=TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=2, num_train_epochs=1, logging_steps=1,
            report_to="none", save_strategy="no",
        ),
    )  # fmt: skip
    packed = trainer.train_dataset["seq_lengths"]
    assert sorted(length for row in packed for length in row) == [4, 6, 8, 8, 10, 13] and len(packed) == 2
    assert trainer.layout.startswith(FLAT)
    assert trainer.train().global_step == 1
    assert losses(trainer) == [pytest.approx(expected, rel=1e-5)]  # six documents, none of which sees another


def eight_bits_script(
    saved: str, out: Path, data: Dataset, *, dtype: torch.dtype | None, max_seq_length: int = 16, r: int = 4,
    max_steps: int = 4, **arguments: Any,
) -> tuple[Any, Any]:
    """8-bit states, TensorBoard, prints of memory, a run that goes on from a checkpoint, adapters that are saved.

    Returns the trainers of the whole run and of the one that went on.
    """

    def load(random_state: int) -> tuple[Any, Any]:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=saved, max_seq_length=max_seq_length, dtype=dtype
        )
        return FastLanguageModel.get_peft_model(
            model, r=r, target_modules=LINEARS, random_state=random_state), tokenizer

    def make(model: Any, tokenizer: Any, name: str) -> Any:
        return FastSFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=data, dataset_text_field="story",
            max_seq_length=max_seq_length,
            args=TrainingArguments(**{
                "output_dir": str(out / name), "per_device_train_batch_size": 2, "max_steps": max_steps,
                "learning_rate": 2e-3, "logging_steps": 1, "save_steps": max_steps // 2, "optim": "adamw_8bit",
                "weight_decay": 0.01, "lr_scheduler_type": "linear", "seed": 3407, "report_to": "tensorboard",
            } | arguments),
        )  # fmt: skip

    model, tokenizer = load(3407)
    trainer = make(model, tokenizer, "run")
    if torch.cuda.is_available():
        gpu_stats = torch.cuda.get_device_properties(0)
        print(f"GPU = {gpu_stats.name}. Max memory = {gpu_stats.total_memory / 2**30:.3f} GiB.")
        print(f"{torch.cuda.max_memory_reserved() / 2**30:.3f} GiB of memory reserved.")
    trainer_stats = trainer.train()
    print(f"{trainer_stats.metrics['train_runtime']} seconds used for training.")
    if torch.cuda.is_available():
        print(f"Peak reserved memory = {torch.cuda.max_memory_reserved() / 2**30:.3f} GiB.")

    again, tokenizer = load(1)  # adapters of its own, which are not the run's
    resumed = make(again, tokenizer, "again")
    resumed.train(resume_from_checkpoint=str(out / "run" / f"checkpoint-{max_steps // 2}"))

    model.save_pretrained(str(out / "lora_model"))
    tokenizer.save_pretrained(str(out / "lora_model"))
    FastLanguageModel.for_inference(model)
    ids = tokenizer(["00aa"], return_tensors="pt").to(model.device)
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape == (1, 7)
    return trainer, resumed


def assert_logged_and_resumed(trainer: Any, resumed: Any, *, steps: int, near: float) -> None:
    """TensorBoard's file holds the losses, and the run that went on from half of its steps has the same ones."""
    assert len(losses(trainer)) == steps == resumed.state.global_step
    assert losses(resumed) == pytest.approx(losses(trainer), rel=near)
    for one, logged in ((trainer, losses(trainer)), (resumed, losses(resumed)[steps // 2 :])):
        (events,) = Path(one.args.output_dir).rglob("events.out.tfevents*")
        scalars = EventAccumulator(str(events)).Reload().Scalars("train/loss")
        assert [scalar.value for scalar in scalars] == pytest.approx(logged)
        assert "bitsandbytes" in type(getattr(one.optimizer, "optimizer", one.optimizer)).__module__


def test_eight_bits_tensorboard_memory_resume_and_save(saved, tmp_path):
    trainer, resumed = eight_bits_script(saved, tmp_path, rows(), dtype=torch.float32)
    assert_logged_and_resumed(trainer, resumed, steps=4, near=NEAR)
    model, again = trainer.model, resumed.model
    trained = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert len(trained) == 14
    for name, value in again.state_dict().items():
        assert name not in trained or torch.allclose(value, trained[name], rtol=0, atol=NEAR), name
    ids = trainer.processing_class(["00aa"], return_tensors="pt").to(model.device)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), str(tmp_path / "lora_model")).eval()
    reloaded, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora_model"), dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(saved).eval()
    logits = [other.to(model.device)(**ids).logits for other in (model, plain, reloaded.eval(), base)]
    assert torch.allclose(logits[1], logits[0], atol=1e-4) and torch.allclose(logits[2], logits[0], atol=1e-4)
    assert not torch.allclose(logits[3], logits[0], atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_among_the_targets_stay_one_tensor(tied, tmp_path):
    tiny.llama(num_hidden_layers=1, tie_word_embeddings=tied).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), dtype=torch.float32)
    mine = ["lm_head"]
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"], modules_to_save=mine)
    assert mine == ["lm_head"]
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == tied and ends[1].requires_grad


# ------------------------------------------------------------------------------------------- what it takes and refuses


def build(tmp_path: Path, args: Any = None, **options: Any) -> Any:
    settings = {"model": tiny.llama(num_hidden_layers=1), "tokenizer": tiny.tokenizer(), "train_dataset": rows(),
                "dataset_text_field": "story"}
    return FastSFTTrainer(args=args, **(settings | options))


def config(tmp_path: Path, **options: Any) -> FastTrainingArguments:
    return FastTrainingArguments(str(tmp_path), **({"bf16": False, "report_to": "none"} | options))


def test_a_setting_given_twice(tmp_path):
    assert build(tmp_path, config(tmp_path, max_length=20), max_seq_length=20).args.max_length == 20
    with pytest.raises(ConfigError, match="max_seq_length=30, and the training arguments hold max_length=20"):
        build(tmp_path, config(tmp_path, max_length=20), max_seq_length=30)
    with pytest.raises(ConfigError, match="max_seq_length=30, and the training arguments hold max_length=20"):
        config(tmp_path, max_length=20, max_seq_length=30)
    with pytest.raises(ConfigError, match="packing=False, and the training arguments hold packing=True"):
        build(tmp_path, config(tmp_path, packing=True), packing=False)
    with pytest.raises(ConfigError, match="two names of one thing"):
        build(tmp_path, config(tmp_path), processing_class=tiny.tokenizer())
    with pytest.raises(ConfigError, match="args is a dict"):
        build(tmp_path, {"max_steps": 3})
    with pytest.raises(TypeError, match="max_seq_lenght"):
        build(tmp_path, config(tmp_path), max_seq_lenght=30)


def test_the_scripts_own_arguments_stay_as_they_are(tmp_path):
    for kind in (FastTrainingArguments, trl.SFTConfig):
        args = kind(str(tmp_path), bf16=False, report_to="none")
        trainer = build(tmp_path, args, max_seq_length=20, packing=True)
        assert (trainer.args.max_length, trainer.args.packing, type(trainer.args)) == (20, True, kind)
        assert (args.max_length, args.packing, args.dataset_text_field) == (1024, False, "text")


def test_the_length_that_is_meant(tmp_path, caplog):
    model = tiny.llama(num_hidden_layers=1)
    model.max_seq_length = 2048
    plain = TrainingArguments(str(tmp_path), report_to="none")
    with caplog.at_level(logging.WARNING, logger="aligntune"):
        assert build(tmp_path, plain, model=model).args.max_length == 2048
        assert build(tmp_path, plain, model=model, max_seq_length=40).args.max_length == 40
        assert build(tmp_path, config(tmp_path, max_seq_length=50), model=model).args.max_length == 50
        assert caplog.text == ""
        assert build(tmp_path, config(tmp_path), model=model).args.max_length == 1024
    assert "rows are cut at 1024 tokens, TRL's default; the model was loaded for 2048" in caplog.text
    assert build(tmp_path, plain).args.max_length == 1024


def test_all_weights_in_bf16_are_spoken_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="aligntune"):
        build(tmp_path, config(tmp_path), model=tiny.llama(num_hidden_layers=1).bfloat16())
    assert "weights train that are stored in bfloat16, which loses steps below 1/256 of a weight" in caplog.text


class HalfOfTheLabels(DataCollatorForLanguageModeling):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["labels"][:, ::2] = -100
        return batch


def test_collators_and_losses_of_their_own_keep_padded_rows(tmp_path):
    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return tiny.tokenizer().pad(examples, return_tensors="pt")

    assert build(tmp_path, config(tmp_path)).layout.startswith(FLAT)
    assert build(tmp_path, config(tmp_path), data_collator=collate).layout.startswith("rows: padded, function makes")
    overrides = build(tmp_path, config(tmp_path), data_collator=HalfOfTheLabels(pad_token_id=0))
    assert overrides.layout.startswith("rows: padded, HalfOfTheLabels makes the batches; ")
    batch = next(iter(overrides.get_train_dataloader()))
    assert (batch["labels"][:, ::2] == -100).all() and (batch["labels"][:, 1::2] != -100).all()
    trls = build(tmp_path, config(tmp_path), data_collator=DataCollatorForLanguageModeling(pad_token_id=0))
    assert trls.layout.startswith(FLAT)
    smooth = build(tmp_path, config(tmp_path, label_smoothing_factor=0.1))
    assert smooth.layout.startswith("rows: padded, its loss wants logits; ")


def test_a_formatting_function_of_a_batch_is_told(tmp_path):
    def of_a_batch(examples: Any) -> list[str]:
        return [f"### {story}" for story in examples["story"]]

    with pytest.raises(ConfigError, match="returned a list: TRL calls it with one row.*return that row's text"):
        build(tmp_path, config(tmp_path), train_dataset=rows(), formatting_func=of_a_batch)
    of_a_row = build(tmp_path, config(tmp_path), train_dataset=rows((3,)), dataset_text_field=None,
                     formatting_func=lambda row: f"#{row['story']}")
    assert tiny.tokenizer().decode(of_a_row.train_dataset[0]["input_ids"]) == f"#{rows((3,))[0]['story']}<eos>"


def test_batches_that_accelerate_cuts_up_stay_padded(saved, tmp_path):
    """It takes as many of each tensor as there are rows: of `cu_seq_lens` one, of flat tokens one row."""
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to="none",
                             accelerator_config={"dispatch_batches": True})
    ragged = rows((3, 8, 5, 6))
    trainer = FastSFTTrainer(model=saved, args=args, train_dataset=ragged, dataset_text_field="story")
    assert trainer.layout.startswith("rows: padded, dispatch_batches hands out")
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0] == 4
    streamed = FastSFTTrainer(model=saved, train_dataset=ragged.to_iterable_dataset(), dataset_text_field="story",
                              args=TrainingArguments(str(tmp_path), max_steps=1, report_to="none",
                                                     per_device_train_batch_size=4))
    batch = next(iter(streamed.get_train_dataloader()))
    assert ("cu_seq_lens_q" in batch) == streamed.rows_end_to_end
    assert not streamed.rows_end_to_end or batch["cu_seq_lens_q"].unique().numel() >= 5


def test_the_default_folder(monkeypatch):
    """TRL's default is bf16, which transformers refuses on a CPU."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    assert _config(None, "org/name/", {}).output_dir == "name-SFT"
    assert _config(None, tiny.llama(), {"packing": True}).packing is True
    assert _config(None, tiny.llama(), {}).output_dir == "model-SFT"


def test_errors_of_the_embedding_rate_and_strict(tmp_path):
    with pytest.raises(ConfigError, match="neither embed_tokens nor lm_head trains"):
        build(tmp_path, config(tmp_path, embedding_learning_rate=1e-5), peft_config=tiny.lora())
    with pytest.raises(ConfigError, match="relu2"):
        build(tmp_path, config(tmp_path), model=tiny.llama(hidden_act="relu2"), strict=True)


def test_arguments_survive_their_own_dictionary(tmp_path):
    args = config(tmp_path, embedding_learning_rate=1e-5, max_seq_length=50)
    again = FastTrainingArguments(**json.loads(json.dumps(args.to_dict())))
    assert (again.embedding_learning_rate, again.max_length) == (1e-5, 50)
