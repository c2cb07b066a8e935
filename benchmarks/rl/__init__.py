"""Whole DPO, GRPO, PPO and DAPO steps of backend "fast" beside its peers."""
