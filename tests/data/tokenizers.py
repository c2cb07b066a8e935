"""Small tokenizers built in code: a byte-level BPE, with the chat templates that the installed trl carries."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# family: (template file, special tokens, bos, eos)
FAMILIES = {
    "qwen3": ("qwen3", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|im_end|>"),
    "qwen2.5": ("qwen2_5", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|im_end|>"),
    "llama3.1": (
        "llama3_1",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|begin_of_text|>", "<|eot_id|>",
    ),
    "gemma": ("gemma", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "gemma3": ("gemma3", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "r1": (
        "deepseek_r1_distill",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    ),
    "base": (None, ["<|endoftext|>"], None, "<|endoftext|>"),
    "base-bos": (None, ["<s>", "</s>"], "<s>", "</s>"),
}  # fmt: skip

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Give three tips for staying healthy. Eat well, sleep enough and exercise every day.",
    "user assistant system Human Assistant prompt completion answer question think",
    "12 + 30 = 42. Two plus two is four. Write a function that adds two numbers.",
] * 8


@cache
def _backend(special: tuple[str, ...], bos: str | None) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def make(family: str, **changes: object) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of `family`; changes go to its constructor."""
    template, special, bos, eos = FAMILIES[family]
    settings = {"bos_token": bos, "eos_token": eos, "pad_token": special[-1], **changes}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(tuple(special), bos)),
        **{key: value for key, value in settings.items() if value is not None},
    )
    if template is not None:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer
