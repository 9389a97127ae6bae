"""What later stages need of a base model, checked before it is fetched, copied or loaded.

Nothing here writes: it decides whether a stage runs, not what comes out.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.families import known
from stages.sources import tokenizer, weights
from stages.sources.manifest import refuse_lfs_pointer
from stages.sources.names import PICKLES, suffix


def check_model(
    folder: Path, names: Sequence[str], *, name: str, allow_pickle: bool = False
) -> None:
    """Refuse a model that later stages could not load; ``names`` are its files, weights included.

    It needs the config.json of a conditional generation model of a known family, its tokenizer, an
    image processor, and, where there is an index, each of its shards. Weights are looked for by
    name only: in ``folder`` they may not be there yet.

    Raises:
        UserError: naming what is missing, or what the model is instead.
    """
    there = set(names)
    if "config.json" not in there:
        adapter = "adapter_config.json" in there
        raise UserError(
            f"{name}: there is no config.json"
            + (" (it is a LoRA adapter)" if adapter else "")
            + "; name a base model's folder or repository"
        )
    config = _json_object(folder / "config.json", name)
    kind, named = config.get("model_type"), config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no architecture"
    if kind not in known.model_types() or not architecture.endswith("ForConditionalGeneration"):
        raise UserError(
            f"{name}: config.json describes {architecture} (model_type {kind}), but this pipeline "
            f"tunes {known.names()} models; set model.source to one, such as "
            f"{known.FAMILIES[0].example}"
        )
    if "adapter_config.json" in there:
        raise UserError(
            f"{name}: an adapter lies in the folder (adapter_config.json), which would be loaded "
            "on top of the base; take it out, or narrow model.source.files, or merge it first"
        )
    _check_config(config, name)
    vocabulary = "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there
    if not vocabulary or "tokenizer_config.json" not in there:
        raise UserError(
            f"{name}: the tokenizer is missing (tokenizer_config.json with tokenizer.json, or with "
            "vocab.json and merges.txt); add it, or widen model.source.files"
        )
    if "preprocessor_config.json" not in there and not (
        "processor_config.json" in there  # where transformers 5 saves it
        and "image_processor" in _json_object(folder / "processor_config.json", name)
    ):
        raise UserError(
            f"{name}: the image processor is missing (preprocessor_config.json, or "
            "processor_config.json with an image_processor); add it, or widen model.source.files"
        )
    _json_object(folder / "tokenizer_config.json", name)
    tokenizer.check(folder, there, config, name=name)
    for path in sorted({"preprocessor_config.json", "processor_config.json"} & there):
        _check_processor(_json_object(folder / path, name), config, f"{name}: {path}")
    index = "model.safetensors.index.json"
    pickled = allow_pickle and not any(suffix(path) == ".safetensors" for path in names)
    if index in there and not pickled:
        shards = _json_object(folder / index, name).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{name}: {index} has no weight_map; get it again")
        if absent := sorted(set(map(str, shards.values())) - there):
            raise UserError(
                f"{name}: {index} names {absent[0]}, which is missing; fetch all shards "
                '("*.safetensors" in model.source.files)'
            )


def check_weights_exist(
    name: str, wanted: Sequence[str], there: Sequence[str], allow_pickle: bool
) -> None:
    """Refuse, by names alone, a model without usable weights.

    ``wanted`` are the files that will be fetched, ``there`` all that the source has.

    Raises:
        UserError: says what the weights are instead, and the fix.
    """
    suffixes = {suffix(path) for path in wanted}
    if ".safetensors" in suffixes or (allow_pickle and suffixes & PICKLES):
        return
    if any(path.endswith(".safetensors") for path in there):
        raise UserError(
            f'{name}: model.source.files leaves out the weights; add "*.safetensors" to it'
        )
    pickled = [path for path in there if suffix(path) in PICKLES]
    if pickled:
        raise UserError(
            f"{name}: the weights exist only as {pickled[0]}, a pickle, which can run any code "
            "when loaded. Use a revision that has safetensors (the Hub's conversion bot offers "
            "one as refs/pr/N), or set model.trust.pickle: true if you trust its author"
        )
    raise UserError(f"{name}: it holds no safetensors weights; is it a base model?")


def check_weights(folder: Path, names: Iterable[str], *, name: str) -> None:
    """Refuse safetensors files whose headers are not right, that are not the weights of the model
    in config.json, or that hold values which are not finite. Nothing is loaded.

    Raises:
        UserError: naming the file.
    """
    names = [path for path in names if suffix(path) == ".safetensors"]
    by_file: dict[str, dict[str, weights.Tensor]] = {}
    for path in names:
        refuse_lfs_pointer(folder / path, f"{name}: {path}")
        try:
            by_file[path] = weights.header(folder / path)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{name}: {path} is truncated or not a safetensors file ({reason}); get it again"
            ) from None
    # Of a folder without subfolders, which transformers does not look into.
    loaded = {path: tensors for path, tensors in by_file.items() if "/" not in path}
    if not loaded:
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" not in loaded:
        where = _json_object(index, name)["weight_map"]
        for tensor, path in where.items():
            if tensor not in loaded.get(str(path), {}):
                raise UserError(
                    f"{name}: {index.name} says that {tensor[:100]} is in {path}, which has not "
                    "got it; get all files of one revision"
                )
        loaded = {path: loaded[path] for path in sorted(set(where.values()))}
    elif "model.safetensors" not in loaded:
        raise UserError(
            f"{name}: the weights are in {min(loaded)}, and there is no {index.name} that says "
            "what is where; fetch it too, or name the file model.safetensors"
        )
    else:
        loaded = {"model.safetensors": loaded["model.safetensors"]}
    together = {tensor: about for tensors in loaded.values() for tensor, about in tensors.items()}
    weights.check_against(_json_object(folder / "config.json", name), together, name)
    for path, tensors in loaded.items():
        if (bad := weights.not_finite(folder / path, tensors)) is not None:
            raise UserError(
                f"{name}: {bad} in {path} holds values that are infinite or not numbers, and so "
                "would be every log-prob; get it again, or another revision"
            )


# config.json: keys of its sections that decide sizes, and what is too large to be one; an absurd
# number of layers would be made, one by one, before anything fails.
_TEXT = {"vocab_size": 10_000_000, "hidden_size": 1_000_000, "num_hidden_layers": 1000}
_VISION = {"depth": 1000, "patch_size": 1000, "spatial_merge_size": 100}
_MORE = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "num_heads"),
    *("temporal_patch_size", "out_hidden_size", "num_position_embeddings", "in_channels"),
)
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def _check_config(config: Mapping[str, Any], name: str) -> None:
    text, vision = config.get("text_config", config), config.get("vision_config")
    for section, place, needed in (
        (text, "text_config" if "text_config" in config else "config.json", _TEXT),
        (vision, "vision_config", _VISION),
    ):
        if not isinstance(section, dict):
            raise UserError(f"{name}: config.json has no {place}; get it again")
        for key in (*needed, *(key for key in _MORE if key in section)):
            value, most = section.get(key), needed.get(key, 10_000_000)
            if type(value) is not int or not 0 < value <= most:
                raise UserError(
                    f"{name}: config.json says {key} = {str(value)[:100]} in {place}, which no "
                    "such model has; get it again"
                )
    for key, value in _walk(config):
        if key == "quantization_config" and value:
            raise UserError(
                f"{name}: the weights are quantised already (quantization_config in config.json); "
                "use the model they were made from, with model.quantization_bit: 4 or 8"
            )
        if key.endswith("attn_implementation") and value not in (None, *_ATTENTION):
            raise UserError(
                f"{name}: config.json asks for the attention kernel {str(value)[:100]}, which "
                f"would be downloaded and run; remove {key} from it"
            )


def _walk(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        yield key, value
        if isinstance(value, dict):
            yield from _walk(value)


def _check_processor(found: Mapping[str, Any], config: Mapping[str, Any], name: str) -> None:
    """Refuse an image processor that would give the model no image, or another model's."""
    vision = config["vision_config"]
    for section in (found, found.get("image_processor", {})):
        if not isinstance(section, dict):
            raise UserError(f"{name} has an image_processor that is not an object; get it again")
        for key in ("processor_class", "image_processor_type"):
            if not str(section.get(key) or "Qwen").startswith("Qwen"):
                raise UserError(
                    f"{name} names {key} {str(section[key])[:100]}, which is another family's; get "
                    "the processor of this model"
                )
        for key, same in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
            if section.get(key, vision[same]) != vision[same]:
                raise UserError(
                    f"{name} says {key} = {str(section[key])[:100]}, and config.json says {same} = "
                    f"{vision[same]}; get both of one revision"
                )
        size = section.get("size") or {}
        if not isinstance(size, dict):
            raise UserError(
                f"{name} says size = {str(size)[:100]}, where this family has shortest_edge and "
                "longest_edge; get the processor of this model"
            )
        positive = {f"size.{edge}": value for edge, value in size.items()}
        positive |= {f"image_std[{i}]": std for i, std in _numbered(section, "image_std")}
        for key in ("min_pixels", "max_pixels", "temporal_patch_size", "rescale_factor"):
            if section.get(key) is not None:
                positive[key] = section[key]
        for key, value in positive.items():
            if not (_is_number(value) and value > 0):
                raise UserError(
                    f"{name} says {key} = {str(value)[:100]}, which must be above 0: every image "
                    "would become nothing or not a number; get it again"
                )
        for i, value in _numbered(section, "image_mean"):
            if not _is_number(value):
                raise UserError(f"{name} says image_mean[{i}] = {str(value)[:100]}; get it again")
        least = positive.get("size.shortest_edge", positive.get("min_pixels", 0))
        if least > positive.get("size.longest_edge", positive.get("max_pixels", math.inf)):
            raise UserError(f"{name} has a smallest image size above its largest; get it again")


def _numbered(section: Mapping[str, Any], key: str) -> list[tuple[int, Any]]:
    values = section.get(key)
    return list(
        enumerate(values if isinstance(values, list) else [] if values is None else [values])
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _json_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name}: {path.name} is not a JSON object; copy or download it again")
    return value
