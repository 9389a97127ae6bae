"""Processes that a stage starts, and that must not outlive it."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Its standard input is a pipe that nobody writes to: it ends when the stage does, however that
# dies. What does not end by SIGTERM within 20 s is killed.
WATCH = """
read -r _
kill -TERM "-$1"
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "-$1" || exit; sleep 2; done
kill -KILL "-$1"
"""


@contextmanager
def ended_with_the_stage(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """End the group of ``process``, which leads it, if the body raises or the stage is killed.

    A stage that was killed (SIGKILL, out of memory) can't end anything, so a shell in a session of
    its own waits for that.
    """
    with subprocess.Popen(
        ["/bin/sh", "-c", WATCH, "sh", str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as watch:
        try:
            yield
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
        finally:
            watch.kill()
