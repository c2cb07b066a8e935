"""Characters carried to tokens: offsets, multi-byte text, special tokens around it, tokenizers without offsets."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizer

from aligntune.data.mask import Rendered
from aligntune.data.rows import RowFault
from aligntune.data.tokens import Encoded, Encoder
from aligntune.errors import DataError
from tests.data import rows as data
from tests.data.rows import assistant, learnt, prepared, user
from tests.data.tokenizers import make


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: one token per character, or per pair of digits; it gives no offsets."""

    model_input_names = ["input_ids"]

    def __init__(self, **options):
        pairs = [f"{a}{b}" for a in "0123456789" for b in "0123456789"]
        self.table = {c: i for i, c in enumerate([*map(chr, range(10)), *map(chr, range(32, 127)), *pairs, "\n"])}
        self.names = {i: c for c, i in self.table.items()}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.table)

    def get_vocab(self):
        return {**self.table, **self.added_tokens_encoder}

    def _tokenize(self, text, **options):
        found, at = [], 0
        while at < len(text):
            step = 2 if text[at : at + 2].isdigit() and len(text[at : at + 2]) == 2 else 1
            found.append(text[at : at + step])
            at += step
        return found

    def _convert_token_to_id(self, token):
        return self.table.get(token, 0)

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.fixture
def letters():
    return Letters(eos_token="<|end|>", pad_token="<|end|>")


def test_a_tokenizer_without_offsets_gives_the_same_masks(letters):
    assert not letters.is_fast
    rows = [{"prompt": "q: ", "completion": "the answer"}]
    found = prepared(rows, "sft", tokenizer=letters)
    assert learnt(found) == "the answer<|end|>"
    letters.chat_template = make("llama3.1").chat_template.replace("<|eot_id|>", "<|end|>")
    rows = [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}]
    assert learnt(prepared(rows, "sft", tokenizer=letters)) == "b<|end|>|d<|end|>"
    pair = [{"prompt": "q: ", "chosen": "yes", "rejected": "no"}]
    train = prepared(pair, "preference", tokenizer=letters).train
    assert letters.decode(train[0]["prompt_ids"]) == "q: " and letters.decode(train[0]["rejected_ids"]) == "no<|end|>"


def test_without_offsets_a_token_across_the_edge_is_refused_not_guessed(letters):
    with pytest.raises(DataError, match="list: row 0: tokens: this tokenizer gives no offsets, and a token spans"):
        prepared([{"prompt": "1 + 1 = 3", "completion": "4"}], "sft", tokenizer=letters)


@pytest.mark.parametrize("text", ["naïve", "日本語のテスト", "🙂🙃", "ﬁ ligature", "e\u0301", "\u200b", "\t x \r\n"])
@pytest.mark.parametrize("family", ["llama3.1", "base-bos", "gemma"])
def test_multi_byte_text_is_masked_exactly(family, text):
    rows = [{"messages": [user(f"say {text}"), assistant(f"a{text}b"), user(text), assistant(f"c{text}d")]}]
    end = {"llama3.1": "<|eot_id|>", "base-bos": "</s>", "gemma": "<end_of_turn>\n"}[family]
    assert learnt(prepared(rows, "sft", family)) == f"a{text}b{end}|c{text}d{end}"


def test_spans_at_the_edges_of_a_text():
    encoder = Encoder(make("base-bos"))
    whole, tail, prompted = encoder.encode([
        Rendered("abc", [(0, 3)], special=True), Rendered("abc", [(2, 3)], special=True),
        Rendered("abc", [(0, 3)], prompt="", special=True),
    ])  # fmt: skip
    assert isinstance(whole, Encoded) and whole.spans == [(0, len(whole.ids))] and len(whole.ids) == 4
    assert isinstance(tail, Encoded) and tail.spans == [(3, 4)]
    assert isinstance(prompted, Encoded) and prompted.spans == [(1, 4)]  # the tokenizer's own first token is no reply


def test_special_and_plain_texts_of_one_batch_keep_their_order():
    encoder = Encoder(make("base-bos"))
    found = encoder.encode([Rendered("a"), Rendered("b", special=True), Rendered("c")])
    bos = encoder.tokenizer.bos_token_id
    assert [not isinstance(one, RowFault) and one.ids[0] == bos for one in found] == [False, True, False]
    assert encoder.count([Rendered("a"), Rendered("b", special=True)]) == [1, 2]


def test_what_closes_a_turn():
    encoder = Encoder(make("qwen3"))
    end, a = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>"), encoder.tokenizer("a")["input_ids"][0]
    blank = encoder.tokenizer("\n")["input_ids"][0]
    assert encoder.closed([a, end], [(0, 2)]) and encoder.closed([a, end, blank, blank], [(0, 4)])
    assert not encoder.closed([a, end], [(0, 1)]) and not encoder.closed([end, a], [(0, 2)])
    assert not encoder.closed([blank], [(0, 1)]) and not encoder.closed([a], [])


def test_text_above_the_tokenizers_own_maximum_is_not_cut():
    tokenizer = make("base")
    tokenizer.model_max_length = 5
    found = prepared([{"text": "The capital of France is Paris. " * 9}], "sft", tokenizer=tokenizer)
    assert len(found.train[0]["input_ids"]) > 50 and found.report.truncated == 0


def test_settings_left_on_the_tokenizer_change_nothing():
    tokenizer = make("base")
    tokenizer.padding_side = "left"
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=2)  # leaves both on in the backend
    assert list(prepared(data.TEXT, "sft", tokenizer=tokenizer).train["input_ids"]) == list(
        prepared(data.TEXT, "sft", "base").train["input_ids"]
    )
