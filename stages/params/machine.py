"""Whether this machine has the GPUs that the parameters ask for."""

import os
import shutil
import subprocess
from dataclasses import dataclass

from stages.core.errors import UserError
from stages.params.params import Params

ELSEWHERE = (
    "WITHOUT_GPU"  # a variable of the environment: the stages for a GPU run on another machine
)
# The oldest driver series for programs of a CUDA version: NVIDIA, CUDA Compatibility, table 1.
DRIVERS = {13: 580, 12: 525}


@dataclass(frozen=True)
class Gpu:
    """A GPU as ``nvidia-smi`` lists it; memory in GB (10^9 bytes)."""

    name: str
    memory: float
    driver: str


def listed() -> list[Gpu]:
    """The GPUs that the driver knows, without importing torch."""
    if not shutil.which("nvidia-smi"):
        return []
    columns = "--query-gpu=name,memory.total,driver_version"
    query = ["nvidia-smi", columns, "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines()]
    return [
        Gpu(row[0], float(row[1]) * 2**20 / 1e9, row[2])
        for row in rows
        if len(row) == 3 and row[1].isdigit()
    ]


def lacking(p: Params) -> list[str]:
    """What the parameters ask of GPUs and torch does not find here, a sentence each."""
    asked = {
        f"train.gpus is {p.train.gpus}": p.train.gpus,
        "scoring.device is cuda": int(p.scoring.device == "cuda"),
        f"model.quantization_bit is {p.model.quantization_bit}": int(
            bool(p.model.quantization_bit)
        ),
    }
    if not any(asked.values()):
        return []  # torch takes 6 s to import
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines = [
        f"{what}, and torch finds {found or 'no'} GPU here"
        for what, number in asked.items()
        if number > found
    ]
    if lines and (gpus := listed()):
        lines.append(unusable(gpus, str(torch.__version__), str(torch.version.cuda)))
    return lines


def unusable(gpus: list[Gpu], torch: str, cuda: str) -> str:
    """Why torch may find fewer GPUs than the driver lists."""
    driver, needed = gpus[0].driver, DRIVERS.get(int(cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) >= needed:
        return f"nvidia-smi lists {len(gpus)} GPU: CUDA_VISIBLE_DEVICES may hide some from torch"
    number = torch.partition("+")[0]
    return (
        f"NVIDIA's driver here is {driver}, and torch {number} is built for CUDA {cuda}, which "
        f"needs {needed} or newer: update the driver, or install torch's wheels for CUDA 12.6 over "
        "the lock with `.venv/bin/uv pip install --python .venv/bin/python --torch-backend cu126 "
        f"--reinstall torch=={number} torchvision torchaudio`, after which results need not have "
        "the same bits as elsewhere"
    )


def require(p: Params) -> None:
    """Raise ``UserError`` where this machine lacks what a later stage needs, unless the user said
    in the environment that it runs on another one."""
    if (lines := lacking(p)) and not os.environ.get(ELSEWHERE):
        raise UserError(
            f"{'; '.join(lines)}. Run on a machine that has it, or choose other parameters; "
            f"`{ELSEWHERE}=1 dvc repro format` prepares the data here for another machine"
        )
