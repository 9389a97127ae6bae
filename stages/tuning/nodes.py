"""Several machines in one training: what the first tells the others, and how they join it.

The first runs the pipeline, the others ``make join``; all see the project's folder under the same
path. When its training starts, the first writes a *call* into ``models/training``: the very command
and environment. The others run that, as further nodes of torchrun, and write nothing themselves.

With ``USE_RAY``, LLaMA-Factory's own switch, Ray starts the processes of all machines instead. It
is the same training, with the same fingerprint.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from stages.core.errors import UserError
from stages.core.processes import ended_with_the_stage
from stages.tuning import config
from stages.tuning.inside.sitecustomize import FOLDER
from stages.tuning.process import EVENTS_FILE, inside

CALL = ".call.json"
# What a training gets from the machine that it runs on, not from the first.
OWN = ("CUDA_VISIBLE_DEVICES", "PATH")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # told even where the first's own environment has them
GRACE = 30.0  # seconds in which a joined training may end by itself once the first has ended


def require(environment: Mapping[str, str], gpus: int, nodes: int) -> None:
    """Refuse what would make LLaMA-Factory start other processes than ``train.gpus`` and
    ``train.nodes`` say, by which a training is named.

    Raises:
        UserError: which variable, and what to do.
    """
    if on_ray(environment) and find_spec("ray") is None:
        raise UserError(
            "USE_RAY is set, and ray is not installed: `make extras` installs it; unset USE_RAY to "
            "train by torchrun"
        )
    if other := [name for name in ("USE_V1", "USE_MCA", "USE_KT") if is_on(environment, name)]:
        raise UserError(
            f"{other[0]} is set, with which LLaMA-Factory trains by other code, whose options and "
            "results this pipeline does not know: unset it"
        )
    if elastic := [name for name in ("RDZV_ID", "MIN_NNODES") if environment.get(name)]:
        raise UserError(
            f"{elastic[0]} is set, with which torchrun may change the number of processes, and so "
            "the batch, as it goes: unset it"
        )
    wanted = {"NNODES": ("train.nodes", nodes), "NPROC_PER_NODE": ("train.gpus", max(gpus, 1))}
    for name, (key, count) in wanted.items():
        found = environment.get(name, "").strip()
        if found not in ("", str(count)):
            raise UserError(
                f"{name} is {found}, and {key} means {count}: unset it, and set {key}, which a "
                "training is named by (docs/scaling.md)"
            )
    if environment.get("NODE_RANK", "").strip() not in ("", "0"):
        raise UserError(
            f"NODE_RANK is {environment['NODE_RANK']}, and the pipeline runs on the first machine, "
            "which is 0: run `make join` here"
        )


def on_ray(environment: Mapping[str, str]) -> bool:
    """Whether Ray starts the processes."""
    return is_on(environment, "USE_RAY")


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes, as LLaMA-Factory reads it."""
    return environment.get(name, "0").lower() in ("1", "true", "y")


def environment(base: Mapping[str, str], gpus: int, nodes: int) -> dict[str, str]:
    """``base`` with what the first of ``nodes`` machines needs; as it is, of one machine.

    With Ray: without what calls torchrun, and Ray reports to nobody.
    """
    if on_ray(base):
        kept = {name: value for name, value in base.items() if name != "FORCE_TORCHRUN"}
        return kept | {"RAY_USAGE_STATS_ENABLED": "0", FOLDER: os.getcwd()}
    if nodes == 1:
        return dict(base)
    return {
        "MASTER_ADDR": socket.gethostname(),
        "MASTER_PORT": str(free_port()),
        **base,
        "FORCE_TORCHRUN": "1",
        "NPROC_PER_NODE": str(max(gpus, 1)),
        "NNODES": str(nodes),
        "NODE_RANK": "0",
    }


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])


@contextmanager
def calling(
    workspace: Path,
    arguments: list[str],
    folder: Path,
    environment: Mapping[str, str],
    gpus: int,
    nodes: int,
) -> Iterator[None]:
    """While it lasts, call the other machines to the training that starts now in ``folder``."""
    if nodes == 1 or on_ray(environment):
        yield
        return
    ours = {k: v for k, v in environment.items() if os.environ.get(k) != v or k in ADDRESS}
    call = {
        "id": uuid.uuid4().hex,
        "nodes": nodes,
        "gpus": gpus,
        "directory": os.getcwd(),
        "arguments": arguments,
        "events": str((folder / EVENTS_FILE).absolute()),
        "environment": {k: v for k, v in ours.items() if k not in OWN},
    }
    with FileLock(workspace / ".call.lock"):  # one at a time calls
        path = workspace / CALL
        new = workspace / f"{CALL}.new"
        new.write_text(json.dumps(call, indent=2) + "\n", encoding="utf-8")
        new.replace(path)
        others = f"machine{'s' * (nodes > 2)} 1" + (f" to {nodes - 1}" if nodes > 2 else "")
        print(f"waiting for {others}: `make join` there", flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def read(workspace: Path) -> dict[str, Any] | None:
    """The call of a training that runs now, if there is one."""
    try:
        call: dict[str, Any] = json.loads((workspace / CALL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return call


def join(call: Mapping[str, Any], node: int, workspace: Path) -> int:
    """Run this machine's processes of a training; the exit status, negative if it was ended.

    It is ended a little after the first machine has: a process whose peers are gone may wait for
    them until a timeout of hours.

    Raises:
        UserError: the training has no such machine, or this one too few GPUs.
    """
    if not 0 < node < call["nodes"]:
        raise UserError(
            f"the training runs on {call['nodes']} machines, and this would be number {node}: "
            f"NODE_RANK must be 1 to {call['nodes'] - 1} here, another one on each"
        )
    config.require_gpus(call["gpus"])
    own = config.environment(call["gpus"], os.environ)
    shared = call["environment"] | inside(Path(call["events"]), own)
    program = [str(Path(sys.executable).with_name("llamafactory-cli")), *call["arguments"]]
    with (
        subprocess.Popen(
            program,
            cwd=call["directory"],
            env={**own, **shared, "NODE_RANK": str(node)},
            stdin=subprocess.DEVNULL,
            process_group=0,
        ) as process,
        ended_with_the_stage(process),
    ):
        return waited(process, lambda: (read(workspace) or {}).get("id") == call["id"])


def waited(child: "subprocess.Popen[bytes]", called: Callable[[], bool]) -> int:
    """The exit status of ``child``, which is ended ``GRACE`` after the call was taken back."""
    over: float | None = None
    while (status := child.poll()) is None:
        over = None if called() else over or time.monotonic()
        if over is not None and time.monotonic() - over > GRACE:
            os.killpg(child.pid, signal.SIGTERM)
            return child.wait()
        time.sleep(0.5)
    return status
