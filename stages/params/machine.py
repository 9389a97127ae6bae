"""Whether this machine has the GPUs that the parameters ask for."""

import os
from collections.abc import Mapping
from importlib.util import find_spec

from stages.core.errors import UserError
from stages.params.params import Params

ELSEWHERE = "WITHOUT_GPU"  # set in the environment where another machine runs the stages for a GPU


def on_ray(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Ray starts the processes of a training, by LLaMA-Factory's own switch."""
    return environment.get("USE_RAY", "0").lower() in ("1", "true", "y")


def lacking(p: Params) -> list[str]:
    """What the parameters ask of GPUs and torch does not find here, a sentence each. On Ray all but
    one GPU may be other machines'.
    """
    lines = []
    if p.evaluate.generation.engine == "vllm" and not find_spec("vllm"):
        lines.append(
            "evaluate.generation.engine is vllm, but it is not installed (docs/performance.md)"
        )
    asked = {
        f"train.gpus is {p.train.gpus}": min(p.train.gpus, 1) if on_ray() else p.train.gpus,
        "scoring.device is cuda": int(p.scoring.device == "cuda"),
        f"model.quantization_bit is {p.model.quantization_bit}": int(
            bool(p.model.quantization_bit)
        ),
    }
    if not any(asked.values()):
        return lines  # torch takes 6 s to import
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines += [
        f"{what}, but torch finds {found or 'no'} GPU here"
        for what, number in asked.items()
        if number > found
    ]
    if lines and _driver_is_too_old():
        lines.append(
            f"NVIDIA's driver is too old for torch, which is built for CUDA {torch.version.cuda}: "
            "update it to 580 or newer, or install torch for an older one (docs/reliability.md)"
        )
    given = p.train.passed_through
    wants_bfloat16 = p.train.gpus and (given.get("bf16") or given.get("pure_bf16"))
    if wants_bfloat16 and found and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(0)
        lines.append(f"the {name} has no bfloat16 (set train.bf16 to false and train.fp16 to true)")
    return lines


def _driver_is_too_old() -> bool:
    """By torch's own check, which compares the driver with the CUDA that torch was built for."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # of several kinds: no driver, no GPU, no CUDA in this torch
        return "too old" in str(error)
    return False


def require(p: Params, *, now: bool = False) -> None:
    """Raise ``UserError`` where this machine lacks what a stage needs, ``now`` or later; what comes
    later may run on another machine, as the user can say in the environment."""
    if (lines := lacking(p)) and (now or not os.environ.get(ELSEWHERE)):
        raise UserError(
            f"{'; '.join(lines)}. Run on another machine, or choose other parameters; "
            f"`{ELSEWHERE}=1 dvc repro format` prepares the data here for another machine"
        )
