"""Qwen2.5-VL.

Patches of 14 pixels, so a token is 28 by 28. Time, row and column each take a section of a head's
rotary frequencies (``mrope_section``). Most layers of the vision tower attend within windows of 112
pixels, those of ``fullatt_block_indexes`` to the entire image. The chat template opens with a
system prompt.
"""

from stages.families import qwen
from stages.families.family import Family

FAMILY = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    templates=("qwen2_vl",),
    example="Qwen/Qwen2.5-VL-3B-Instruct",
    tag="qwen2.5-vl",
    citation="""@techreport{bai2025qwen25vl,
  title  = {Qwen2.5-VL Technical Report},
  author = {{Qwen Team}},
  year   = {2025},
  note   = {arXiv:2502.13923}
}""",
    image_token="<|image_pad|>",
    image_tokens=qwen.image_tokens,
    position_inputs=qwen.position_inputs,
    seeing_each_image_once=qwen.seeing_each_image_once,
)
