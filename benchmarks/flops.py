"""How many floating-point operations a training step on one pair takes.

    python -m benchmarks.flops
    python -m benchmarks.flops --image-tokens 1024 --answer-tokens 240

A product of (m, k) and (k, n) counts 2mkn. Attention counts what is seen, not what a kernel masks
out. Norms, activations, the optimizer and LoRA's own products (below 1% at rank 8) are left out.
Weights are frozen, so backward costs what forward does: it only goes to the activations. With
gradient checkpointing the layers, not the head, are computed once more. ``make plan`` has simpler
arithmetic (``stages.commands.plan``), which a test holds against this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.throughput import SIZES
from stages.commands.plan import TERA
from stages.commands.planning.dimensions import GIGA, PATCHES, VOCABULARY, Pair, Size
from stages.core import command

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
    seen = 2 * triangle(pair.prompt + pair.answer)
    if way.shared:  # rejected sees the prompt too, and not chosen
        seen -= triangle(pair.prompt)
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


def logits_bytes(pairs: int, pair: Pair) -> float:
    """Of the float32 logits of all positions, which LLaMA-Factory makes and casts."""
    return 4.0 * VOCABULARY * pairs * 2 * (pair.prompt + pair.answer)


WAYS = {
    "LLaMA-Factory": Way(shared=False, cached=False, vision=4, answers_only=False),
    "reference cached": Way(shared=False, cached=True, vision=2, answers_only=False),
    "… and each image seen once": Way(shared=False, cached=True, vision=1, answers_only=False),
    "… and the prompt shared": Way(shared=True, cached=True, vision=1, answers_only=False),
    "… and the head on answer tokens alone (ours)": Way(
        shared=True, cached=True, vision=1, answers_only=True
    ),
    "ours, reference computed in each step": Way(
        shared=True, cached=False, vision=2, answers_only=True
    ),
    "ours, without checkpointing": Way(
        shared=True, cached=True, vision=1, answers_only=True, checkpointing=False
    ),
}


def table(size: str = "4b", pair: Pair = DEFAULT) -> str:
    """A training step on one pair, as a Markdown table in TFLOP."""
    lines = ["| a training step on one pair | TFLOP | layers | head | vision |"]
    lines.append("|---|---|---|---|---|")
    for name, way in WAYS.items():
        parts = step(SIZES[size], pair, way)
        shown = " | ".join(f"{part / TERA:.2f}" for part in parts.values())
        lines.append(f"| {name} | {sum(parts.values()) / TERA:.1f} | {shown} |")
    return "\n".join(lines) + "\n"


def main(
    size: str = "4b", image_tokens: int = 256, question_tokens: int = 40, answer_tokens: int = 120
) -> None:
    pair = Pair(image_tokens, question_tokens, answer_tokens)
    print(table(size, pair))
    stock, ours = (score(SIZES[size], pair, shared=shared) for shared in (False, True))
    print(
        f"scoring one pair by one model: {stock / TERA:.2f} TFLOP in two rows, "
        f"{ours / TERA:.2f} in one\n"
        f"tokens of a pair: {2 * (pair.prompt + pair.answer)} in two rows, "
        f"{pair.prompt + 2 * pair.answer} in one\n"
        f"float32 logits of all positions of two pairs: {logits_bytes(2, pair) / GIGA:.2f} GB a "
        "copy"
    )


if __name__ == "__main__":
    command.run(main)
