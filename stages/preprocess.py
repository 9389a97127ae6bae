"""Make one table of checked pairs, and their images, from what the sources hold.

Reads ``data/raw/<name>/`` of each source that params.yaml names (see ``stages.fetch``). Writes into
``data/pairs/``:

- ``images/<32 digits of SHA-256>.jpg``: each image once, as an upright RGB JPEG within limits;
- ``pairs.parquet`` (``output.PAIRS``): the pairs, in the order of the sources, each with its split;
- ``questions.parquet`` (``output.QUESTIONS``): held-out questions, where a data set has any;
- ``left_out.parquet`` (``output.LEFT_OUT``): every question and row left out, and why.

``reports/preprocess.json`` counts it all. The files are the same, byte for byte, however many
workers there are; a run that fails or is interrupted leaves nothing behind. Memory holds the texts
of all pairs, and the images of a few rows for each worker.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from stages.core import command, console
from stages.pairs import images, output, pairs, refusals
from stages.pairs.images import Outcomes
from stages.pairs.pairs import Question, Record
from stages.pairs.refusals import Refusal
from stages.params import params
from stages.sources import source
from stages.sources.kinds import read

Rows = list[dict[str, Any]]


def main(raw: Path, out: Path, report: Path) -> None:
    settings = params.load()
    sources = settings.data.sources
    for name in sources:
        source.read(raw / name)  # refuses a folder that fetch has not completed
    rows, questions = read({name: raw / name for name in sources}, sources)
    with output.all_or_nothing(out) as folder:
        shown = console.counted(rows, None, "preprocess", "rows")
        counted = fill(folder, shown, questions, settings.preprocess)
        output.check(counted, folder, settings.preprocess)
    output.write_report(counted, report)
    if ended := counted["end_tokens_taken_off"]:
        print(f"{ended:,} rows had answers that ended with an end-of-turn token, which was removed")


def fill(
    folder: Path, rows: Iterable[Record], questions: Iterable[Question], chosen: params.Preprocess
) -> dict[str, Any]:
    """Write images and tables into an empty folder; gives the counts for the report."""
    (folder / "images").mkdir()
    work = partial(images.store, folder=folder / "images", limits=chosen)
    decode = partial(images.decode, work=work, workers=chosen.workers)

    asked, not_asked = kept_questions(decode(questions, refusals.text_refusal))
    refuse = partial(refusals.refusal, wanted=chosen.wanted, patterns=chosen.refuse)
    kept, left_out = kept_pairs(decode(rows, refuse), {question["image"] for question in asked})
    set_splits(kept, chosen)

    output.write(kept, folder / "pairs.parquet", output.PAIRS)
    output.write(asked, folder / "questions.parquet", output.QUESTIONS)
    output.write([*not_asked, *left_out], folder / "left_out.parquet", output.LEFT_OUT)
    return output.counts(kept, left_out, asked, not_asked, chosen.refuse)


def kept_questions(found: Iterable[tuple[Question, Outcomes]]) -> tuple[Rows, Rows]:
    """Held-out questions, and those left out."""
    kept: dict[str, dict[str, Any]] = {}
    left_out = []
    for question, outcome in found:
        if not isinstance(outcome, Refusal):
            (image,) = outcome
            name = pairs.row_id(image.name, question.question, question.answer)
            if name not in kept:
                texts = {part: getattr(question, part) for part in ("question", "answer", "kind")}
                kept[name] = {"id": name, "image": image.name, **texts}
                continue
            outcome = Refusal("exact_duplicate", f"id {name}")
        left_out.append(output.left_out(question.where, outcome))
    return list(kept.values()), left_out


def kept_pairs(found: Iterable[tuple[Record, Outcomes]], held_out: set[str]) -> tuple[Rows, Rows]:
    """Pairs that show no image of the ``held_out`` ones, and the rows left out.

    Beside the columns of the table a pair has ``shown``, what it shares with the pairs of its
    group, ``published``, the split it was published in, and ``ended`` as in ``Record``.
    """
    kept: dict[str, dict[str, Any]] = {}
    left_out = []
    for row, outcome in found:
        if not isinstance(outcome, Refusal):
            names = [image.name for image in outcome]
            asked = pairs.prompt(row)
            name = pairs.row_id(*names, *asked, str(row.chosen), str(row.rejected))
            used = held_out.intersection(names)
            if not used and name not in kept:
                texts = ("system", "question", "chosen", "rejected", "origin", "kind", "ended")
                kept[name] = {
                    "id": name,
                    "images": names,
                    "widths": [image.width for image in outcome],
                    "heights": [image.height for image in outcome],
                    "history": [{"user": u, "assistant": a} for u, a in row.history],
                    "shown": [n.removesuffix(".jpg") for n in names] or [pairs.row_id(*asked)],
                    "published": row.split,
                    **{part: getattr(row, part) for part in texts},
                }
                continue
            outcome = Refusal("exact_duplicate", f"id {name}")
            if used:
                outcome = Refusal("image_in_held_out_questions", min(used))
        left_out.append(output.left_out(row.where, outcome))
    return list(kept.values()), left_out


def set_splits(kept: Rows, chosen: params.Preprocess) -> None:
    """Give each pair its ``group`` and its ``split``."""
    group_of = pairs.joined(pair["shown"] for pair in kept)
    groups = [group_of[pair["shown"][0]] for pair in kept]
    drawn = partial(
        pairs.split_of, key=chosen.split_key, validation=chosen.validation, test=chosen.test
    )
    sides = pairs.sides(groups, [pair["published"] for pair in kept], drawn)
    for pair, group, side in zip(kept, groups, sides, strict=True):
        pair |= {"group": group, "split": side}


if __name__ == "__main__":
    command.run(main)
