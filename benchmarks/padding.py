"""The share of padding among the tokens that training forwards: pairs in random order, and in
batches of like lengths (``train.train_sampling_strategy: group_by_length``).

    python -m benchmarks.padding

A batch is as wide as its longest row, rounded up to 8. The demo's lengths are its training pairs'
(after ``dvc repro format``). The others are drawn: answers of 60 to 300 tokens around 120, rejected
within 20% of chosen, questions of 15 to 45; topic-overwrite itself was not seen.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from stages.core import command
from stages.model import formatted, tokens
from stages.params import params

FORMATTED, IMAGES, MODEL = Path("data/formatted"), Path("data/pairs/images"), Path("models/base")
MICRO_BATCHES, STEP = (1, 2, 8, 16), 8  # pairs a forward; pairs a step, at least


def main(pairs: int = 20_000) -> None:
    drawn = np.random.default_rng(1)
    sets = {
        "234 to 256 image tokens (4B preset)": drawn.integers(234, 257, pairs),
        "256 to 1,024 image tokens": drawn.integers(256, 1025, pairs),
    }
    for name, images in sets.items():
        chosen = np.clip(drawn.lognormal(np.log(120), 0.45, pairs), 60, 300)
        rejected = np.clip(chosen * drawn.normal(1, 0.2, pairs), 60, 300)
        question = drawn.integers(15, 45, pairs)
        sets[name] = images + question + (chosen + rejected).astype(int)
    if FORMATTED.is_dir():
        sets["the demo"] = of_the_demo()
    print("| rows | tokens of a row | pairs a forward | random | like lengths | fewer tokens |")
    print("|---|---|---|---|---|---|")
    for name, rows in sets.items():
        for micro in MICRO_BATCHES:
            random, grouped = (
                forwarded(rows, order, micro) for order in orders(rows.tolist(), max(STEP, micro))
            )
            print(
                f"| {name} | {rows.min():,} to {rows.max():,} | {micro} "
                f"| {1 - rows.sum() / random:.0%} | {1 - rows.sum() / grouped:.0%} "
                f"| {1 - grouped / random:.0%} |"
            )


def orders(rows: list[int], step: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the rows at random, and as transformers groups them."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(0)
    random = torch.randperm(len(rows), generator=generator).numpy()
    return random, np.array(get_length_grouped_indices(rows, step, generator=generator))


def forwarded(rows: np.ndarray, order: np.ndarray, micro: int) -> int:
    """Tokens of all batches, padding included."""
    batches = [rows[order[start : start + micro]] for start in range(0, len(rows), micro)]
    return sum(len(batch) * (-(-int(batch.max()) // 8) * 8) for batch in batches)


def of_the_demo() -> np.ndarray:
    """Tokens of each training pair's row."""
    p = params.load(Path("params/demo.yaml"))
    rows = formatted.read(FORMATTED, "train")
    sizes = [[Image.open(IMAGES / name).size for name in row["images"]] for row in rows]
    counted = tokens.count(tokens.load(MODEL, p), rows, sizes)
    return np.array([each.prompt + each.chosen + each.rejected for each in counted])


if __name__ == "__main__":
    command.run(main)
