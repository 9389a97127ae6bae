"""Qwen2.5-VL.

Patches of 14 pixels, so a token is 28 by 28. Time, row and column each take a section of a head's
rotary frequencies (``mrope_section``). Most layers of the vision tower attend within windows of 112
pixels, those of ``fullatt_block_indexes`` to the entire image. The chat template opens with a
system prompt.
"""

from stages.families.family import Family

FAMILY = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    templates=("qwen2_vl",),
    token_side=28,
    example="Qwen/Qwen2.5-VL-3B-Instruct",
    tag="qwen2.5-vl",
    paper="2502.13923",
    published={
        # The tower's gated MLP (three products of 3,420) counts as two of 5,130, and windows as
        # full attention.
        "Qwen/Qwen2.5-VL-3B-Instruct": {
            "text": {
                "hidden_size": 2048,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "intermediate_size": 11008,
            },
            "vision": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 5130,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "deepstack_visual_indexes": [],
            },
        },
    },
)
