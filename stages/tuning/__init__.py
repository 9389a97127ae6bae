"""A LLaMA-Factory training: its configuration, its process, its history."""
