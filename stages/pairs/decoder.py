"""Worker processes that decode images, in order and in bounded memory.

A pool of processes, because decoding is the cost of preprocess; what ``work`` does with one encoded
image is the caller's to say (``stages.pairs.images.store``).
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
from dataclasses import dataclass
from typing import Any

from stages.core.errors import UserError
from stages.pairs.images import Stored
from stages.pairs.refusals import Refusal

Outcome = Stored | Refusal  # of one image
Outcomes = tuple[Stored, ...] | Refusal  # of a row
# Rows go to the workers by the batch: one by one, handing them over costs more than decoding them.
_ROWS, _BYTES = 32, 2**20
_BATCHES = 3  # under way for each worker: enough that none waits behind one large image


@dataclass(frozen=True)
class Encoded:
    """An encoded image on its way to a worker, and the row that it is of."""

    where: str
    data: bytes


class Decoder:
    """Worker processes that turn the rows' images into stored ones.

    ``work`` (one encoded image -> outcome) goes to the workers by pickling.
    """

    def __init__(self, work: Callable[[bytes], Outcome], *, workers: int) -> None:
        self._work = work
        self._window = _BATCHES * workers
        self._pool = _pool(workers)

    def decode(
        self, rows: Iterable[Any], refuse: Callable[[Any], Refusal | None]
    ) -> Iterator[tuple[Any, Outcomes]]:
        """Each row with its stored images, or why it is left out, in order.

        Args:
            refuse: what is wrong with a row before its images are looked at.

        Raises:
            UserError: a worker died, or had no memory left; the message names the row.
        """
        try:
            yield from in_order(
                batches(rows),
                lambda batch: self._pool.submit(_outcomes, self._work, batch),
                refuse=refuse,
                window=self._window,
            )
        except WorkerDied as error:
            raise UserError(self._blame(error.images)) from None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _blame(self, images: list[Encoded]) -> str:
        """Which row kills a worker: those under way are tried again, each in its own process."""
        self.close()
        if not images:
            return (
                "the worker processes died before any image: memory probably ran out; lower "
                "preprocess.workers"
            )
        for image in images:
            with _pool(1) as pool:
                try:
                    pool.submit(_outcomes, self._work, [image]).result()
                except BrokenProcessPool:
                    return (
                        f"{image.where}: decoding its image kills the worker process; remove this "
                        "row, or lower preprocess.max_input_pixels if memory ran out"
                    )
                except UserError as error:
                    return str(error)
        return (
            f"a worker process died while decoding {images[0].where} to {images[-1].where}, but "
            "each of them decodes alone: memory probably ran out; lower preprocess.workers"
        )


def _outcomes(work: Callable[[bytes], Outcome], images: list[Encoded]) -> list[Outcome]:
    """What a worker does with a batch."""
    found = []
    for image in images:
        try:
            found.append(work(image.data))
        except MemoryError:
            raise UserError(
                f"{image.where}: not enough memory to decode its image; lower preprocess.workers "
                "or preprocess.max_input_pixels"
            ) from None
        except Exception as error:
            error.add_note(f"while decoding the image of {image.where}")
            raise
    return found


class WorkerDied(Exception):
    """A worker process ended without an answer; ``images`` were under way."""

    def __init__(self, images: list[Encoded]) -> None:
        super().__init__(f"while {len(images)} images were under way")
        self.images = images


def batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """The rows, as many at a time as go to a worker at once."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, row.images or ()))
        if len(batch) == _ROWS or size >= _BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def in_order(
    batches: Iterable[list[Any]],
    submit: Callable[[list[Encoded]], "Future[list[Outcome]]"],
    *,
    refuse: Callable[[Any], Refusal | None],
    window: int,
) -> Iterator[tuple[Any, Outcomes]]:
    """Each row with the outcomes for its images, in the order of the rows.

    At most ``window`` batches are held at once. Of each distinct image its digest and outcome are
    kept (about 600 bytes), so that one that occurred before is not submitted again; rows that
    ``refuse`` has something against are not submitted either.

    Raises:
        WorkerDied: with the images under way.
        UserError: a worker ran out of memory; the message names the row.
    """
    asked: list[tuple[Any, list[bytes] | Refusal]]  # rows with the digests of their images
    new: dict[bytes, Encoded]
    waiting: deque[tuple[list[tuple[Any, Any]], dict[bytes, Encoded], Future[list[Outcome]]]]
    waiting = deque()
    known: dict[bytes, Outcome | None] = {}  # by digest of the encoded file; None: under way

    def first() -> Iterator[tuple[Any, Outcomes]]:
        asked, new, outcomes = waiting[0]
        known.update(zip(new, outcomes.result(), strict=True))
        waiting.popleft()
        for row, digests in asked:
            yield row, digests if isinstance(digests, Refusal) else _of_row(digests, known)

    try:
        for batch in batches:
            asked, new = [], {}
            for row in batch:
                if refusal := refuse(row):
                    asked.append((row, refusal))
                    continue
                digests = [hashlib.sha256(data).digest() for data in row.images]
                asked.append((row, digests))
                for digest, data in zip(digests, row.images, strict=True):
                    if digest not in known:
                        known[digest], new[digest] = None, Encoded(row.where, data)
            waiting.append((asked, new, submit(list(new.values()))))
            if len(waiting) >= window:
                yield from first()
        while waiting:
            yield from first()
    except BrokenProcessPool:
        raise WorkerDied([image for _, new, _ in waiting for image in new.values()]) from None


def _of_row(digests: list[bytes], known: dict[bytes, Outcome | None]) -> Outcomes:
    """The row's stored images, or the first refusal among them."""
    stored = []
    for digest in digests:
        outcome = known[digest]
        assert outcome is not None  # batches come back in order
        if isinstance(outcome, Refusal):
            return outcome
        stored.append(outcome)
    return tuple(stored)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked from here, which would copy the locks of pyarrow's threads in whatever state they
    # are, but from a server that has only done the imports: 20 ms a worker, spawning takes 1 s.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(
        ["stages.pairs.images", "stages.params.params", "stages.pairs.tables"]
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
