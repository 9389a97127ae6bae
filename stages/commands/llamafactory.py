"""LLaMA-Factory's command line on the trained model: its configuration, its processes."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stages.core.errors import UserError
from stages.model import scoring
from stages.params.params import Params
from stages.tuning import config
from stages.tuning.process import last_lines

ROOT = Path(__file__).parents[2]
ENGINE = "stages.commands.engine"


def configuration(
    p: Params, model: Path, adapter: Path | None, *, quantized: bool = True
) -> dict[str, Any]:
    """What ``llamafactory-cli`` needs to load base or tuned as the evaluation does.

    Answers are greedy unless a request names a temperature. (``do_sample: false`` would make
    LLaMA-Factory ignore that temperature.)
    """
    found: dict[str, Any] = {
        "model_name_or_path": str(model.absolute()),
        "template": p.model.template,
        "trust_remote_code": p.model.trust.remote_code,
        "infer_dtype": p.scoring.dtype,
        "image_max_pixels": p.format.image_max_pixels,
        "image_min_pixels": p.format.image_min_pixels,
        "temperature": 0.0,
    }
    if adapter is not None:
        found["adapter_name_or_path"] = str(adapter.absolute())
    if quantized and p.model.quantization_bit is not None:
        found["quantization_bit"] = p.model.quantization_bit
    return found


def environment(p: Params) -> dict[str, str]:
    """The environment of such a process: on the CPU where ``scoring.device`` says so."""
    found = config.environment(0, os.environ, is_portable=p.scoring.portable)
    if p.scoring.device != "cpu":
        import torch

        scoring.choose_device(p.scoring.device, torch.cuda.is_available())
        del found["CUDA_VISIBLE_DEVICES"]
        if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
            found["CUDA_VISIBLE_DEVICES"] = chosen
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return found | {"PYTHONPATH": os.pathsep.join(path), "GRADIO_ANALYTICS_ENABLED": "False"}


@contextlib.contextmanager
def started(
    command: str, configured: Mapping[str, Any], folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """``llamafactory-cli <command>`` with a configuration, with the corrections of ``engine``.

    It works in ``folder``, says what it says into ``<command>.log`` there, and ends with the
    ``with``, all of its group.
    """
    file, log = folder / f"{command}.yaml", folder / f"{command}.log"
    # By the library that LLaMA-Factory reads it with: to YAML 1.1, a bare `no` is false.
    OmegaConf.save(OmegaConf.create(dict(configured)), file)
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", ENGINE, command, str(file)],
            cwd=folder,  # webchat writes its settings into the folder where it is
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def failed(command: str, returncode: int, folder: Path) -> UserError:
    """A process that ended before its time: its last lines that say something."""
    output = (folder / f"{command}.log").read_text(encoding="utf-8", errors="replace")
    lines = "\n".join(f"    {line}" for line in last_lines(output))
    return UserError(
        f"llamafactory-cli {command} failed (exit status {returncode}); its last lines:\n{lines}"
    )
