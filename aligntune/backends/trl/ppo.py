"""PPO in TRL's style: TRL's GRPOTrainer makes the rollouts, this one adds a critic, GAE, and passes of mini batches.

Generation, rewards, log-probs, the reference, adapters and logs are GRPOTrainer's. An item of the dataloader is the
prompts of a rollout; TRL's sampler repeats it once for each micro-step that learns from it, and `_prepare_inputs` hands
out the micro-batches.
"""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from aligntune.algorithms.policy_gradient import clipped_surrogate
from aligntune.algorithms.ppo import (
    approx_kl,
    clipped_value_loss,
    generalized_advantages,
    next_kl_coef,
    ppo_loss,
    token_kl,
    token_rewards,
    whiten,
)
from aligntune.backends.trl import ppo_state
from aligntune.backends.trl.offline import Quiet
from aligntune.backends.trl.ppo_config import PPOConfig
from aligntune.backends.trl.ppo_critic import Critic, OwnCritic, value_head

Batch = dict[str, Any]


class PPOTrainer(Quiet, GRPOTrainer):
    """Proximal policy optimisation with a critic.

    Args:
        model: as for GRPOTrainer.
        reward_funcs: as for GRPOTrainer; sequence-classification models and functions, mixed.
        args: a `PPOConfig`.
        value_model: the critic: None is a value head on the policy's trunk; or a causal or sequence-classification
            model, whose parameters that require gradients are trained.
        kwargs: the other arguments of GRPOTrainer.

    Raises:
        ValueError: DeepSpeed, FSDP or a vision-language model, which this trainer does not run.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
        "citation": textwrap.dedent("""\
            @article{ziegler2019fine,
                title   = {{Fine-Tuning Language Models from Human Preferences}},
                author  = {Ziegler, Daniel M. and Stiennon, Nisan and Wu, Jeffrey and Brown, Tom B. and others},
                year    = 2019,
                eprint  = {arXiv:1909.08593},
            }"""),
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: PPOConfig | None = None, *, value_model: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, reward_funcs=reward_funcs, args=args or PPOConfig("trainer_output"), **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self._is_vlm:
            raise ValueError("PPO trains text models, in one process or several (DDP); not with DeepSpeed or FSDP")
        self.critic = self._critic(value_model)
        self.kl_coef: float = self.args.kl_coef
        self._critic_is_optimized = False
        self._values: Tensor | None = None
        self._scores: Tensor | None = None
        self._ended: Tensor | None = None
        self.forget_rollout()
        self.add_callback(_CriticSteps(self))

    def _critic(self, value_model: Any) -> Critic:
        if value_model is None:
            hidden = self.model.config.get_text_config().hidden_size
            return Critic(value_head(hidden, self.accelerator.device))
        from trl.trainer.utils import disable_dropout_in_model

        if self.args.disable_dropout:
            disable_dropout_in_model(value_model)
        critic = OwnCritic(value_model).to(self.accelerator.device)
        if self.args.gradient_checkpointing:
            critic.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.accelerator.num_processes > 1:
            for value in critic.trainable().values():  # adapters start at random, in each process on its own
                torch.distributed.broadcast(value.data, src=0)
        return critic

    # Rollouts

    def forget_rollout(self) -> None:
        """Start anew with the next step: no rollout at hand, `kl_coef` as configured."""
        self._rollout: Batch | None = None
        self._position, self._rollouts, self._stopped = 0, 0, False
        self._sums: Tensor | None = None
        self._items = torch.ones(())
        self.kl_coef = self.args.kl_coef

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; an earlier call that stopped within a rollout leaves nothing of it."""
        self.forget_rollout()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _micro_steps(self) -> int:
        """Micro-steps that learn from one rollout."""
        return self.args.steps_per_generation * self.args.num_ppo_epochs

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._rollout is None or self._position >= self._micro_steps:
            self._rollout = self._generate_and_score_completions(generation_batch)
            self._position, self._stopped = 0, False
            self._rollouts += 1
        rows = self._rows(self._position)
        if self._position % self.args.gradient_accumulation_steps == 0:
            window = range(self._position, self._position + self.args.gradient_accumulation_steps)
            mine = sum(self._rollout["loss_mask"][self._rows(at)].sum() for at in window)
            self._items = self._sum(mine).clamp(min=1)
        self._position += 1
        return {name: value[rows] for name, value in self._rollout.items()}

    def _rows(self, position: int) -> Tensor:
        """The rows of the rollout that this micro-step takes: each pass has an order of its own.

        It follows from the seed, so that a run that stops within a rollout goes on in the same order.
        """
        passes, slot = divmod(position, self.args.steps_per_generation)
        size = self.args.per_device_train_batch_size
        count = size * self.args.steps_per_generation
        generator = torch.Generator()
        generator.manual_seed(hash((self.args.seed, self._rollouts, passes, self.accelerator.process_index)) % 2**63)
        order = torch.randperm(count, generator=generator)
        return order[slot * size:(slot + 1) * size].to(self.accelerator.device)

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        self._values = None
        # One more than there are: where a rollout is a single optimizer step GRPO does not compute the log-probs of
        # the policy that sampled, which the KL in the reward needs. Nothing else in that method reads the number.
        self.num_iterations += 1
        try:
            rollout = super()._generate_and_score_completions(inputs)
        finally:
            self.num_iterations -= 1
        return self._estimate(rollout)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        each = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        start = self.accelerator.process_index * len(prompts)
        self._scores = each[start:start + len(prompts)]
        # As TRL tells it, by the list: an engine may have marked its end there.
        ended = [ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        self._ended = torch.tensor(ended, device=each.device)
        return each

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As GRPOTrainer's; the first call after `_values` was emptied is the policy's, and values are read in it."""

        def run() -> Any:
            return super(PPOTrainer, self)._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)

        if self._values is not None:
            return run()
        self.critic.train(self.model.training)
        policy = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            result, self._values = self.critic.read(
                run, policy, input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids))
        return result

    @torch.no_grad()
    def _estimate(self, rollout: Batch) -> Batch:
        """From completions and their scores to what the passes learn from: advantages and returns."""
        args, mode = self.args, "train" if self.model.training else "eval"
        old, values, ended = rollout["old_per_token_logps"], self._values, self._ended
        assert self._scores is not None and values is not None and ended is not None
        scored = ~self._scores.isnan().all(dim=1)
        scores = (self._scores * self.reward_weights.to(old.device)).nansum(dim=1)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~ended
        # A completion that no reward applies to teaches nothing.
        mask = rollout["completion_mask"] * scored.unsqueeze(1)
        reference = rollout.get("ref_per_token_logps")
        kl = torch.zeros_like(old) if reference is None else token_kl(old, reference, estimator=args.kl_estimator)
        rewards = plain = token_rewards(scores, kl, mask, kl_coef=self.kl_coef)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self._sum)
        advantages, returns = generalized_advantages(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        kl_of_completions = self._log_rollout(mode, mask, scored, scores, kl, plain, values, returns, ended)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=self._sum)
        self._log_advantages(advantages, mask)
        if mode == "train" and args.kl_control == "adaptive":
            self.kl_coef = next_kl_coef(self.kl_coef, kl_of_completions, goal=args.kl_goal, gain=args.kl_gain)
        kept = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "importance_sampling_ratio")
        return {**{name: rollout[name] for name in kept if name in rollout}, "loss_mask": mask, "old_log_probs": old,
                "values": values, "advantages": advantages, "returns": returns}

    # Loss

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        args, training, mask = self.args, self.model.training, inputs["loss_mask"]
        self._values = None
        log_probs, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1), inputs["completion_ids"].size(1),
            compute_entropy=True, compute_aux_loss=self.aux_loss_enabled,
        )
        assert self._values is not None
        ratio = (log_probs - inputs["old_log_probs"]).exp()
        policy_losses = clipped_surrogate(ratio, inputs["advantages"], epsilon=args.cliprange)
        if "importance_sampling_ratio" in inputs:  # what vLLM sampled with is not quite this policy
            policy_losses = policy_losses * inputs["importance_sampling_ratio"]
        value_losses, value_clipped = clipped_value_loss(
            self._values, inputs["values"], inputs["returns"], cliprange=args.cliprange_value)
        # DDP averages over the processes what is divided here by the tokens of all of them.
        items = self._items / self.accelerator.num_processes if training else None
        loss = ppo_loss(policy_losses, value_losses, entropies, mask, vf_coef=args.vf_coef,
                        entropy_coef=args.entropy_coef, num_items=items)
        if self.aux_loss_enabled:
            parts = self.current_gradient_accumulation_steps if training else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / parts
        with torch.no_grad():
            advantages = inputs["advantages"]
            clipped = ((ratio > 1 + args.cliprange) & (advantages > 0)) | (
                (ratio < 1 - args.cliprange) & (advantages < 0))
            self._count(training, mask, {
                "policy/approxkl_avg": approx_kl(log_probs, inputs["old_log_probs"]),
                "policy/clipfrac_avg": clipped, "val/clipfrac_avg": value_clipped, "val/ratio": ratio,
                "val/ratio_var": ratio.square(), "entropy": entropies, "loss/policy_avg": policy_losses,
                "loss/value_avg": value_losses,
            })
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-step; after `target_kl` was passed, the rest of the rollout's steps change nothing.

        Such a step leaves every gradient None, and optimizers skip a parameter without a gradient: neither momentum
        nor weight decay moves it. It counts as a step, so that the schedule and the order of the data stay.
        """
        accumulation = self.args.gradient_accumulation_steps
        if self._stopped and self._position < self._micro_steps:
            self._position += 1
            self._step += 1
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self._position % accumulation == 0:
                self._average_critic_gradients()
        if self._position % accumulation == 0 and self.args.target_kl is not None:
            self._metrics["train"]["policy/skipped"].append(float(self._sums is None and self._stopped))
        if self._position % accumulation == 0 and self._sums is not None:
            self._end_mini_batch()
        return loss

    def _average_critic_gradients(self) -> None:
        """What DDP does for the policy: the mean over all processes."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.critic.trainable().values())
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        flat = self.accelerator.reduce(flat, reduction="mean")
        for value, part in zip(parameters, flat.split([value.numel() for value in parameters]), strict=True):
            value.grad = part.view_as(value).to(value.dtype)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the critic's parameters in groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._critic_is_optimized:
            rate = self.args.value_learning_rate
            for decay, wanted in ((self.args.weight_decay, True), (0.0, False)):
                members = [value for value in self.critic.trainable().values() if (value.dim() > 1) == wanted]
                if members:
                    lr = self.args.learning_rate if rate is None else rate
                    optimizer.add_param_group({"params": members, "lr": lr, "weight_decay": decay})
            self._critic_is_optimized = True
        return optimizer

    # Logs

    def _sum(self, tensor: Tensor) -> Tensor:
        """Summed over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def _log_rollout(
        self, mode: str, mask: Tensor, scored: Tensor, scores: Tensor, kl: Tensor, rewards: Tensor, values: Tensor,
        returns: Tensor, ended: Tensor,
    ) -> float:
        """Means over the completions of all processes; returns the KL of a completion."""
        token = mask.bool()

        def total(tensor: Tensor) -> Tensor:
            return torch.where(token, tensor, 0.0).sum()

        local = torch.stack([
            scored.sum().float(), token.sum().float(), total(kl), (scores * scored).sum(), total(rewards),
            total(values), total(returns), total(returns - values), ended.sum().float(),
        ])
        rows, tokens, kl_sum, score, reward, value, target, error, ends = self._sum(local).tolist()
        means = [target / max(tokens, 1), error / max(tokens, 1)]
        spread = torch.stack([total((returns - means[0]).square()), total((returns - values - means[1]).square())])
        of_returns, of_errors = self._sum(spread).tolist()
        rows = max(rows, 1)
        metrics = self._metrics[mode]
        metrics.pop("frac_reward_zero_std", None)  # GRPO's: the spread within a group
        for name, number in {
            "objective/kl": kl_sum / rows, "kl": kl_sum / max(tokens, 1), "objective/kl_coef": self.kl_coef,
            "objective/scores": score / rows, "objective/rlhf_reward": reward / rows,
            "objective/non_score_reward": (reward - score) / rows, "val/mean": value / max(tokens, 1),
            "val/explained_variance": 1 - of_errors / of_returns if of_returns > 0 else 0.0,
            "val/num_eos_tokens": ends,
        }.items():
            metrics[name].append(number)
        return kl_sum / rows

    def _log_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """In the table of completions, the mean advantage in place of GRPO's."""
        means = self.accelerator.gather((advantages * mask).sum(-1) / mask.sum(-1).clamp(min=1)).tolist()
        kept = list(self._logs["advantages"])
        self._logs["advantages"].clear()
        self._logs["advantages"].extend([*kept[:-len(means)], *means])

    def _count(self, training: bool, mask: Tensor, numbers: dict[str, Tensor]) -> None:
        """Add sums over the counted tokens; an evaluation batch, or the mini batch that ends here, becomes a log."""
        kept = mask.bool()
        sums = torch.stack([kept.sum().float(), *(torch.where(kept, each.float(), 0.0).sum()
                                                  for each in numbers.values())])
        self._names = list(numbers)
        self._sums = sums if self._sums is None else self._sums + sums
        if not training:
            self._end_mini_batch()

    def _end_mini_batch(self) -> None:
        assert self._sums is not None
        tokens, *totals = self._sum(self._sums).tolist()
        self._sums = None
        means = {name: total / max(tokens, 1) for name, total in zip(self._names, totals, strict=True)}
        means["val/ratio_var"] = max(means["val/ratio_var"] - means["val/ratio"] ** 2, 0.0)
        training = self.model.training
        for name, mean in means.items():
            self._metrics["train" if training else "eval"][name].append(mean)
        limit = self.args.target_kl
        if training and limit is not None and means["policy/approxkl_avg"] > limit:
            self._stopped = True

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Here, because trainer_state.json, which makes a checkpoint complete, is written after it.
        super()._save_optimizer_and_scheduler(output_dir)
        ppo_state.save(self, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            ppo_state.load(self, checkpoint)  # before the optimizer, which would not say that the critic is another
        super()._load_optimizer_and_scheduler(checkpoint)


class _CriticSteps(TrainerCallback):
    """What transformers does for the gradients of its model, for those of the critic: clips them, and clears them."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = [value for value in self.trainer.critic.trainable().values() if value.grad is not None]
        if parameters and args.max_grad_norm:
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            self.trainer._metrics["train"]["val/grad_norm"].append(float(norm))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.critic.zero_grad(set_to_none=True)
