"""What preprocess writes: a folder that appears complete or not at all, its tables, its counts."""

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError, shown
from stages.pairs.pairs import SPLITS
from stages.pairs.refusals import REASONS, Refusal, advice

_MOST_LABELS = 50  # origins or kinds counted one by one in the report
# Rows whose pair is there nevertheless, or was kept for the evaluation.
_NOT_LOST = {"exact_duplicate", "image_in_held_out_questions"}
_ROWS_PER_GROUP = 4096  # of a Parquet file; text only, so a few MB


def _list(of: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", of))  # by Parquet's own name for it


# Rows of data/pairs/pairs.parquet; images are relative to data/pairs/images/, in the order of the
# prompt, and their sizes are in pixels. ``history`` is the turns before the question.
PAIRS = pa.schema(
    {
        "id": pa.string(),
        "images": _list(pa.string()),
        "widths": _list(pa.int32()),
        "heights": _list(pa.int32()),
        "system": pa.string(),
        "history": _list(pa.struct({"user": pa.string(), "assistant": pa.string()})),
        "question": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "origin": pa.string(),
        "kind": pa.string(),
        "group": pa.string(),
        "split": pa.string(),
    }
)
QUESTIONS = pa.schema({name: pa.string() for name in ("id", "image", "question", "answer", "kind")})
LEFT_OUT = pa.schema({name: pa.string() for name in ("where", "reason", "detail")})


@contextlib.contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder that takes the place of ``out`` if the block ends well, else vanishes."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def left_out(where: str, refusal: Refusal) -> dict[str, str]:
    """A row of left_out.parquet, as UTF-8 can spell it: file names may hold half a surrogate."""
    row = {"where": where, "reason": refusal.reason, "detail": refusal.detail[:300]}
    return {name: text.encode("utf-8", "backslashreplace").decode() for name, text in row.items()}


def write(rows: Sequence[Mapping[str, Any]], path: Path, schema: pa.Schema) -> None:
    """Write rows as Parquet, of each what ``schema`` names; the same rows give the same bytes."""
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, compression="zstd", row_group_size=_ROWS_PER_GROUP)


def write_report(counts: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Counts


def by_label(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by a label from the data, under names that are safe as parts of a metric's name.

    DVC joins names by dots, so "coco/v1.0" becomes "coco_v1_0", with which "coco/v1_0" is counted.
    No label is "none"; "other" sums up all but the 50 most frequent.
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named: Counter[str] = Counter()
    for place, (label, number) in enumerate(ranked):
        name = re.sub(r"[^\w-]+", "_", label).strip("_")[:80] or "none"
        named[name if place < _MOST_LABELS else "other"] += number
    return dict(sorted(named.items()))


def counts(
    kept: Sequence[Mapping[str, Any]],
    left_out: Sequence[Mapping[str, str]],
    questions: Sequence[Mapping[str, Any]],
    questions_left_out: Sequence[Mapping[str, str]],
    refused: Iterable[str],
) -> dict[str, Any]:
    """The report: what went in, what was kept, and why the rest was not. ``refused`` are the names
    in ``preprocess.refuse``, whose rows are counted too.
    """
    reasons = Counter(row["reason"] for row in left_out)
    of_questions = Counter(row["reason"] for row in questions_left_out)
    split_of_image = {name: pair["split"] for pair in kept for name in pair["images"]}
    by_split = Counter(pair["split"] for pair in kept)
    images_by_split = Counter(split_of_image.values())
    return {
        "rows_in": len(kept) + len(left_out),
        "rows_kept": len(kept),
        "rows_left_out": len(left_out),
        "unique_images": len(split_of_image),
        "questions_in": len(questions) + len(questions_left_out),
        "questions_kept": len(questions),
        "question_images": len({question["image"] for question in questions}),
        **({"questions_left_out": dict(of_questions)} if of_questions else {}),
        "left_out": {reason: reasons[reason] for reason in (*REASONS, *refused)},
        "end_tokens_taken_off": sum(pair["ended"] for pair in kept),
        "published_split_changed": sum(
            pair["published"] not in ("", pair["split"]) for pair in kept
        ),
        "pairs_by_split": {name: by_split[name] for name in SPLITS},
        "images_by_split": {name: images_by_split[name] for name in SPLITS},
        "pairs_by_origin": by_label(Counter(pair["origin"] for pair in kept)),
        "pairs_by_kind": by_label(Counter(pair["kind"] for pair in kept)),
    }


def rows_left_out(counts: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """Rows left out, in the order of the sources; in the table the questions left out are first."""
    found: list[dict[str, str]] = pq.read_table(folder / "left_out.parquet").to_pylist()
    return found[counts["questions_in"] - counts["questions_kept"] :]


def check(counts: Mapping[str, Any], folder: Path, chosen: Any) -> None:
    """Refuse to continue with nothing, with too little, or with a split that is empty.

    Args:
        folder: where the tables were written.
        chosen: the section ``preprocess`` of the parameters.

    Raises:
        UserError: says which, with the counts, the first row left out, and what helps.
    """
    rows, kept = counts["rows_in"], counts["rows_kept"]
    found = {reason: number for reason, number in counts["left_out"].items() if number}
    lost = {reason: number for reason, number in found.items() if reason not in _NOT_LOST}
    if not rows:
        raise UserError("the source is empty: it has files, but no row; check data.sources")
    if not kept or sum(lost.values()) > chosen.max_dropped * rows:
        reasons = ", ".join(f"{number} {reason}" for reason, number in found.items())
        left_out = rows_left_out(counts, folder)
        first = next(row for row in left_out if row["reason"] in lost or not kept)
        most = max(found, key=lambda reason: found[reason])
        raise UserError(
            f"{rows - kept} of the {rows} rows can't be used ({reasons}), more than "
            f"preprocess.max_dropped ({chosen.max_dropped:g}) allows; the first, "
            f"{shown(first['where'])}: {shown(first['detail'], 300)}; {most}: {advice(most)}"
        )
    wanted = ["train", "test", *(["validation"] if chosen.validation else [])]
    if empty := [name for name in wanted if not counts["pairs_by_split"][name]]:
        raise UserError(
            f"no pair fell into the {' and the '.join(empty)} split, because whole images are "
            f"split and there are only {counts['unique_images']} images; add images, change "
            "preprocess.validation or preprocess.test, or draw another split by another "
            "preprocess.split_key"
        )
