"""Worker processes that decode images, in order and in bounded memory.

A pool of processes, because decoding is the cost of preprocess; what ``work`` does with one encoded
image is the caller's to say (``stages.ingest.images.store``).
"""

import hashlib
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from stages.core.errors import UserError
from stages.ingest import refusals
from stages.ingest.images import Stored
from stages.ingest.refusals import Refusal

Outcome = Stored | Refusal
# Rows go to the workers by the batch: one by one, handing them over costs more than decoding them.
_ROWS, _BYTES = 32, 2**20
_BATCHES = 3  # under way for each worker: enough that none waits behind one large image


class Decoder:
    """Worker processes that turn the rows' images into stored ones.

    ``work`` (one encoded image -> outcome) goes to the workers by pickling.
    """

    def __init__(self, work: Callable[[bytes], Outcome], *, workers: int) -> None:
        self._work = work
        self._window = _BATCHES * workers
        self._pool = _pool(workers)

    def decode(self, rows: Iterable[Any]) -> Iterator[tuple[Any, Outcome]]:
        """Each row with its outcome, in order.

        Raises:
            UserError: a worker died, or had no memory left; the message names the row.
        """
        try:
            yield from in_order(
                batches(rows),
                lambda batch: self._pool.submit(_outcomes, self._work, batch),
                window=self._window,
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
                    pool.submit(_outcomes, self._work, [row]).result()
                except BrokenProcessPool:
                    return (
                        f"{row.where}: decoding its image kills the worker process; remove this "
                        "row, or lower preprocess.max_input_pixels if memory ran out"
                    )
                except UserError as error:
                    return str(error)
        return (
            f"a worker process died while decoding {rows[0].where} to {rows[-1].where}, but each "
            "of them decodes alone: memory probably ran out; lower preprocess.workers"
        )


def _outcomes(work: Callable[[bytes], Outcome], rows: list[Any]) -> list[Outcome]:
    """What a worker does with a batch."""
    found = []
    for row in rows:
        try:
            found.append(work(row.image))
        except MemoryError:
            raise UserError(
                f"{row.where}: not enough memory to decode its image; lower preprocess.workers or "
                "preprocess.max_input_pixels"
            ) from None
        except Exception as error:
            error.add_note(f"while decoding the image of {row.where}")
            raise
    return found


class WorkerDied(Exception):
    """A worker process ended without an answer; ``rows`` were under way."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__(f"while {len(rows)} rows were under way")
        self.rows = rows


def batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """The rows, as many at a time as go to a worker at once."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.image or b"")
        if len(batch) == _ROWS or size >= _BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def in_order(
    batches: Iterable[list[Any]],
    submit: Callable[[list[Any]], "Future[list[Outcome]]"],
    *,
    window: int,
) -> Iterator[tuple[Any, Outcome]]:
    """Each row with the outcome for its image, in the order of the rows.

    At most ``window`` batches are held at once. Of each distinct image its digest and outcome are
    kept (about 600 bytes), so that one that occurred before is not submitted again; rows whose
    fields are wrong are not submitted either.

    Raises:
        WorkerDied: with the rows under way.
        UserError: a worker ran out of memory; the message names the row.
    """
    waiting: deque[tuple[list[tuple[Any, bytes | Refusal]], list[bytes], Future[list[Outcome]]]]
    waiting = deque()
    known: dict[bytes, Outcome | None] = {}  # by digest of the encoded file; None: under way

    def first() -> Iterator[tuple[Any, Outcome]]:
        asked, digests, outcomes = waiting[0]
        known.update(zip(digests, outcomes.result(), strict=True))
        waiting.popleft()
        for row, found in asked:
            outcome = found if isinstance(found, Refusal) else known[found]
            assert outcome is not None  # batches come back in order
            yield row, outcome

    try:
        for batch in batches:
            asked: list[tuple[Any, bytes | Refusal]] = []
            new: dict[bytes, Any] = {}
            for row in batch:
                found = refusals.text_refusal(row) or hashlib.sha256(row.image).digest()
                asked.append((row, found))
                if isinstance(found, bytes) and found not in known:
                    known[found], new[found] = None, row
            waiting.append((asked, list(new), submit(list(new.values()))))
            if len(waiting) >= window:
                yield from first()
        while waiting:
            yield from first()
    except BrokenProcessPool:
        raise WorkerDied(
            [row for asked, _, _ in waiting for row, found in asked if isinstance(found, bytes)]
        ) from None


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
