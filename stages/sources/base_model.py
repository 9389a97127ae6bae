"""Refuses a base model with a silent or unsafe fault before it is fetched, copied or loaded.

``format`` tries whether tokenizer, template and processor work, and loading tells whether all
tensors are there. This module loads no model and writes nothing.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.text import listed, shown
from stages.families import known
from stages.pairs.files import PICKLES, suffix
from stages.sources.source import refuse_lfs_pointer

INDEX = "model.safetensors.index.json"
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def is_weights(name: str) -> bool:
    """Whether a model's weights may be in it."""
    return suffix(name) in PICKLES | {".safetensors"}


def check_weights_exist(
    name: str, wanted: Sequence[str], there: Sequence[str], allow_pickle: bool
) -> None:
    """Refuse, by names alone, a model without usable weights.

    ``wanted`` are the files that will be fetched, ``there`` all that the source has.

    Raises:
        UserError: says what the weights are instead, and the fix.
    """
    suffixes = {suffix(path) for path in wanted}
    if ".safetensors" not in suffixes and not (allow_pickle and suffixes & PICKLES):
        raise UserError(
            f"{name}: no safetensors weights are taken; it holds "
            f'{listed(filter(is_weights, there), 5) or "no weights"}. Add "*.safetensors" to '
            "model.source.files, or use a revision that has them (the Hub's conversion bot offers "
            "one as refs/pr/N); a pickle can run any code when loaded, and model.trust.pickle: "
            "true takes it if you trust its author"
        )


def check_model(folder: Path, names: Sequence[str], *, name: str) -> None:
    """Refuse a model by its small files: an unknown family, or a fault that loading would not tell.

    ``names`` are its files; weights may not be in ``folder`` yet.

    Raises:
        UserError: naming what is missing, or what the model is instead.
    """
    for problem in _problems(folder, set(names), name):
        raise UserError(f"{name}: {problem}")


def _problems(folder: Path, names: set[str], name: str) -> Iterator[str]:
    if "adapter_config.json" in names:
        yield (
            "the folder holds a LoRA adapter (adapter_config.json), which would be loaded on top "
            "of the base; remove it, narrow model.source.files, or merge it first"
        )
    if "config.json" not in names:
        yield "there is no config.json; name a base model's folder or repository"
    config = _json_object(folder / "config.json", name)
    known.of_type(config.get("model_type"), name=name)
    if "ForConditionalGeneration" not in str(config.get("architectures")):
        yield (
            f"config.json describes {shown(config.get('architectures'))}, which generates no text; "
            f"set model.source to a model such as {known.FAMILIES[0].example}"
        )
    for key, value in _walk(config):
        if key == "quantization_config" and value:
            yield (
                "the weights are quantised already (quantization_config in config.json); use the "
                "model they were made from, with model.quantization_bit: 4 or 8"
            )
        if key.endswith("attn_implementation") and value not in (None, *ATTENTION):
            yield (
                f"config.json asks for the attention kernel {shown(value)}, which would be "
                f"downloaded and run; remove {key} from it"
            )
    for file in sorted({"tokenizer.json", "tokenizer_config.json"} & names):
        for key, value in _walk(_json_object(folder / file, name)):
            # A space can't be broken up in the data, is in every text, and makes loading hang.
            if key.endswith(("_token", "_tokens", "_decoder")) and (blank := _blank(value)):
                yield (
                    f"{file} has the special token {blank}, which may occur in any text; get this "
                    "model's own tokenizer"
                )


def check_weights(folder: Path, names: Iterable[str], *, name: str) -> None:
    """Refuse safetensors files that are damaged, are not the weights of the model in config.json,
    or hold values that are not finite.

    Raises:
        UserError: naming the file.
    """
    there: dict[str, list[str]] = {}  # names of tensors by file
    for path in names:
        if suffix(path) == ".safetensors" and "/" not in path:  # transformers looks into no folder
            there[path] = _tensors(folder / path, f"{name}: {path}")
    if "model.safetensors" in there:
        there = {"model.safetensors": there["model.safetensors"]}
    elif there:
        for tensor, path in _json_object(folder / INDEX, name)["weight_map"].items():
            if tensor not in there.get(path, ()):
                raise UserError(
                    f"{name}: {INDEX} says that {shown(tensor)} is in {path}, which does not hold "
                    "it; get all files of one revision"
                )
    config = _json_object(folder / "config.json", name)
    for what, section, key in (
        ("layers", "text_config", "num_hidden_layers"),
        ("blocks", "vision_config", "depth"),
    ):
        pattern = re.compile(rf"(?:^|\.){what}\.(\d+)\.")
        found = {int(m[1]) for each in there.values() for t in each if (m := pattern.search(t))}
        count = config.get(section, config).get(key)
        if found and not (len(found) == max(found) + 1 == count):  # more are ignored in silence
            raise UserError(
                f"{name}: config.json says {key} = {shown(count)}, but the weights have "
                f"{len(found)} such layers; get both from one revision"
            )


def _tensors(path: Path, name: str) -> list[str]:
    """The names of a safetensors file's tensors, all of which hold finite numbers.

    Raises:
        UserError: they don't, or the header does not fit itself or the file; ``name`` says whose.
    """
    from safetensors import SafetensorError, safe_open

    refuse_lfs_pointer(path, name)
    try:
        with safe_open(path, framework="pt") as opened:
            names: list[str] = list(opened.keys())
            for each in names:
                tensor = opened.get_tensor(each)
                is_number = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()
                if is_number and not all(bound.isfinite() for bound in tensor.aminmax()):
                    raise UserError(
                        f"{name}: {each} holds values that are infinite or not numbers; get it "
                        "again, or another revision"
                    )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{name} is truncated or not a safetensors file ({shown(error, 300)}); get it again"
        ) from None
    return names


def _walk(section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        yield key, value
        if isinstance(value, dict):
            yield from _walk(value)


def _blank(value: Any) -> str | None:
    """The first text of at most one visible character in a value, its lists and objects."""
    if isinstance(value, str):
        return repr(value) if len(value.strip()) < 2 else None
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_blank, inside)), None)


def _json_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name}: {path.name} is not a JSON object; copy or download it again")
    return value
