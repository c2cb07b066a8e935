"""Train the tokenizer of the embedded models: `python -m aligntune.builtin.make_tokenizer`.

Byte-level BPE over the docstrings of the standard library and the arithmetic rows. The files it writes are part of the
package, so nobody needs to run it again; another Python version has other docstrings and gives another vocabulary,
which would not fit the stored weights of `builtin:tiny-instruct`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from aligntune.builtin import arithmetic, docstrings

VOCAB_SIZE = 2048
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

# `<|end|>` closes every turn and is the tokenizer's eos: a model stops where its turn ends. The `generation` tags mark
# what the model writes, end of turn included, so a trainer can supervise exactly that.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- elif message['role'] in ('system', 'user') -%}
        {{- '<|' + message['role'] + '|>' + message['content'] + eos_token -}}
    {%- else -%}
        {{- raise_exception("the roles are 'system', 'user' and 'assistant', not '" + message['role'] + "'") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def corpus() -> Iterator[str]:
    """The text the vocabulary is made from: every training turn of `builtin:pydoc` and `builtin:arithmetic`."""
    for row in (*docstrings.chat_rows("train"), *arithmetic.chat_rows("train")):
        for message in row["messages"]:
            yield message["content"]


def main(folder: Path = Path(__file__).parent / "tiny") -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one: a carry is then a rule over positions, and 100 numbers do not become 100 unrelated tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, END, *ROLES.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any text can be encoded: no unknown token
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 2048,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    main()
