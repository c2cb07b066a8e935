"""Generation: padding, templates, options, and nothing left changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aligntune.core import generation
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from aligntune.errors import ConfigError, DataError
from tests.core import tiny

PROMPTS = ["a", "a much longer prompt than the others", "hello", "xy", "12 + 30 ="]


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def tokens():
    return tiny.tokenizer()


def alone(model, ids, count):
    """Greedy by hand: no padding, no cache, no generate()."""
    ids = list(ids)
    new = []
    for _ in range(count):
        with torch.no_grad():
            best = int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax())
        if best == 2:
            break
        new.append(best)
        ids.append(best)
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("raw", [True, False])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(model, tokens, batch_size, raw):
    texts = generation.generate(model, tokens, PROMPTS, raw=raw, max_new_tokens=12, batch_size=batch_size)
    expected = []
    for prompt in PROMPTS:
        text = prompt if raw else f"<user>{prompt}<eos><assistant>"
        ids = tokens(text, add_special_tokens=False)["input_ids"]
        expected.append(tokens.decode(alone(model, ids, 12), skip_special_tokens=True))
    assert texts == expected
    assert len(set(texts)) > 2


def test_pad_may_be_eos(model):
    tokens = tiny.tokenizer()
    expected = generation.generate(model, tokens, PROMPTS, max_new_tokens=8)
    tokens.pad_token = tokens.eos_token
    assert generation.generate(model, tokens, PROMPTS, max_new_tokens=8) == expected


def test_prompts_of_every_form(tokens):
    def text(prompt, **options):
        return tokens.decode(generation.encode(tokens, prompt, **options))

    turn = {"role": "user", "content": "hi"}
    assert text("hi") == text([turn]) == "<user>hi<eos><assistant>"
    assert text("hi", raw=True) == "hi"
    assert text("hi", system_prompt="S") == "<system>S<eos><user>hi<eos><assistant>"
    own = {"role": "system", "content": "own"}
    assert text([own, turn], system_prompt="S") == "<system>own<eos><user>hi<eos><assistant>"
    assert text([turn, {"role": "assistant", "content": "so"}]) == "<user>hi<eos><assistant>so"
    assert generation.as_list("a") == ["a"] and generation.as_list([turn]) == [[turn]]
    assert generation.as_list([[turn], "a"]) == [[turn], "a"] and generation.as_list(()) == []


def test_one_prompt_or_none(model, tokens):
    assert len(generation.generate(model, tokens, "hi", max_new_tokens=2)) == 1
    assert len(generation.generate(model, tokens, [{"role": "user", "content": "hi"}], max_new_tokens=2)) == 1
    assert generation.generate(model, tokens, []) == []


def test_a_tokenizer_that_appends_eos_does_not_start_behind_the_end(tokens):
    from tokenizers.processors import TemplateProcessing

    closing = tiny.tokenizer(template=None)
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    assert closing("hi")["input_ids"][-1] == 2
    assert closing.decode(generation.encode(closing, "hi")) == "<bos>hi"
    # A template writes its own special tokens: none are added to them.
    closing.chat_template = tiny.TEMPLATE
    assert closing.decode(generation.encode(closing, "hi")) == "<user>hi<eos><assistant>"


@pytest.mark.parametrize(("prompt", "error", "message"), [
    (7, DataError, "not int"), ([7], DataError, "not int"), ([""], DataError, "prompt 0 has no tokens"),
    ([{"content": "x"}], DataError, "'role' and 'content'"), (None, DataError, "NoneType"),
    ({"a": 1}, DataError, "dict"),
])
def test_what_is_no_prompt(model, tokens, prompt, error, message):
    with pytest.raises(error, match=message):
        generation.generate(model, tokens, prompt, raw=prompt == [""], max_new_tokens=2)


def test_messages_that_the_template_refuses(model):
    strict = tiny.tokenizer(template=(
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('no role ' + m['role']) }}{% endif %}"
        "{{ m['content'] + eos_token }}{% endfor %}"))
    assert len(generation.generate(model, strict, [[{"role": "user", "content": "q"}]], max_new_tokens=2)) == 1
    for role, content, why in (("usr", "q", "no role usr"), ("user", None, "content|NoneType")):
        with pytest.raises(DataError, match=f"chat template refuses the conversation: .*({why})"):
            generation.generate(model, strict, [[{"role": role, "content": content}]], max_new_tokens=2)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("prompt", "options"), [
    ("\ud83d", {}), (["fine", "half \ude00 of one" + "x" * 99], {}), ([{"role": "user", "content": "a\udfff"}], {}),
    ("fine", {"system_prompt": "\ud83d"}),
])
def test_half_a_character_is_told(model, tokens, prompt, options, raw):
    raw = raw and not options  # a system prompt is rendered
    with pytest.raises(DataError, match=r"the prompt '.*\\ud.*' has a lone surrogate \(half a character\)") as told:
        generation.generate(model, tokens, prompt, raw=raw, max_new_tokens=2, **options)
    assert str(told.value).isascii() and len(str(told.value)) < 250


def test_messages_without_a_template(model):
    plain = tiny.tokenizer(template=None)
    with pytest.raises(DataError, match="chat template"):
        generation.generate(model, plain, [{"role": "user", "content": "x"}])
    with pytest.raises(ConfigError, match="no chat template"):
        generation.generate(model, plain, "x", system_prompt="S")
    assert generation.generate(model, plain, "x", max_new_tokens=3)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_tokens": 3}, "unknown sampling option 'max_tokens'; did you mean 'max_new_tokens'"),
    ({"stop": "x"}, "unknown sampling option 'stop'; did you mean 'stop_strings'"),
    ({"max_length": 3}, "unknown sampling option 'max_length'; did you mean 'max_new_tokens'"),
    ({"n": 2}, "unknown sampling option 'n': a prompt has one completion"), ({"top_p": 0}, "top_p = 0: a number > 0"),
    ({"temprature": 1.0}, "'temperature'"), ({"top_p": 1.5}, "top_p = 1.5"), ({"temperature": -1}, "temperature = -1"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0"), ({"temperature": float("nan")}, "temperature"),
    ({"top_k": True}, "top_k = True"), ({"batch_size": 0}, "batch_size = 0"), ({"streamer": 1}, "streamer"),
    ({"top_k": 2.5}, "top_k = 2.5: a whole number >= 0"), ({"max_new_tokens": 2.5}, "a whole number >= 1"),
    ({"min_new_tokens": 1.0}, "min_new_tokens = 1.0: a whole"), ({"num_beams": 0}, "num_beams = 0"),
    ({"no_repeat_ngram_size": "2"}, "no_repeat_ngram_size = '2'"), ({"temperature": float("inf")}, "temperature = inf"),
    ({"repetition_penalty": "a"}, "repetition_penalty = 'a': a number > 0"), ({"repetition_penalty": 0}, "> 0"),
    ({"typical_p": 0}, "typical_p = 0"), ({"length_penalty": [1]}, "length_penalty"), ({"max_time": -1}, "max_time"),
    ({"top_p": 1.5, "top_k": "5", "do_sample": "yes"}, "3 faults"), ({"do_sample": 1}, "do_sample = 1: true or"),
    ({"early_stopping": "nevr", "num_beams": 2}, "early_stopping = 'nevr': true, false or 'never'"),
    ({"stop_strings": ["a", 3]}, "stop_strings"), ({"stop_strings": ""}, "none empty"), ({"seed": 1.5}, "seed = 1.5"),
    ({"seed": 2**70}, f"seed = {2**70}: a whole number from 0 to "), ({"seed": 2**63}, "seed"), ({"seed": -1}, "seed"),
    ({"seed": 2**2000}, "seed = "), ({"seed": True}, "seed = True: a whole number"),
    ({"eos_token_id": "</s>"}, "eos_token_id = '</s>': a token id or"), ({"eos_token_id": [2, 2.5]}, "eos_token_id"),
    ({"eos_token_id": np.int64(2)}, "eos_token_id"),
    ({"suppress_tokens": 3}, "suppress_tokens = 3: a list"), ({"begin_suppress_tokens": ["a"]}, "begin_suppress"),
    ({"bad_words_ids": [3]}, "bad_words_ids"), ({"bad_words_ids": []}, "bad_words_ids"), ({"batch_size": 2.0}, "batch"),
    ({"bad_words_ids": [[-1]]}, "bad_words_ids"), ({"forced_eos_token_id": True}, "forced_eos_token_id = True"),
    ({"exponential_decay_length_penalty": 1.1}, "exponential_decay"),
    ({"max_tokens": 3, "top_p": 2}, "2 faults"), ({"max_new_tokens": 300}, "positions for 256"),
])
def test_options_that_cannot_be(model, tokens, options, message):
    with pytest.raises(ConfigError, match=message):
        generation.generate(model, tokens, "hi", **options)


def test_names_of_other_libraries_are_no_options_and_mean_some():
    own = {*generation.OPTIONS, "system_prompt"}
    assert set(generation.OTHER_NAMES.values()) <= own and not own & generation.OTHER_NAMES.keys()


@pytest.mark.parametrize("options", [
    {"temperature": 2, "seed": np.int64(3)}, {"top_k": np.int64(4), "seed": 1}, {"min_p": 0, "top_p": 1, "seed": 1},
    {"repetition_penalty": 2}, {"repetition_penalty": np.float32(1.5)}, {"top_k": None, "temperature": None},
    {"num_beams": 2, "early_stopping": "never", "length_penalty": -1}, {"typical_p": 1, "seed": 1}, {"max_time": 60},
    {"stop_strings": ("a", "b")}, {"stop_strings": []}, {"eos_token_id": [2, 3]}, {"eos_token_id": None},
    {"eos_token_id": []}, {"temperature": 1.0, "seed": 0}, {"temperature": 1.0, "seed": 2**63 - 1},
    {"suppress_tokens": [4]}, {"begin_suppress_tokens": [4]}, {"bad_words_ids": [[4, 5]]}, {"forced_eos_token_id": 2},
    {"exponential_decay_length_penalty": (2, 1.5)}, {"no_repeat_ngram_size": 2, "min_new_tokens": 1},
], ids=lambda options: "-".join(options))
def test_options_that_can_be(model, tokens, options):
    assert generation.generate(model, tokens, ["hi", "you"], max_new_tokens=3, **options) != ["", ""]


def test_greedy_is_the_default_whatever_the_checkpoint_says(model, tokens):
    expected = generation.generate(model, tokens, PROMPTS, max_new_tokens=10)
    habits = tiny.llama()
    habits.generation_config.do_sample = True
    habits.generation_config.temperature = 5.0
    habits.generation_config.repetition_penalty = 3.0
    assert generation.generate(habits, tokens, PROMPTS, max_new_tokens=10) == expected
    assert generation.generate(model, tokens, PROMPTS, max_new_tokens=10, temperature=0) == expected
    assert generation.generate(model, tokens, PROMPTS, max_new_tokens=10, repetition_penalty=3.0) != expected
    assert habits.generation_config.repetition_penalty == 3.0 and habits.generation_config.do_sample is True


def test_sampling_is_seeded_and_leaves_the_random_state(model, tokens):
    def sample(seed):
        return generation.generate(model, tokens, PROMPTS, max_new_tokens=10, temperature=2.0, seed=seed)

    before = torch.get_rng_state()
    first, second, other = sample(1), sample(1), sample(2)
    assert first == second != other
    assert torch.equal(before, torch.get_rng_state())


def test_stop_strings_and_length(model, tokens):
    letters = [index for token, index in tokens.get_vocab().items() if not (len(token) == 1 and token.isascii())]
    options = {"raw": True, "suppress_tokens": letters}
    whole = generation.generate(model, tokens, "hi", max_new_tokens=20, **options)[0]
    assert len(whole) == 20 and len(generation.generate(model, tokens, "hi", max_new_tokens=7, **options)[0]) == 7
    short = generation.generate(model, tokens, "hi", max_new_tokens=20, stop_strings=[whole[3:5]], **options)[0]
    assert whole.startswith(short) and len(short) <= 5


def test_the_default_length_fits_the_models_positions(tokens):
    small = tiny.llama(max_position_embeddings=16)
    text = generation.generate(small, tokens, "abcdefgh", raw=True, eos_token_id=999)[0]
    assert text and generation._new_tokens(small, 8, None) == 8
    assert generation._new_tokens(tiny.llama(max_position_embeddings=4096), 8, None) == 256


def test_everything_is_as_before(tmp_path):
    trainer = tiny.sft(tmp_path, peft_config=tiny.lora(), gradient_checkpointing=False)
    run = AlignTrainer(trainer, config={}, run_dir=RunDir(tmp_path), tokenizer=trainer.processing_class, backend="trl",
                       algorithm="sft", progress=False, system_prompt="S")
    model = trainer.model.train()
    model.base_model.model.model.layers[0].eval()
    model.config.use_cache = False
    trainer.processing_class.padding_side = "right"
    modes = [module.training for module in model.modules()]
    habits, patched = model.get_base_model().generation_config, vars(model.get_base_model())["forward"]
    texts = run.generate(PROMPTS, max_new_tokens=4)
    assert len(texts) == 5
    assert [module.training for module in model.modules()] == modes and model.config.use_cache is False
    assert trainer.processing_class.padding_side == "right"
    assert model.get_base_model().generation_config is habits
    assert vars(model.get_base_model())["forward"] is patched
    assert texts == run.generate(PROMPTS, max_new_tokens=4, system_prompt="S")
    assert texts != run.generate(PROMPTS, max_new_tokens=4, system_prompt="another one")


def test_adapters_are_used(tmp_path):
    trainer = tiny.sft(tmp_path, peft_config=tiny.lora(init_lora_weights=False))
    run = AlignTrainer(trainer, config={}, run_dir=RunDir(tmp_path), tokenizer=trainer.processing_class, backend="trl",
                       algorithm="sft", progress=False)
    texts = run.generate(PROMPTS, raw=True, max_new_tokens=8)
    assert texts == [trainer.processing_class.decode(alone(
        trainer.model, trainer.processing_class(prompt)["input_ids"], 8), skip_special_tokens=True)
        for prompt in PROMPTS]
    with trainer.model.disable_adapter():
        assert texts != run.generate(PROMPTS, raw=True, max_new_tokens=8)
