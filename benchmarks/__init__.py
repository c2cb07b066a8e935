"""Benchmarks: each prints a short table and writes what the docs' tables are made from, as JSON."""
