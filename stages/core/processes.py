"""Processes that a stage starts, and that must not outlive it."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stages.core.errors import UserError

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


def do_each(work: Callable[[Any], object], items: Sequence[Any], *, count: int, cpu: bool) -> bool:
    """Call ``work`` with every item, in ``count`` processes; whether all of them ended well.

    accelerate starts one for each GPU. A process does every n-th item and keeps what it makes by
    itself; nothing comes back. So a result has the same bits whoever made it, and what is finished
    when one of them dies is not lost. ``work`` is pickled, so it is a module's function or a
    method, or a ``partial`` of one.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.pickle")
        job.write_bytes(pickle.dumps((work, items, cpu)))
        line = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--cpu" if cpu else "--multi_gpu", "--mixed_precision", "no"),
            *("--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"),
            *("--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", "1")),
            *("--dynamo_backend", "no", "-m", __name__, str(job)),
        ]
        # A group of its own, so that what accelerate started can be ended with it.
        with (
            subprocess.Popen(line, process_group=0) as process,
            ended_with_the_stage(process),
        ):
            return process.wait() == 0


def _one_of_each(job: Path) -> None:
    from accelerate import PartialState

    work, items, cpu = pickle.loads(job.read_bytes())
    state = PartialState(cpu=cpu)
    # Items may lie in the order of their size: each process gets small ones and large ones.
    for item in items[state.process_index :: state.num_processes]:
        work(item)


if __name__ == "__main__":
    try:
        _one_of_each(Path(sys.argv[1]))
    except UserError as told:
        raise SystemExit(f"error: {told}") from None
