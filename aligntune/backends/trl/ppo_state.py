"""What a PPO checkpoint holds beyond transformers': the critic, the rollout at hand and the place in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from aligntune.errors import CheckpointError

if TYPE_CHECKING:
    from aligntune.backends.trl.ppo import PPOTrainer

CRITIC = "critic.safetensors"


def _file(folder: str, process: int) -> str:
    return os.path.join(folder, f"ppo_state_{process}.pt")


def save(trainer: PPOTrainer, folder: str) -> None:
    """Write the critic (once) and, for each process, its share of the rollout."""
    os.makedirs(folder, exist_ok=True)
    if trainer.args.should_save:
        critic = {name: value.detach().cpu().contiguous() for name, value in trainer.critic.trainable().items()}
        save_file(critic, os.path.join(folder, CRITIC))
    unfinished = trainer._rollout is not None and trainer._position < trainer._micro_steps
    rollout = {name: value.cpu() for name, value in (trainer._rollout or {}).items()} if unfinished else None
    torch.save(
        {"rollout": rollout, "position": trainer._position, "rollouts": trainer._rollouts,
         "stopped": trainer._stopped, "kl_coef": trainer.kl_coef},
        _file(folder, trainer.accelerator.process_index),
    )


def load(trainer: PPOTrainer, folder: str) -> None:
    """Put critic, rollout and place back.

    Raises:
        CheckpointError: there is no PPO state for this process, or the critic is another one.
    """
    path, critic_path = _file(folder, trainer.accelerator.process_index), os.path.join(folder, CRITIC)
    if not os.path.isfile(path) or not os.path.isfile(critic_path):
        raise CheckpointError(f"{folder} holds no PPO state for process {trainer.accelerator.process_index}: it is of "
                              "another algorithm, or of a run with fewer processes")
    saved, mine = load_file(critic_path), trainer.critic.trainable()
    shapes = [{name: tuple(value.shape) for name, value in part.items()} for part in (saved, mine)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{folder}: the critic of the checkpoint is another one (value_model_name, LoRA options)")
    for name, value in mine.items():
        value.data.copy_(saved[name])
    state = torch.load(path, map_location="cpu", weights_only=True)
    rollout, device = state["rollout"], trainer.accelerator.device
    trainer._rollout = None if rollout is None else {name: value.to(device) for name, value in rollout.items()}
    trainer._position = state["position"]
    trainer._rollouts, trainer._stopped, trainer.kl_coef = state["rollouts"], state["stopped"], state["kl_coef"]
