"""What later stages need of a base model, checked before it is fetched, copied or loaded.

Nothing here writes: it decides whether a stage runs, not what comes out.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.families import registry
from stages.sources.manifest import refuse_lfs_pointer
from stages.sources.names import PICKLES, suffix


def check_model(
    folder: Path, names: Sequence[str], *, name: str, allow_pickle: bool = False
) -> None:
    """Refuse a model that later stages could not load; ``names`` are its files, weights included.

    It needs the config.json of a Qwen3-VL conditional generation model, a tokenizer, an image
    processor, and, where there is an index, each of its shards. Weights are looked for by name
    only: in ``folder`` they may not be there yet.

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
    if kind not in registry.model_types() or not architecture.endswith("ForConditionalGeneration"):
        raise UserError(
            f"{name}: config.json describes {architecture} (model_type {kind}), but this pipeline "
            f"tunes {registry.names()} models; set model.source to one, such as "
            f"{registry.FAMILIES[0].example}"
        )
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
    """Refuse a safetensors file whose header and size do not fit; no tensor is read.

    Raises:
        UserError: naming the file.
    """
    from safetensors import SafetensorError, safe_open

    for path in (folder / path for path in names if suffix(path) == ".safetensors"):
        refuse_lfs_pointer(path, f"{name}: {path.name}")
        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{name}: {path.name} is truncated or not a safetensors file ({error}); get it "
                "again"
            ) from None


def _json_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name}: {path.name} is not a JSON object; copy or download it again")
    return value
