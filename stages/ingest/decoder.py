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
from stages.dataset import pairs
from stages.dataset.pairs import Refusal
from stages.ingest.images import Stored

Outcome = Stored | Refusal
_WINDOW = 8  # rows under way for each worker: enough that none waits behind one large image


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

    At most ``window`` rows are held at once. Of each distinct image its digest and outcome are kept
    (about 600 bytes), so that one that occurred before is not submitted again; rows whose fields
    are wrong are not submitted either.

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
