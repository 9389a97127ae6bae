"""Compute the frozen base model's log-probs of every pair, once for all experiments.

In: ``data/formatted``, the images, the base model. Out: ``logps.parquet``, both answers' log-probs
for every pair of every split, and ``made_with.json``, all that decides them.

Why a stage: the reference never changes while people sweep beta, rank or learning rate, so what it
says is data. DVC keeps it, every later experiment starts without it, and training looks it up.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from stages.core import command, console
from stages.model import formatted, reference_logps
from stages.model.checkpoint import Checkpoint
from stages.pairs.pairs import SPLITS
from stages.params import params


def main(formatted_data: Path, images: Path, model: Path, out: Path) -> dict[str, Any]:
    p = params.load()
    base = Checkpoint(model, p)
    pairs = {split: formatted.read(formatted_data, split) for split in SPLITS}
    with console.bar(sum(map(len, pairs.values())), "reference", "pairs"):
        tables = [
            base.log_probs(rows, images, label=f"reference {split}").assign(split=split)
            for split, rows in pairs.items()
            if rows
        ]
    made = reference_logps.made_with(model, p, dtype=p.scoring.dtype)
    reference_logps.write(out, pd.concat(tables), made)
    return base.cost()


if __name__ == "__main__":
    command.run(main)
