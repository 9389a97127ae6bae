"""Join: this machine's part of a training that runs over several (``train.nodes``).

    NODE_RANK=1 make join

In: what the first machine writes into ``models/training`` when its training starts. Out: nothing;
the first machine saves. It waits for a training, joins it, and waits for the next, until it is
interrupted. In a SLURM job ``SLURM_NODEID`` is the number where ``NODE_RANK`` is not set.
"""

import os
import time

from stages.core import command
from stages.core.errors import UserError
from stages.core.project import project_root
from stages.tuning import nodes
from stages.tuning.config import WORKSPACE


def main(node: str = "", trainings: int = 0) -> None:
    """``trainings``: after how many to leave; 0 for never."""
    number = node or os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID") or ""
    if not number.isdecimal() or number == "0":
        raise UserError(
            "which machine is this? The first, 0, runs the pipeline; on the others "
            "`NODE_RANK=1 make join`, another number on each"
        )
    workspace = project_root() / WORKSPACE
    served: list[str] = []
    print(f"machine {number}: waiting for a training that runs over several", flush=True)
    while not trainings or len(served) < trainings:
        call = nodes.read(workspace)
        if call is None or call["id"] in served:
            time.sleep(1)
            continue
        served.append(call["id"])
        status = nodes.join(call, int(number), workspace)
        print(f"machine {number}: the training here ended with status {status}", flush=True)


if __name__ == "__main__":
    command.run(main)
