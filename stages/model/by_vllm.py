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

RANK, IMAGES = 64, 8  # of an adapter, and of a prompt, at most
MEMORY = 0.5  # of a GPU's; the model that scores lies there too


def answer(
    model: Path,
    p: Params,
    adapter: Path | None,
    rows: Sequence[dict[str, Any]],
    images: Path,
    most: int,
) -> list[scoring.Answer]:
    """``scoring.answer`` of up to ``most`` tokens by vLLM."""
    loaded = tokens.load(model, p)
    plugin, template = copy.copy(loaded.template.mm_plugin), copy.copy(loaded.template)
    plugin.expand_mm_tokens, template.mm_plugin = False, plugin  # vLLM expands an image's token
    asked = functools.partial(scoring.prompt_tokens, replace(loaded, template=template))
    # As LLaMA-Factory resizes an image before the processor sees it.
    bounds = {name: getattr(p.format, name) for name in ("image_max_pixels", "image_min_pixels")}
    seen = functools.partial(plugin._regularize_images, **bounds)
    side = round(p.format.image_max_pixels**0.5)
    llm = _engine(model, p.scoring.dtype, p.format.cutoff_len + most, side)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    stops = loaded.template.get_stop_token_ids(loaded.tokenizer)
    options = {"temperature": 0, "max_tokens": most, "ignore_eos": True, "detokenize": False}
    outputs = llm.generate(
        [
            {
                "prompt_token_ids": asked(row, images),
                "multi_modal_data": {
                    "image": seen([str(images / name) for name in row["images"]])["images"]
                },
            }
            for row in rows
        ],
        SamplingParams(stop_token_ids=stops, **options),
        lora_request=LoRARequest(str(adapter), 1, str(adapter)) if adapter else None,
        use_tqdm=False,
    )
    said = [list(output.outputs[0].token_ids) for output in outputs]
    return [scoring.as_answer(loaded.tokenizer, new, stops) for new in said]


def decides() -> dict[str, str]:
    """What of vLLM decides its answers."""
    [package, *_] = packages_distributions()["vllm"]
    return {"vllm": version(package), **code("model/by_vllm.py")}


@functools.cache
def _engine(model: Path, dtype: str, longest: int, side: int) -> Any:
    """vLLM's engine in this process, for prompts with answers of up to ``longest`` tokens and
    images of ``side`` pixels.
    """
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import torch
    from vllm import LLM

    torch.cuda.empty_cache()
    each = {"count": IMAGES, "width": side, "height": side}
    return LLM(
        model=str(model),
        dtype=dtype,
        max_model_len=longest,
        limit_mm_per_prompt={"image": each, "video": 0},
        enable_lora=True,
        max_lora_rank=RANK,
        gpu_memory_utilization=MEMORY,
        enforce_eager=not torch.cuda.is_available(),
        generation_config="vllm",
    )
