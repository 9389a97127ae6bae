"""What a base model and the parameters make of a pair: dimensions, tokens, operations."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.commands import BASE
from stages.core.errors import UserError
from stages.families import known
from stages.families.family import Family
from stages.params.params import Params

GIGA = 1e9
PATCHES = 4  # of the vision tower, to an image token
VOCABULARY = 151936  # Qwen's; a config.json says its own

Size = Mapping[str, Mapping[str, Any]]  # "text" and "vision": dimensions as in config.json


@dataclass(frozen=True)
class Pair:
    """Tokens of one pair: of its image, of the rest of its prompt, and of each answer."""

    image: int = 256
    question: int = 40
    answer: int = 120

    @property
    def prompt(self) -> int:
        return self.image + self.question

    @property
    def row(self) -> int:
        return self.prompt + 2 * self.answer


def named(source: Any) -> str:
    """A repository, a folder or a package, as params.yaml names it."""
    return str(getattr(source, "repo", None) or getattr(source, "path", None) or source.kind)


def model_size(p: Params, here: Set[str]) -> Size:
    """The base's dimensions, by its config.json or as its family publishes them.

    Raises:
        UserError: neither is there.
    """
    name = named(p.model.source)
    file = (BASE if "fetch-model" in here else Path(name)) / "config.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        text = found.get("text_config", found)
        head = {"head_dim": text["hidden_size"] // text["num_attention_heads"]}
        head["tie_word_embeddings"] = found.get("tie_word_embeddings", True)
        seen = {"deepstack_visual_indexes": [], "out_hidden_size": text["hidden_size"]}
        return {"text": head | text, "vision": seen | found["vision_config"]}
    if name in known.published():
        return known.published()[name]
    raise UserError(
        f"model.source is {name}, whose dimensions are not known here; `dvc repro fetch-model` "
        "fetches it, then plan again"
    )


def parameters(size: Size) -> dict[str, float]:
    """Numbers in the weights: of the ``layers``, of the ``head``, of the ``embeddings`` where they
    are not the head's, of the ``vision`` tower with its mergers. Norms, biases and position
    embeddings, up to 0.2%, are left out.
    """
    text, vision = size["text"], size["vision"]
    hidden, seen = text["hidden_size"], vision["hidden_size"]
    heads = 2 * (text["num_attention_heads"] + text["num_key_value_heads"]) * text["head_dim"]
    if "linear_num_key_heads" in text:  # Qwen3.5: gated attention in one of four layers
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        gated = heads + text["num_attention_heads"] * text["head_dim"]
        heads = (gated + 3 * (2 * keys + 3 * values)) / 4
    tower = vision["depth"] * (4 * seen**2 + 2 * seen * vision["intermediate_size"])
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    merged = PATCHES * seen * (PATCHES * seen + vision["out_hidden_size"])
    vocabulary = hidden * text.get("vocab_size", VOCABULARY)
    return {
        "layers": text["num_hidden_layers"] * hidden * (heads + 3 * text["intermediate_size"]),
        "head": vocabulary,
        "embeddings": 0 if text.get("tie_word_embeddings", True) else vocabulary,
        "vision": tower + mergers * merged,
    }


def forward(size: Size, tokens: float, images: float, predicted: float = 0) -> float:
    """Operations of a pass over ``tokens`` and ``images`` (in tokens of the first), of which
    ``predicted`` go through the head."""
    numbers = parameters(size)
    seen = PATCHES * images * numbers["vision"]
    return 2 * (tokens * numbers["layers"] + predicted * numbers["head"] + seen)


def family(p: Params) -> Family:
    return next(each for each in known.FAMILIES if p.model.template in each.templates)


def image_tokens(p: Params) -> int:
    """Of an image as large as it may be."""
    return max(1, p.format.image_max_pixels // family(p).token_side ** 2)


def batch(p: Params) -> int:
    """Pairs that a device takes at a time."""
    return int(p.train.passed_through.get("per_device_train_batch_size", 8))
