"""Online algorithms over our engine: TRL's loss on our completions, the gates, and what stays TRL's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from aligntune.backends.base import Prepared, require
from aligntune.backends.fast.attachment import detach
from aligntune.backends.fast.build import build as build_fast
from aligntune.backends.fast.rollout import trl as rollout_trl
from aligntune.backends.fast.rollout.engine import RolloutEngine
from aligntune.backends.fast.support import BACKEND
from aligntune.backends.trl.build import build as build_trl
from aligntune.core.backend_factory import create_rl_trainer
from aligntune.core.resolve import resolve
from aligntune.errors import ConfigError, UnsupportedAlgorithmError
from tests.backends.trl.test_build import longest, rows
from tests.core import tiny


def built_of(backend: str, algorithm: str, tmp_path: Any, **options: Any) -> Any:
    job = resolve({
        "model_name": tiny.llama(), "dataset_name": "in memory", "algorithm": algorithm, "backend": backend,
        "output_dir": str(tmp_path / backend), "max_steps": 2, "batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": "none", "tokenizer_name": tiny.tokenizer(), "reward_functions": [longest],
        "num_generations": 4, "max_completion_length": 5, "max_seq_length": 64, "gradient_accumulation_steps": 1,
        "precision": "fp32",
        **options,
    })
    return {"trl": build_trl, "fast": build_fast}[backend](job, Prepared(tiny.tokenizer(), rows(algorithm), None))


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


_SLOW = pytest.mark.slow  # training steps of interpreted kernels


@pytest.mark.parametrize(("algorithm", "adapters"), [
    ("grpo", True), pytest.param("grpo", False, marks=_SLOW), pytest.param("dr_grpo", True, marks=_SLOW),
    pytest.param("dr_grpo", False, marks=_SLOW), pytest.param("dapo", True, marks=_SLOW),
    pytest.param("dapo", False, marks=_SLOW),
])
def test_steps_are_trls_on_the_same_completions(algorithm: str, adapters: bool, tmp_path: Any) -> None:
    """Two steps of ours, then TRL's own with our completions forced: losses, rewards, KL and weights."""
    options: dict[str, Any] = {"use_peft": True, "lora_r": 4} if adapters else {}
    built = built_of("fast", algorithm, tmp_path, **options)
    ours = built.trainer
    drawn, generate = [], ours._generate_single_turn

    def recorded(*args: Any) -> Any:
        drawn.append(generate(*args))
        return drawn[-1]

    ours._generate_single_turn = recorded
    ours.train()
    assert isinstance(ours.rollout_engine, RolloutEngine)
    assert "rollouts: our engine" in built.attestation()["layout"]
    assert len(drawn) >= 2 and drawn[0][0] != drawn[1][0]
    # The log-probs that came with the tokens are those of the trainer's own forward.
    apart = logged(ours, "sampling/sampling_logp_difference/max")
    assert len(apart) == 2 and max(apart) < 1e-4
    assert all(scores < 0 for _, log_probs in drawn for row in log_probs for scores in row)

    theirs = built_of("trl", algorithm, tmp_path, **options).trainer
    forced = iter(drawn)
    theirs._generate_single_turn = lambda *args: (next(forced)[0], None)
    theirs.train()
    for key in ("loss", "reward", "grad_norm", "completions/mean_length", *(["kl"] if algorithm == "grpo" else [])):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=2e-4, abs=2e-6), key
    assert max(logged(ours, "grad_norm")) > 1e-3
    start = dict(tiny.llama().named_parameters())
    moved = 0
    for (name, mine), other in zip(ours.model.cpu().named_parameters(), theirs.model.cpu().parameters(), strict=True):
        difference = (mine - other).norm()
        if mine.requires_grad and name in start:
            way = (mine - start[name]).norm()
            assert difference < 0.02 * way, name  # Adam's first steps divide by gradients that are nearly 0
            moved += 1
        assert difference < 1e-3, name
    assert moved or adapters


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_base_in_fp8_draws_from_the_policy_that_learns(algorithm: str, tmp_path: Any) -> None:
    """A rollout that multiplied the base as it was loaded would differ by 0.08 in the mean here."""
    built = built_of("fast", algorithm, tmp_path, use_peft=True, lora_r=4, base_precision="fp8")
    assert "e4m3 by rows in 14 linear layers; rollouts: our engine" in built.attestation()["layout"]
    built.trainer.train()
    for part in ("mean", "max"):
        apart = logged(built.trainer, f"sampling/sampling_logp_difference/{part}")
        assert len(apart) == 2 and 0 < max(apart) < 1e-4, apart


def rollout_of(trainer: Any) -> Any:
    """What a trainer without a reference makes of a rollout, without its kernels."""
    detach(trainer.model.train())
    trainer.rows_end_to_end = False
    rows = [{"prompt": f"count to {n}:"} for n in (3, 5) for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_nothing_is_logged_where_nothing_is_compared(algorithm: str, tmp_path: Any) -> None:
    """No completion ends within 5 tokens: masked, none of them is in a pass, and 0 would read as agreement."""
    name = "sampling/sampling_logp_difference/mean"
    for masks, compared in ((True, 0), (False, 1)):
        trainer = built_of("fast", algorithm, tmp_path, mask_truncated_completions=masks, num_iterations=2,
                           beta=0.0).trainer
        trainer._tokenizer.eos_token_id, trainer.eos_token_ids = None, [258]
        rollout = rollout_of(trainer)
        assert bool(rollout["completion_mask"].any()) is not masks
        found = trainer._metrics["train"].get(name, [])
        assert len(found) == compared and all(0 < value < 1e-5 for value in found)


def test_a_rollout_of_several_steps_is_compared_once_and_whole(tmp_path: Any) -> None:
    trainer = built_of("fast", "grpo", tmp_path, num_iterations=2, steps_per_generation=2, beta=0.0).trainer
    compared = []
    log = trainer._log_difference
    trainer._log_difference = lambda *given: (compared.append(given[2].sum()), log(*given))
    rollout = rollout_of(trainer)
    assert [int(tokens) for tokens in compared] == [int(rollout["completion_mask"].sum())] != [0]
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, {name: value[:4] if isinstance(value, torch.Tensor) and value.dim() else value
                                          for name, value in rollout.items()})
    assert len(compared) == 1 and trainer._sampled is None
    assert 0 < trainer._metrics["train"]["sampling/sampling_logp_difference/max"][0] < 1e-4
    # A step whose rollout ends with it scores it in its loss alone.
    aligned = built_of("fast", "grpo", tmp_path, beta=0.0).trainer
    assert "old_per_token_logps" not in rollout_of(aligned) and not aligned._metrics["train"][
        "sampling/sampling_logp_difference/max"]


def test_log_probs_of_the_engine_decide_nothing(tmp_path: Any) -> None:
    """TRL masks rows of `off_policy_mask_threshold` by a sampler's log-probs, where it finds such: ours are logged."""
    options: dict[str, Any] = {"beta": 0.0, "trainer_options": {"off_policy_mask_threshold": 0.05}}
    ours = built_of("fast", "grpo", tmp_path / "ours", rollout_engine="fast", **options).trainer
    handed: list[Any] = []

    def apart(rollout: Any) -> Any:
        handed.append(rollout.completion_ids)
        return rollout.completion_ids, [[score + 0.1 for score in row] for row in rollout.log_probs]

    ours._handed = apart
    theirs = built_of("fast", "grpo", tmp_path / "theirs", rollout_engine="hf", **options).trainer
    theirs._generate_single_turn = lambda *args: (handed[0], None)
    found = []
    for trainer in (ours, theirs):
        rollout = rollout_of(trainer)
        trainer.current_gradient_accumulation_steps = 1
        advantages = torch.tensor([1.0, -1.0, 0.5, -1.5] * 2, device=rollout["completion_ids"].device)
        found.append(rollout | {"advantages": advantages})
    losses = [float(trainer._compute_loss(trainer.model, rollout).detach())
              for trainer, rollout in zip((ours, theirs), found, strict=True)]
    assert losses[0] == losses[1]
    name = "sampling/sampling_logp_difference/mean"
    assert ours._metrics["train"][name] == pytest.approx([0.1], abs=1e-4)
    # Another sampler's, vLLM's say, are TRL's to read: its own code masks by them.
    assert abs(float(theirs._compute_loss(theirs.model, found[0]).detach()) - losses[1]) > 0.1
    assert "sampling_per_token_logps" in found[0] and "sampling_per_token_logps" not in found[1]


def test_seeds(tmp_path: Any) -> None:
    """A step draws the same in a fresh run; another step, another round and another seed draw other tokens."""
    def draws(**options: Any) -> list[Any]:
        trainer = built_of("fast", "grpo", tmp_path, **options).trainer
        detach(trainer.model)  # the engine runs a model as it stands; interpreted kernels take their time
        rounds = []
        for step in (0, 0, 1):
            trainer.state.global_step = step
            rounds.append(trainer._generate_single_turn([[9, 30, 7]] * 4, None, {}, 4)[0])
        return rounds

    first, again, other = draws(), draws(), draws(seed=99)
    assert first == again
    assert first[0] != other[0]
    assert first[0] != first[1] != first[2]
    assert len({tuple(row) for ids in first for row in ids}) > 8


def test_an_evaluation_changes_no_draw_of_training_and_no_comparison(tmp_path: Any) -> None:
    """A run that resumes from a checkpoint at which another evaluated draws the same."""
    from tests.backends.fast.test_token_gradients import loss_pass

    def seeds(trainer: Any, *, evaluates: bool) -> list[int]:
        found = []
        for step in (4, 5):
            trainer.state.global_step = step
            if evaluates:
                trainer.model.eval()
                held_out.extend(trainer._sampling().seed for _ in range(2))
            trainer.model.train()
            found += [trainer._sampling().seed for _ in range(2)]
        return found

    held_out: list[int] = []
    plain, evaluated = (built_of("fast", "grpo", tmp_path).trainer for _ in range(2))
    expected = seeds(plain, evaluates=False)
    assert seeds(evaluated, evaluates=True) == expected and len({*expected, *held_out}) == 8

    detach(evaluated.model)
    evaluated.rows_end_to_end = False
    inputs = loss_pass(evaluated, sampling_per_token_logps=torch.zeros(2, 4, device=evaluated.accelerator.device))
    name = "sampling/sampling_logp_difference/max"
    for step, compared in ((5, 1), (6, 1)):
        evaluated.state.global_step = step
        evaluated.model.eval()
        evaluated._sampling()
        evaluated.model.train()
        evaluated._compute_loss(evaluated.model, inputs)
        assert len(evaluated._metrics["train"][name]) == compared, "at step 6 the policy is not the one that drew"


def test_sampling_options_arrive(tmp_path: Any) -> None:
    trainer = built_of("fast", "grpo", tmp_path, temperature=0.7, top_p=0.9, top_k=12, min_p=0.05,
                       repetition_penalty=1.2, rollout_memory_gib=0.5).trainer
    sampling = trainer._sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 12, 0.05)
    assert (sampling.repetition_penalty, sampling.max_new_tokens) == (1.2, 5)
    assert set(sampling.stop_token_ids) == {2}
    assert trainer._engine_options == {"max_len": 64, "memory_gib": 0.5}
    assert trainer._sampling().seed != sampling.seed  # a second round of the same step


def test_transformers_generate_stays_available(tmp_path: Any) -> None:
    built = built_of("fast", "grpo", tmp_path, rollout_engine="hf")
    assert "rollouts: hf, as was asked for" in built.attestation()["layout"]
    assert not [line for line in built.notices if line.startswith("rollouts: ")]
    detach(built.trainer.model)
    ids, log_probs = built.trainer._generate_single_turn([[9, 30, 7]] * 4, None, {}, 4)
    assert log_probs is None and len(ids) == 4  # TRL's own returns none
    trainer = built_of("fast", "grpo", tmp_path, batch_size=8).trainer
    detach(trainer.model.eval())
    trainer._generate_single_turn([[9, 30, 7]] * 2, None, {}, 2)
    assert trainer.rollout_engine.max_batch == 8  # as many as training will want
    assert built.trainer.rollout_engine is None


def test_what_the_engine_cannot_run_is_said_when_building(tmp_path: Any) -> None:
    options = {"trainer_options": {"generation_kwargs": {"num_beams": 2}}}
    with pytest.raises(ConfigError, match=r"rollout_engine = 'fast': generation_kwargs \['num_beams'\]"):
        built_of("fast", "grpo", tmp_path, rollout_engine="fast", **options)
    built = built_of("fast", "grpo", tmp_path, **options)  # auto: another engine, and it is said
    told = "rollouts: hf, generation_kwargs ['num_beams'] are transformers' options"
    assert told in built.attestation()["layout"] and told in built.notices


@pytest.mark.parametrize(("field", "value"), [("suppress_tokens", [3, 4]), ("min_new_tokens", 2), ("num_beams", 2)])
def test_what_the_models_own_generation_config_asks_for_is_not_dropped(field: str, value: Any, tmp_path: Any) -> None:
    """TRL's `generate` fills in from it what TRL does not set."""
    model = tiny.llama()
    setattr(model.generation_config, field, value)
    with pytest.raises(ConfigError, match=f"the model's generation_config sets {field}, which only transformers"):
        built_of("fast", "grpo", tmp_path / "asked", rollout_engine="fast", model_name=model)
    built = built_of("fast", "grpo", tmp_path / "auto", model_name=model)
    assert f"rollouts: hf, the model's generation_config sets {field}" in built.attestation()["layout"]
    # What an ordinary checkpoint has, and what TRL sets over it, keeps our engine.
    model.generation_config = GenerationConfig(
        temperature=0.6, top_p=0.9, top_k=20, do_sample=True, repetition_penalty=1.05, num_beams=1, min_length=0,
        bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0, max_length=20, use_cache=True)
    assert "rollouts: hf" not in built_of("fast", "grpo", tmp_path / "own", model_name=model).attestation()["layout"]


@pytest.mark.parametrize("given", ["option", "field"])
@pytest.mark.parametrize("algorithm", [
    "grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ppo", "dapo", "dr_grpo", "rloo"))])
def test_a_completion_that_a_stop_string_ends_is_not_cut_off(algorithm: str, given: str, tmp_path: Any) -> None:
    """TRL masks what is cut off, and PPO takes a penalty off it; both go by `eos_token_ids`."""
    ends: dict[str, Any] = {"eos_token_id": [86, 105]}
    options = {"option": {"stop_strings": "^", "trainer_options": {"generation_kwargs": ends}},
               "field": {"trainer_options": {"generation_kwargs": ends | {"stop_strings": ["^"]}}}}[given]
    masks = {} if algorithm == "ppo" else {"mask_truncated_completions": True, "beta": 0.0}
    graded: list[list[int]] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        graded.extend(completion_ids)
        return [float(len(text)) for text in completions]

    built = built_of("fast", algorithm, tmp_path, max_completion_length=12, reward_functions=[reward],
                     **options, **masks)
    trainer = built.trainer
    assert "rollouts: our engine" in built.attestation()["layout"]
    rollout = rollout_of(trainer)
    decode, metrics = trainer._tokenizer.decode, trainer._metrics["train"]
    ended = ["^" in decode(ids) or ids[-1] in (2, 86, 105) for ids in graded]
    assert {86, 105} & {ids[-1] for ids in graded} and any("^" in decode(ids) for ids in graded) and not all(ended)
    for ids in graded:
        assert not {2, 86, 105} & {*ids[:-1]} and "^" not in decode(ids[:-1]), "drawn on after an end"
    lengths = [len(ids) for ids in graded]
    if algorithm == "ppo":
        assert metrics["val/num_eos_tokens"] == [sum(ended)]
    else:
        expected = [length * end for length, end in zip(lengths, ended, strict=True)]
        assert rollout["completion_mask"].sum(1).tolist() == expected
    terminated = [length for length, end in zip(lengths, ended, strict=True) if end]
    assert metrics["completions/clipped_ratio"] == [1 - sum(ended) / len(ended)]
    assert metrics["completions/mean_terminated_length"] == [pytest.approx(sum(terminated) / len(terminated))]


def test_ends_that_our_engine_alone_takes_are_no_reason_for_another(tmp_path: Any) -> None:
    field = {"trainer_options": {"generation_kwargs": {"stop_strings": ["^"]}}}
    for engine in ("auto", "fast"):
        with pytest.raises(ConfigError, match=r"generation_kwargs\.stop_strings: our engine alone ends completions so, "
                                              r"and it cannot run here: one row of 64"):
            built_of("fast", "grpo", tmp_path, rollout_engine=engine, rollout_memory_gib=1e-6, **field)
        with pytest.raises(ConfigError, match=r"^rollout\.stop_strings: our engine ends completions so, and it cannot "
                                              "run here: one row of 64.*; rollout_engine='vllm' ends them so too$"):
            built_of("fast", "grpo", tmp_path, rollout_engine=engine, rollout_memory_gib=1e-6, stop_strings="^")


def test_fields_that_only_transformers_generate_reads_are_told(tmp_path: Any) -> None:
    options = {"trainer_options": {"cache_implementation": "static"}}
    told = ("rollouts: our engine; nothing reads cache_implementation of trainer_options (rollout_engine='hf' does)")
    built = built_of("fast", "grpo", tmp_path, **options)
    assert built.notices == [told]
    detach(built.trainer.model)
    for others in ({"rollout_engine": "fast"}, {"rollout_engine": "hf"}):  # of the first the resolved job says it
        built = built_of("fast", "grpo", tmp_path, **options, **others)
        assert told not in built.notices
        detach(built.trainer.model)


def test_gates() -> None:
    for options in ({"importance_sampling_level": "sequence"}, {"loss_type": "luspo"}, {"loss_type": "vespo"}):
        for given in (options, {"loss_type": "grpo", "trainer_options": options}):  # two ways to the same field
            with pytest.raises(UnsupportedAlgorithmError, match=f"{[*options.values()][0]}.*token-level ratios.*trl"):
                require(BACKEND, "grpo", given)
    for algorithm in ("dapo", "dr_grpo"):
        given = {"trainer_options": {"importance_sampling_level": "sequence"}}
        with pytest.raises(UnsupportedAlgorithmError, match="'sequence'.*token-level ratios.*trl"):
            require(BACKEND, algorithm, given)
        for backend in ("fast", "trl"):  # neither runs it: no gate sends anybody from one to the other
            with pytest.raises(ConfigError, match=f"loss_type = 'vespo': {algorithm} is defined by '{algorithm}'"):
                create_rl_trainer(tiny.llama(), [{"prompt": "a"}], algorithm=algorithm, backend=backend,
                                  reward_functions=[longest], trainer_options={"loss_type": "vespo"})
    with pytest.raises(UnsupportedAlgorithmError, match="token-level ratios"):
        require(BACKEND, "gspo", {})
    for name, value, off in (("torch_compile", True, False), ("use_liger_kernel", True, False),
                             ("torch_compile_backend", "inductor", None), ("torch_compile_mode", "default", None)):
        with pytest.raises(UnsupportedAlgorithmError, match=f"backend='fast', {name}={value!r}: .*backend='trl' runs"):
            require(BACKEND, "sft", {"trainer_options": {name: value}})
        require(BACKEND, "sft", {"trainer_options": {name: off}})
    require(BACKEND, "grpo", {"rollout_engine": "fast", "loss_type": "grpo", "importance_sampling_level": "token"})
    require(BACKEND, "grpo", {"loss_type": "luspo", "trainer_options": {"loss_type": "grpo"}})


def test_a_cache_too_small_for_a_row_is_said_when_building(tmp_path: Any, monkeypatch: Any) -> None:
    why = r"one row of 64 tokens needs 0\.0234 MiB, 0\.00102 MiB of cache are there; set rollout_memory_gib"
    with pytest.raises(ConfigError, match=rf"rollout_engine = 'fast': {why}.*'hf' generates"):
        built_of("fast", "grpo", tmp_path, rollout_engine="fast", rollout_memory_gib=1e-6)
    built = built_of("fast", "grpo", tmp_path, rollout_memory_gib=1e-6)
    layout = built.attestation()["layout"]
    assert re.search(f"; rollouts: hf, {why}.*; generate: transformers, for one row of 256", layout), layout
    assert [line.partition(",")[0] for line in built.notices] == ["rollouts: hf", "generate: transformers"]
    detach(built.trainer.model)
    assert built.trainer._generate_single_turn([[9, 30, 7]] * 2, None, {}, 2)[1] is None
    # Without the option it is the share of a budget, or of what is free.
    monkeypatch.setattr(rollout_trl, "share_of_budget", lambda plan: 1e-6)
    assert "rollouts: hf, one row of 64" in built_of("fast", "grpo", tmp_path).attestation()["layout"]
    built = built_of("fast", "grpo", tmp_path, rollout_memory_gib=0.01)
    assert "rollouts: our engine" in built.attestation()["layout"]
    monkeypatch.setattr(rollout_trl, "gather_object", lambda mine: [*mine, "the other process has no room"])
    with pytest.raises(ConfigError, match="the other process has no room"):
        built.trainer.rollouts_on(max_len=64, memory_gib=0.01)


def test_rows_at_once_are_capped_as_the_docs_say(tmp_path: Any) -> None:
    trainer = built_of("fast", "grpo", tmp_path).trainer
    detach(trainer.model)
    trainer.args.generation_batch_size = 300
    trainer._generate_single_turn([[9, 30, 7]], None, {}, 1)
    assert trainer.rollout_engine.max_batch == rollout_trl.MOST_ROWS == 256
    page = (Path(__file__).parents[4] / "docs" / "rollouts.md").read_text()
    assert f"no more than {rollout_trl.MOST_ROWS} rows at once" in page
