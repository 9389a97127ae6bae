"""Make one table of checked pairs, and their images, from what the sources hold.

Reads ``data/raw/<name>/`` of each source that params.yaml names (see ``stages.fetch``). Writes into
``data/pairs/``:

- ``images/<32 digits of SHA-256>.jpg``: each image once, as an upright RGB JPEG within limits;
- ``pairs.parquet`` (``pairs.PAIRS``): the pairs, in the order of the sources, each with its split;
- ``questions.parquet`` (``pairs.QUESTIONS``): held-out questions, where a data set has any;
- ``left_out.parquet`` (``refusals.LEFT_OUT``): every row left out and why.

``reports/preprocess.json`` counts it all. The files are the same, byte for byte, however many
workers there are; a run that fails or is interrupted leaves nothing behind. Memory holds a few rows
for each worker, and about 600 bytes for every row so far (the digests that find duplicates).
"""

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.core import command, console
from stages.pairs import images, output, pairs, refusals
from stages.pairs.pairs import Question, Record
from stages.pairs.refusals import Refusal
from stages.pairs.split import joined, sides, split_of
from stages.params import params
from stages.sources import source
from stages.sources.kinds import read


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
    work = functools.partial(images.store, folder=folder / "images", limits=chosen)
    decode = functools.partial(images.decode, work=work, workers=chosen.workers)
    count: Counter[str] = Counter()
    left_out: Counter[str] = Counter({reason: 0 for reason in (*refusals.REASONS, *chosen.refuse)})
    origins: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    shown: list[list[str]] = []  # for each pair, the groups of its images, or that of its text
    published: list[str] = []
    images_of: list[tuple[str, ...]] = []
    held_out: set[str] = set()
    seen: set[str] = set()

    def refuse(row: Record) -> Refusal | None:
        return (
            refusals.text_refusal(row)
            or refusals.shape_refusal(row, chosen.wanted)
            or refusals.pattern_refusal(row, chosen.refuse)
        )

    with (
        output.table(folder / "pairs.parquet", pairs.PAIRS) as add_pair,
        output.table(folder / "questions.parquet", pairs.QUESTIONS) as add_question,
        output.table(folder / "left_out.parquet", refusals.LEFT_OUT) as add_left_out,
    ):

        def leave_out(where: str, refusal: Refusal) -> None:
            texts = {"where": where, "reason": refusal.reason, "detail": refusal.detail[:300]}
            add_left_out({name: output.printable(text) for name, text in texts.items()})

        for question, found in decode(questions, refusals.text_refusal):
            count["questions_in"] += 1
            if not isinstance(found, Refusal):
                (image,) = found
                row_id = pairs.row_id(image.name, question.question, question.answer)
                held_out.add(image.name)
                if row_id in seen:
                    found = Refusal("exact_duplicate", f"id {row_id}")
            if isinstance(found, Refusal):
                leave_out(question.where, found)
                continue
            seen.add(row_id)
            count["questions_kept"] += 1
            texts = {name: getattr(question, name) for name in ("question", "answer", "kind")}
            add_question({"id": row_id, "image": image.name, **texts})

        for row, found in decode(rows, refuse):
            count["rows_in"] += 1
            if not isinstance(found, Refusal):
                names = [image.name for image in found]
                row_id = pairs.pair_id(row, names)
                if used := held_out.intersection(names):
                    found = Refusal("image_in_held_out_questions", min(used))
                elif row_id in seen:
                    found = Refusal("exact_duplicate", f"id {row_id}")
            if isinstance(found, Refusal):
                left_out[found.reason] += 1
                leave_out(row.where, found)
                continue
            seen.add(row_id)
            count["end_tokens_taken_off"] += row.ended
            origins[row.origin] += 1
            kinds[row.kind] += 1
            images_of.append(tuple(names))
            shown.append(
                [image.name.removesuffix(".jpg") for image in found] or [pairs.prompt_id(row)]
            )
            published.append(row.split)
            said = ("system", "question", "chosen", "rejected", "origin", "kind")
            add_pair(
                {
                    "id": row_id,
                    "images": names,
                    "widths": [image.width for image in found],
                    "heights": [image.height for image in found],
                    "history": [{"user": u, "assistant": a} for u, a in row.history],
                    **{name: getattr(row, name) for name in said},
                }
            )
    group_of = joined(shown)
    groups = [group_of[names[0]] for names in shown]
    drawn = functools.partial(
        split_of, key=chosen.split_key, validation=chosen.validation, test=chosen.test
    )
    side_of = sides(groups, published, drawn)
    output.fill(folder / "pairs.parquet", {"group": groups, "split": side_of})
    pairs_of_images = zip(images_of, side_of, strict=True)
    split_of_image = {name: side for names, side in pairs_of_images for name in names}
    by_split, images_by_split = Counter(side_of), Counter(split_of_image.values())
    moved = sum(was not in ("", now) for was, now in zip(published, side_of, strict=True))
    return {
        "rows_in": count["rows_in"],
        "rows_kept": len(groups),
        "rows_left_out": left_out.total(),
        "unique_images": len(split_of_image),
        "questions_in": count["questions_in"],
        "questions_kept": count["questions_kept"],
        "question_images": len(held_out),
        "left_out": dict(left_out),
        "end_tokens_taken_off": count["end_tokens_taken_off"],
        "published_split_changed": moved,
        "pairs_by_split": {name: by_split[name] for name in pairs.SPLITS},
        "images_by_split": {name: images_by_split[name] for name in pairs.SPLITS},
        "pairs_by_origin": output.by_label(origins),
        "pairs_by_kind": output.by_label(kinds),
    }


if __name__ == "__main__":
    command.run(main)
