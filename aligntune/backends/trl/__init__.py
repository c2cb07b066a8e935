"""Backend "trl": Hugging Face TRL as it is."""
