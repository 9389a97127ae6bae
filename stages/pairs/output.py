"""What preprocess writes: a folder that appears complete or not at all, its tables, its report."""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError

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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full; free some space where {out.parent} is and run again"
            ) from None
        raise


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
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def printable(text: str) -> str:
    """As text that UTF-8 can spell; file names and broken JSON may hold half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()
