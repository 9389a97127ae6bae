"""Pairs scored and tokens generated per second at the size of a real model, with random weights.

    python -m benchmarks.throughput --size 4b --device-name cuda --dtype bfloat16
    python -m benchmarks.throughput --size 100m --device-name cpu --dtype float32 --pairs 8

Speed and memory depend on the shapes, not on what the weights know, so nothing is downloaded: the
model has the dimensions of Qwen3-VL-4B-Instruct (or of a small one), with its vocabulary size, and
the demo's tokenizer and processor. A pair has a 512x512 image (256 image tokens), a question, and
two answers of ``--answer-tokens`` tokens. What runs is what the stages reference and evaluate run:
``stages.model.scoring``. One run of each is not timed.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pipeline import stack
from stages.commands.planning.dimensions import VOCABULARY, Size
from stages.core import command
from stages.families import known
from stages.model import scoring
from stages.params import params
from stages.params.params import Params
from stages.sources.topics import COLOURS, SHAPES

DEMO = Path("demo/model")
IMAGE_SIDE = 512

# Qwen3-VL-4B-Instruct, one that two CPU cores can run, and one to rehearse with.
SIZES: dict[str, Size] = {
    "4b": known.published()["Qwen/Qwen3-VL-4B-Instruct"],
    "tiny": {
        "text": {
            "vocab_size": 384,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "intermediate_size": 128,
            "mrope_section": [6, 5, 5],
        },
        "vision": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1],
        },
    },
    "100m": {
        "text": {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "intermediate_size": 1536,
            "mrope_section": [12, 10, 10],
        },
        "vision": {
            "depth": 6,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_heads": 6,
            "out_hidden_size": 512,
            "num_position_embeddings": 1024,
            "deepstack_visual_indexes": [1, 3, 5],
        },
    },
}
# Qwen3.5's architecture: three of four layers are recurrent.
SIZES["100m-3.5"] = {
    "text": {
        **{k: v for k, v in SIZES["100m"]["text"].items() if k != "mrope_section"},
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "vision": {**SIZES["100m"]["vision"], "deepstack_visual_indexes": []},
}


def main(
    size: str = "100m",
    device_name: str = "cpu",
    dtype: str = "float32",
    pairs: int = 32,
    batch_tokens: int = 4096,
    answer_tokens: int = 120,
    new_tokens: int = 64,
    repeats: int = 3,
    model: str = "",
) -> None:
    p = parameters_of(device_name, dtype, IMAGE_SIDE**2, batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(model or folder, "model")
        make_model(model_dir, SIZES[size], device_name, dtype)
        policy = scoring.load(model_dir, p)
        rows = make_pairs(Path(folder), policy.tokenizer, pairs, answer_tokens)

        def score() -> None:
            scoring.log_probs(
                policy, rows, Path(folder), batch_tokens=batch_tokens, label="scoring"
            )

        def answer() -> list[scoring.Answer]:
            return scoring.answer(
                policy,
                rows,
                Path(folder),
                max_new_tokens=new_tokens,
                batch_tokens=batch_tokens,
                label="generation",
            )

        scored, score_memory = timed(score, repeats)
        generated = sum(one.tokens for one in answer())
        answered, answer_memory = timed(answer, repeats)
    parameters = sum(weight.numel() for weight in policy.model.parameters()) / 1e6
    print(
        f"\ncommand: python -m benchmarks.throughput --size {size} --device-name {device_name} "
        f"--dtype {dtype} --pairs {pairs} --batch-tokens {batch_tokens} "
        f"--answer-tokens {answer_tokens} --new-tokens {new_tokens} --repeats {repeats}\n"
        f"{stack()}\n"
        f"{parameters:,.0f} M parameters, {dtype}; {pairs} pairs with 256 image tokens and two "
        f"answers of {answer_tokens} tokens; median of {repeats} runs\n\n"
        "| what | rate | peak GPU memory |\n|---|---|---|\n"
        f"| scoring | {pairs / scored:.2f} pairs/s | {score_memory} |\n"
        f"| generation | {generated / answered:.1f} tokens/s "
        f"| {answer_memory} |"
    )


def parameters_of(device_name: str, dtype: str, pixels: int, batch_tokens: int = 4096) -> Params:
    """The demo's, for models of these sizes and images of so many pixels."""
    p = params.load(Path("params/demo.yaml"))
    wanted = {
        "device": device_name,
        "dtype": dtype,
        "portable": False,
        "batch_tokens": batch_tokens,
    }
    limits = {"image_max_pixels": pixels, "image_min_pixels": pixels}
    return p.model_copy(
        update={
            "scoring": params.Scoring.model_validate(wanted),
            "format": params.Format.model_validate(
                limits | {"cutoff_len": 4096, "allowed_tokens": []}
            ),
        }
    )


def make_model(
    folder: Path,
    size: Size,
    device_name: str,
    dtype: str,
    largest_shard: str = "50GB",
) -> None:
    """A model folder with random weights of that size, and the demo's tokenizer and processor; one
    that is there stays.
    """
    if folder.exists():
        return
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    processor["image_processor"]["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device(device_name):
        config = AutoConfig.for_model(**config_of(size))
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=largest_shard)


def config_of(size: Size) -> dict[str, Any]:
    """The demo's config.json with those dimensions."""
    config: dict[str, Any] = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    text = dict(size["text"])
    if "linear_num_key_heads" in text:
        ids = {name: value for name, value in config.items() if name.endswith("token_id")}
        text |= {"vocab_size": VOCABULARY, "eos_token_id": config["text_config"]["eos_token_id"]}
        vision = {k: v for k, v in size["vision"].items() if k != "deepstack_visual_indexes"}
        return {"model_type": "qwen3_5", "text_config": text, "vision_config": vision, **ids}
    config["text_config"]["rope_parameters"]["mrope_section"] = text.pop("mrope_section")
    config["text_config"] |= {"vocab_size": VOCABULARY, "max_position_embeddings": 8192} | text
    config["vision_config"] |= size["vision"]
    return config


def make_pairs(
    folder: Path, tokenizer: Any, count: int, answer_tokens: int, side: int = IMAGE_SIDE
) -> list[dict[str, Any]]:
    """Formatted pairs whose answers are so many tokens long, each with a noisy image of its own,
    ``side`` pixels high and wide.
    """
    import numpy as np
    from PIL import Image

    one_word = len(tokenizer.encode(" red red", add_special_tokens=False)) // 2
    generator = np.random.default_rng(0)

    def text() -> str:
        return " ".join(generator.choice([*COLOURS, *SHAPES], size=answer_tokens // one_word))

    rows = []
    for i in range(count):
        noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg")
        rows.append(
            {
                "id": str(i),
                "messages": [{"role": "user", "content": "<image>What is in the image?"}],
                "images": [f"{i}.jpg"],
                "chosen": {"role": "assistant", "content": text()},
                "rejected": {"role": "assistant", "content": text()},
            }
        )
    return rows


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, str]:
    """Median seconds of ``repeats`` runs after one that is not timed, and the peak GPU memory."""
    import torch

    work()
    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if gpu else "none"
    return statistics.median(seconds), memory


if __name__ == "__main__":
    command.run(main)
