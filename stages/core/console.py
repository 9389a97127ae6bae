"""What a stage shows while it runs: its own sentences, and one bar that fills once.

Sentences are printed (standard output). All else that libraries and subprocesses write to standard
error goes to ``reports/diary/<stage>.log``, whose last lines are shown when the stage fails. Where
standard error is no terminal, as in CI, there is no bar but a line now and then.
"""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

PAUSE = 30.0  # seconds between two lines where there is no terminal
LAST = 20  # lines of the log that are shown when a stage fails

T = TypeVar("T")


class Screen:
    """Where people look, while standard error goes to a log; one bar at a time."""

    def __init__(self) -> None:
        self.stream: TextIO | None = None
        self.bar: Bar | None = None


_screen = Screen()


def show(text: str) -> None:
    """A line on standard error as people see it, also while that goes to a log."""
    print(text, file=_screen.stream or sys.stderr, flush=True)


@contextmanager
def logged(log: Path) -> Iterator[None]:
    """Let standard error, that of libraries and subprocesses too, go to ``log``.

    Without a place for the log, standard error stays as it is.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError:
        yield
        return
    sys.stderr.flush()
    saved = os.dup(sys.stderr.fileno())
    with os.fdopen(os.dup(saved), "w", buffering=1) as _screen.stream:
        os.dup2(file, sys.stderr.fileno())
        os.close(file)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, sys.stderr.fileno())
            os.close(saved)
            _screen.stream = None


def last_lines(output: str, count: int = LAST) -> list[str]:
    """The last lines that say something: no progress bars, no stack frames, no blank lines."""
    lines = [line.rpartition("\r")[2].rstrip() for line in output.splitlines()]
    frame = re.compile(r'^\s+(File ".*", line \d+|\^+|~+)|^Traceback|^\s{4}|\d+%\|')
    return [line for line in lines if line.strip() and not frame.search(line)][-count:]


class Bar:
    """Progress of ``total`` things (``unit``): on a terminal a bar, else a line now and then."""

    def __init__(self, total: int | None, what: str, unit: str) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done, self.told = 0, time.monotonic()
        stream = _screen.stream or sys.stderr
        self.bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            scale = unit == "B"
            self.bar = tqdm(
                total=total, desc=what, unit=unit, unit_scale=scale, file=stream, leave=False
            )

    def update(self, number: int = 1) -> None:
        """``number`` more of them are done."""
        self.done += number
        if self.bar is not None:
            self.bar.update(number)
        elif time.monotonic() - self.told > PAUSE:
            self.told = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            show(f"{self.what}: {self.done:,}{of} {self.unit}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def bar(total: int | None, what: str, unit: str) -> Iterator[Bar]:
    """A bar for the body. Inside another one it is that one: the outermost counts for all."""
    if _screen.bar is not None:
        yield _screen.bar
        return
    _screen.bar = Bar(total, what, unit)
    try:
        yield _screen.bar
    finally:
        _screen.bar.close()
        _screen.bar = None


def counted(items: Iterable[T], total: int | None, what: str, unit: str) -> Iterator[T]:
    """The items, each counted by a bar once it was worked on."""
    with bar(total, what, unit) as progress:
        for item in items:
            yield item
            progress.update()
