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

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stages.core import command, console
from stages.pairs import images, output, pairs, refusals
from stages.pairs.images import Outcomes, Stored
from stages.pairs.pairs import Question, Record
from stages.pairs.refusals import Refusal
from stages.params import params
from stages.sources import source
from stages.sources.kinds import read

Rows = list[dict[str, Any]]
Made = dict[str, Any] | Refusal  # of a row
Entry = Callable[[Any, Sequence[Stored]], Made]


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

    asked, not_asked = kept(decode(questions, refusals.text_refusal), of_question)
    refuse = partial(refusals.refusal, wanted=chosen.wanted, patterns=chosen.refuse)
    held_out = {question["image"] for question in asked}
    made, left_out = kept(decode(rows, refuse), partial(of_pair, held_out=held_out))
    set_splits(made, chosen)

    output.write(made, folder / "pairs.parquet", output.PAIRS)
    output.write(asked, folder / "questions.parquet", output.QUESTIONS)
    output.write([*not_asked, *left_out], folder / "left_out.parquet", output.LEFT_OUT)
    return output.counts(made, left_out, asked, not_asked, chosen.refuse)


def kept(found: Iterable[tuple[Any, Outcomes]], entry: Entry) -> tuple[Rows, Rows]:
    """Each ``entry`` of a row and its images once, by its id, and the rows left out."""
    rows: dict[str, dict[str, Any]] = {}
    left_out = []
    for row, outcome in found:
        made = outcome if isinstance(outcome, Refusal) else entry(row, outcome)
        if not isinstance(made, Refusal) and made["id"] in rows:
            made = Refusal("exact_duplicate", f"id {made['id']}")
        if isinstance(made, Refusal):
            left_out.append(output.left_out(row.where, made))
        else:
            rows[made["id"]] = made
    return list(rows.values()), left_out


def of_question(question: Question, images: Sequence[Stored]) -> dict[str, Any]:
    (image,) = images
    name = pairs.row_id(image.name, question.question, question.answer)
    texts = {part: getattr(question, part) for part in ("question", "answer", "kind")}
    return {"id": name, "image": image.name, **texts}


def of_pair(row: Record, images: Sequence[Stored], *, held_out: set[str]) -> Made:
    """A pair, unless it shows an image of the ``held_out`` ones.

    Beside the columns of the table it has ``shown``, what it shares with the pairs of its group,
    ``published``, the split it was published in, and ``ended`` as in ``Record``.
    """
    names = [image.name for image in images]
    if used := held_out.intersection(names):
        return Refusal("image_in_held_out_questions", min(used))
    asked = pairs.prompt(row)
    texts = ("system", "question", "chosen", "rejected", "origin", "kind", "ended")
    return {
        "id": pairs.row_id(*names, *asked, str(row.chosen), str(row.rejected)),
        "images": names,
        "widths": [image.width for image in images],
        "heights": [image.height for image in images],
        "history": [{"user": u, "assistant": a} for u, a in row.history],
        "shown": [name.removesuffix(".jpg") for name in names] or [pairs.row_id(*asked)],
        "published": row.split,
        **{part: getattr(row, part) for part in texts},
    }


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
