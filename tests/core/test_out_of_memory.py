"""When the GPU's memory runs out: an error of ours, with the settings now and what would lower it by how much."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from aligntune import create_sft_trainer
from aligntune.backends.fast import scripts
from aligntune.backends.fast.sft_trainer import FastSFTTrainer
from aligntune.core import out_of_memory
from aligntune.core.resolve import resolve
from aligntune.errors import AlignTuneError, GpuMemoryError
from tests.core import tiny

MIB, GIB = 1 << 20, 1 << 30
LAYERS, HIDDEN = 4, 1024


class Layer(nn.Module):
    def __init__(self, *, adapters: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for block, name, width in ((self.self_attn, "q_proj", HIDDEN), (self.mlp, "up_proj", 3 * HIDDEN)):
            linear = nn.Linear(HIDDEN, width, bias=False, dtype=torch.bfloat16)
            setattr(block, name, linear)
            if adapters:
                linear.requires_grad_(False)
                linear.lora_A = nn.Parameter(torch.zeros(64, HIDDEN))
                linear.lora_B = nn.Parameter(torch.zeros(width, 64))


class Model(nn.Module):
    """48 MiB of 16-bit weights: 32 in linear layers, 16 of an embedding; adapters: 0.75 M fp32 numbers in each layer's
    q_proj and mlp together, hence 4 layers x (2 + 4) x 64 x 1,024.
    """

    def __init__(self, *, adapters: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(8 * HIDDEN, HIDDEN, dtype=torch.bfloat16).requires_grad_(not adapters)
        self.layers = nn.ModuleList(Layer(adapters=adapters) for _ in range(LAYERS))
        if adapters:
            self.peft_config: dict[str, Any] = {"default": SimpleNamespace(r=64)}
        sizes = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=HIDDEN)
        self.config = SimpleNamespace(get_text_config=lambda: sizes)


WEIGHTS = 48 * MIB
ADAPTERS = LAYERS * 6 * 64 * HIDDEN
"""Numbers; as many x 4 bytes of weights, and of gradients."""


def message(monkeypatch: pytest.MonkeyPatch, *, adapters: bool = True, recompute: bool = True, peak: float = GIB,
            optim: str = "adamw_torch", four_bits: bool = False, keeps: float | None = None, script: bool = False,
            algorithm: str = "sft", has: dict[str, Any] | None = None, **options: Any) -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: int(peak))
    job = resolve({"algorithm": algorithm, "model_name": "m", "dataset_name": "d", "use_peft": adapters,
                   **({"lora_r": 64} if adapters else {}), **options})
    model = Model(adapters=adapters)
    model.is_loaded_in_4bit = four_bits  # type: ignore[assignment]
    trainer = SimpleNamespace(
        model=model, optimizer=None, state=SimpleNamespace(global_step=6),
        args=SimpleNamespace(gradient_checkpointing=recompute, optim=optim, bf16=True, fp16=False, max_length=2048,
                             per_device_train_batch_size=job.options.batch_size,
                             gradient_accumulation_steps=job.options.gradient_accumulation_steps))
    if keeps is not None:
        trainer.memory = SimpleNamespace(keeps=keeps)
    vars(trainer).update(has or {})
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total of 80 GiB")
    return out_of_memory.explain(trainer, None if script else job.config, error)


def changes(text: str) -> dict[str, str]:
    """Each change named and what it saves."""
    lines = [line.strip() for line in text.split("what would lower it:\n")[1].splitlines()]
    return dict(line.removesuffix(" less").split(": about ") for line in lines if line.endswith(" less"))


def test_a_script_s_peak_is_its_training_s(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [20 * GIB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: peaks.append(0))
    with out_of_memory.explained(None):
        assert peaks[-1] == 0
    assert len(peaks) == 2


def test_the_settings_and_where_memory_went(monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(monkeypatch, batch_size=4, gradient_accumulation_steps=2, max_seq_length=2048)
    assert text.startswith("the GPU ran out of memory in step 7: CUDA out of memory.\n")
    assert text.splitlines()[1] == (
        "  now: batch_size=4, gradient_accumulation_steps=2, max_seq_length=2048, packing=False, "
        "gradient_checkpointing=auto, memory_budget_gib=None, quantization=None, base_precision=None, optimizer=adamw, "
        "use_peft=True, lora_r=64")
    assert "peak 1.0 GiB: weights 0.1, optimizer state 0.0, gradients and activations 0.9" in text


def test_the_settings_of_an_online_method_and_of_full_training(monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(monkeypatch, algorithm="grpo", adapters=False, reward_functions=["exact_match"], backend="fast",
                   num_generations=4, max_completion_length=128, rollout_memory_gib=3.0, memory_budget_gib=9.0)
    now = text.splitlines()[1]
    assert "num_generations=4, max_completion_length=128, rollout_memory_gib=3.0" in now
    assert "memory_budget_gib=9.0" in now and "use_peft=False" in now
    assert "lora_r" not in now and "packing" not in now


PLAIN: dict[str, Any] = {"batch_size": 1, "max_seq_length": 2048}
# What is left of a peak of 1 GiB for activations, in MiB: under adapters (weights, gradients) and in full training.
LORA, FULL = 1024 - 48 - 2 * ADAPTERS * 4 / MIB, 1024 - 2 * 48
MOMENTS = 2 * 4 * ADAPTERS / MIB


@pytest.mark.parametrize(("given", "said"), [
    # One of four layers' activations stays.
    ({"recompute": False, "batch_size": 4}, {
        "gradient_checkpointing=True": LORA * 3 / 4, "batch_size=2, gradient_accumulation_steps=2": LORA / 2,
        "max_seq_length=512": LORA / 2}),
    # Odd batches keep their optimizer step.
    ({"recompute": False, "batch_size": 9, "max_seq_length": 2048}, {
        "gradient_checkpointing=True": LORA * 3 / 4, "batch_size=3, gradient_accumulation_steps=3": LORA * 2 / 3,
        "max_seq_length=1024": LORA / 2}),
    # Linear weights are 32 of the 48 MiB; an input is 2 bytes x 4,096 tokens x 1,024, of three layers 24 MiB.
    (PLAIN | {"max_seq_length": 4096}, {
        "max_seq_length=2048": LORA / 2, "quantization='nf4'": 32 - 16 * 4.127 / 8,
        "gradient_checkpointing='offload' (backend 'fast')": 24}),
    # The longest context of QLoRA: nothing is left but length, and what adapters and their optimizer hold.
    (PLAIN | {"four_bits": True, "backend": "fast", "gradient_checkpointing": "offload"}, {
        "max_seq_length=1024": LORA / 2, "lora_target_modules of attention alone": 4 / 6 * (2 * MOMENTS),
        "optimizer='paged_adamw_8bit' (state in host memory)": MOMENTS}),
    (PLAIN | {"four_bits": True, "backend": "fast", "gradient_checkpointing": "offload", "peak": 500 * MIB,
              "optim": "paged_adamw_8bit"}, {
        "max_seq_length=1024": (LORA - 524) / 2, "lora_target_modules of attention alone": 4 / 6 * MOMENTS,
        "lora_r=32": MOMENTS / 2}),
    (PLAIN | {"four_bits": True, "backend": "fast", "gradient_checkpointing": "offload", "peak": 8 * GIB,
              "optim": "paged_adamw_8bit"}, {
        "max_seq_length=512": (LORA + 7 * 1024) * 3 / 4, "max_seq_length=1024": (LORA + 7 * 1024) / 2,
        "max_seq_length=1536": (LORA + 7 * 1024) / 4}),
    # All trains, moments are two bytes a number: 48 of gradients and 48 of moments, less adapters of 8 MiB.
    (PLAIN | {"adapters": False, "optim": "adamw_8bit"}, {
        "max_seq_length=1024": FULL / 2, "use_peft=True": 96 - 8,
        "use_peft=True, quantization='nf4'": 96 - 8 + 32 - 16 * 4.127 / 8}),
    (PLAIN | {"adapters": False, "optim": "adamw_torch", "peak": 200 * MIB}, {
        "use_peft=True": 48 + 96 - 8, "use_peft=True, quantization='nf4'": 48 + 96 - 8 + 32 - 16 * 4.127 / 8,
        "max_seq_length=1024": 52}),
    # The plan kept layers: it can keep fewer.
    (PLAIN | {"four_bits": True, "keeps": 512 * MIB, "backend": "fast"}, {
        "gradient_checkpointing=True": 512, "max_seq_length=1024": LORA / 2, "memory_budget_gib=0.9": 0.1 * 1024}),
    # It kept none: 2 bytes x 2,048 tokens x 1,024 x 3 layers of inputs are 12 MiB.
    (PLAIN | {"four_bits": True, "keeps": 0, "backend": "fast"}, {
        "max_seq_length=1024": LORA / 2, "lora_target_modules of attention alone": 4 / 6 * (2 * MOMENTS),
        "gradient_checkpointing='offload'": 12}),
    # Only the completion gets shorter: 128 of 256 of a row of 1,024.
    ({"algorithm": "grpo", "reward_functions": ["exact_match"], "batch_size": 8, "recompute": False,
      "max_completion_length": 256}, {
        "gradient_checkpointing=True": LORA * 3 / 4, "batch_size=4, gradient_accumulation_steps=2": LORA / 2,
        "max_completion_length=128": LORA / 8}),
])
def test_three_changes_and_what_they_save(
    given: dict[str, Any], said: dict[str, float], monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = message(monkeypatch, **given)
    found = changes(text)
    for change, expected in said.items():
        number, unit = found[change].split()
        tolerance = 0.051 if unit == "GiB" else 0.51
        assert float(number) == pytest.approx(expected / (1024 if unit == "GiB" else 1), abs=tolerance), text
    assert len(found) == 3 and found.keys() == said.keys(), text
    assert "only" not in text


@pytest.mark.parametrize("packed", [[[100, 412], [512]], [[100, 412], [256, 256]]])
def test_rows_that_stand_alone(packed: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as long as the longest; where one fills a sequence nothing is saved in the step that has it."""
    made = out_of_memory._measure

    def measured(trainer: Any, config: Any) -> Any:
        trainer.train_dataset = Dataset.from_dict({"seq_lengths": packed})
        return made(trainer, config)

    monkeypatch.setattr(out_of_memory, "_measure", measured)
    text = message(monkeypatch, recompute=True, four_bits=True, batch_size=1, max_seq_length=512, packing=True)
    assert "packing=True" in text.splitlines()[1]
    saved = {512: None, 412: f"{LORA * 100 / 512:.0f} MiB" if LORA * 100 / 512 < 102 else "0.2 GiB"}
    assert changes(text).get("packing=False (fewer tokens a step)") == saved[max(map(max, packed))]


def test_where_fewer_than_three_would_help_it_says_how_many_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    full = WEIGHTS + 2 * ADAPTERS * 4
    given: dict[str, Any] = PLAIN | {"four_bits": True, "backend": "fast", "gradient_checkpointing": "offload",
                                     "optim": "paged_adamw_8bit", "lora_r": 64}
    text = message(monkeypatch, peak=full, **given)
    assert list(changes(text)) == ["lora_target_modules of attention alone", "lora_r=32"]
    assert ("only 2 changes would free 1% of the peak or more: layers keep nothing on the GPU; batch_size is 1; the "
            "base is in 4 bits; the optimizer's state can wait in host memory; max_seq_length=1024 would free 0 MiB\n"
            ) in text + "\n"
    nothing = message(monkeypatch, peak=100 * GIB, keeps=0, **given | {"gradient_checkpointing": True})
    assert len(changes(nothing)) == 3
    monkeypatch.setattr(out_of_memory, "WORTH", 0.9)
    nothing = message(monkeypatch, peak=full, **given)
    assert "nothing of these settings is predicted to lower it:\n    no change would free 90% of the peak" in nothing
    assert "no peak was measured to predict from" in message(monkeypatch, peak=0, **given)


@pytest.mark.parametrize(("states", "coming"), [(False, True), (True, False)])
def test_state_that_is_yet_to_come_is_said_to_be(states: bool, coming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "_states", lambda trainer: 100 * MIB if states else 0)
    text = message(monkeypatch, adapters=False, batch_size=1)
    assert ("optimizer state that comes when the first step ends, 96 MiB" in text) is coming
    assert f"optimizer state {0.1 * states:.1f}" in text
    assert "state that comes" not in message(monkeypatch, recompute=False, four_bits=True)  # none of the three has it


def test_other_ways_of_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference beside the policy, the rollouts' cache, the base's copies in fp8."""
    reference = nn.Linear(1024, 64 * 1024, bias=False, dtype=torch.bfloat16)  # 128 MiB
    engine = SimpleNamespace(cache_bytes=256 * MIB, ran_out=True)
    made = out_of_memory._measure

    def measured(trainer: Any, config: Any) -> Any:
        trainer.ref_model, trainer.rollout_engine = reference, engine
        return made(trainer, config)

    monkeypatch.setattr(out_of_memory, "_measure", measured)
    monkeypatch.setattr(out_of_memory, "_three", list)
    text = message(monkeypatch, algorithm="dpo", adapters=False, batch_size=1, max_seq_length=2048)
    assert "weights 0.2," in text and "precompute_ref_log_probs=False" in text.splitlines()[1]
    found = changes(text)
    assert found["precompute_ref_log_probs=True"] == "0.1 GiB" and found["rollout_memory_gib=0.12"] == "0.1 GiB"
    assert not any(change.startswith(("gradient_checkpointing", "max_seq_length")) for change in found)
    engine.ran_out = False
    elsewhere = changes(message(monkeypatch, algorithm="dpo", adapters=False, batch_size=1, max_seq_length=2048))
    assert "rollout_memory_gib=0.12" not in elsewhere, "in training the cache is not there"
    assert any(change.startswith("max_seq_length") for change in elsewhere), "and activations are"
    engine.ran_out = True
    assert found["use_peft=True"] == "0.3 GiB"  # 48 of gradients, 96 of moments, 128 of the reference, less 8
    text = message(monkeypatch, batch_size=1, base_precision="fp8", backend="fast")
    assert changes(text)["base_precision=None"] == "32 MiB" and "quantization='nf4', base_precision=None" in text


def runs_out(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_a_run_that_ran_out_ends_in_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = create_sft_trainer(
        "builtin:tiny", [{"text": "one two three four"}] * 4, backend="trl", max_steps=2, batch_size=2,
        max_seq_length=16, output_dir=str(tmp_path / "run"), report_to="none", progress=False)
    monkeypatch.setattr(trainer.trainer, "training_step", runs_out)
    with pytest.raises(GpuMemoryError, match="ran out of memory in step 1: CUDA out of memory") as caught:
        trainer.train()
    assert isinstance(caught.value, AlignTuneError) and isinstance(caught.value, MemoryError)
    assert "batch_size=2, gradient_accumulation_steps=1, max_seq_length=16" in str(caught.value)
    assert caught.value.exit_code == 11
    assert '"status": "failed"' in (tmp_path / "run" / "summary.json").read_text()
    assert '"steps": 0' in (tmp_path / "run" / "attestation.json").read_text()


@pytest.mark.parametrize("way", ["FastSFTTrainer", "fast_train", "accelerate_trl"])
@pytest.mark.filterwarnings("error:.*is_gradient_checkpointing.*")
def test_a_script_s_own_trainer_says_the_same(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In TRL's names; the error stays torch's for who catches that."""
    monkeypatch.setattr(scripts, "attach_trainer", lambda trainer, **_: SimpleNamespace(model=trainer.model))
    monkeypatch.setattr("aligntune.backends.fast.sft_trainer.attach_trainer", scripts.attach_trainer)
    monkeypatch.setattr("aligntune.backends.fast.sft_trainer.lay_rows", lambda *_: "rows")
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=2, max_length=16, max_steps=2, report_to="none",
                     use_cpu=True, bf16=False)
    made = FastSFTTrainer if way == "FastSFTTrainer" else SFTTrainer
    with scripts.accelerate_trl() if way == "accelerate_trl" else nullcontext():
        trainer = made(tiny.llama(), args, train_dataset=Dataset.from_list([{"text": "one two three"}] * 4),
                       processing_class=tiny.tokenizer())
    trainer.training_step = runs_out
    with pytest.raises(torch.OutOfMemoryError, match="ran out of memory in step 1: CUDA out of memory") as caught:
        scripts.fast_train(trainer) if way == "fast_train" else trainer.train()
    assert isinstance(caught.value, GpuMemoryError) and type(caught.value.__cause__) is torch.OutOfMemoryError
    assert ("now: per_device_train_batch_size=2, gradient_accumulation_steps=1, max_length=16, packing=False, "
            "gradient_checkpointing=") in str(caught.value)


def test_a_script_s_changes_are_in_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(monkeypatch, script=True, batch_size=4, recompute=True, peak=200 * MIB)
    assert "use_peft=True, lora_r=64" in text.splitlines()[1] and "optim=adamw_torch," in text.splitlines()[1]
    assert "per_device_train_batch_size=2, gradient_accumulation_steps=2" in text and "max_length=1024" in text
    assert "gradient_checkpointing='offload' (FastTrainingArguments): about" in text
    assert "optim state" not in text and "(backend 'fast')" not in text and "max_seq_length" not in text
    whole = message(monkeypatch, script=True, adapters=False, batch_size=1, peak=200 * MIB)
    assert "adapters (FastLanguageModel.get_peft_model), load_in_4bit=True: about" in whole
    assert "optim='adamw_8bit'" in message(monkeypatch, script=True, adapters=False, batch_size=1, max_seq_length=2,
                                           peak=160 * MIB)


# What is predicted of rows that are shorter than they may be


def of_rows(monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[list[int]]], *, flat: bool, **given: Any) -> str:
    has = {"train_dataset": Dataset.from_dict(columns), "rows_end_to_end": flat}
    return message(monkeypatch, has=has, **given)


RAGGED = [[0] * length for length in (100, 20, 20, 20, 20, 20)]


@pytest.mark.parametrize(("columns", "flat", "said"), [
    # Two rows a batch: 100 and 20 end to end, two of 100 padded.
    ({"input_ids": RAGGED}, True, {50: 1 - 70 / 120, 25: 1 - 45 / 120}),
    ({"input_ids": RAGGED}, False, {50: 1 / 2, 25: 3 / 4}),
    # A prompt stands before each answer of a pair: 110 and 20, 30 and 20.
    ({"prompt_ids": [[0] * 10] * 2, "chosen_ids": [[0] * 100, [0] * 20], "rejected_ids": [[0] * 10] * 2}, True,
     {55: 1 - (55 + 20 + 30 + 20) / 180, 27: 1 - (27 + 20 + 27 + 20) / 180}),
    ({"chosen_ids": [[0] * 100, [0] * 20], "rejected_ids": [[0] * 10] * 2}, False, {50: 1 / 2, 25: 3 / 4}),
])
def test_a_shorter_limit_saves_what_rows_have_beyond_it(
    columns: dict[str, list[list[int]]], flat: bool, said: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of 2,048 is far above every row: halving it would save nothing."""
    text = of_rows(monkeypatch, columns, flat=flat, batch_size=2, max_seq_length=2048, four_bits=True, backend="fast",
                   gradient_checkpointing="offload", optim="paged_adamw_8bit", peak=8 * GIB)
    found = changes(text)
    kept = LORA + 7 * 1024
    for length, share in said.items():
        if f"max_seq_length={length}" in found:
            assert found[f"max_seq_length={length}"] == out_of_memory._size(share * kept * MIB)
    assert any(f"max_seq_length={length}" in found for length in said) and "max_seq_length=1024" not in found


def test_inputs_of_layers_are_those_of_the_tokens_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """To host memory: 2 bytes x 120 tokens x 1,024 of three layers; by the limit it would be 34 times as much."""
    given = {"batch_size": 2, "max_seq_length": 2048, "four_bits": True, "optim": "paged_adamw_8bit", "peak": 66 * MIB}
    monkeypatch.setattr(out_of_memory, "_three", list)  # others save more
    text = of_rows(monkeypatch, {"input_ids": RAGGED}, flat=True, **given)
    saved = changes(text)["gradient_checkpointing='offload' (backend 'fast')"]
    assert saved == out_of_memory._size(2 * 120 * HIDDEN * 3) == "1 MiB"  # of 6 MiB of activations


def test_rows_that_say_nothing_of_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    text = of_rows(monkeypatch, {"prompt": [[0]]}, flat=True, **PLAIN)
    assert changes(text)["max_seq_length=1024"] == out_of_memory._size(LORA / 2 * MIB)
