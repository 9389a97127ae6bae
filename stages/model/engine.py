"""Greedy answers by vLLM, base and adapter in one engine, to the tokens and pixels of training.

vLLM is not in the lock; docs/performance.md says how to install it on top. Its answers were held
against those of transformers on a CPU (RESULTS.md). No GPU has run this.
"""

import copy
import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from stages.core.meaning import code
from stages.model import scoring, tokens
from stages.params.params import Params

RANK = 64  # of an adapter, at most
MEMORY = 0.5  # of a GPU's; the model that scores lies there too


def made_with(p: Params) -> dict[str, Any]:
    """What decides the answers besides the checkpoint; empty where transformers answers."""
    if p.evaluate.generation.engine != "vllm":
        return {}
    [package, *_] = packages_distributions()["vllm"]
    return {"vllm": version(package)} | code("model/engine.py")


def answer(
    model: Path, p: Params, adapter: Path | None, prompts: Sequence[dict[str, Any]], images: Path
) -> list[scoring.Answer]:
    """``scoring.answer`` by vLLM."""
    loaded = tokens.load(model, p)
    plugin = copy.copy(loaded.template.mm_plugin)
    plugin.expand_mm_tokens = False  # vLLM puts as many tokens as an image has
    template = copy.copy(loaded.template)
    template.mm_plugin = plugin
    unexpanded = replace(loaded, template=template)
    # As LLaMA-Factory resizes an image before its processor sees it.
    low, high = p.format.image_min_pixels, p.format.image_max_pixels
    seen = functools.partial(plugin._regularize_images, image_max_pixels=high, image_min_pixels=low)
    longest = p.format.cutoff_len + p.evaluate.generation.max_new_tokens
    llm = _engine(model, p.scoring.dtype, longest, round(high**0.5), p.preprocess.wanted.images)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    stops = loaded.template.get_stop_token_ids(loaded.tokenizer)
    outputs = llm.generate(
        [
            {
                "prompt_token_ids": scoring.prompt_tokens(unexpanded, prompt, images),
                "multi_modal_data": {
                    "image": seen([str(images / name) for name in prompt["images"]])["images"]
                },
            }
            for prompt in prompts
        ],
        SamplingParams(
            temperature=0,
            max_tokens=p.evaluate.generation.max_new_tokens,
            stop_token_ids=stops,
            ignore_eos=True,
            detokenize=False,
        ),
        lora_request=LoRARequest(str(adapter), 1, str(adapter)) if adapter else None,
        use_tqdm=False,
    )
    return [
        scoring.as_answer(loaded.tokenizer, list(one.outputs[0].token_ids), stops)
        for one in outputs
    ]


@functools.cache
def _engine(model: Path, dtype: str, longest: int, side: int, images: int) -> Any:
    """vLLM's engine in this process; ``longest`` prompt with its answer, ``side`` of an image."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import torch
    from vllm import LLM

    torch.cuda.empty_cache()
    return LLM(
        model=str(model),
        dtype=dtype,
        max_model_len=longest,
        limit_mm_per_prompt={"image": {"count": images, "width": side, "height": side}, "video": 0},
        enable_lora=True,
        max_lora_rank=RANK,
        gpu_memory_utilization=MEMORY,
        enforce_eager=not torch.cuda.is_available(),
        generation_config="vllm",
    )
