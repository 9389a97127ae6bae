"""Evaluate: does the tuned model prefer the chosen answers of pairs whose images it never saw?

In: the adapter, the base model, the test pairs, and what the reference says of them. Out:
``metrics.json`` (keys explained in ``stages.metrics``), every pair's scores, both models' answers,
the tables behind the plots, what lm-eval's tasks gave; and the experiment's MLflow run, completed.

Why only the policy is run here: the reference stage already ran the base model on the same tokens.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages import (
    command,
    controls,
    formatted,
    params,
    prompts,
    regression,
    scoring,
    slices,
    tasks,
    tracking,
)
from stages import metrics as measures
from stages.errors import UserError
from stages.pairs import SPLITS


def main(
    formatted_data: Path,
    images: Path,
    model: Path,
    adapter: Path,
    reference: Path,
    curves: Path,
    task_files: Path,
    metrics: Path,
    scores: Path,
    answers: Path,
    lm_eval: Path,
    margins: Path,
    by_slice: Path,
) -> dict[str, Any]:
    p = params.load()
    pairs = formatted.read(formatted_data, "test")
    tasks.check(p.evaluate.lm_eval, task_files)
    policy = scoring.load(model, p, adapter)
    probed = tasks.run(policy, p, task_files, formatted_data, images)
    start = time.monotonic()
    logps = scoring.log_probs(policy, pairs, images, batch_size=p.scoring.batch_size, label="tuned")
    rate = len(pairs) / (time.monotonic() - start)
    own = scoring.to_table(pairs, logps).assign(shown="own")
    controlled = controls.log_probs(policy, pairs, images, p, label="tuned")
    asked = prompts.chosen(formatted_data, p)
    tuned = prompts.answers(policy, asked, images, p, label="tuned answers")

    scored = against_reference(pairs, pd.concat([own, controlled]), reference, p.train.beta)
    answered = prompts.beside_each_other(
        asked, pd.read_parquet(reference / "answers.parquet"), tuned
    )
    result = (
        measures.of_pairs(scored, p.evaluate)
        | measures.of_length(scored, p.evaluate)
        | measures.of_images(scored, p.evaluate)
        | measures.of_answers(answered[answered["of"] == "pair"], p.evaluate)
        | measures.of_questions(answered[answered["of"] == "question"], p.evaluate)
        | regression.comparison(tasks.read(reference / "lm_eval"), probed, p.evaluate)
    )

    scored.to_parquet(made(scores), index=False)
    answered.to_parquet(made(answers), index=False)
    tasks.write(probed, lm_eval)
    histogram(scored["reward_margin"].to_numpy()).to_csv(made(margins), index=False)
    slices.table(scored, p.evaluate).to_csv(made(by_slice), index=False)
    made(metrics).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(measures.in_words(result))

    tracking.complete_run(
        json.loads((adapter / "fingerprint.json").read_text())["fingerprint"],
        tracking.RunRecord(
            name=tracking.experiment_name(),
            parameters=p.model_dump(mode="json"),
            metrics=result,
            curves=curves,
            tags=tracking.provenance(),
            artifacts=(
                *(metrics, scores, answers, lm_eval, margins, by_slice, curves),
                adapter / "llamafactory.yaml",
            ),
            datasets=tuple(dataset(formatted_data / f"{split}.json") for split in SPLITS),
        ),
    )
    return {"device": scoring.device_name(policy), "pairs_per_second": round(rate, 2)}


def against_reference(
    pairs: list[dict[str, Any]], policy: pd.DataFrame, reference: Path, beta: float
) -> pd.DataFrame:
    """Scores of the pairs, with the margins that they have when another image is ``shown``.

    Raises:
        UserError: the tuned model's log-probs are not numbers, or the reference was not shown the
            same pairs in the same ways.
    """
    broken = policy[~np.isfinite(policy[["chosen_logps", "rejected_logps"]]).all(axis=1)]
    if len(broken):
        raise UserError(
            f"the tuned model gives log-probs that are not finite for {len(broken)} pairs (first: "
            f"{broken['id'].iloc[0]}); lower train.learning_rate, or set scoring.dtype to float32"
        )
    known = pd.read_parquet(reference / "logps.parquet")
    by_way = {}
    try:
        for way, logps in policy.groupby("shown"):
            table = logps.drop(columns="shown")
            ids = set(table["id"])
            those = [pair for pair in pairs if pair["id"] in ids]
            by_way[str(way)] = measures.score(those, table, known[known["shown"] == way], beta)
    except ValueError as error:
        raise UserError(f"{error}; `dvc repro -f reference` makes {reference} anew") from None
    return measures.with_controls(by_way.pop("own"), by_way)


def made(path: Path) -> Path:
    """The path, in a folder that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def dataset(path: Path) -> tracking.Dataset:
    """A file of the formatted data set as MLflow shows it, by the md5 that DVC knows it by."""
    return tracking.Dataset(path.stem, hashlib.md5(path.read_bytes()).hexdigest(), str(path))


def histogram(margins: np.ndarray, bins: int = 40) -> pd.DataFrame:
    """Number of pairs by reward margin, for the plot; ``margin`` is the middle of a bin.

    About ``bins`` bins of a round width (1, 2 or 5 times a power of ten), of which 0 is an edge, so
    that a bin holds wins or losses, and the bins of similar experiments lie on each other. A margin
    on an edge counts above it.
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
