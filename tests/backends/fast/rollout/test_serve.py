"""Our engine behind `generate`: transformers' tokens and options, what is declined, and what is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import DistributedType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aligntune.backends.fast.attachment import detach
from aligntune.backends.fast.rollout.engine import RolloutEngine
from aligntune.backends.fast.rollout.serve import EngineGenerator, of_trainer, sampling_of
from aligntune.backends.fast.rollout.trl import autocast_of
from aligntune.core import generation
from aligntune.core.run_dir import RunDir
from aligntune.core.trainer import AlignTrainer
from aligntune.errors import ConfigError, DataError
from tests.backends.fast.rollout.test_trl import built_of
from tests.backends.trl.test_build import longest
from tests.core import tiny

PROMPTS = ["a", "a much longer prompt than the others", "hello", "xy", "12 + 30 ="]


@pytest.fixture(scope="module")
def model(device: str) -> Any:
    return tiny.llama().eval().to(device)


@pytest.fixture(scope="module")
def tokens() -> Any:
    return tiny.tokenizer()


def both(model: Any, tokens: Any, prompts: Any = PROMPTS, **options: Any) -> tuple[list[str], list[str]]:
    ours = generation.generate(model, tokens, prompts, generator=EngineGenerator(model, tokens), **options)
    return ours, generation.generate(model, tokens, prompts, **options)


@pytest.mark.parametrize("options", [
    {}, {"raw": True}, {"batch_size": 2}, {"system_prompt": "S"}, {"repetition_penalty": 1.7}, {"temperature": 0},
    {"eos_token_id": [40, 41, 42, 43]}, {"max_new_tokens": 1}, {"do_sample": False, "num_beams": 1},
], ids=str)
def test_greedy_is_transformers(model: Any, tokens: Any, options: dict[str, Any]) -> None:
    ours, theirs = both(model, tokens, **{"max_new_tokens": 12} | options)
    assert ours == theirs and len(set(ours)) > 2


def test_stop_strings_are_transformers(model: Any, tokens: Any) -> None:
    plain = both(model, tokens, raw=True, max_new_tokens=16)[0]
    pieces = [text[at : at + 2] for text in plain for at in range(1, len(text) - 4)]
    strings = sorted({piece for piece in pieces if piece.isascii() and piece.isprintable()})
    for stop in (strings, strings[0]):
        ours, theirs = both(model, tokens, raw=True, max_new_tokens=16, stop_strings=stop)
        assert ours == theirs != plain
        assert any(len(cut) < len(whole) for cut, whole in zip(ours, plain, strict=True))


def metaspace() -> Any:
    """Tokens as SentencePiece makes them (Llama 2, Mistral): the space is a word's first character."""
    letters = "abcdefghijklmnopqrstuvwxyz.,0123456789"
    words = ["<pad>", "<bos>", "<eos>", "\u2581", *letters, *(f"\u2581{one}" for one in letters)]
    words += [f"\u2581w{one}" for one in range(259 - len(words))]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_stop_strings_under_a_decoder_that_drops_the_first_space(model: Any) -> None:
    tokens = metaspace()
    assert tokens.decode([45, 45]) == tokens.convert_ids_to_tokens(45)[1:] + tokens.decode([3, 45])
    engine, at_once = EngineGenerator(model, tokens), 0
    for last in range(3, 40):
        prompt = [50, 7, last]
        free = engine([prompt], {"max_new_tokens": 6}, batch_size=1, seed=None)[0]
        whole = "".join(tokens.convert_ids_to_tokens(free)).replace("\u2581", " ")
        for stop in (whole[:1], whole[:3], whole[2:5]):
            ours = engine([prompt], {"max_new_tokens": 6, "stop_strings": stop}, batch_size=1, seed=None)[0]
            theirs = model.generate(
                torch.tensor([prompt], device=model.device), max_new_tokens=6, do_sample=False, stop_strings=stop,
                tokenizer=tokens, pad_token_id=0, eos_token_id=None)[0, 3:].tolist()
            assert ours == theirs, (prompt, stop)
            at_once += len(ours) == 1 and stop.startswith(" ")
    assert at_once > 5


def test_one_prompt_none_and_bad_ones(model: Any, tokens: Any) -> None:
    assert both(model, tokens, "hi", max_new_tokens=3)[0] == both(model, tokens, "hi", max_new_tokens=3)[1]
    assert both(model, tokens, []) == ([], [])
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        both(model, tokens, [""], raw=True)
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        both(model, tokens, max_new_token=3)


def test_options_mean_what_they_mean_in_transformers() -> None:
    sampling = sampling_of({"max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1,
                            "eos_token_id": 7, "stop_strings": "ab"}, 3)
    assert (sampling.temperature, sampling.top_p, sampling.min_p, sampling.seed) == (0.5, 0.9, 0.1, 3)
    assert (sampling.stop_token_ids, sampling.stop_strings, sampling.max_new_tokens) == ((7,), ("ab",), 5)
    from transformers import GenerationConfig

    assert sampling.top_k == GenerationConfig._get_default_generation_params()["top_k"] == 50
    assert sampling_of({"max_new_tokens": 5, "do_sample": True, "top_k": 0}, 3).top_k == 0
    greedy = sampling_of({"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}, None)
    assert greedy.temperature == 0 and greedy.stop_token_ids == ()
    with pytest.raises(ConfigError, match="repetition_penalty"):
        sampling_of({"max_new_tokens": 5, "repetition_penalty": -1.0}, None)


def test_seeds(model: Any, tokens: Any) -> None:
    generator = EngineGenerator(model, tokens)

    def sample(seed: int | None) -> list[str]:
        return generation.generate(model, tokens, PROMPTS, max_new_tokens=10, temperature=2.0, seed=seed,
                                   generator=generator)

    before = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    first, second = sample(None), sample(None)
    torch.manual_seed(0)
    assert sample(None) == first != second
    # The nucleus of next to nothing is the likeliest token.
    narrow = generation.generate(model, tokens, PROMPTS, max_new_tokens=10, top_p=1e-6, seed=1, generator=generator)
    assert narrow == generation.generate(model, tokens, PROMPTS, max_new_tokens=10)


def test_what_is_declined_is_said(model: Any, tokens: Any, capsys: Any) -> None:
    ours, theirs = both(model, tokens, num_beams=2, min_new_tokens=0, max_new_tokens=5)
    assert ours == theirs
    assert capsys.readouterr().err.count("generate: with transformers; num_beams: the engine has no such option") == 1
    both(model, tokens, num_beams=1, max_new_tokens=2)
    assert not capsys.readouterr().err


def test_the_engine_is_kept_until_it_is_too_small(model: Any, tokens: Any) -> None:
    generator = EngineGenerator(model, tokens)
    assert generator._engine is None
    options = {"max_new_tokens": 4}
    generator([[5, 6]], options, batch_size=2, seed=None)
    first = generator._engine
    generator([[5, 6, 7]], options, batch_size=1, seed=None)
    assert generator._engine is first and first.max_len == 256
    generator([[5] * 253], options, batch_size=1, seed=None)
    assert generator._engine is not first and generator._engine.max_len == 512
    generator([[5]] * 3, options, batch_size=3, seed=None)
    assert generator._engine.max_batch == 3 and generator._engine.max_len == 256
    generator.release()
    assert generator._engine is None


def test_models_that_it_cannot_run_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(ConfigError, match="'gpt2' is not in the table"):
        EngineGenerator(gpt2, tiny.tokenizer())


def run_of(trainer: Any, generator: Any, path: Any, algorithm: str = "grpo") -> AlignTrainer:
    return AlignTrainer(trainer, config={}, run_dir=RunDir(path), tokenizer=trainer.processing_class, backend="fast",
                        algorithm=algorithm, progress=False, generator=generator)


def test_a_trainer_of_backend_fast_generates_with_it(tmp_path: Any) -> None:
    built = built_of("fast", "grpo", tmp_path, rollout_memory_gib=0.01)
    assert built.attestation()["layout"].endswith("; generate: our engine")
    trainer = built.trainer
    detach(trainer.model)  # the engine runs a model as it stands; interpreted kernels take their time
    run = run_of(trainer, built.generator, tmp_path)
    plain = run_of(trainer, None, tmp_path)
    ours = run.generate(PROMPTS, max_new_tokens=6)
    assert ours == plain.generate(PROMPTS, max_new_tokens=6) and len(set(ours)) > 2
    # A rollout's engine is used where it is long enough (64 here), and outlives its training.
    own = built.generator._engine
    assert own is not None and own.memory_gib == 0.01
    trainer._generate_single_turn([[9, 30, 7]] * 4, None, {}, 4)
    assert built.generator._at(64, 1) is trainer.rollout_engine and built.generator._at(65, 1) is own
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert built.generator._engine is None
    trainer.is_in_train = True
    run.generate("x" * 80, raw=True, max_new_tokens=2)
    assert built.generator._engine is None


def test_where_it_does_not_generate_the_build_says_so(tmp_path: Any) -> None:
    built = built_of("fast", "grpo", tmp_path, rollout_engine="hf")
    assert built.generator is None
    assert "generate: transformers, for rollout_engine is 'hf'" in built.attestation()["layout"]
    assert built.notices == ["generate: transformers, for rollout_engine is 'hf'"]
    state = built.trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    try:
        generator, what = of_trainer(built.trainer, tiny.tokenizer())
    finally:
        state.distributed_type = DistributedType.NO
    assert generator is None and what == "transformers, for FSDP shards the weights"


@pytest.mark.parametrize("algorithm", [
    "grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dapo", "dr_grpo", "rloo", "ppo"))])
def test_evaluation_of_an_online_method_draws_with_the_engine(
    algorithm: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewards are those of what the engine drew, and transformers draws nothing."""
    options: dict[str, Any] = {"overlong_buffer_len": 0} if algorithm == "dapo" else {}
    options |= {} if algorithm == "ppo" else {"beta": 0.0}
    built = built_of("fast", algorithm, tmp_path, model_name=tiny.llama(num_hidden_layers=1), **options)
    drawn, draw = [], RolloutEngine.generate

    def recorded(self: RolloutEngine, *args: Any, **given: Any) -> Any:
        drawn.append(draw(self, *args, **given))
        return drawn[-1]

    monkeypatch.setattr(RolloutEngine, "generate", recorded)
    monkeypatch.setattr(type(built.trainer.model), "generate", None)
    built.trainer.eval_dataset = tiny.prompts(2)
    metrics = run_of(built.trainer, built.generator, tmp_path, algorithm).evaluate()
    ids = [row for rollout in drawn for row in rollout.completion_ids]
    rewards = longest([], built.trainer.processing_class.batch_decode(ids, skip_special_tokens=True))
    assert len(rewards) == 2 * 4 and len(set(rewards)) > 1
    assert metrics["eval_reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert metrics["eval_rollout/seconds"] > 0
    assert 0 < metrics["eval_sampling/sampling_logp_difference/max"] < 1e-4


def test_fp32_norms_over_bf16_weights_are_met_under_autocast() -> None:
    """As TRL's CPO and ORPO leave a 4-bit base: its layers have no fp32 weights."""
    made = peft.get_peft_model(tiny.llama().to(torch.bfloat16), peft.LoraConfig(target_modules=["q_proj"]))
    for name, value in made.named_parameters():
        if "lora_" in name:
            value.data = value.data.float()
    trainer = SimpleNamespace(model=made, args=SimpleNamespace(bf16=True, fp16=False))
    assert autocast_of(trainer) is None
    for name, module in made.named_modules():
        if name.endswith("norm"):
            module.float()
    assert autocast_of(trainer) is torch.bfloat16
    assert autocast_of(SimpleNamespace(model=made, args=SimpleNamespace(bf16=False, fp16=False))) is None
    assert autocast_of(SimpleNamespace(model=tiny.llama(), args=trainer.args)) is torch.bfloat16
