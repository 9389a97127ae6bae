"""A training step by each way to attend, as a training on a GPU chooses (stages.tuning.attention).

    python -m benchmarks.attention --size 4b --device-name cuda --dtype bfloat16 --image-tokens 1024

Random weights, one row for both answers, no reference. A way that fails, or that gives other
log-probs than sdpa, has no figure.
"""

import math
import tempfile
from pathlib import Path

from benchmarks.pipeline import stack
from benchmarks.throughput import SIZES, make_model, make_pairs
from benchmarks.train import QUESTION, encode, side_of, trainers
from stages.core import command
from stages.tuning import attention


def main(
    size: str = "100m",
    device_name: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 2,
    image_tokens: int = 256,
    answer_tokens: int = 120,
    repeats: int = 3,
    model: str = "",
) -> None:
    from stages.tuning.trainer import TOLERANCE

    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(model or folder, "model")
        make_model(model_dir, SIZES[size], device_name, dtype)
        stock, ours, *_ = trainers(
            model_dir, Path(folder, "output"), image_tokens, device_name, dtype
        )
        rows = make_pairs(
            Path(folder), ours.processing_class, batch_size, answer_tokens, side_of(image_tokens)
        )
        for row in rows:
            row["messages"][0]["content"] = QUESTION
        features = encode(stock, rows, Path(folder))
        batch = ours._prepare_inputs(ours.data_collator(features))
        attention.STEPS = repeats
        nats = 12 * answer_tokens  # of an answer, as the weights are random: ln 151,936 a token
        seconds = attention.measured(ours, batch, TOLERANCE[dtype] * nats)
    print(
        f"\n{stack()}\n{batch_size} pairs a step, rows of {batch['input_ids'].shape[1]} tokens\n\n"
        "| way to attend | pairs/s |\n|---|---|"
    )
    for way, taken in seconds.items():
        print(f"| {way} | {f'{batch_size / taken:.3f}' if taken < math.inf else 'none'} |")


if __name__ == "__main__":
    command.run(main)
