"""Measure whether the tuned model prefers the chosen answers of pairs whose images it never saw.

In: the adapter, the base model, the test pairs, the reference's log-probs and the baseline. Out:
``headline`` (the few numbers that people compare by), ``results/`` (every number, explained in
``evaluation.catalogue``, and the tables behind the plots), ``details/`` (every pair's scores, both
models' answers, what lm-eval's tasks gave, and ``audit.csv``: pairs that contradict each other and
images that look like one of another split).

Why only the tuned model is run here: the base's log-probs and answers are there already.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.answers import controls, lm_eval, off_policy, prompts, task_results
from stages.core import command
from stages.evaluation import catalogue, metrics, paired, shortcuts, slices, statistics
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.pairs.pairs import SPLITS
from stages.params import params


def main(
    formatted_data: Path,
    images: Path,
    model: Path,
    adapter: Path,
    reference: Path,
    baseline: Path,
    task_files: Path,
    headline: Path,
    results: Path,
    details: Path,
) -> dict[str, Any]:
    p = params.load()
    by_split = {split: formatted.read(formatted_data, split) for split in SPLITS}
    pairs, validation = by_split["test"], by_split["validation"]
    tuned = Checkpoint(model, p, adapter)
    probed = lm_eval.run(tuned, task_files, formatted_data, images)
    own = tuned.log_probs(pairs, images, label="tuned")
    controlled = controls.log_probs(tuned, pairs, images, label="tuned")
    asked = prompts.selected(formatted_data, p)
    answers = prompts.answers(tuned, asked, images, label="tuned answers")

    logps = pd.read_parquet(reference / "logps.parquet")
    of_base = dict(iter(pd.read_parquet(baseline / "controls.parquet").groupby("shown")))
    by_way = {
        str(way): metrics.score(
            [pair for pair in pairs if pair["id"] in set(table["id"])],
            table.drop(columns="shown"),
            of_base[way],
            p.train.beta,
        )
        for way, table in controlled.groupby("shown")
    }
    scored = metrics.with_controls(metrics.score(pairs, own, logps, p.train.beta), by_way)
    choosing = {}
    if validation:
        likewise = tuned.log_probs(validation, images, label="tuned validation")
        of_validation = metrics.score(validation, likewise, logps, p.train.beta)
        choosing = metrics.of_validation(of_validation, p.evaluate)
    answered = prompts.beside_each_other(
        asked, pd.read_parquet(baseline / "answers.parquet"), answers
    )
    seen = shortcuts.seen_texts(by_split["train"], pairs)
    scored["text"] = ["as in a training pair" if one else "new" for one in seen]
    scored["in_common"] = [round(shortcuts.in_common(pair), 2) for pair in pairs]
    audit, counts = shortcuts.listed(by_split, images)
    counts["seen_text_pairs"] = sum(seen)
    judged = shortcuts.judges(by_split["train"], pairs)
    beside_own = pd.read_parquet(baseline / "off_policy.parquet")
    measured = (
        metrics.of_pairs(scored, p.evaluate)
        | metrics.of_split(statistics.outcomes(scored["base_margin"]), scored["group"], p.evaluate)
        | metrics.of_length(scored, p.evaluate)
        | metrics.of_shortcuts(judged, counts, scored["group"], p.evaluate)
        | off_policy.figures(beside_own)
        | metrics.of_images(scored, p.evaluate)
        | metrics.of_answers(answered[answered["of"] == "pair"], p.evaluate)
        | metrics.of_questions(answered[answered["of"] == "question"], p.evaluate)
        | choosing
        | paired.of_tasks(task_results.read(baseline / "lm_eval"), probed, p.evaluate)
    )

    for folder in (results, details, headline.parent):
        folder.mkdir(parents=True, exist_ok=True)
    scored.to_parquet(details / "scores.parquet", index=False)
    answered.to_parquet(details / "answers.parquet", index=False)
    task_results.write(probed, details / "lm_eval")
    audit.to_csv(details / "audit.csv", index=False)
    histogram(scored["reward_margin"].to_numpy()).to_csv(results / "margins.csv", index=False)
    off_policy.histogram(beside_own).to_csv(results / "off_policy.csv", index=False)
    slices.table(scored, p.evaluate).to_csv(results / "slices.csv", index=False)
    for path, values in (
        (results / "metrics.json", measured),
        (headline, metrics.headline(measured)),
    ):
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(catalogue.in_words(measured))
    return tuned.cost()


def histogram(margins: np.ndarray, bins: int = 40) -> pd.DataFrame:
    """Number of pairs by reward margin, for the plot; ``margin`` is the middle of a bin.

    About ``bins`` bins of a round width (1, 2 or 5 times a power of ten), of which 0 is an edge, so
    that a bin holds wins or losses.
    """
    spread = max(float(np.ptp(margins)), float(np.abs(margins).max()), 1e-9) / bins
    power = 10.0 ** np.floor(np.log10(spread))
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= spread)
    places = np.floor(margins / width).astype(int)
    present = np.arange(places.min(), places.max() + 1)
    counts = np.bincount(places - places.min(), minlength=len(present))
    middles = [float(f"{(place + 0.5) * width:.6g}") for place in present]
    return pd.DataFrame({"margin": middles, "pairs": counts})


if __name__ == "__main__":
    command.run(main)
