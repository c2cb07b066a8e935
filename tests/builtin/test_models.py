"""The embedded models and their tokenizer, loaded as any other checkpoint is."""

import multiprocessing
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligntune.builtin import docstrings, load_model, load_tokenizer, model_path, models
from aligntune.errors import ConfigError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 47 + 85?"},
    {"role": "assistant", "content": "132"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("ALIGNTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def test_special_tokens_are_distinct(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert ids == [0, 1, 2] and len(tokenizer) == tokenizer.vocab_size == 2048
    assert tokenizer.unk_token_id is None


@pytest.mark.parametrize("text", ["", "  a\n\n\tb ", "h\u00e9llo \u65e5\u672c \U0001f389", "x" * 3000, "01234567" * 9])
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id  # plain text begins with bos, as Llama's tokenizers do it
    assert tokenizer.decode(ids[1:]) == text


def test_digits_are_single_tokens(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("2024 and 1,000.50", add_special_tokens=False)["input_ids"])
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("2024100050")


def test_compression_on_the_text_it_is_for(tokenizer):
    text = "".join(row["messages"][1]["content"] for row in docstrings.chat_rows("test"))
    assert len(text) / len(tokenizer(text)["input_ids"]) > 2.2  # characters a token; bytes alone would be 1


def test_chat_template(tokenizer):
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert rendered == (
        "<|bos|><|system|>Be brief.<|end|><|user|>What is 47 + 85?<|end|><|assistant|>132<|end|>")
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert rendered == prompt + "132<|end|>"  # the generation prompt is a prefix of the whole


def test_generation_tags_cover_the_answer_and_its_end(tokenizer):
    out = tokenizer.apply_chat_template(CHAT + CHAT[1:], return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, on in zip(out["input_ids"], out["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(masked) == "132<|end|>132<|end|>"


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="the roles are 'system', 'user' and 'assistant', not 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_tiny_is_the_same_model_every_time_and_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    model = load_model("builtin:tiny")
    assert torch.equal(before, torch.random.get_rng_state())
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_590_464
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert weight[0, :3].tolist() == pytest.approx(PINNED_WEIGHT, abs=1e-5)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(weight, model.model.layers[1].self_attn.q_proj.weight)


PINNED_WEIGHT = [-0.0028342, 0.0041480, -0.0179729]


def test_the_folder_is_a_checkpoint_like_any_other():
    path = model_path("builtin:tiny")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    ours = load_model("tiny")
    for (name, one), (_, two) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.get_vocab() == load_tokenizer("tiny").get_vocab()
    assert tokenizer.chat_template == load_tokenizer("tiny").chat_template
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert model_path("builtin:tiny") == path and path.is_relative_to(os.environ["ALIGNTUNE_CACHE"])


def fetch(_):
    return str(model_path("builtin:tiny")), (model_path("builtin:tiny") / "model.safetensors").stat().st_size


def test_several_processes_may_ask_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(fetch, range(3), chunksize=1)
    assert len(set(found)) == 1
    left = [entry.name for entry in (tmp_path / "builtin").iterdir()]
    assert left == [os.path.basename(found[0][0])]  # no drafts


def test_a_changed_file_gets_another_folder(tmp_path, monkeypatch):
    first = model_path("builtin:tiny")
    monkeypatch.setattr(models, "SEED", models.SEED + 1)
    assert model_path("builtin:tiny") != first


def test_unknown_models():
    with pytest.raises(ConfigError, match="did you mean 'builtin:tiny'"):
        model_path("builtin:tinny")
    with pytest.raises(ConfigError, match="builtin:pydoc is a dataset; the builtin models are"):
        load_model("builtin:pydoc")
    with pytest.raises(ConfigError, match="Valid: builtin:tiny, builtin:tiny-instruct"):
        load_tokenizer("builtin:")


def test_dtype_and_device():
    assert load_model("tiny", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model("tiny", device="meta").device.type == "meta"
