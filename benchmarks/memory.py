"""What a training holds on a GPU, by arithmetic, in GB of 10⁹ bytes.

    python -m benchmarks.memory

Counted are weights, LoRA adapters with AdamW, what gradient checkpointing keeps, one layer that is
computed again, and the head's logits. Not counted are the CUDA context and what the allocator
leaves idle, 1 to 3 GB together; leave room for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.flops import DEFAULT, GIGA, Pair
from benchmarks.throughput import SIZES, VOCABULARY
from stages.core import command
from stages.model.prefix import CHUNK

# Qwen3-VL-4B-Instruct; of these the embedding, tied to the head, and the vision tower stay in
# bfloat16 when the base is quantised.
PARAMETERS, VISION, EMBEDDING = 4_437_815_808, 415_347_712, VOCABULARY * 2560


@dataclass(frozen=True)
class Preset:
    """What decides: bits of a base weight, pairs in a batch, whether prompts are shared."""

    bits: int = 16
    batch: int = 2
    shared: bool = True
    gpus: int = 1


PRESETS = {
    "`qwen3-vl-4b`": Preset(),
    "`qwen3-vl-4b`, LLaMA-Factory's way": Preset(shared=False),
    "`qwen3-vl-4b-24gb`": Preset(bits=4, batch=1),
    "`qwen3-vl-4b-8gpu`, each GPU": Preset(gpus=8),
}


def adapter_parameters(text: Mapping[str, Any], rank: int = 8) -> int:
    """Of LoRA on every linear layer of the language model: rank · (inputs + outputs) each."""
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    both_ways = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + wide)
    return int(rank * both_ways * text["num_hidden_layers"])


def training(preset: Preset, pair: Pair = DEFAULT) -> dict[str, float]:
    """Bytes on one GPU: ``weights``, ``adapter``, ``kept``, ``layer``, ``logits``."""
    text = SIZES["4b"]["text"]
    hidden, wide = text["hidden_size"], text["intermediate_size"]
    tokens = preset.batch * (
        pair.prompt + 2 * pair.answer if preset.shared else 2 * (pair.prompt + pair.answer)
    )
    dense = VISION + EMBEDDING
    weights = 2.0 * PARAMETERS
    if preset.bits < 16:  # with half a byte for each 64 weights' scale
        weights = 2.0 * dense + (PARAMETERS - dense) * (preset.bits / 8 + 0.5 / 64)
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    # In bfloat16: inputs of the norms and products, queries, keys, values, both halves of the MLP.
    inside = 2.0 * tokens * (6 * hidden + 2 * queries + 2 * keys + 4 * wide)
    # LLaMA-Factory casts the logits of all positions to float32 and holds three of that size
    # (logits, log-softmax, gradient); ours takes the same three of a chunk of answer tokens.
    at_once = min(CHUNK, 2 * preset.batch * pair.answer) if preset.shared else tokens
    return {
        "weights": weights,
        # Weight, gradient and Adam's two moments in float32.
        "adapter": 16.0 * adapter_parameters(text),
        "kept": 2.0 * tokens * hidden * text["num_hidden_layers"],
        "layer": 2 * inside,  # with its gradients
        "logits": 3 * 4.0 * VOCABULARY * at_once,
    }


def table() -> str:
    names = ("weights", "adapter, AdamW", "checkpoints", "one layer", "logits", "together")
    lines = [f"| preset, GB | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, preset in PRESETS.items():
        parts = list(training(preset).values())
        shown = " | ".join(f"{part / GIGA:.1f}" for part in [*parts, sum(parts)])
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    print(table(), end="")


if __name__ == "__main__":
    command.run(main)
