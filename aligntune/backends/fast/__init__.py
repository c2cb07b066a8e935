"""Backend "fast": the same trainers over our own kernels."""
