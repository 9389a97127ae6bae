"""Reference: what the frozen base model says of every pair, computed once.

In: ``data/formatted``, the images, the base model. Out: ``logps.parquet`` (both answers' log-probs
for every pair of every split, and for a sample of test pairs with other images),
``answers.parquet`` (greedy answers to the evaluation's prompts), ``lm_eval/`` (what lm-eval's tasks
gave).

Why a stage: the reference never changes while people sweep beta, rank or learning rate, so what it
says is data. DVC keeps it, and every later experiment starts without it.
"""

import time
from pathlib import Path
from typing import Any

import pandas as pd

from stages import command, controls, formatted, params, prompts, scoring, tasks
from stages.pairs import SPLITS


def main(
    formatted_data: Path, images: Path, model: Path, task_files: Path, out: Path
) -> dict[str, Any]:
    p = params.load()
    tasks.check(p.evaluate.lm_eval, task_files)
    policy = scoring.load(model, p)
    # First what can fail: lm-eval downloads the data sets of its tasks.
    probed = tasks.run(policy, p, task_files, formatted_data, images)

    by_split = {split: formatted.read(formatted_data, split) for split in SPLITS}
    tables, start = [], time.monotonic()
    for split, pairs in by_split.items():
        logps = scoring.log_probs(
            policy, pairs, images, batch_size=p.scoring.batch_size, label=f"reference {split}"
        )
        tables.append(scoring.to_table(pairs, logps).assign(split=split, shown="own"))
    rate = sum(map(len, by_split.values())) / (time.monotonic() - start)
    controlled = controls.log_probs(policy, by_split["test"], images, p, label="reference")
    tables.append(controlled.assign(split="test"))
    asked = prompts.chosen(formatted_data, p)
    answers = prompts.answers(policy, asked, images, p, label="base answers")

    out.mkdir(parents=True, exist_ok=True)
    pd.concat(tables).to_parquet(out / "logps.parquet", index=False)
    answers.to_parquet(out / "answers.parquet", index=False)
    tasks.write(probed, out / "lm_eval")
    return {"device": scoring.device_name(policy), "pairs_per_second": round(rate, 2)}


if __name__ == "__main__":
    command.run(main)
