"""``params.yaml`` as checked models, and what LLaMA-Factory accepts."""
