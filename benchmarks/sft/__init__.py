"""Whole SFT steps of backend "fast" beside its peers, each through its own trainer, on one GPU."""
