"""What it spares to compute a prompt once that several rows begin with: forward and backward of rows end to end.

python -m benchmarks.shared_prompts --json FILE     pairs and groups of eight of a Llama 1B shape, on one GPU
python -m benchmarks.shared_prompts --smoke         toy sizes, any machine; the times mean nothing

Rows of one length, a share of which is the prompt, random weights, LoRA r = 16 on all linears, bf16. Each time is the
GPU's, of a captured graph that is replayed. `saved` is the share of the rows' tokens that are not computed, which is
what `LEAST_SAVED` decides by.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.rollout import model_of
from benchmarks.sft.workloads import MODELS

TOKENS = 8192
LENGTH = 512
GROUPS = (2, 8)
SAVED = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45)


def batch_of(group: int, length: int, prompt: int, tokens: int, vocab: int, device: str) -> tuple[Any, Any]:
    """(rows, length) ids and a mask of ones; `group` rows at a time begin with the same `prompt` tokens."""
    import torch

    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(10, vocab, (tokens // length // group, group, length), generator=draw)
    ids[:, :, :prompt] = ids[:, :1, :prompt]
    ids = ids.flatten(0, 1).to(device)
    return ids, torch.ones_like(ids)


def step_of(model: Any, ids: Any, mask: Any, *, columns: int, share: bool) -> tuple[Any, int]:
    """A call that runs forward and backward, and the tokens that it computes."""
    import torch

    from aligntune.backends.fast import shared_prompts
    from aligntune.backends.fast.online import Flat

    least, shared_prompts.LEAST_SAVED = shared_prompts.LEAST_SAVED, 0.0
    try:
        flat = Flat.of(ids, mask, columns, share=share)
    finally:
        shared_prompts.LEAST_SAVED = least
    assert ("shared_before" in flat.inputs) == share
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> tuple[Any, ...]:
        log_probs = model(**flat.inputs, fused_lm_head=True).log_probs
        return (log_probs, *torch.autograd.grad(log_probs.sum(), trained))

    return step, flat.inputs["input_ids"].numel()


def cells(smoke: bool) -> list[tuple[int, int, int, int]]:
    """(group, length, prompt, tokens) of every row."""
    length, tokens = (32, 128) if smoke else (LENGTH, TOKENS)
    found = []
    for group in GROUPS[:1] if smoke else GROUPS:
        for saved in SAVED:
            # Of G rows with P tokens of prompt, (G - 1) (P - 1) are not computed again: its last stays with each row.
            prompt = 1 + round(saved * group * length / (group - 1))
            if 1 < prompt < length:
                found.append((group, length, prompt, tokens))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_prompts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="the commit, where this tree is not a checkout")
    args = parser.parse_args(argv)
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    if not gpu and not args.smoke:
        print("benchmarks need an NVIDIA GPU, and TRITON_INTERPRET unset; --smoke runs anywhere", file=sys.stderr)
        return 1
    from trl.trainer.utils import add_fused_lm_head

    from aligntune.backends.fast import attach
    from benchmarks.ops.__main__ import commit, versions
    from benchmarks.ops.bench import Ceilings, clock_ms, graph_ms

    device, name = "cuda" if gpu else "cpu", "smoke" if args.smoke else "llama-1b"
    report: dict[str, Any] = {
        "command": " ".join(("python -m benchmarks.shared_prompts", *(sys.argv[1:] if argv is None else argv))),
        "commit": args.commit or commit(), "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": versions(), "rows": [],
    }  # fmt: skip
    if gpu:
        report["ceilings"] = dataclasses.asdict(Ceilings.measure())
        torch.cuda.empty_cache()
    model = model_of(name, device, lora=True).train()
    add_fused_lm_head(model.base_model.model, outputs=("log_probs",))  # as TRL's trainers do
    attach(model)
    for group, length, prompt, tokens in cells(args.smoke):
        ids, mask = batch_of(group, length, prompt, tokens, MODELS[name][1]["vocab_size"], device)
        entry: dict[str, Any] = {"group": group, "length": length, "prompt": prompt}
        results = {}
        for share in (False, True):
            step, computed = step_of(model, ids, mask, columns=length - prompt, share=share)
            results[share] = [one.detach().float() for one in step()]
            entry |= {f"{'shared' if share else 'whole'}_ms": graph_ms([step]) if gpu else clock_ms([step]),
                      f"{'shared' if share else 'whole'}_tokens": computed}
        entry["saved"] = 1 - entry["shared_tokens"] / entry["whole_tokens"]
        # Outputs lie elsewhere where prompts are shared; the gradients are the same numbers.
        entry["gradients_apart"] = max(float((ours - theirs).norm() / theirs.norm())
                                       for ours, theirs in zip(results[True][1:], results[False][1:], strict=True))
        report["rows"].append(entry)
        print(f"  {group} rows of {length}, prompt {prompt:4}: saved {entry['saved']:.0%}  "
              f"whole {entry['whole_ms']:8.2f} ms  shared {entry['shared_ms']:8.2f} ms  "
              f"{entry['whole_ms'] / entry['shared_ms']:.3f}x  "
              f"gradients {entry['gradients_apart']:.1e} apart", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
