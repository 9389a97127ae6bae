"""How many floating-point operations, bytes and parameters a pair takes, from a model's dimensions.

A product of (m, k) and (k, n) counts 2mkn. Attention counts what is seen, not what a kernel masks
out. Norms, activations, the optimizer and LoRA's own products (below 1% at rank 8) are left out.
Weights are frozen, so backward costs what forward does: it only goes to the activations. With
gradient checkpointing the layers, not the head, are computed once more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.families import known

TERA, GIGA = 1e12, 1e9
VOCABULARY = 151936  # Qwen's; a config.json says its own
PATCHES = 4  # of the vision tower, to an image token

Size = Mapping[str, Mapping[str, Any]]
PUBLISHED: Mapping[str, Size] = known.published()  # by repository


@dataclass(frozen=True)
class Pair:
    """Tokens of one pair: of its image, of the rest of its prompt, and of each answer."""

    image: int = 256
    question: int = 40
    answer: int = 120

    @property
    def prompt(self) -> int:
        return self.image + self.question


DEFAULT = Pair()


@dataclass(frozen=True)
class Way:
    """How a step is computed. ``vision``: how often the tower sees the image."""

    shared: bool
    cached: bool
    vision: int
    answers_only: bool
    checkpointing: bool = True


def step(size: Size, pair: Pair, way: Way) -> dict[str, float]:
    """FLOPs of a training step on one pair: ``layers``, ``head``, ``vision``."""
    passes = 2 + way.checkpointing + (not way.cached)
    tokens = pair.prompt + 2 * pair.answer if way.shared else 2 * (pair.prompt + pair.answer)
    seen = seen_tokens(pair) if way.shared else 2 * triangle(pair.prompt + pair.answer)
    head = 2 * pair.answer if way.answers_only else tokens
    text = size["text"]
    head_products = 2.0 * text["hidden_size"] * text.get("vocab_size", VOCABULARY)
    return {
        "layers": passes * (tokens * layer_products(text) + seen * attention(text)),
        "head": (2 + (not way.cached)) * head * head_products,
        "vision": way.vision * tower(size["vision"], pair.image),
    }


def score(size: Size, pair: Pair, *, shared: bool) -> float:
    """FLOPs of the log-probs of one pair by one model: ours, or LLaMA-Factory's rows."""
    forward = step(size, pair, Way(shared, True, 1 if shared else 2, shared, checkpointing=False))
    return (forward["layers"] + forward["head"]) / 2 + forward["vision"]


def layer_products(text: Mapping[str, Any]) -> float:
    """Of all layers, for one token."""
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    return 2.0 * text["num_hidden_layers"] * hidden * (2 * queries + 2 * keys + 3 * wide)


def attention(text: Mapping[str, Any]) -> float:
    """Of all layers, for one token that one query sees."""
    return 4.0 * text["num_hidden_layers"] * text["num_attention_heads"] * text["head_dim"]


def tower(vision: Mapping[str, Any], image_tokens: int) -> float:
    """Of the vision tower with its mergers, for one image."""
    patches, hidden, wide = (
        PATCHES * image_tokens,
        vision["hidden_size"],
        vision["intermediate_size"],
    )
    layer = patches * 2.0 * (4 * hidden**2 + 2 * hidden * wide) + 4.0 * patches**2 * hidden
    merged = PATCHES * hidden
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    merger = image_tokens * 2.0 * merged * (merged + vision["out_hidden_size"])
    return float(vision["depth"] * layer + mergers * merger)


def triangle(length: int) -> float:
    """Tokens that the queries of a causal row see, all together."""
    return length * (length + 1) / 2


def seen_tokens(pair: Pair) -> float:
    """The same for a row of both answers."""
    return triangle(pair.prompt) + 2 * (pair.answer * pair.prompt + triangle(pair.answer))


def logits_bytes(pairs: int, pair: Pair) -> float:
    """Of the float32 logits of all positions, which LLaMA-Factory makes and casts."""
    return 4.0 * VOCABULARY * pairs * 2 * (pair.prompt + pair.answer)


def parameters(size: Size) -> dict[str, float]:
    """Numbers in the weights: of the ``layers``, of the ``head`` (tied to the embeddings), of the
    ``vision`` tower with its mergers. Norms, biases and position embeddings, 0.1%, are left out."""
    text, vision = size["text"], size["vision"]
    hidden = vision["hidden_size"]
    merged, mergers = PATCHES * hidden, 1 + len(vision["deepstack_visual_indexes"])
    return {
        "layers": layer_products(text) / 2,
        "head": float(text["hidden_size"] * text.get("vocab_size", VOCABULARY)),
        "vision": float(
            vision["depth"] * (4 * hidden**2 + 2 * hidden * vision["intermediate_size"])
            + mergers * merged * (merged + vision["out_hidden_size"])
        ),
    }


def adapter_parameters(size: Size, rank: int) -> float:
    """Of LoRA on every linear layer of the language model: rank · (inputs + outputs) of each."""
    text = size["text"]
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    each = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + wide)
    return float(rank * text["num_hidden_layers"] * each)
