"""Writes trl_1_12_ppo.json: what the PPO trainer of TRL 1.12, the last that had one, computes on a fixed batch.

In an environment of its own (`pip install torch==2.13.0 trl==1.12`), from the root of the repository:

    PYTHONPATH=. python tests/backends/trl/make_ppo_fixture.py

Its `train()` runs as it is; what it generates is fixed, and functions of its module are wrapped to keep what they see.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo import ppo_trainer as module

from tests.backends.trl import ppo_oracle as oracle


def tokenizer() -> Any:
    specials = ["<pad>", "<bos>", "<eos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*specials, *letters])}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   padding_side="left")


def record(run: str) -> dict[str, Any]:
    parts = oracle.models()
    prompts, completions = oracle.rows(run)
    seen: dict[str, list[Any]] = {"log_probs": [], "means": [], "whitened": [], "scores": [], "values": []}
    answers = {tuple(p.tolist()): c for p, c in zip(prompts, completions, strict=True)}

    def batch_generation(model: Any, queries: Any, *args: Any) -> Any:
        both = torch.cat([queries, torch.stack([answers[tuple(q.tolist())] for q in queries])], dim=1)
        seen["queries"] = queries.tolist()
        return both, plain["forward"](model, both, oracle.PAD).logits[:, oracle.PROMPT - 1:-1].clone()

    def keep(name: str, where: str) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = plain[name](*args, **kwargs)
            seen[where].append((result[0] if isinstance(result, tuple) else result).detach().clone())
            return result

        return wrapped

    def get_reward(model: Any, *args: Any) -> Any:
        result = plain["get_reward"](model, *args)
        is_value = model is parts["value"]
        seen["values" if is_value else "scores"].append(result[0 if is_value else 1].detach().clone())
        return result

    def forward(model: Any, *args: Any) -> Any:
        result = plain["forward"](model, *args)
        if isinstance(result, tuple):
            seen["values"].append(result[1].detach().clone())
        return result

    names = ("forward", "get_reward", "batch_generation", "selective_log_softmax", "masked_mean", "masked_whiten")
    plain = {name: getattr(module, name) for name in names}
    # masked_whiten calls masked_mean itself: what is kept of it is told apart by its number of calls.
    new = {"forward": forward, "get_reward": get_reward, "batch_generation": batch_generation,
           "selective_log_softmax": keep("selective_log_softmax", "log_probs"),
           "masked_mean": keep("masked_mean", "means"), "masked_whiten": keep("masked_whiten", "whitened")}
    for name, function in new.items():
        setattr(module, name, function)
    try:
        trainer = train(run, parts, prompts)
    finally:
        for name, function in plain.items():
            setattr(module, name, function)
    epochs = oracle.SETTINGS["num_ppo_epochs"]
    span = slice(oracle.PROMPT - 1, -1)
    return {
        "queries": seen["queries"], "scores": seen["scores"][0].tolist(),
        "old_log_probs": seen["log_probs"][0].tolist(), "ref_log_probs": seen["log_probs"][1].tolist(),
        "old_values": seen["values"][0][:, span, 0].tolist(), "advantages": seen["whitened"][-1].tolist(),
        "log_probs": [each.tolist() for each in seen["log_probs"][2:]],
        "values": [each[:, span, 0].tolist() for each in seen["values"][1:]],
        # twice the value loss, value clips, policy loss, policy clips, of each epoch
        "means": torch.stack(seen["means"][-4 * epochs:]).reshape(epochs, 4).tolist(),
        "orders": trainer.orders, "after": oracle.outputs(parts["policy"], parts["value"].model, parts["value"].score),
        "logged": {name: value for name, value in trainer.state.log_history[0].items() if "/" in name},
    }


def train(run: str, parts: dict[str, Any], prompts: Any) -> Any:
    args = PPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=oracle.ROWS, total_episodes=oracle.ROWS, bf16=False,
        use_cpu=True, report_to="none", num_mini_batches=1, response_length=oracle.LENGTH, temperature=1.0,
        stop_token="eos" if run == "ragged" else None, num_sample_generations=0, gradient_checkpointing=False,
        save_strategy="no", learning_rate=oracle.LEARNING_RATE, **{**oracle.SETTINGS, **oracle.RUNS[run]},
    )
    parameters = [*parts["policy"].parameters(), *parts["value"].parameters()]
    sgd = torch.optim.SGD(parameters, lr=oracle.LEARNING_RATE)
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer(), model=parts["policy"], ref_model=parts["reference"],
        reward_model=parts["reward"], value_model=parts["value"],
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)),
    )
    trainer.orders = []
    shuffle = module.np.random.permutation

    def permutation(count: int) -> Any:
        order = shuffle(count)
        trainer.orders.append(order.tolist())
        return order

    module.np.random.permutation = permutation
    try:
        trainer.train()
    finally:
        module.np.random.permutation = shuffle
    return trainer


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    names = ("trl", "torch", "transformers")
    found = {"versions": {name: version(name) for name in names}, "python": sys.version.split()[0],
             "runs": {run: rounded(record(run)) for run in oracle.RUNS}}
    target = Path(__file__).with_name("trl_1_12_ppo.json")
    target.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(target, target.stat().st_size, "bytes")
