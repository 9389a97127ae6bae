"""Weights in safetensors files, looked at without loading a model: headers, names, values.

A header is 8 bytes of length, then JSON: for each tensor its dtype, shape and place among the bytes
that follow (https://github.com/huggingface/safetensors, "Format").
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.text import shown

# A value as a whole number, and the bits of its exponent: all of them are set where it is infinite
# or not a number.
EXPONENTS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
AT_ONCE = 2**25  # values that are looked at together: at most 0.5 GB of memory


@dataclass(frozen=True)
class Tensor:
    """``start`` is in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, as they lie in it.

    Raises:
        ValueError: the header does not fit itself or the file, as the safetensors library finds.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length))
    found.pop("__metadata__", None)
    return {
        name: Tensor(about["dtype"], tuple(about["shape"]), 8 + length + about["data_offsets"][0])
        for name, about in sorted(found.items(), key=lambda item: item[1]["data_offsets"][0])
    }


def not_finite(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds an infinite value or one that is not a number."""
    import numpy as np

    for name, tensor in tensors.items():
        if tensor.dtype not in EXPONENTS or not tensor.count:
            continue
        integer, bits = EXPONENTS[tensor.dtype]
        kind = np.dtype(integer)
        for first in range(0, tensor.count, AT_ONCE):
            values = np.fromfile(
                path,
                kind,
                min(AT_ONCE, tensor.count - first),
                offset=tensor.start + first * kind.itemsize,
            )
            values &= kind.type(bits)
            if (values == bits).any():
                return name
    return None


def check_against(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that are not those of the model that ``config.json`` describes.

    Only what a comparison of the layers with each other shows, and the sizes of the embedding:
    loading tells of the rest (``stages.model.scoring.load``), but takes minutes to come to it.

    Raises:
        UserError: naming what is missing, or has another size.
    """
    text, vision = config.get("text_config", config), config["vision_config"]
    layers = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")
    blocks = re.compile(r"(?:^|\.)visual\.blocks\.(\d+)\.(.+)")
    for pattern, key, count in (
        (layers, "num_hidden_layers", text["num_hidden_layers"]),
        (blocks, "vision_config.depth", vision["depth"]),
    ):
        found: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for tensor, about in tensors.items():
            if match := pattern.search(tensor):
                found[int(match[1])][match[2]] = about.shape
        if set(found) != set(range(count)):
            odd = min(set(found) ^ set(range(count)))
            raise UserError(
                f"{name}: config.json says {key} = {count}, and the weights have {len(found)} such "
                f"layers (number {odd} is {'missing' if odd < count else 'too many'}); get both of "
                "one revision"
            )
        if "moe" not in str(config.get("model_type")):  # there, layers may differ
            _refuse_odd_layer(found, key, name)
    untied = ("lm_head.weight",) if config.get("tie_word_embeddings") is False else ()
    for needed in ("embed_tokens.weight", "visual.patch_embed.proj.weight", *untied):
        if not any(f".{tensor}".endswith(f".{needed}") for tensor in tensors):
            raise UserError(f"{name}: the weights have no {needed}; get all files of one revision")
    for tensor, about in tensors.items():
        wanted = (text["vocab_size"], text["hidden_size"])
        if tensor.endswith("embed_tokens.weight") and about.shape != wanted:
            raise UserError(
                f"{name}: {tensor} has the shape {about.shape}, and config.json says vocab_size "
                f"and hidden_size {wanted}; get both of one revision"
            )


def _refuse_odd_layer(found: Mapping[int, Mapping[str, Any]], key: str, name: str) -> None:
    kinds = Counter(frozenset(layer.items()) for layer in found.values())
    usual = dict(kinds.most_common(1)[0][0])
    for number, layer in sorted(found.items()):
        for tensor in sorted(usual.keys() | layer.keys()):
            if layer.get(tensor) != usual.get(tensor):
                told = "missing" if tensor not in layer else f"of the shape {layer[tensor]}"
                told = told if tensor in usual else "one that no other has"
                raise UserError(
                    f"{name}: in layer {number} of {len(found)} ({key}), {shown(tensor)} is "
                    f"{told}, unlike in the others; get the weights again"
                )
