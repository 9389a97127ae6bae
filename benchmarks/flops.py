"""How many floating-point operations and bytes a training step on one pair takes, by arithmetic.

    python -m benchmarks.flops
    python -m benchmarks.flops --image-tokens 1024 --answer-tokens 240

What is counted is said in ``stages.commands.flops``.
"""

from benchmarks.throughput import SIZES
from stages.commands.flops import DEFAULT, GIGA, TERA, Pair, Way, logits_bytes, score, step
from stages.core import command

WAYS = {
    "LLaMA-Factory": Way(shared=False, cached=False, vision=4, answers_only=False),
    "reference cached": Way(shared=False, cached=True, vision=2, answers_only=False),
    "… and each image seen once": Way(shared=False, cached=True, vision=1, answers_only=False),
    "… and the prompt shared": Way(shared=True, cached=True, vision=1, answers_only=False),
    "… and the head on answer tokens alone (ours)": Way(
        shared=True, cached=True, vision=1, answers_only=True
    ),
    "… and vision features kept (train.keep_vision_features)": Way(
        shared=True, cached=True, vision=0, answers_only=True
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
