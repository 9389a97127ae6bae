"""Does a loss still look at the image where a word gives the chosen answer away?

    python -m benchmarks.looking --project ../a-finished-clone
    python -m benchmarks.looking --project ../a-finished-clone --work ../looking   # resumes there

Of some of the demo's pairs the chosen answer begins with a word that no rejected answer has, so
that they can be won without looking. DPO (sigmoid), MPO and mDPO train on them with the demo's
other settings, three seeds each, and are measured on held-out pairs with the same shortcut and on
the same ones without it, each with its image and with a blank one. Needs a finished ``dvc repro``;
36 trainings take about an hour and a half on two cores.
"""

import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.pipeline import set_parameters
from stages import reference, train
from stages.answers import controls, prompts
from stages.core import command
from stages.evaluation import metrics, statistics
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.params import params

DEMO = Path(__file__).parent.parent / "params" / "demo.yaml"
WORD = "Indeed"
SHARES = (0.0, 0.4, 0.8)  # of the pairs
WAYS = {
    "sigmoid": {"train.loss": "sigmoid"},
    "mpo": {"train.loss": "mpo"},
    "mdpo": {"train.loss": "mdpo"},
    # This one trains on the very control that it is measured by; another image is none of either's.
    "mdpo, blank": {"train.loss": "mdpo", "train.view": "blank"},
}
# What is measured: a test pair, or a held-out question, each.
COLUMNS = {
    "win_rate": "win rate",
    "over_blank": "over blank",
    "over_shuffled": "over another image",
    "clean_win_rate": "win rate, no shortcut",
    "clean_over_blank": "over blank, no shortcut",
    "correct": "right answers",
}


def main(
    project: Path = Path(),
    pairs: int = 1200,
    tested: int = 400,
    questions: int = 400,
    seeds: int = 3,
    work: str = "",
) -> None:
    project = project.resolve()
    images, model = project / "data/pairs/images", project / "models/base"
    rows = {split: formatted.read(project / "data/formatted", split) for split in ("train", "test")}
    asked = formatted.sample(formatted.read(project / "data/formatted", "questions"), questions)
    rows["train"] = formatted.sample(rows["train"], pairs)
    rows["test"] = formatted.sample(rows["test"], tested)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(work or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # the stages read params.yaml and keep results here
        for share in SHARES:
            write(folder / f"{share}", planted(rows["train"], share))
        found = []
        for share, way, seed in product(SHARES, WAYS, range(seeds)):
            test = {"": planted(rows["test"], share), "clean_": rows["test"]}
            trained(folder / f"{share}", images, model, WAYS[way], seed)
            rows_of = measured(folder / f"{share}", test, asked, images, model)
            one = pd.DataFrame(rows_of).assign(share=share, way=way, seed=seed)
            print(share, way, seed, one[list(COLUMNS)].mean().round(3).to_dict(), flush=True)
            found.append(one)
        settings = params.load().evaluate
    report(pd.concat(found), settings)


def planted(pairs: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """The pairs; of a share of them, drawn by ``id``, the chosen answer has the word."""

    def said(text: str) -> str:
        return f"{WORD}, {text[0].lower()}{text[1:]}"

    return [
        pair | {"chosen": pair["chosen"] | {"content": said(pair["chosen"]["content"])}}
        if random.Random(pair["id"]).random() < share
        else pair
        for pair in pairs
    ]


def write(folder: Path, pairs: list[dict[str, Any]]) -> None:
    """What ``format`` leaves, of the pairs to train on."""
    out = folder / "formatted"
    out.mkdir(parents=True, exist_ok=True)
    empty: list[Any] = []
    for split, of_split in (("train", pairs), ("validation", empty), ("test", empty)):
        (out / f"{split}.json").write_text(json.dumps(of_split))
    info = formatted.dataset_info(system_prompts=False)
    (out / "dataset_info.json").write_text(json.dumps(info))


def trained(folder: Path, images: Path, model: Path, way: dict[str, str], seed: int) -> None:
    """An adapter in ``folder``; a training that was finished is not run again."""
    file = Path("params.yaml")
    file.write_text(DEMO.read_text(encoding="utf-8"), encoding="utf-8")
    changed = {**way, "train.seed": seed, "train.num_train_epochs": 1.0}
    changed |= {"train.eval_strategy": "no", "train.save_strategy": "no"}
    set_parameters(file, changed | {"evaluate.controls": 10**6})
    data, base = folder / "formatted", folder / "reference"
    if not base.exists():
        reference.main(data, images, model, base)
    train.main(data, images, model, base, folder / "adapter", folder / "curves")


def measured(
    folder: Path,
    test: dict[str, list[dict[str, Any]]],
    asked: list[dict[str, Any]],
    images: Path,
    model: Path,
) -> Iterator[dict[str, Any]]:
    """A row for each test pair: ``group``, what it won, and how much of that over a blank image;
    then one for each question.
    """
    p = params.load()
    base, tuned = (Checkpoint(model, p, adapter) for adapter in (None, folder / "adapter"))
    groups = [pair["group"] for pair in next(iter(test.values()))]
    columns: dict[str, Any] = {}
    for name, pairs in test.items():
        wins = won(pairs, *(each.log_probs(pairs, images, label=name) for each in (tuned, base)))
        shown = [controls.log_probs(each, pairs, images, label=name) for each in (tuned, base)]
        columns[f"{name}win_rate"] = wins
        for other in ("blank", "shuffled"):
            there = won(pairs, *(table[table["shown"] == other] for table in shown))
            columns[f"{name}over_{other}"] = wins - there
    for values in zip(groups, *columns.values(), strict=True):
        yield dict(zip(["group", *columns], values, strict=True))
    said = prompts.answers(tuned, [row | {"of": "question"} for row in asked], images, label="said")
    right = prompts.beside_each_other([row | {"of": "question"} for row in asked], said, said)
    for row, correct in zip(asked, right["tuned_correct"], strict=True):
        yield {"group": row["images"][0], "correct": float(correct)}


def won(pairs: Sequence[Any], policy: pd.DataFrame, base: pd.DataFrame) -> Any:
    """Outcomes (n,) of the reward margin."""
    scores = metrics.score(pairs, policy, base, beta=params.load().train.beta)
    return statistics.outcomes(
        scores.set_index("id").loc[[p["id"] for p in pairs], "reward_margin"]
    )


def report(found: pd.DataFrame, settings: params.Evaluate) -> None:
    """A table: means over seeds, with intervals over test images, and the losses' differences."""
    print(f"| shortcut | loss | {' | '.join(COLUMNS.values())} |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for share in SHARES:
        rows = found[found["share"] == share]
        means, groups = {}, {}
        for way, column in product(WAYS, COLUMNS):
            seeds = rows[rows["way"] == way].dropna(subset=column).groupby("seed")
            means[way, column] = np.stack([one[column] for _, one in seeds]).mean(axis=0)
            groups[column] = next(one["group"].to_numpy() for _, one in seeds)
        first, *others = WAYS
        shown = [(way, way, "") for way in WAYS]
        shown += [(f"{way} - {first}", way, first) for way in others]
        for name, way, other in shown:
            cells = []
            for column in COLUMNS:
                values = means[way, column] - (means[other, column] if other else 0)
                given = statistics.bootstrap_intervals({"": values}, groups[column], settings)[""]
                cells.append(
                    f"{100 * given.estimate:.1f} ({100 * given.low:.1f} to {100 * given.high:.1f})"
                )
            print(f"| {share:.0%} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    command.run(main)
