"""Rollouts on one GPU: our engine beside transformers' generate, in tokens a second and in % of the bytes bound.

python -m benchmarks.rollout --json FILE                    both models, batches of 8, 64 and 256, context 4k, uneven
python -m benchmarks.rollout llama-1b --batches 64          one row
python -m benchmarks.rollout llama-1b --batches 64 --profile    and what the GPU did in a decode step
python -m benchmarks.rollout llama-1b --base nf4 --no-hf            another base: nf4, fp8, or all weights in fp32
python -m benchmarks.rollout --smoke                        toy sizes, any machine; the times mean nothing

Random weights of the real shapes, bf16, LoRA r = 16 on all linears, 8 completions a prompt; with `--base full` all
weights train instead, in fp32 under autocast to bf16. The bound of a step: every weight once, as it lies there, and the
cache of every row at its middle length, at the copy bandwidth measured here. Beside each time
stands what makes it count: |log-prob when drawn - log-prob of a forward over the whole row|, mean and largest; and what
the engine's memory costs: a first call with its captures, and a call after a release beside an ordinary one.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.sft.workloads import MODELS

GROUP = 8
BASES = ("bf16", "nf4", "fp8", "full")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(name: str, device: str, *, lora: bool, base: str = "bf16") -> Any:
    """Random weights on the device, LoRA factors of both kinds away from zero; `base` is one of BASES."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = MODELS[name]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" and base != "full" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=dtype)
    if base == "nf4":
        _in_nf4(model, device)
    if lora and base != "full":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.02)
        model = model.to(device)
    if base == "fp8":
        from aligntune.backends.fast import fp8_base

        fp8_base.install(model)
    return model.eval()


def _in_nf4(model: Any, device: str) -> None:
    """Each linear of a layer in 4 bits, the scales of its blocks quantised as well: as transformers loads QLoRA's."""
    import bitsandbytes as bnb
    import torch

    for name, linear in [*model.named_modules()]:
        if isinstance(linear, torch.nn.Linear) and name.rpartition(".")[2] in TARGETS:
            parent, _, own = name.rpartition(".")
            four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None,
                                     compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
            four.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                                            compress_statistics=True)
            if linear.bias is not None:
                four.bias = linear.bias
            model.get_submodule(parent)._modules[own] = four.to(device)
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)


def prompts_of(count: int, length: int, vocab: int) -> list[list[int]]:
    """Random words, none of them special."""
    import torch

    return torch.randint(10, vocab, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


def bound_ms(model: Any, rows: int, context: float, bandwidth: float, *, base: str = "bf16") -> float:
    """Milliseconds that one step's bytes take: each weight that a matrix product reads, and the rows' caches."""
    config = model.config
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if base == "fp8":  # a byte of each copy, and its scales, where the weight has two
        weights -= sum(p.numel() for name, p in model.named_parameters() if "base_layer.weight" in name)
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            weights += state.absmax.numel() * state.absmax.element_size()
    if head.data_ptr() != embeddings.data_ptr():
        weights -= embeddings.numel() * embeddings.element_size()  # a step reads a row of it a token
    number = 2 if base == "full" else embeddings.element_size()  # of the cache, in bytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * number
    return (weights + rows * context * per_token) / bandwidth * 1e3


def forced_difference(
    model: Any, prompts: list[list[int]], rollout: Any, autocast: Any, checked: int = 16
) -> dict[str, float]:
    """Log-probs of the drawn tokens against those of one forward over each whole row."""
    import torch

    apart = []
    for i in range(0, len(rollout.completion_ids), max(1, len(rollout.completion_ids) // checked)):
        prompt, ids = prompts[i * len(prompts) // len(rollout.completion_ids)], rollout.completion_ids[i]
        with torch.no_grad(), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            logits = model(torch.tensor([prompt + ids], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
        truth = logits.log_softmax(-1).gather(1, torch.tensor(ids, device=model.device)[:, None])[:, 0]
        apart.append((truth.cpu() - torch.tensor(rollout.log_probs[i])).abs())
    whole = torch.cat(apart)
    return {"log_prob_difference_mean": float(whole.mean()), "log_prob_difference_max": float(whole.max())}


def measure_ours(model: Any, prompts: list[list[int]], args: Any, *, rows: int, new: int, stops: tuple[int, ...] = (),
                 slots: int | None = None, bandwidth: float | None) -> dict[str, Any]:  # fmt: skip
    """A call that captures, then the median of three more, and what a release before a call brings and costs.

    `captures` and `capture_seconds` are the first call's; `later_captures` those of the three, which keep its graphs.
    """
    import torch

    from aligntune.backends.fast.rollout import RolloutEngine, Sampling

    on_gpu = next(model.parameters()).is_cuda
    gc.collect()  # an engine before this one
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    autocast = torch.bfloat16 if args.base == "full" and on_gpu else None
    engine = RolloutEngine(model, max_batch=slots or rows, max_len=len(prompts[0]) + new, memory_gib=args.memory_gib,
                           autocast=autocast)
    sampling = Sampling(max_new_tokens=new, stop_token_ids=stops)

    def call(seed: int) -> Any:
        return engine.generate(prompts, num_generations=rows // len(prompts),
                               sampling=dataclasses.replace(sampling, seed=seed))  # fmt: skip

    first, runs = call(0), [call(seed) for seed in range(1, 4)]
    best = sorted(runs, key=lambda run: run.stats.seconds)[1]
    entry = {**best.stats.to_dict(), "first_call_s": first.stats.seconds, "captures": first.stats.captures,
             "capture_seconds": first.stats.capture_seconds,
             "later_captures": sum(run.stats.captures for run in runs)}  # fmt: skip
    if on_gpu:
        entry["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    entry |= forced_difference(model, prompts, best, autocast)
    if on_gpu:
        entry["step_ms"] = step_ms(engine, min(rows, engine.max_batch), len(prompts[0]) + new // 2, args.profile)
        if isinstance(entry["step_ms"], dict):
            entry |= entry.pop("step_ms")
        entry["bound_ms"] = bound_ms(model, min(rows, engine.max_batch), len(prompts[0]) + new / 2, bandwidth or 1.0,
                                     base=args.base)
        entry["of_bound"] = entry["bound_ms"] / entry["step_ms"]
    return entry | after_release(engine, call)


def after_release(engine: Any, call: Callable[[int], Any]) -> dict[str, Any]:
    """Release, then a call: the median of three, by their seconds."""
    found = []
    for seed in range(4, 7):
        held, started = held_bytes(), time.perf_counter()
        engine.release()
        release_s = time.perf_counter() - started
        given = held - held_bytes()
        stats = call(seed).stats
        found.append({"after_release_s": release_s + stats.seconds, "after_release_captures": stats.captures,
                      "after_release_capture_s": stats.capture_seconds, "graphs_gib": given / 2**30})
    return sorted(found, key=lambda one: one["after_release_s"])[1]


def held_bytes() -> int:
    """What the process holds of its GPU, without torch's own reserve; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def step_ms(engine: Any, rows: int, context: int, profile: bool) -> Any:
    """A decode step alone: every row at one length, no host work in between."""
    import torch

    from aligntune.backends.fast.rollout import Sampling
    from aligntune.backends.fast.rollout.cache import pages_for

    decoder = engine._decoder
    steps = min(50, decoder.outputs.tokens.shape[1])  # a row's line has room for no more
    sampling = Sampling(max_new_tokens=engine.max_len, stop_token_ids=())
    need = min(pages_for(context + steps), decoder.table.shape[1])
    free = list(range(1, decoder.pool.capacity + 1))
    lines = [[9, context, 0, 10**6, row, 1, 0, 0] for row in range(rows)]
    # Rows beyond the pool's size read the pages of others: what is measured is the reading.
    table = [[free[(row * need + i) % len(free)] for i in range(need)] for row in range(rows)]
    with decoder.rollout(sampling, ()):
        decoder.pool.memory.zero_()  # nobody filled the pages that are read
        decoder.table[:rows, :need].copy_(torch.tensor(table, dtype=torch.int32))

        def set_out() -> None:
            decoder.state[:rows].copy_(torch.tensor(lines, dtype=torch.int32))

        set_out()
        decoder.steps(min(5, steps), rows, sampling.form)
        set_out()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        decoder.steps(steps, rows, sampling.form)
        end.record()
        torch.cuda.synchronize()
        taken = start.elapsed_time(end) / steps
        if not profile:
            return taken
        set_out()
        traced = min(10, steps)
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA]) as trace:
            decoder.steps(traced, rows, sampling.form)
            torch.cuda.synchronize()
    kernels = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)[:30]
    return {"step_ms": taken,
            "kernels": {event.key[:90]: [event.count / traced, event.self_device_time_total / traced / 1e3]
                        for event in kernels}}


def measure_theirs(model: Any, prompts: list[list[int]], *, rows: int, new: int) -> dict[str, Any]:
    """transformers' generate with its dynamic cache, as TRL calls it."""
    import torch

    ids = torch.tensor([ids for ids in prompts for _ in range(rows // len(prompts))], device=model.device)
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options | {"min_new_tokens": 4,
                                                                                    "max_new_tokens": 4})
    if ids.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    if ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    tokens = (out.shape[1] - ids.shape[1]) * rows
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def line(entry: dict[str, Any]) -> str:
    """One line of the printed table."""
    text = f"  {entry['what']:26} {entry['tokens_per_second']:9,.0f} tok/s {entry['seconds']:7.2f} s"
    if "step_ms" in entry:
        text += f"  step {entry['step_ms']:6.2f} ms, bound {entry['bound_ms']:5.2f} ({entry['of_bound']:.0%})"
    if "log_prob_difference_mean" in entry:
        text += f"  |dlogp| {entry['log_prob_difference_mean']:.1e} max {entry['log_prob_difference_max']:.1e}"
    if "first_call_s" in entry:
        text += (f"  first {entry['first_call_s']:.1f} s, {entry['captures']} captures {entry['capture_seconds']:.1f} s"
                 f", {entry['later_captures']} later, {entry['graphs']}; after a release of "
                 f"{entry['graphs_gib']:.2f} GiB {entry['after_release_s']:.2f} s")
    return text


def run_model(name: str, args: argparse.Namespace, device: str, bandwidth: float | None) -> list[dict[str, Any]]:
    """Every row of one model."""
    from aligntune.backends.fast import attach
    from aligntune.backends.fast.ops._runtime import interpreting

    model = model_of(name, device, lora=not args.no_lora, base=args.base)
    vocab = MODELS[name][1]["vocab_size"]
    rows: list[dict[str, Any]] = []

    def add(what: str, entry: dict[str, Any]) -> None:
        rows.append({"model": name, "base": args.base, "what": what} | entry)
        print(line(rows[-1]), flush=True)

    kind = args.base if device == "cuda" or args.base != "bf16" else "fp32"
    print(f"{name}, {kind}{'' if args.no_lora or args.base == 'full' else ', LoRA r = 16'}")
    if not args.no_hf:
        for batch in args.batches:
            prompts = prompts_of(max(1, batch // GROUP), args.prompt, vocab)
            add(f"generate, batch {batch}", measure_theirs(model, prompts, rows=batch, new=min(args.new, args.hf_new)))
    if device == "cuda" or interpreting():
        attach(model)
    for batch in args.batches:
        prompts = prompts_of(max(1, batch // GROUP), args.prompt, vocab)
        add(f"fast, batch {batch}", measure_ours(model, prompts, args, rows=batch, new=args.new, bandwidth=bandwidth))
    if args.context:
        prompts = prompts_of(8, args.context - args.new, vocab)
        add(f"fast, batch 64, context {args.context}",
            measure_ours(model, prompts, args, rows=64, new=args.new, bandwidth=bandwidth))  # fmt: skip
    if args.uneven:
        # One token in `uneven` stops a row: lengths are geometric, cut at four times the mean.
        stops = tuple(range(10, 10 + max(1, vocab // args.uneven)))
        prompts = prompts_of(32, args.prompt, vocab)
        add("fast, uneven, 256 on 64", measure_ours(model, prompts, args, rows=256, new=4 * args.uneven, stops=stops,
                                                    slots=64, bandwidth=bandwidth))  # fmt: skip
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="llama-1b and qwen3-4b by default")
    parser.add_argument("--batches", default="8,64,256")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--hf-new", type=int, default=64, help="tokens of a completion in generate's rows")
    parser.add_argument("--context", type=int, default=4096, help="a row of 64 at this many tokens; 0: none")
    parser.add_argument("--uneven", type=int, default=256, help="a row of uneven lengths with this mean; 0: none")
    parser.add_argument("--memory-gib", type=float, default=48.0, help="most that the cache may take")
    parser.add_argument("--no-hf", action="store_true")
    parser.add_argument("--no-lora", action="store_true")
    parser.add_argument("--base", default="bf16", choices=BASES, help="full: all weights train, in fp32 under autocast")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    args = parser.parse_args(argv)
    args.batches = [int(batch) for batch in args.batches.split(",")]
    args.models = args.models or ["llama-1b", "qwen3-4b"]
    if args.smoke:
        args.models, args.batches, args.prompt, args.new, args.context, args.uneven = ["smoke"], [2, 8], 9, 12, 0, 6
    if strange := sorted(set(args.models) - set(MODELS)):
        parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(MODELS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    if not gpu and not args.smoke:
        print("benchmarks need an NVIDIA GPU, and TRITON_INTERPRET unset; --smoke runs anywhere", file=sys.stderr)
        return 1
    from benchmarks.ops.__main__ import commit

    report: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks.rollout", *(sys.argv[1:] if argv is None else argv))),
        "commit": args.commit or commit(), "device": torch.cuda.get_device_name() if gpu else "cpu", "rows": [],
        "torch": torch.__version__,
    }  # fmt: skip
    bandwidth = None
    if gpu:
        from benchmarks.ops.bench import Ceilings

        ceilings = Ceilings.measure()
        report["ceilings"] = dataclasses.asdict(ceilings)
        bandwidth = ceilings.bytes_per_s
        torch.cuda.empty_cache()
    for name in args.models:
        report["rows"] += run_model(name, args, "cuda" if gpu else "cpu", bandwidth)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
