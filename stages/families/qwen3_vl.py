"""Qwen3-VL, dense and mixture of experts.

Patches of 16 pixels, so a token is 32 by 32. Time, row and column are interleaved over the rotary
frequencies of a head (``mrope_interleaved``). DeepStack: the tower also gives features of some of
its layers, which the language model adds to the image's tokens after its first layers.
"""

from stages.families import qwen
from stages.families.family import Family

FAMILY = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    templates=("qwen3_vl_nothink", "qwen3_vl"),  # the second is for Thinking models
    example="Qwen/Qwen3-VL-4B-Instruct",
    tag="qwen3-vl",
    citation="""@techreport{qwen2025qwen3vl,
  title  = {Qwen3-VL Technical Report},
  author = {{Qwen Team}},
  year   = {2025},
  note   = {arXiv:2511.21631}
}""",
    image_token="<|image_pad|>",
    image_tokens=qwen.image_tokens,
    position_inputs=qwen.position_inputs,
    seeing_each_image_once=qwen.seeing_each_image_once,
)
