"""Models of every family, small and random, in the form in which the Hub has the real ones."""

import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo" / "model"

# As Qwen2.5-VL's own: with a system prompt, where the demo's has none.
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}"
)


def config_of_qwen2_5() -> dict[str, Any]:
    """Qwen2.5-VL's architecture in about 0.6 million parameters, flat, as the Hub has it."""
    ids: dict[str, int] = {
        token["content"]: token["id"]
        for token in json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "sliding_window": 1024,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": json.loads((DEMO / "config.json").read_text())["text_config"]["vocab_size"],
        "vision_config": {
            "depth": 3,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,  # of 2 by 2 tokens
            "fullatt_block_indexes": [1],  # within depth, else no layer sees the entire image
            "initializer_range": 0.1,
        },
    }


def random_qwen2_5(**more: Any) -> Any:
    """A model of it, with other values."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(**config_of_qwen2_5() | more)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")


def qwen2_5_vl(folder: Path) -> Path:
    """The same in a folder, with the demo's tokenizer.

    Written as Qwen/Qwen2.5-VL-3B-Instruct is: a flat config.json, the names that its tensors had
    before transformers 5, pixel bounds as ``min_pixels`` and ``max_pixels``.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in random_qwen2_5().state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder / "config.json", config_of_qwen2_5())
    write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 28 * 28,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    template = CHAT_TEMPLATE + (DEMO / "chat_template.jinja").read_text()
    write(folder / "chat_template.json", {"chat_template": template})
    shutil.copyfile(DEMO / "tokenizer.json", folder / "tokenizer.json")
    tokenizer = json.loads((DEMO / "tokenizer_config.json").read_text())
    tokenizer.pop("processor_class", None)
    write(folder / "tokenizer_config.json", tokenizer)
    return folder


def qwen3_5(folder: Path) -> Path:
    """A folder of ``random_qwen3_5`` with the demo's processor."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    random_qwen3_5().save_pretrained(folder)
    return folder


def random_qwen3_5() -> Any:
    """Qwen3.5's architecture in about 0.5 million parameters, with the demo's tokens: three
    recurrent layers and one of attention.
    """
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    demo = json.loads((DEMO / "config.json").read_text())
    demo_text, ids = demo["text_config"], {k: v for k, v in demo.items() if k.endswith("token_id")}
    text = {
        **{key: demo_text[key] for key in ("vocab_size", "eos_token_id", "pad_token_id")},
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    config = Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="float32", **ids
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation="sdpa")


# The added tokens of Qwen2.5-VL and Qwen3-VL (151643 to 151668 in their tokenizers), and which of
# them are marked special. The demo's tokenizer has the eight that a prompt needs.
QWEN_TOKENS = {
    **dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), True),
    **dict.fromkeys(("<|object_ref_start|>", "<|object_ref_end|>"), True),
    **dict.fromkeys(("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"), True),
    **dict.fromkeys(("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"), True),
    **dict.fromkeys(("<|image_pad|>", "<|video_pad|>"), True),
    **dict.fromkeys(("<tool_call>", "</tool_call>"), False),
    **dict.fromkeys(("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"), False),
    **dict.fromkeys(("<|repo_name|>", "<|file_sep|>"), False),
    **dict.fromkeys(("<tool_response>", "</tool_response>", "<think>", "</think>"), False),
}


def with_qwen_tokens(folder: Path) -> Path:
    """The demo's processor with all of Qwen's added tokens, and Qwen's normalisation (NFC)."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    document = json.loads((folder / "tokenizer.json").read_text())
    there = {token["content"] for token in document["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token, special in QWEN_TOKENS.items():
        if token not in there:
            number = len(document["model"]["vocab"]) + len(document["added_tokens"])
            document["added_tokens"].append(
                {"id": number, "content": token, "special": special, **flags}
            )
    document["normalizer"] = {"type": "NFC"}
    write(folder / "tokenizer.json", document)
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
