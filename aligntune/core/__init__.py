"""Configuration, registries, factories and what a run leaves behind."""
