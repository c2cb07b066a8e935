"""aligntune: post-training for language models on interchangeable backends."""
