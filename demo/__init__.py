"""The embedded default's base model: a tiny real Qwen3-VL, made by ``python -m demo.make_base``."""
