"""What preprocess writes: a folder that appears complete or not at all, its tables, its counts."""

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError, shown
from stages.pairs.refusals import advice

_MOST_LABELS = 50  # origins or kinds counted one by one in the report
# Rows whose pair is there nevertheless, or was kept for the evaluation.
_NOT_LOST = {"exact_duplicate", "image_in_held_out_questions"}
_ROWS_PER_GROUP = 4096  # of a Parquet file; text only, so a few MB


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


@contextlib.contextmanager
def table(path: Path, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds one row to a Parquet file; the same rows always give the same bytes."""
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        def add(row: dict[str, Any]) -> None:
            waiting.append(row)
            if len(waiting) == _ROWS_PER_GROUP:
                flush()

        yield add
        if waiting:
            flush()


def fill(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Give columns of a Parquet file that ``table`` wrote their values, one for each row."""
    partial = path.with_name(f".{path.name}.partial")
    start = 0
    with (
        pq.ParquetFile(path) as file,
        pq.ParquetWriter(partial, file.schema_arrow, compression="zstd") as writer,
    ):
        for batch in file.iter_batches(_ROWS_PER_GROUP):
            rows = pa.Table.from_batches([batch])
            for name, values in columns.items():
                those = pa.array(values[start : start + len(rows)], pa.string())
                rows = rows.set_column(rows.schema.get_field_index(name), name, those)
            writer.write_table(rows)
            start += len(rows)
    partial.replace(path)


def write_report(counts: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def printable(text: str) -> str:
    """As text that UTF-8 can spell; file names and broken JSON may hold half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


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
        left_out = pq.read_table(folder / "left_out.parquet").to_pylist()
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
