"""Evaluate: does the tuned model prefer the chosen answers of pairs whose images it never saw?

In: the adapter, the base model, the test pairs, and what the reference says of them. Out:
``metrics.json`` (keys explained in ``stages.metrics``), every pair's scores, both models' answers,
the distribution of margins; and the experiment's MLflow run, completed.

Why only the policy is run here: the reference stage already ran the base model on the same tokens.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from stages import command, formatted, params, prompts, scoring, tracking
from stages import metrics as measures
from stages.errors import UserError
from stages.pairs import SPLITS
from stages.topics import is_correct


def main(
    formatted_data: Path,
    images: Path,
    model: Path,
    adapter: Path,
    reference: Path,
    curves: Path,
    metrics: Path,
    scores: Path,
    answers: Path,
    margins: Path,
) -> None:
    p = params.load()
    pairs = formatted.read(formatted_data, "test")
    policy = scoring.load(model, p, adapter)
    logps = scoring.log_probs(policy, pairs, images, batch_size=p.scoring.batch_size, label="tuned")
    asked = prompts.chosen(formatted_data, p)
    tuned = prompts.answers(policy, asked, images, p, label="tuned answers")

    try:
        scored = measures.score(
            pairs,
            scoring.to_table(pairs, logps),
            pd.read_parquet(reference / "logps.parquet"),
            p.train.beta,
        )
    except ValueError as error:
        raise UserError(f"{error}; `dvc repro reference` makes {reference} anew") from None
    side_by_side = beside_each_other(asked, pd.read_parquet(reference / "answers.parquet"), tuned)
    result = measures.of_pairs(scored, p.evaluate) | measures.of_questions(
        side_by_side[side_by_side["of"] == "question"], p.evaluate
    )

    for path in (metrics, scores, answers, margins):
        path.parent.mkdir(parents=True, exist_ok=True)
    scored.to_parquet(scores, index=False)
    side_by_side.to_parquet(answers, index=False)
    histogram(scored["reward_margin"].to_numpy()).to_csv(margins, index=False)
    metrics.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(measures.in_words(result))

    tracking.complete_run(
        json.loads((adapter / "fingerprint.json").read_text())["fingerprint"],
        tracking.RunRecord(
            name=tracking.experiment_name(),
            parameters=p.model_dump(mode="json"),
            metrics=result,
            curves=curves,
            tags=tracking.provenance(),
            artifacts=(metrics, scores, answers, margins, curves, adapter / "llamafactory.yaml"),
            datasets=tuple(dataset(formatted_data / f"{split}.json") for split in SPLITS),
        ),
    )


def beside_each_other(
    asked: prompts.Prompts, base: pd.DataFrame, tuned: pd.DataFrame
) -> pd.DataFrame:
    """One row a prompt: what was asked, both answers, and whether each is right where that is
    known.

    Raises:
        UserError: base and tuned did not answer the same prompts.
    """
    rows = [
        {
            "id": row["id"],
            "of": of,
            "image": row["images"][0],
            "kind": row["kind"],
            "question": row["messages"][0]["content"].removeprefix(formatted.IMAGE_PLACEHOLDER),
            "truth": row.get("answer"),
        }
        for of, asked_rows in (("pair", asked.pairs), ("question", asked.questions))
        for row in asked_rows
    ]
    table = pd.DataFrame(rows, columns=["id", "of", "image", "kind", "question", "truth"])
    asked_for = set(map(tuple, table[["id", "of"]].to_numpy()))
    for name, given in (("base", base), ("tuned", tuned)):
        if set(map(tuple, given[["id", "of"]].to_numpy())) != asked_for:
            raise UserError(
                f"the {name} model answered other prompts; `dvc repro -f reference` answers anew"
            )
        table = table.merge(
            given.rename(columns={"answer": f"{name}_answer"}), on=["id", "of"], validate="1:1"
        )
        table[f"{name}_correct"] = [
            None if truth is None else is_correct(question, truth, answer)
            for question, truth, answer in zip(
                table["question"], table["truth"], table[f"{name}_answer"], strict=True
            )
        ]
    return table


def dataset(path: Path) -> tracking.Dataset:
    """A file of the formatted data set as MLflow shows it, by the md5 that DVC knows it by."""
    return tracking.Dataset(path.stem, hashlib.md5(path.read_bytes()).hexdigest(), str(path))


def histogram(margins: np.ndarray, bins: int = 40) -> pd.DataFrame:
    """Number of pairs by reward margin, for the plot; ``margin`` is the middle of a bin."""
    counts, edges = np.histogram(margins, bins=bins)
    return pd.DataFrame({"margin": ((edges[:-1] + edges[1:]) / 2).round(4), "pairs": counts})


if __name__ == "__main__":
    command.run(main)
