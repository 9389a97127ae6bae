"""Qwen3-VL, dense and mixture of experts.

Patches of 16 pixels, so a token is 32 by 32. Time, row and column are interleaved over the rotary
frequencies of a head (``mrope_interleaved``). DeepStack: the tower also gives features of some of
its layers, which the language model adds to the image's tokens after its first layers.
"""

from stages.families.family import Family

FAMILY = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    templates=("qwen3_vl_nothink", "qwen3_vl"),  # the second is for Thinking models
    token_side=32,
    example="Qwen/Qwen3-VL-4B-Instruct",
    tag="qwen3-vl",
    paper="2511.21631",
    published={
        "Qwen/Qwen3-VL-2B-Instruct": {
            "text": {
                "hidden_size": 2048,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 6144,
            },
            "vision": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
        "Qwen/Qwen3-VL-4B-Instruct": {
            "text": {
                "hidden_size": 2560,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 9728,
                "mrope_section": [24, 20, 20],
            },
            "vision": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
        "Qwen/Qwen3-VL-8B-Instruct": {
            "text": {
                "hidden_size": 4096,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 12288,
                "tie_word_embeddings": False,
            },
            "vision": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    },
)
