"""The embedded default's base model: a tiny real Qwen3-VL, made by ``python -m demo.make_base``."""

import os

from stages.core import portable

os.environ |= portable.environment(portable=True)  # before torch is imported
