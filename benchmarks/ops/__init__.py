"""Benchmark rows of the fast backend's ops: `python -m benchmarks.ops [names]`; the head has a script of its own.

A module of this package that holds `ROWS` (a list of `benchmarks.ops.bench.Row`) and stands in `MODULES` is run.
"""

MODULES = ("rms_norm", "glu", "rope")
