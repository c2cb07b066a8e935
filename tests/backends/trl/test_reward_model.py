"""Reward models: scores of single texts, in batches, with a tokenizer of their own; what is no reward model is told."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from aligntune import create_reward_trainer, create_rl_trainer
from aligntune.backends.trl.reward_model import RewardModel
from aligntune.errors import AlignTuneError, ConfigError
from tests.backends.trl.ppo_cases import PROMPTS, distinct, job, moved, reward_model, weights
from tests.core import tiny

TURNS = ["count to 3:", "say something longer than that:", "x"]
ANSWERS = [" 1 2 3", "", " a very long answer indeed, to be sure"]


def one_by_one(model: Any, tokenizer: Any, texts: list[str]) -> list[float]:
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item()
                for text in texts]


def other(family: str) -> tuple[Any, Any]:
    """A random scorer of another family with its tokenizer; an encoder's puts [CLS] and [SEP] around a text."""
    tokenizer = tiny.tokenizer(template=None)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 1, "initializer_range": 0.2}
    if family == "qwen3":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if family in ("bert", "roberta"):
        sizes["pad_token_id"] = 0
        core = tokenizer.backend_tokenizer
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 1), ("<eos>", 2)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", cls_token="<bos>", sep_token="<eos>",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **sizes)), tokenizer


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "bert"])
def test_scores_do_not_depend_on_the_batch(family: str, batch: int) -> None:
    model, tokenizer = (reward_model(), tiny.tokenizer()) if family == "llama" else other(family)
    scorer = RewardModel(model, tokenizer, name="scorer", batch_size=batch)
    texts = [a + b for a, b in zip(TURNS, ANSWERS, strict=True)]
    expected = one_by_one(model, tokenizer, [f"<bos>{text}<eos>" for text in texts] if family == "bert" else texts)
    assert len({round(score, 3) for score in expected}) == 3
    assert scorer(TURNS, ANSWERS, extra=[1, 2, 3]) == pytest.approx(expected, abs=1e-5)
    assert scorer([], []) == []
    assert ("token_type_ids" in tokenizer("ab")) == (family == "bert")


@pytest.mark.parametrize(("family", "room"), [("bert", 64), ("roberta", 63), ("gpt_neox", None)])
def test_a_text_beyond_the_last_position_is_refused(family: str, room: int | None) -> None:
    model, tokenizer = other(family)
    scorer = RewardModel(model, tokenizer, name="scorer")
    if room is None:  # rotary positions have no end
        assert math.isfinite(scorer(["x" * 99], ["y"])[0])
        return
    full = "x" * (room - 3)  # [CLS], [SEP] and the completion take the other three
    assert math.isfinite(scorer([full], ["y"])[0])
    with pytest.raises(ConfigError, match=f"scorer reads {room} tokens, .* has {room + 1}: lower max_seq_length"):
        scorer(["a", full], ["b", "yy"])


def test_an_encoders_first_token_that_a_template_wrote_is_not_written_twice() -> None:
    model, tokenizer = other("bert")
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m['content'] }}{% endfor %}<eos>"
    said = [[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]]
    scorer = RewardModel(model, tokenizer, name="scorer")
    expected = pytest.approx(one_by_one(model, tokenizer, ["<bos>ab<eos>"]), abs=1e-6)
    assert scorer(*said) == expected and scorer(["a"], ["b"]) == expected


def test_a_text_that_ended_by_itself_ends_with_the_reward_models_own_token() -> None:
    model, tokenizer = reward_model(), tiny.tokenizer()
    scorer = RewardModel(model, tokenizer, name="scorer", policy_eos=9)
    ended, cut = one_by_one(model, tokenizer, ["ab<eos>", "ab"])
    assert ended != pytest.approx(cut, abs=1e-3)
    assert scorer(["a", "a"], ["b", "b"], completion_ids=[[5, 9], [5, 6]]) == pytest.approx([ended, cut], abs=1e-5)


def test_conversations_are_rendered_with_the_template_that_is_given() -> None:
    model, bare = reward_model(), tiny.tokenizer(template=None)
    asked = [[{"role": "user", "content": text}] for text in TURNS]
    said = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    scorer = RewardModel(model, bare, name="scorer", template_from=tiny.tokenizer(), batch_size=2)
    texts = [f"<user>{a}<eos><assistant>{b}<eos>" for a, b in zip(TURNS, ANSWERS, strict=True)]
    assert scorer(asked, said) == pytest.approx(one_by_one(model, bare, texts), abs=1e-5)


def test_of_two_labels_the_log_odds_of_the_second() -> None:
    model, tokenizer = reward_model(labels=2), tiny.tokenizer()
    with torch.no_grad():
        logits = model(**tokenizer("ab", return_tensors="pt", add_special_tokens=False)).logits[0]
    odds = torch.log_softmax(logits, -1)
    assert RewardModel(model, tokenizer, name="two")(["a"], ["b"]) == pytest.approx([(odds[1] - odds[0]).item()])
    with pytest.raises(ConfigError, match="has 3 labels"):
        RewardModel(reward_model(labels=3), tokenizer, name="three")


def own_tokenizer(folder: Any) -> None:
    """The policy's bytes with two of their numbers exchanged."""
    plain = tiny.tokenizer(template=None)
    swapped = dict(plain.get_vocab())
    low, high = plain.convert_ids_to_tokens([50, 60])
    swapped[low], swapped[high] = swapped[high], swapped[low]
    core = Tokenizer(models.BPE(vocab=swapped, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
                            ).save_pretrained(folder)


def test_a_path_brings_its_tokenizer_and_functions_count_beside_it(tmp_path: Any) -> None:
    folder = tmp_path / "scorer"
    reward_model().save_pretrained(folder)
    own_tokenizer(folder)
    run = job(tmp_path / "run", reward_model_name=str(folder), reward_functions=[distinct],
              reward_function_weights=[2.0, 0.5], max_steps=1)
    functions = run.trainer.reward_funcs
    assert [function.__name__ for function in functions] == ["distinct", "scorer"]
    assert functions[1].tokenizer.get_vocab() != tiny.tokenizer().get_vocab()
    run.train()
    logged = run.trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(
        2.0 * logged["rewards/distinct/mean"] + 0.5 * logged["rewards/scorer/mean"], rel=1e-5)
    assert logged["rewards/scorer/mean"] != 0


def test_the_folder_of_the_run_that_trained_it_is_a_path_too(tmp_path: Any) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": f"{i} good", "rejected": f"{i} bad"} for i in range(4)]
    trained = create_reward_trainer(tiny.scorer(), pairs, tokenizer_name=tiny.tokenizer(), backend="trl", max_steps=1,
                                    output_dir=str(tmp_path / "scorer"), report_to="none", batch_size=2)
    trained.train()
    run = job(tmp_path / "run", reward_model_name=str(tmp_path / "scorer"))
    (scorer,) = run.trainer.reward_funcs
    assert scorer.__name__ == "scorer"
    assert torch.equal(scorer.model.score.weight, trained.model.score.weight)


def test_grpo_takes_a_reward_model_object_too(tmp_path: Any) -> None:
    run = create_rl_trainer(tiny.llama(), PROMPTS, algorithm="grpo", backend="trl", reward_model_name=reward_model(),
                            batch_size=4, num_generations=4, max_steps=1, max_completion_length=6, max_seq_length=64,
                            tokenizer_name=tiny.tokenizer(), output_dir=str(tmp_path), report_to="none")
    assert run.train().global_step == 1
    assert run.trainer.state.log_history[0]["rewards/LlamaForSequenceClassification/std"] > 0


def test_what_is_no_reward_model_is_told(tmp_path: Any) -> None:
    tiny.llama().save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"is no reward model: it has no score\.weight"):
        job(tmp_path / "a", reward_model_name=str(tmp_path / "lm"))
    with pytest.raises(ConfigError, match="reward_model_name: '.*nothing' is no folder here"):
        job(tmp_path / "b", reward_model_name=str(tmp_path / "nothing"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    with pytest.raises(AlignTuneError, match="the reward model '.*broken' cannot be loaded"):
        job(tmp_path / "b", reward_model_name=str(tmp_path / "broken"))
    with pytest.raises(ConfigError, match="the policy's has 259 tokens to its 100"):
        job(tmp_path / "c", reward_model_name=reward_model(vocab_size=100))


@pytest.fixture
def adapters(tmp_path: Any) -> Any:
    """A folder of adapters with a score head as `algorithm: reward` leaves them."""
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    base.config.pad_token_id = tiny.tokenizer().pad_token_id
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "scorer")
    tiny.tokenizer().save_pretrained(tmp_path / "scorer")
    return model.eval(), tmp_path / "scorer"


def test_adapters_score_with_the_head_that_was_saved_with_them(adapters: Any, tmp_path: Any) -> None:
    model, folder = adapters
    (scorer,) = job(tmp_path / "run", reward_model_name=str(folder)).trainer.reward_funcs
    expected = one_by_one(model, tiny.tokenizer(), [a + b for a, b in zip(TURNS, ANSWERS, strict=True)])
    assert len({round(score, 3) for score in expected}) == 3
    assert scorer(TURNS, ANSWERS) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    with model.disable_adapter():  # both the adapters and the head are part of the score
        assert one_by_one(model, tiny.tokenizer(), ["ab"])[0] != pytest.approx(scorer(["a"], ["b"])[0], abs=1e-2)
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "object"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_critic_that_starts_from_adapters_has_them_merged(
    adapters: Any, use_peft: bool, by_path: bool, tmp_path: Any
) -> None:
    model, folder = adapters
    reward = str(folder) if by_path else copy.deepcopy(model)
    run = job(tmp_path / "run", reward_model_name=reward, value_model_name="reward", use_peft=use_peft,
              max_steps=2, learning_rate=1e-2, **({"lora_r": 2} if use_peft else {}))
    before = weights(run.trainer)
    whole = model.merge_and_unload()
    assert torch.equal(before["critic.head.weight"], whole.score.weight)
    queries = [value for name, value in before.items()
               if name.startswith("critic.") and name.endswith(("q_proj.weight", "q_proj.base_layer.weight"))]
    assert len(queries) == len(whole.model.layers)
    for layer, query in zip(whole.model.layers, queries, strict=True):
        assert torch.allclose(query, layer.self_attn.q_proj.weight, atol=1e-6)
    run.train()
    critics = {name for name in moved(before, weights(run.trainer)) if name.startswith("critic.")}
    assert any("lora_" in name for name in critics) == use_peft
    assert any("mlp" in name and "lora_" not in name for name in critics) != use_peft
    (scorer,) = run.trainer.reward_funcs
    assert any("lora_" in name for name, _ in scorer.model.named_parameters())  # the scorer keeps its own


@pytest.mark.parametrize(("part", "words"), [
    ("score", "it has no score.weight"), ("layers.1.self_attn.q_proj.lora_B", r"it has no model\.layers\.1\..*lora_B")])
def test_adapters_without_their_head_or_a_part_are_told(part: str, words: str, adapters: Any, tmp_path: Any) -> None:
    file = adapters[1] / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    assert len(kept) == len(load_file(file)) - 1
    save_file(kept, file)
    with pytest.raises(ConfigError, match=words):
        job(tmp_path / "run", reward_model_name=str(adapters[1]))


def test_adapters_that_name_no_base(adapters: Any, tmp_path: Any) -> None:
    path = adapters[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AlignTuneError, match="names no base model"):
        job(tmp_path / "run", reward_model_name=str(adapters[1]))


def test_a_base_with_a_hole_is_told_under_adapters_too(adapters: Any, tmp_path: Any) -> None:
    file = tmp_path / "base/model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "model.norm.weight"}, file,
              metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"it has no model\.norm\.weight"):
        job(tmp_path / "run", reward_model_name=str(adapters[1]))
