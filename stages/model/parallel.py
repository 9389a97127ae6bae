"""Log-probs by several processes at once, one for each GPU, which accelerate starts.

A process computes every n-th chunk and keeps it in ``models/kept/``, where the stage takes it up as
it does what an earlier run kept. So a chunk has the same bits whoever computed it, no process waits
for another, and what is finished when one of them dies is not lost.
"""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError
from stages.core.processes import ended_with_the_stage
from stages.params.params import Params

if TYPE_CHECKING:
    from stages.model.checkpoint import Checkpoint


def processes(p: Params) -> int:
    """How many processes score: one for each visible GPU, or one on the CPU."""
    import torch

    from stages.model import scoring

    device = scoring.choose_device(p.scoring.device, torch.cuda.is_available())
    return torch.cuda.device_count() if device == "cuda" else 1


def log_probs(
    checkpoint: "Checkpoint",
    chunks: Sequence[Sequence[Mapping[str, Any]]],
    images: Path,
    *,
    count: int,
    label: str,
) -> bool:
    """Compute and keep the log-probs of every chunk, in ``count`` processes; whether all ended
    well. What is missing afterwards is the caller's to compute.
    """
    p = checkpoint.p
    on_cpu = ["--cpu"] if p.scoring.device == "cpu" else ["--multi_gpu"]
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.pickle")
        work = (checkpoint.model, p, checkpoint.adapter, chunks, images, label)
        job.write_bytes(pickle.dumps(work))
        line = [
            *(sys.executable, "-m", "accelerate.commands.launch", *on_cpu),
            *("--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", "1", "-m", __name__, str(job)),
        ]
        # A group of its own, so that what accelerate started can be ended with it.
        with (
            subprocess.Popen(line, process_group=0) as process,
            ended_with_the_stage(process),
        ):
            failed = process.wait()
    if failed:
        print(f"{label}: one of {count} processes failed; one goes on with what is missing")
    return not failed


def main(job: Path) -> None:
    """One of the processes."""
    from accelerate import PartialState

    from stages.model.checkpoint import Checkpoint

    model, p, adapter, chunks, images, label = pickle.loads(job.read_bytes())
    state = PartialState(cpu=p.scoring.device == "cpu")
    checkpoint = Checkpoint(model, p, adapter)
    # Chunks are in the order of their length: each process gets short ones and long ones.
    for chunk in chunks[state.process_index :: state.num_processes]:
        checkpoint.chunk(chunk, images, label=f"{label}, process {state.process_index}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as told:
        raise SystemExit(f"error: {told}") from None
