"""Reference: what the frozen base model makes of every pair, computed once.

In: ``data/formatted``, the images, the base model. Out: ``logps.parquet``, both answers' log-probs
for every pair of every split, and nothing else.

Why a stage: the reference never changes while people sweep beta, rank or learning rate, so what it
says is data. DVC keeps it, and every later experiment starts without it.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from stages.core import command
from stages.dataset import formatted
from stages.dataset.pairs import SPLITS
from stages.model.checkpoint import Checkpoint
from stages.parameters import params


def main(formatted_data: Path, images: Path, model: Path, out: Path) -> dict[str, Any]:
    base = Checkpoint(model, params.load())
    tables = [
        base.log_probs(
            formatted.read(formatted_data, split), images, label=f"reference {split}"
        ).assign(split=split)
        for split in SPLITS
    ]
    out.mkdir(parents=True, exist_ok=True)
    pd.concat(tables).to_parquet(out / "logps.parquet", index=False)
    return base.cost()


if __name__ == "__main__":
    command.run(main)
