"""The same work on many items by several processes, one for each GPU, which accelerate starts.

A process does every n-th item and keeps what it makes by itself; nothing comes back. So a result
has the same bits whoever made it, no process waits for another, and what is finished when one of
them dies is not lost.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.processes import ended_with_the_stage


def each(work: Callable[[Any], object], items: Sequence[Any], *, count: int, cpu: bool) -> bool:
    """Call ``work`` with every item, in ``count`` processes; whether all of them ended well.

    ``work`` is pickled, so it is a module's function or a method, or a ``partial`` of one.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.pickle")
        job.write_bytes(pickle.dumps((work, items, cpu)))
        line = [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--cpu" if cpu else "--multi_gpu",
            ),
            *("--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", "1")),
            *("-m", __name__, str(job)),
        ]
        # A group of its own, so that what accelerate started can be ended with it.
        with (
            subprocess.Popen(line, process_group=0) as process,
            ended_with_the_stage(process),
        ):
            return process.wait() == 0


def main(job: Path) -> None:
    """One of the processes."""
    from accelerate import PartialState

    work, items, cpu = pickle.loads(job.read_bytes())
    state = PartialState(cpu=cpu)
    # Items may lie in the order of their size: each process gets small ones and large ones.
    for item in items[state.process_index :: state.num_processes]:
        work(item)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as told:
        raise SystemExit(f"error: {told}") from None
