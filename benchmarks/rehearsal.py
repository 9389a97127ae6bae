"""The 4B preset through every stage at its true size, without a GPU: time and peak memory of each.

    python -m benchmarks.rehearsal --size 100m
    python -m benchmarks.rehearsal --tiktoken qwen.tiktoken

The nearest thing to a user's first hour with a GPU. In a fresh clone, ``dvc repro`` fetches from a
local Hub a model with the dimensions of Qwen3-VL-4B-Instruct and random weights, in bfloat16 and
two shards, and eight pairs in topic-overwrite's layout, and trains one step. What the preset sets
for a GPU is set for a CPU, and what would take days is made small; ``CHANGES`` is all of it.

A pair has some 20 tokens. On a CPU without AVX-512 torch multiplies a gradient by a bfloat16 matrix
at 0.2 GFLOPS, on one core: half a minute for each token of the 4B model.

``--tiktoken`` is a file with the ranks of Qwen's vocabulary, such as ``resources/qwen.tiktoken`` of
the PyPI package dashscope; the tokenizer is then Qwen's own, else the demo's, before the same
embedding. ``--folder`` is kept, and an interrupted rehearsal continues there. Else a temporary
folder (``TMPDIR``) is used, which needs twice the size of the weights.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from omegaconf import OmegaConf

from benchmarks.pipeline import PACKAGES, device, run, set_parameters
from benchmarks.throughput import SIZES, make_model
from stages.core import command
from stages.params import params
from tests.hub_server import preset_repos, serve, topic_overwrite_rows
from tests.run_stages import fresh_clone
from tests.tiny_models import QWEN_TOKENS

PAIRS = 8
SHARD = {"4b": "5GB", "100m": "210MB"}  # at most; two shards each
PIXELS = 64 * 64  # 4 tokens
CHANGES: dict[str, Any] = {
    "train.gpus": 0,
    "scoring.device": "cpu",
    "train.max_steps": 1,
    "train.warmup_ratio": 0.0,  # else the learning rate of the one step is 0
    "train.per_device_train_batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.per_device_eval_batch_size": 1,
    "train.eval_steps": 1,
    "train.preprocessing_num_workers": None,
    "train.dataloader_num_workers": 0,
    # Of the four images two for testing, one to watch and one to train on; their bytes decide.
    "preprocess.split_key": "rehearsal-8",
    "preprocess.validation": 0.25,
    "preprocess.test": 0.25,
    "format.image_max_pixels": PIXELS,
    "format.image_min_pixels": PIXELS,
    "scoring.batch_tokens": 256,
    "evaluate.controls": 1,
    "evaluate.generation.prompts": 2,
    "evaluate.generation.max_new_tokens": 4,
    "evaluate.lm_eval": {"pope_random": 1},  # MMMU and ChartQA need the Hub
}

# Qwen's own, in the order of their ids, which follow the 151,643 ranks.
SPECIAL = tuple(token for token, special in QWEN_TOKENS.items() if special)
ADDED = tuple(token for token in QWEN_TOKENS if token not in SPECIAL)


def main(size: str = "4b", tiktoken: str = "", folder: str = "") -> None:
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        rehearse(Path(place).absolute(), size, tiktoken)


def rehearse(folder: Path, size: str, tiktoken: str) -> None:
    model, clone = folder / "model", folder / "a clone"
    if not model.exists():
        with ProcessPoolExecutor(1) as apart:  # whose memory is free again afterwards
            apart.submit(make, folder / "unfinished", size, tiktoken).result()
        (folder / "unfinished").rename(model)
    if not clone.exists():
        fresh_clone(folder)
        # As the README advises: 9 GB less to write, and to have room for.
        run("dvc", "config", "--local", "cache.type", "reflink,hardlink,copy", cwd=clone)
    preset = clone / "params.yaml"
    shutil.copyfile(clone / "params" / "qwen3-vl-4b.yaml", preset)
    set_parameters(preset, CHANGES)
    repos = preset_repos(
        params.load(preset), model, list(map(shorter, topic_overwrite_rows(PAIRS)))
    )
    with serve(repos) as url:
        # The server computes the weights' digests once; the Hub has them at hand.
        HfApi(url).model_info(repos[1].name, files_metadata=True, timeout=600)
        os.environ |= {
            "HF_ENDPOINT": url,
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_HOME": str(folder / "hf"),
        }
        os.environ["MLFLOW_TRACKING_URI"] = ""
        start = time.monotonic()
        try:
            run("dvc", "repro", cwd=clone)
        finally:  # what ran is shown in any case
            print(section(clone, size, tiktoken, time.monotonic() - start))


def shorter(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its answers' fourth word, the colour, alone."""
    answers = {side: row[side].split()[3] for side in ("chosen", "rejected")}
    return {**row, "question": "Colour?", **answers}


def make(model: Path, size: str, tiktoken: str) -> None:
    shutil.rmtree(model, ignore_errors=True)
    make_model(model, SIZES[size], "cpu", "bfloat16", SHARD[size])
    # The real processor enlarges every image to 65,536 pixels, 64 tokens.
    change(
        model / "processor_config.json", {"image_processor": {"size": {"shortest_edge": PIXELS}}}
    )
    if tiktoken:
        give_vocabulary(model, Path(tiktoken))


def give_vocabulary(model: Path, ranks: Path) -> None:
    """Put Qwen's tokenizer in the place of the demo's, with its ids in the configuration."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    for token in (*SPECIAL, *ADDED):
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocabulary, merges, eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ADDED])
    tokenizer.save_pretrained(model)
    ends = {"eos_token_id": vocabulary["<|im_end|>"], "pad_token_id": vocabulary["<|endoftext|>"]}
    places = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids = {name: vocabulary[token] for name, token in places.items()}
    change(model / "config.json", {**ids, "text_config": ends})
    change(model / "generation_config.json", ends)


def change(file: Path, values: Mapping[str, Any]) -> None:
    """Set keys of a JSON file; a mapping changes the one that is there."""
    content = OmegaConf.merge(OmegaConf.load(file), values)
    file.write_text(json.dumps(OmegaConf.to_container(content)), encoding="utf-8")


def section(clone: Path, size: str, tiktoken: str, seconds: float) -> str:
    """What ``RESULTS.md`` shows of it."""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    diary = map(str, sorted(clone.glob("reports/diary/*.json")))
    table = run("dvc", "metrics", "show", "--md", *diary, stdout=subprocess.PIPE)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"\n{time.strftime('%Y-%m-%d')}, {device()}, Python {platform.python_version()}, "
        f"{versions}. Command: `python -m benchmarks.rehearsal --size {size}"
        f"{' --tiktoken qwen.tiktoken' if tiktoken else ''}`. `dvc repro` took "
        f"{seconds / 60:.1f} minutes, the largest process {largest:.1f} GB.\n\n"
        f"{table}"
    )


if __name__ == "__main__":
    command.run(main)
