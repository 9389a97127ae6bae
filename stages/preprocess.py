"""Raw data, in whatever shape its source has it -> one table of checked pairs, and their images.

Reads ``data/raw/`` (see ``stages.fetch``). Writes into ``data/pairs/``:

- ``images/<32 digits of SHA-256>.jpg``: each image once, as an upright RGB JPEG within limits;
- ``pairs.parquet`` (``pairs.PAIRS``): the pairs, in the order of the source, each with its split;
- ``questions.parquet`` (``pairs.QUESTIONS``): held-out questions, where the data set has any;
- ``left_out.parquet`` (``pairs.LEFT_OUT``): every row left out and why.

``reports/preprocess.json`` counts it all. The files are the same, byte for byte, however many
workers there are; a run that fails or is interrupted leaves nothing behind.
"""

import contextlib
import errno
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.process
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stages.core import command
from stages.core.errors import UserError
from stages.dataset import pairs
from stages.dataset.pairs import Question, Record, Refusal
from stages.ingest import images, tables
from stages.parameters import params

Outcome = images.Stored | Refusal
_ROWS_PER_GROUP = 4096  # of a Parquet file; text only, so a few MB
_WINDOW = 8  # rows under way for each worker: enough that none waits behind one large image
_MOST_LABELS = 50  # origins or kinds counted one by one in the report


def main(raw: Path, out: Path, report: Path) -> None:
    settings = params.load()
    rows, questions, total = source(raw, settings.data.columns.model_dump())
    chosen = settings.preprocess
    limits = images.Limits(
        min_side=chosen.min_side,
        max_pixels=chosen.max_pixels,
        max_input_pixels=chosen.max_input_pixels,
        jpeg_quality=chosen.jpeg_quality,
    )
    split = functools.partial(
        pairs.split_of, key=chosen.split_key, validation=chosen.validation, test=chosen.test
    )
    with whole_or_nothing(out) as folder:
        (folder / "images").mkdir()
        work = functools.partial(images.store, folder=folder / "images", limits=limits)
        with contextlib.closing(Decoder(work, workers=chosen.workers)) as decoder:
            shown = progress(rows, total, "preprocess")
            counts = write_tables(shown, questions, folder, decode=decoder.decode, split=split)
        check_counts(counts, {"validation": chosen.validation, "test": chosen.test})
    write_report(counts, report)


def source(
    raw: Path, columns: Mapping[str, str | None]
) -> tuple[Iterator[Record], Iterator[Question], int | None]:
    """Rows, held-out questions and, where it is known, the number of rows of what ``fetch`` left.

    Raises:
        UserError: ``raw`` is not what ``fetch`` leaves.
    """
    try:
        kind = json.loads((raw / "SOURCE.json").read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{raw}/SOURCE.json is missing or damaged; run `dvc repro -f fetch@data`"
        ) from None
    if kind == "easy-vqa":
        from stages.sources import easyvqa

        return easyvqa.records(raw), easyvqa.questions(raw), None
    return tables.records(raw, columns), iter(()), tables.count(raw)


def write_tables(
    rows: Iterable[Record],
    questions: Iterable[Question],
    folder: Path,
    *,
    decode: Callable[[Iterable[Any]], Iterator[tuple[Any, Outcome]]],
    split: Callable[[str], str],
) -> dict[str, Any]:
    """Write the three tables into ``folder``; gives the counts for the report.

    ``decode`` pairs each row with its stored image or with the reason why there is none, in order.
    """
    left_out: Counter[str] = Counter({reason: 0 for reason in pairs.REASONS})
    by_split: Counter[str] = Counter()
    by_origin: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    split_of_image: dict[str, str] = {}
    held_out: set[str] = set()
    seen: set[str] = set()
    rows_in = questions_in = questions_kept = 0
    with (
        table(folder / "pairs.parquet", pairs.PAIRS) as add_pair,
        table(folder / "questions.parquet", pairs.QUESTIONS) as add_question,
        table(folder / "left_out.parquet", pairs.LEFT_OUT) as add_left_out,
    ):

        def leave_out(where: str, refusal: Refusal) -> None:
            texts = {"where": where, "reason": refusal.reason, "detail": refusal.detail[:300]}
            add_left_out({name: _printable(text) for name, text in texts.items()})

        for question, image in decode(questions):
            questions_in += 1
            if isinstance(image, images.Stored):
                row_id = pairs.row_id(image.name, question.question, question.answer)
                held_out.add(image.name)
                if row_id in seen:
                    image = Refusal("exact_duplicate", f"id {row_id}")
            if isinstance(image, Refusal):
                leave_out(question.where, image)
                continue
            seen.add(row_id)
            questions_kept += 1
            add_question(
                {
                    "id": row_id,
                    "image": image.name,
                    "question": question.question,
                    "answer": question.answer,
                    "kind": question.kind,
                }
            )

        for row, image in decode(rows):
            rows_in += 1
            if isinstance(image, images.Stored):
                row_id = pairs.row_id(image.name, row.question, row.chosen, row.rejected)
                if image.name in held_out:
                    image = Refusal("image_in_held_out_questions", image.name)
                elif row_id in seen:
                    image = Refusal("exact_duplicate", f"id {row_id}")
            if isinstance(image, Refusal):
                left_out[image.reason] += 1
                leave_out(row.where, image)
                continue
            seen.add(row_id)
            side = split_of_image[image.group] = split(image.group)
            by_split[side] += 1
            by_origin[row.origin] += 1
            by_kind[row.kind] += 1
            add_pair(
                {
                    "id": row_id,
                    "image": image.name,
                    "width": image.width,
                    "height": image.height,
                    "question": row.question,
                    "chosen": row.chosen,
                    "rejected": row.rejected,
                    "origin": row.origin,
                    "kind": row.kind,
                    "group": image.group,
                    "split": side,
                }
            )
    images_by_split = Counter(split_of_image.values())
    return {
        "rows_in": rows_in,
        "rows_kept": by_split.total(),
        "rows_left_out": left_out.total(),
        "unique_images": len(split_of_image),
        "questions_in": questions_in,
        "questions_kept": questions_kept,
        "question_images": len(held_out),
        "left_out": dict(left_out),
        "pairs_by_split": {name: by_split[name] for name in pairs.SPLITS},
        "images_by_split": {name: images_by_split[name] for name in pairs.SPLITS},
        "pairs_by_origin": label_counts(by_origin),
        "pairs_by_kind": label_counts(by_kind),
    }


def label_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by a label from the data, under names that are safe as parts of a metric's name.

    DVC joins names by dots, so "coco/v1.0" becomes "coco_v1_0"; where two labels would meet, the
    later one gets a number. No label is "none"; "other" sums up all but the 50 most frequent.
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named: dict[str, int] = {}
    for label, number in sorted(ranked[:_MOST_LABELS]):
        name = base = re.sub(r"[^\w-]+", "_", label).strip("_")[:80] or "none"
        suffix = 2
        while name in named:
            name, suffix = f"{base}_{suffix}", suffix + 1
        named[name] = number
    if rest := sum(number for _, number in ranked[_MOST_LABELS:]):
        named["other"] = named.get("other", 0) + rest
    return named


def check_counts(counts: Mapping[str, Any], fractions: Mapping[str, float]) -> None:
    """Refuse to go on with nothing, or with a split that was asked for and is empty.

    Raises:
        UserError: says which, with the reasons and the fix.
    """
    if not counts["rows_kept"]:
        reasons = [f"{number} {reason}" for reason, number in counts["left_out"].items() if number]
        raise UserError(
            f"none of the {counts['rows_in']} rows could be used "
            f"({', '.join(reasons) or 'the source is empty'}); "
            "check data.source, data.columns and the image limits in preprocess"
        )
    for name, number in counts["pairs_by_split"].items():
        fraction = fractions.get(name)
        if number or fraction == 0:
            continue
        fix = f"raise preprocess.{name}" if fraction else "lower preprocess.validation or .test"
        raise UserError(
            f"no pair fell into the {name} split: {counts['unique_images']} distinct images are "
            f"too few for validation {fractions['validation']:g} and test {fractions['test']:g}; "
            f"{fix}, or add images"
        )


# Files


@contextlib.contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
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


def write_report(counts: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def progress(rows: Iterable[Record], total: int | None, what: str) -> Iterable[Record]:
    """The rows, with a bar on standard error (in a log, where it would pile up, now and then)."""
    pause = 0.2 if sys.stderr.isatty() else 10
    return tqdm(rows, total=total, desc=what, unit=" rows", mininterval=pause)


def _printable(text: str) -> str:
    """As text that UTF-8 can spell; file names and broken JSON may hold half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


# Worker processes


class Decoder:
    """Worker processes that turn the rows' images into stored ones.

    ``work`` (one encoded image -> outcome) goes to the workers by pickling.
    """

    def __init__(self, work: Callable[[bytes], Outcome], *, workers: int) -> None:
        self._work = work
        self._window = _WINDOW * workers
        self._pool = _pool(workers)

    def decode(self, rows: Iterable[Any]) -> Iterator[tuple[Any, Outcome]]:
        """Each row with its outcome, in order.

        Raises:
            UserError: a worker died, or had no memory left; the message names the row.
        """
        try:
            yield from in_order(
                rows, lambda data: self._pool.submit(self._work, data), window=self._window
            )
        except WorkerDied as error:
            raise UserError(self._blame(error.rows)) from None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _blame(self, rows: list[Any]) -> str:
        """Which row kills a worker: those under way are tried again, each in its own process."""
        self.close()
        for row in rows:
            with _pool(1) as pool:
                try:
                    pool.submit(self._work, row.image).result()
                except BrokenProcessPool:
                    return (
                        f"{row.where}: decoding its image kills the worker process; remove this "
                        "row, or lower preprocess.max_input_pixels if memory ran out"
                    )
                except MemoryError:
                    return _out_of_memory(row)
        return (
            f"a worker process died while decoding {rows[0].where} to {rows[-1].where}, but each "
            "of them decodes alone: memory probably ran out; lower preprocess.workers"
        )


class WorkerDied(Exception):
    """A worker process ended without an answer; ``rows`` were under way."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__(f"while {len(rows)} rows were under way")
        self.rows = rows


def in_order(
    rows: Iterable[Any], submit: Callable[[bytes], "Future[Outcome]"], *, window: int
) -> Iterator[tuple[Any, Outcome]]:
    """Each row with the outcome for its image, in the order of ``rows``.

    At most ``window`` rows are held at once, so memory does not depend on how many there are. Rows
    whose fields are wrong, and images that occurred before, are not submitted.

    Raises:
        WorkerDied: with the rows under way.
        UserError: a worker ran out of memory; the message names the row.
    """
    waiting: deque[tuple[Any, bytes | None, Outcome | Future[Outcome]]] = deque()
    known: dict[bytes, Outcome | Future[Outcome]] = {}  # by digest of the encoded file

    def first() -> tuple[Any, Outcome]:
        row, digest, outcome = waiting[0]
        if isinstance(outcome, Future):
            try:
                outcome = outcome.result()
            except MemoryError:
                raise UserError(_out_of_memory(row)) from None
            except Exception as error:
                error.add_note(f"while decoding the image of {row.where}")
                raise
        if digest is not None:
            known[digest] = outcome  # a fraction of what a finished future takes
        waiting.popleft()
        return row, outcome

    try:
        for row in rows:
            outcome: Outcome | Future[Outcome] | None = pairs.text_refusal(row)
            digest = None
            if outcome is None:
                digest = hashlib.sha256(row.image).digest()
                outcome = known.get(digest)
                if outcome is None:
                    outcome = known[digest] = submit(row.image)
            waiting.append((row, digest, outcome))
            if len(waiting) >= window:
                yield first()
        while waiting:
            yield first()
    except BrokenProcessPool:
        raise WorkerDied([row for row, digest, _ in waiting if digest is not None]) from None


def _out_of_memory(row: Any) -> str:
    return (
        f"{row.where}: not enough memory to decode its image; lower preprocess.workers or "
        "preprocess.max_input_pixels"
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked from here, which would copy the locks of pyarrow's threads in whatever state they
    # are, but from a server that has only done the imports: 20 ms a worker, spawning takes 1 s.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(
        ["stages.ingest.images", "stages.parameters.params", "stages.ingest.tables"]
    )
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, about files that are odd but readable
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent cannot stop its workers, and they would wait for ever
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


if __name__ == "__main__":
    command.run(main)
