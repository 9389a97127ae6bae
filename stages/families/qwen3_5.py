"""Qwen3.5, dense.

Patches of 16 pixels, so a token is 32 by 32; time, row and column are interleaved over a quarter of
a head's rotary frequencies. Three of four layers are Gated DeltaNet: a convolution of four tokens
and a recurrence, whose state holds all that was read (``model/recurrence.py``).

The chat template of its makers ends a prompt without thinking by an empty thought, which
LLaMA-Factory 0.9.5's ``qwen3_5_nothink`` leaves out.
"""

from stages.families.family import Family

FAMILY = Family(
    name="Qwen3.5",
    model_types=("qwen3_5",),
    templates=("qwen3_5_nothink", "qwen3_5"),  # the second is for answers with thoughts
    token_side=32,
    example="Qwen/Qwen3.5-4B",
    tag="qwen3.5",
    paper="qwen3.5",
    published={
        "Qwen/Qwen3.5-4B": {
            "text": {
                "hidden_size": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "intermediate_size": 9216,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                "linear_key_head_dim": 128,
                "linear_value_head_dim": 128,
                "vocab_size": 248320,
            },
            "vision": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "deepstack_visual_indexes": [],
            },
        },
    },
)
