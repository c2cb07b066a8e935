"""One arm in a process of its own: loads the seed checkpoint, trains, writes what it cost. Run by `benchmarks.sft`.

    python -m benchmarks.sft.arm SPEC.json RESULT.json

Time is by the clock over the measured steps, the GPU synchronised before the first and after the last of them: in
between an arm may run ahead of the GPU, as it does in use. Tokens are those of the rows, without padding. Rows come in
file order in every arm. With "profile" three more steps run under the profiler: what the GPU did, and how long nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

STARTED = float(os.environ.get("BENCHMARK_STARTED", time.time()))
PROFILED = 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def in_file_order(trainer: Any) -> None:
    """The rows of a step are the same in every arm."""
    from torch.utils.data import SequentialSampler

    trainer._get_train_sampler = lambda *_, **__: SequentialSampler(trainer.train_dataset)


def clock(spec: dict[str, Any], synchronize: Any) -> Any:
    """A callback that notes when the first step and the measured steps ended, and profiles what comes after them."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    last = spec["steps"]
    noted = {1, last - spec["measured"], last}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ended: dict[int, float] = {}
            self.peaks: dict[str, float] = {}
            self.profiler: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step in noted:
                synchronize()
                self.ended[step] = time.time()
            if step == last:
                self.peaks = peaks()
            if step == last and spec["profile"]:
                self.profiler = profile(activities=[ProfilerActivity.CUDA])
                self.profiler.start()
            elif step == last + PROFILED and self.profiler is not None:
                synchronize()
                self.profiler.stop()

    return Clock()


def peaks() -> dict[str, float]:
    """GiB, since the process began."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}  # fmt: skip


def profiled(profiler: Any) -> dict[str, Any]:
    """Milliseconds a step: the GPU's work by kernel, and the time it had none."""
    from torch.autograd import DeviceType

    spans, kernels = [], {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            start, end = event.time_range.start, event.time_range.end
            spans.append((start, end))
            name = event.name[:120]
            kernels[name] = kernels.get(name, 0.0) + (end - start)
    spans.sort()
    busy, gaps, until = 0.0, [], spans[0][0]
    for start, end in spans:
        if start > until:
            gaps.append(start - until)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    scale = 1e3 * PROFILED
    largest = sorted(kernels.items(), key=lambda item: -item[1])[:40]
    return {
        "busy_ms": busy / scale, "idle_ms": sum(gaps) / scale, "launches": len(spans) / PROFILED,
        "longest_gaps_ms": [gap / 1e3 for gap in sorted(gaps)[-8:]],
        "kernels_ms": {name: us / scale for name, us in largest},
    }  # fmt: skip


def last_step(spec: dict[str, Any]) -> int:
    """The profiled steps come after the measured ones."""
    return spec["steps"] + (PROFILED if spec["profile"] else 0)


def of_aligntune(spec: dict[str, Any], callback: Any) -> Any:
    """Backend "trl" or "fast", through the factory."""
    from aligntune import create_sft_trainer

    mode = {
        "lora": {"use_peft": True, "lora_r": 16, "lora_alpha": 16},
        "qlora": {"use_peft": True, "lora_r": 16, "lora_alpha": 16, "quantization": "nf4", "optimizer": "adamw_8bit"},
        "full": {"model_dtype": "bf16"},
    }[spec["mode"]]
    options = {"optimizer": "adamw_fused", **mode, **spec["options"]}
    made = create_sft_trainer(
        spec["model"], spec["rows"], backend=spec["backend"], max_seq_length=spec["max_seq_length"],
        batch_size=spec["batch_size"], max_steps=last_step(spec), learning_rate=1e-4, lr_scheduler="constant", seed=1,
        logging_steps=1 if spec["log_each"] else 5, report_to="none", progress=False, output_dir=spec["output"],
        overwrite=True, packing=spec["packing"], precision=spec["precision"], callbacks=[callback], **options,
    )  # fmt: skip
    in_file_order(made.trainer)
    return made


def of_unsloth(spec: dict[str, Any], callback: Any) -> Any:
    """unsloth's model under its own trainer."""
    import torch
    import unsloth  # noqa: F401  must come before trl
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    options = dict(spec["options"])
    checkpointing = options.pop("gradient_checkpointing")
    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["model"], max_seq_length=spec["max_seq_length"], dtype=torch.bfloat16,
        load_in_4bit=spec["mode"] == "qlora", full_finetuning=spec["mode"] == "full",
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    if spec["mode"] != "full":
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=TARGETS, random_state=1,
            use_gradient_checkpointing=checkpointing,
        )  # fmt: skip
    arguments = SFTConfig(
        output_dir=spec["output"], per_device_train_batch_size=spec["batch_size"], max_steps=last_step(spec),
        learning_rate=1e-4, lr_scheduler_type="constant", seed=1, logging_steps=1 if spec["log_each"] else 5,
        report_to="none", bf16=True, optim="adamw_8bit" if spec["mode"] == "qlora" else "adamw_torch_fused",
        gradient_accumulation_steps=1,  # unsloth's own default is 2
        max_length=spec["max_seq_length"], packing=spec["packing"], dataset_text_field="text", save_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, args=arguments, callbacks=[callback],
        train_dataset=load_dataset("json", data_files=spec["rows"], split="train"),
    )  # fmt: skip
    in_file_order(trainer)
    return trainer


def versions() -> dict[str, str]:
    """The packages that a time depends on, as this arm has them."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "unsloth"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train; what every step took, the losses, the peaks."""
    import torch

    gpu = torch.cuda.is_available()
    callback = clock(spec, torch.cuda.synchronize if gpu else lambda: None)
    made = (of_unsloth if spec["backend"] == "unsloth" else of_aligntune)(spec, callback)
    trainer = getattr(made, "trainer", made)
    made.train()
    history = trainer.state.log_history
    ended = callback.ended
    result = {
        "first_step_s": ended[1] - STARTED,
        "measured_s": ended[spec["steps"]] - ended[spec["steps"] - spec["measured"]],
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "tokens_seen": [entry["num_tokens"] for entry in history if "num_tokens" in entry][-1:],
        "rows_seen": [len(row["input_ids"]) for row in trainer.train_dataset.select_columns(["input_ids"])],
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
        "versions": versions(),
    }
    result |= callback.peaks
    if callback.profiler is not None and gpu:
        result["profile"] = profiled(callback.profiler)
    if hasattr(made, "attestation"):
        found = made.attestation()
        step = found.get("step") or {}
        result["attestation"] = {"layout": found.get("layout"), "eager": found.get("eager"),
                                 "problems": step.get("problems"), "kernels": step.get("kernels")}  # fmt: skip
        graphed = getattr(trainer, "graphed", None)
        if graphed is not None:
            result["graphs"] = {"captured": len(graphed.pairs), "shapes": len(graphed.seen),
                                "capture_s": graphed.capture_seconds}  # fmt: skip
    return result


if __name__ == "__main__":
    if json.loads(Path(sys.argv[1]).read_text())["backend"] == "unsloth":
        import unsloth  # noqa: F401  before transformers is: it patches what it finds
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
