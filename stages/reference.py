"""Reference: what the frozen base model says of every pair, computed once.

In: ``data/formatted``, the images, the base model. Out: ``logps.parquet`` (both answers' log-probs
for every pair of every split) and ``answers.parquet`` (greedy answers to the evaluation's prompts).

Why a stage: the reference never changes while people sweep beta, rank or learning rate, so what it
says is data. DVC keeps it, and every later experiment starts without it.
"""

from pathlib import Path

import pandas as pd

from stages import command, formatted, params, prompts, scoring
from stages.pairs import SPLITS


def main(formatted_data: Path, images: Path, model: Path, out: Path) -> None:
    p = params.load()
    policy = scoring.load(model, p)
    tables = []
    for split in SPLITS:
        pairs = formatted.read(formatted_data, split)
        logps = scoring.log_probs(
            policy, pairs, images, batch_size=p.scoring.batch_size, label=f"reference {split}"
        )
        tables.append(scoring.to_table(pairs, logps).assign(split=split))
    asked = prompts.chosen(formatted_data, p)
    answers = prompts.answers(policy, asked, images, p, label="base answers")

    out.mkdir(parents=True, exist_ok=True)
    pd.concat(tables).to_parquet(out / "logps.parquet", index=False)
    answers.to_parquet(out / "answers.parquet", index=False)


if __name__ == "__main__":
    command.run(main)
