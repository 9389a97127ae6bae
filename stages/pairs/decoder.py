"""Worker processes that decode images, in order and in bounded memory.

A pool of processes, because decoding is the cost of preprocess.
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
from stages.pairs.images import Stored
from stages.pairs.refusals import Refusal

Outcome = Stored | Refusal  # of one image
Outcomes = tuple[Stored, ...] | Refusal  # of a row
Work = Callable[[bytes], Outcome]
Refuse = Callable[[Any], Refusal | None]
# Rows go to the workers by the batch: one by one, handing them over costs more than decoding them.
_ROWS, _BYTES = 32, 2**20
_BATCHES = 3  # under way for each worker: enough that none waits behind one large image


def decode(
    rows: Iterable[Any], refuse: Refuse, *, work: Work, workers: int
) -> Iterator[tuple[Any, Outcomes]]:
    """Each row with its stored images, or why it is left out, in order.

    Args:
        refuse: what is wrong with a row before its images are looked at.
        work: what becomes of one encoded image; it goes to the workers by pickling.

    Raises:
        UserError: a worker died, or had no memory left.
    """
    processes = pool(workers)
    try:
        yield from in_order(
            rows,
            lambda images: processes.submit(_outcomes, work, images),
            refuse=refuse,
            window=_BATCHES * workers,
        )
    finally:
        processes.shutdown(cancel_futures=True)


def _outcomes(work: Work, images: list[bytes]) -> list[Outcome]:
    return [work(image) for image in images]


def in_order(
    rows: Iterable[Any],
    submit: Callable[[list[bytes]], "Future[list[Outcome]]"],
    *,
    refuse: Refuse,
    window: int,
) -> Iterator[tuple[Any, Outcomes]]:
    """Each row with the outcomes for its images, in the order of the rows.

    At most ``window`` batches are held at once. Of each distinct image its digest and outcome are
    kept (about 600 bytes), so that one that occurred before is not submitted again; rows that
    ``refuse`` has something against are not submitted either.

    Raises:
        UserError: a worker died, or had no memory left.
    """
    asked: list[tuple[Any, list[bytes], Refusal | None]] = []  # rows, digests of their images
    new: dict[bytes, bytes]
    waiting: deque[tuple[list[Any], dict[bytes, bytes], Future[list[Outcome]]]] = deque()
    known: dict[bytes, Outcome | None] = {}  # by digest of the encoded file; None: under way

    def first() -> Iterator[tuple[Any, Outcomes]]:
        _, new, outcomes = waiting[0]
        known.update(zip(new, outcomes.result(), strict=True))
        for row, digests, refusal in waiting.popleft()[0]:
            found = [known[digest] for digest in digests]
            refusal = refusal or next((each for each in found if isinstance(each, Refusal)), None)
            yield row, refusal or tuple(each for each in found if isinstance(each, Stored))

    try:
        for batch in batches(rows):
            asked, new = [], {}
            for row in batch:
                refusal = refuse(row)
                images = () if refusal else row.images
                digests = [hashlib.sha256(image).digest() for image in images]
                asked.append((row, digests, refusal))
                new |= {d: data for d, data in zip(digests, images, strict=True) if d not in known}
                known |= dict.fromkeys(new)
            waiting.append((asked, new, submit(list(new.values()))))
            if len(waiting) >= window:
                yield from first()
        while waiting:
            yield from first()
    except (BrokenProcessPool, MemoryError):
        start = (waiting[0][0] if waiting else asked)[0][0].where
        raise UserError(
            f"a worker process died or ran out of memory between {start} and {asked[-1][0].where}; "
            "lower preprocess.workers or preprocess.max_input_pixels, or take out those rows"
        ) from None


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
    if batch:
        yield batch


def pool(workers: int) -> ProcessPoolExecutor:
    """So many processes, which end when this one does."""
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
