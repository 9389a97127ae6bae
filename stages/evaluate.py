"""Measure whether the tuned model prefers the chosen answers of pairs whose images it never saw.

In: the adapter, the base model, the test pairs, the reference's log-probs and the baseline. Out:
``headline`` (the few numbers that people compare by), ``results/`` (every number, explained in
``evaluation.catalogue``, and the tables behind the plots), ``details/`` (every pair's scores, both
models' answers, what lm-eval's tasks gave, and ``audit.csv``: pairs that contradict each other and
images that look like one of another split).

Why only the tuned model is run here: the base's log-probs and answers are there already.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.answers import controls, lm_eval, off_policy, prompts, task_results
from stages.core import command
from stages.evaluation import catalogue, metrics, paired, shortcuts, slices
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.pairs.pairs import SPLITS
from stages.params import params

SEEN = "as in a training pair"  # the text of a test pair; else it is new


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
    pairs = {split: formatted.read(formatted_data, split) for split in SPLITS}
    tuned = Checkpoint(model, p, adapter)
    # First what can fail: lm-eval downloads the data sets of its tasks.
    tasks = lm_eval.run(tuned, task_files, formatted_data, images)
    scores = scored(tuned, pairs, images, reference, baseline)
    answers = answered(tuned, formatted_data, images, baseline)
    audit, counts = shortcuts.listed(pairs, images)

    test, settings = scores["test"], p.evaluate
    judged = shortcuts.judges(pairs["train"], pairs["test"])
    counts["seen_text_pairs"] = int((test["text"] == SEEN).sum())
    beside_own = pd.read_parquet(baseline / "off_policy.parquet")
    measured = (
        metrics.of_pairs(test, settings)
        | metrics.of_split(test, settings)
        | metrics.of_length(test, settings)
        | metrics.of_shortcuts(judged, counts, test["group"], settings)
        | off_policy.figures(beside_own)
        | metrics.of_images(test, settings)
        | metrics.of_answers(answers[answers["of"] == "pair"], settings)
        | metrics.of_questions(answers[answers["of"] == "question"], settings)
        | metrics.of_validation(scores.get("validation"), settings)
        | paired.of_tasks(task_results.read(baseline / "lm_eval"), tasks, settings)
    )

    for folder in (results, details, headline.parent):
        folder.mkdir(parents=True, exist_ok=True)
    test.to_parquet(details / "scores.parquet", index=False)
    answers.to_parquet(details / "answers.parquet", index=False)
    task_results.write(tasks, details / "lm_eval")
    audit.to_csv(details / "audit.csv", index=False)
    histogram(test["reward_margin"].to_numpy()).to_csv(results / "margins.csv", index=False)
    beside_own.round(4).to_csv(results / "off_policy.csv", index=False)
    slices.table(test, settings).to_csv(results / "slices.csv", index=False)
    write_json(results / "metrics.json", measured)
    write_json(headline, metrics.headline(measured))
    print(catalogue.in_words(measured))
    return tuned.cost()


def scored(
    tuned: Checkpoint,
    pairs: Mapping[str, Sequence[dict[str, Any]]],
    images: Path,
    reference: Path,
    baseline: Path,
) -> dict[str, pd.DataFrame]:
    """``metrics.score`` of the test pairs and of the validation pairs, if there are any. Those of
    the test pairs have the controls too, whether their ``text`` is that of a training pair, and
    what both answers have ``in_common``.
    """
    of_base, beta = pd.read_parquet(reference / "logps.parquet"), tuned.p.train.beta
    scores = {
        split: metrics.score(
            rows, tuned.log_probs(rows, images, label=f"tuned {split}"), of_base, beta
        )
        for split, rows in pairs.items()
        if rows and split != "train"
    }
    controlled = controls.log_probs(tuned, pairs["test"], images, label="tuned")
    of_base_by_way = dict(iter(pd.read_parquet(baseline / "controls.parquet").groupby("shown")))
    by_way = {
        str(way): metrics.score(
            [pair for pair in pairs["test"] if pair["id"] in set(table["id"])],
            table.drop(columns="shown"),
            of_base_by_way[way],
            beta,
        )
        for way, table in controlled.groupby("shown")
    }
    seen = shortcuts.seen_texts(pairs["train"], pairs["test"])
    scores["test"] = metrics.with_controls(scores["test"], by_way)
    scores["test"]["text"] = [SEEN if one else "new" for one in seen]
    shared = map(shortcuts.in_common, pairs["test"])
    scores["test"]["in_common"] = [round(share, 2) for share in shared]
    return scores


def answered(tuned: Checkpoint, formatted_data: Path, images: Path, baseline: Path) -> pd.DataFrame:
    """Both models' answers side by side: to a sample of the test pairs, and to the questions."""
    asked = prompts.selected(formatted_data, tuned.p)
    of_base = pd.read_parquet(baseline / "answers.parquet")
    of_tuned = prompts.answers(tuned, asked, images, label="tuned answers")
    return prompts.beside_each_other(asked, of_base, of_tuned)


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


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
