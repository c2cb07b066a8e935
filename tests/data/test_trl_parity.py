"""On ordinary rows the ids (and the labels, where TRL makes the same choice) equal what TRL's own trainers prepare."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from aligntune.data import with_kl_completions
from tests.data import rows as data
from tests.data.tokenizers import make

COMMON = {
    "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def model(cls=LlamaForCausalLM, **extra):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=640, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, **extra,
    )  # fmt: skip
    return cls(config)


def trl_sft(rows, family, tmp_path, **options):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), **COMMON, **options)
    trainer = SFTTrainer(model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=make(family))
    return trainer.train_dataset


def trl_dpo(rows, family, tmp_path, **options):
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(output_dir=str(tmp_path), **COMMON, **options)
    trainer = DPOTrainer(model(), ref_model=model(), args=args, train_dataset=Dataset.from_list(rows),
                         processing_class=make(family))  # fmt: skip
    return trainer.train_dataset


def same(ours, theirs, columns):
    assert len(ours) == len(theirs) > 0
    for column in columns:
        assert list(ours[column]) == list(theirs[column]), column
        assert any(len(value) for value in ours[column])


CASES = [
    (data.TEXT, "qwen3", {}),
    (data.TEXT, "base-bos", {}),
    (data.PROMPT_COMPLETION, "qwen3", {}),
    (data.PROMPT_COMPLETION, "base-bos", {}),
    (data.PROMPT_COMPLETION_TURNS, "llama3.1", {}),
    (data.PROMPT_COMPLETION_TURNS, "gemma", {}),
    (data.PROMPT_COMPLETION_TURNS, "gemma3", {}),
    (data.PROMPT_COMPLETION_TURNS, "qwen2.5", {}),
    (data.PROMPT_COMPLETION_TURNS, "qwen3", {}),
    (data.MESSAGES, "qwen3", {"assistant_only_loss": True}),
    (data.TWO_TURNS, "qwen3", {"assistant_only_loss": True}),
    (data.REASONING, "qwen3", {"assistant_only_loss": True}),
    (data.REASONING, "r1", {"assistant_only_loss": True}),
    (data.TWO_TURNS, "gemma", {"assistant_only_loss": True}),
]


@pytest.mark.parametrize(("rows", "family", "options"), CASES)
def test_sft_rows_equal_trls(rows, family, options, tmp_path):
    theirs = trl_sft(rows, family, tmp_path, **options)
    same(data.prepared(rows, "sft", family).train, theirs, ["input_ids", "labels"])


def test_the_generation_prompt_is_not_learnt_where_trls_tags_include_a_piece_of_it(tmp_path):
    """TRL's tags for Qwen2.5 open before the line break that the generation prompt ends with; the ids are the same."""
    theirs = trl_sft(data.TWO_TURNS, "qwen2.5", tmp_path, assistant_only_loss=True)
    ours = data.prepared(data.TWO_TURNS, "sft", "qwen2.5").train
    same(ours, theirs, ["input_ids"])
    differ = [
        token
        for token, our, their in zip(ours[0]["input_ids"], ours[0]["labels"], theirs[0]["labels"], strict=True)
        if our != their
    ]
    assert [make("qwen2.5").decode([token]) for token in differ] == ["\n", "\n"]


def test_sft_whole_conversations_equal_trls_default(tmp_path):
    theirs = trl_sft(data.MESSAGES, "llama3.1", tmp_path)
    ours = data.prepared(data.MESSAGES, "sft", "llama3.1", completion_only=False).train
    same(ours, theirs, ["input_ids", "labels"])


def test_sft_rows_cut_to_length_equal_trls(tmp_path):
    theirs = trl_sft(data.PROMPT_COMPLETION_TURNS, "qwen3", tmp_path, max_length=33)
    ours = data.prepared(data.PROMPT_COMPLETION_TURNS, "sft", "qwen3", max_seq_length=33)
    same(ours.train, theirs, ["input_ids", "labels"])
    assert ours.report.truncated == 2


@pytest.mark.parametrize(
    ("rows", "family"),
    [
        (data.PREFERENCE, "qwen3"), (data.PREFERENCE, "base-bos"), (data.PREFERENCE_TURNS, "llama3.1"),
        (data.PREFERENCE_TURNS, "gemma"), (data.PREFERENCE_TURNS, "qwen3"), (data.WHOLE_CONVERSATIONS, "qwen3"),
        (data.WHOLE_CONVERSATIONS, "llama3.1"),
        ([{"chosen": "The sky is blue.", "rejected": "The sky is green."}], "base-bos"),
    ],
)  # fmt: skip
def test_preference_rows_equal_trls(rows, family, tmp_path):
    theirs = trl_dpo(rows, family, tmp_path)
    same(data.prepared(rows, "preference", family).train, theirs, ["prompt_ids", "chosen_ids", "rejected_ids"])


@pytest.mark.parametrize(("rows", "family"), [(data.PREFERENCE, "base-bos"), (data.PREFERENCE_TURNS, "llama3.1")])
def test_reward_rows_equal_trls(rows, family, tmp_path):
    from trl import RewardConfig, RewardTrainer

    scorer = model(LlamaForSequenceClassification, num_labels=1, pad_token_id=0)
    trainer = RewardTrainer(scorer, args=RewardConfig(output_dir=str(tmp_path), **COMMON),
                            train_dataset=Dataset.from_list(rows), processing_class=make(family))  # fmt: skip
    same(data.prepared(rows, "reward", family).train, trainer.train_dataset, ["chosen_ids", "rejected_ids"])


@pytest.mark.parametrize("rows", [data.UNPAIRED, data.PREFERENCE], ids=["unpaired", "pairs"])
def test_unpaired_rows_and_kl_completions_equal_trls(rows, tmp_path):
    from trl import KTOConfig, KTOTrainer

    trainer = KTOTrainer(model(), ref_model=model(), args=KTOConfig(output_dir=str(tmp_path), **COMMON),
                         train_dataset=Dataset.from_list(rows), processing_class=make("base-bos"))  # fmt: skip
    ours = with_kl_completions(data.prepared(rows, "unpaired", "base-bos").train, 2)
    same(ours, trainer.train_dataset, ["prompt_ids", "completion_ids", "KL_completion_ids"])
    assert list(ours["label"]) == list(trainer.train_dataset["label"])


def test_the_prepared_columns_train(tmp_path):
    """TRL's own collator takes them: a step through SFTTrainer with its preparation switched off."""
    from trl import SFTConfig, SFTTrainer

    prepared = data.prepared(data.MESSAGES, "sft", "llama3.1")
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, dataset_kwargs={"skip_prepare_dataset": True}, **COMMON)
    trainer = SFTTrainer(model(), args=args, train_dataset=prepared.train, processing_class=prepared.tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert (batch["labels"] != -100).sum() == prepared.report.supervised_tokens > 0
    assert trainer.train().training_loss == pytest.approx(6.46, abs=0.15)  # ln 640: an untrained model
