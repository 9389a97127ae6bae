"""What a training is made of: LLaMA-Factory's configuration, its environment, its fingerprint."""

import hashlib
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.core import portable
from stages.core.command import project_root
from stages.core.errors import UserError, did_you_mean
from stages.core.meaning import code, digest
from stages.families import known
from stages.model import reference_logps
from stages.params import machine
from stages.params.losses import LOSSES
from stages.params.params import Params
from stages.tuning.inside.sitecustomize import FOLDER

WORKSPACE = Path("models/training")  # a folder for each fingerprint; DVC leaves it alone

INSIDE = Path(__file__).parent / "inside"
# Our code in every training process, and what is there besides where prompts are shared.
CODE = ("tuning/inside/sitecustomize.py",)
SHARED_CODE = ("tuning/trainer.py", "tuning/views.py", "tuning/attention.py", "model/prefix.py")

# Packages whose version decides what a training computes.
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")

# LLaMA-Factory's options that change what the base model makes of a pair. Where one is set, the
# reference is computed in each step, by a model that has it too.
CHANGE_THE_REFERENCE = (
    *("upcast_layernorm", "upcast_lmhead_output", "quantization_method", "quantization_type"),
    *("double_quantization", "enable_liger_kernel", "fp8", "torch_compile"),
)


def dpo_config(
    p: Params, *, model: Path, formatted: Path, images: Path, output: Path, validated: bool
) -> dict[str, Any]:
    """The complete configuration of a DPO training, as ``llamafactory-cli train`` reads it from
    YAML.

    ``validated``: whether there are validation pairs to watch.

    It reports to nobody: the steps reach MLflow through the train stage (``process.launch``), and
    the file does not depend on where runs are tracked.
    """
    config: dict[str, Any] = {
        "stage": "dpo",
        "do_train": True,
        "model_name_or_path": str(model),
        "trust_remote_code": p.model.trust.remote_code,
        "template": p.model.template,
        "quantization_bit": p.model.quantization_bit,
        "dataset_dir": str(formatted),
        "media_dir": str(images),
        "dataset": "train",
        "cutoff_len": p.format.cutoff_len,
        "image_max_pixels": p.format.image_max_pixels,
        "image_min_pixels": p.format.image_min_pixels,
        "pref_beta": p.train.beta,
        "pref_loss": p.train.loss,
        "use_cpu": p.train.gpus == 0,
        "output_dir": str(output),
        "report_to": "none",
        "logging_first_step": True,
        **p.train.passed_through,
    }
    if validated:
        config["eval_dataset"] = "validation"
    else:
        config["eval_strategy"] = "no"
        config.pop("eval_steps", None)
    return config


def check_modules(p: Params, model: Path) -> None:
    """Refuse a name in ``train.lora_target`` that no module of the model has in its own. PEFT finds
    out once the model is loaded, and only if no other name fits.

    Raises:
        UserError: with the nearest known name.
    """
    from safetensors import safe_open

    given = p.train.passed_through
    targets = given.get("lora_target", "all")
    targets = [name.strip() for name in targets.split(",")] if isinstance(targets, str) else targets
    modules = set()
    for path in model.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            modules |= {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118
    if given.get("freeze_vision_tower", True):
        modules = {name for name in modules if "visual" not in name.split(".")}
    for target in targets:
        if target != "all" and not any(target in name for name in modules):
            raise UserError(
                f"train.lora_target: no module that is trained has '{target}' in its name"
                + did_you_mean(target, {name.rpartition(".")[2] for name in modules})
            )


def starts_at_reference(p: Params) -> bool:
    """Whether the reward margin at step 1 is 0: not where a loss has no reference, and not where
    NEFTune adds noise to what the policy reads (``train.neftune_noise_alpha``).
    """
    noise = p.train.passed_through.get("neftune_noise_alpha")
    return LOSSES[p.train.loss].reference and not noise


def view(p: Params) -> str | None:
    """What the loss shows in place of a pair's image; None where it takes the pair alone."""
    return p.train.view if LOSSES[p.train.loss].view else None


def dtype(p: Params) -> str:
    """The precision of the base model in training (``llamafactory/hparams/parser.py``)."""
    given = p.train.passed_through
    if given.get("bf16") or given.get("pure_bf16"):
        return "bfloat16"
    return "float16" if given.get("fp16") else "float32"


def cached_reference(p: Params, folder: Path, model: Path) -> Path | None:
    """``folder``, if its log-probs of the reference are those that this training would compute;
    else says why not.
    """
    if not p.train.shared_prefix or not LOSSES[p.train.loss].reference:
        return None
    given = p.train.passed_through
    more = {f"train.{name}": given[name] for name in CHANGE_THE_REFERENCE if given.get(name)}
    wanted = reference_logps.made_with(model, p, dtype=dtype(p), **more)
    differences = reference_logps.differences(folder, wanted)
    if not differences:
        return folder
    print(
        f"this training can't use the log-probs in {folder} (it has other values of "
        f"{', '.join(differences)}), so it computes the reference in each step"
    )
    return None


def fingerprint(
    config: Mapping[str, Any], p: Params, formatted: Path, model: Path, cached: Path | None
) -> str:
    """A name for everything that decides what a training produces: 16 hex digits.

    It covers the LLaMA-Factory configuration (not where it writes), the number of processes (the
    effective batch follows from it), the formatted train and validation pairs (which name
    their images by content), the base model's files (by the hashes in its ``SOURCE.json``), the
    versions of the packages that compute, our code inside the training process, our own keys, and
    the reference's log-probs where they are ``cached``.
    """
    inside = code(*CODE)
    if p.train.shared_prefix:
        inside |= shared_code(model)
    data = ("train.json", "validation.json", "dataset_info.json")
    return digest(
        config={key: value for key, value in config.items() if key != "output_dir"},
        processes=p.train.processes,
        data={name: sha256(formatted / name) for name in data},
        model=sha256(model / "SOURCE.json"),
        packages={package: version(package) for package in PACKAGES},
        inside=inside,
        shared_prefix=p.train.shared_prefix,
        loss=LOSSES[p.train.loss].decides,
        view=view(p),
        portable=p.train.portable and p.train.gpus == 0,
        reference=sorted(reference_logps.by_pair(cached).items()) if cached else None,
    )


def under_view(p: Params, formatted: Path, model: Path, cached: Path | None) -> Path | None:
    """The file in which trainings keep what the reference gives chosen under the loss's view, one
    for all that decides it; None where there is no view, or no reference ``cached``.
    """
    if not cached or not view(p):
        return None
    name = digest(
        view=view(p),
        reference=sorted(reference_logps.by_pair(cached).items()),
        data=sha256(formatted / "train.json"),
        inside=shared_code(model),
    )
    return project_root() / WORKSPACE / f"under-view-{name}.json"


def shared_code(model: Path) -> dict[str, str]:
    """Fingerprints of the code that computes log-probs where prompts are shared."""
    return code(*SHARED_CODE) | dict(known.of_model(model).fingerprint)


def environment(gpus: int, base: Mapping[str, str], *, is_portable: bool) -> dict[str, str]:
    """Environment in which ``llamafactory-cli`` uses exactly ``gpus`` GPUs (0: the CPU).

    One GPU of several must be chosen here, since LLaMA-Factory turns to torchrun wherever it sees
    more than one. A choice the user already made (``CUDA_VISIBLE_DEVICES``) is narrowed, never
    widened. On Ray they may be other machines' GPUs, and Ray chooses; torchrun stays on this one.
    """
    # Else every file and argument is listed, and the progress bar is hard to find.
    result = {"LLAMAFACTORY_VERBOSITY": "WARN"} | dict(base)
    for name in ("NNODES", "NODE_RANK", "RDZV_ID", "MIN_NNODES"):  # torchrun's for several machines
        result.pop(name, None)
    if gpus == 0:
        result |= portable.environment(portable=is_portable)
    # LLaMA-Factory looks for torchrun on the path, also where .venv was never activated.
    tools = [str(Path(sys.executable).parent), *filter(None, [base.get("PATH")])]
    result["PATH"] = os.pathsep.join(tools)
    if gpus == 0 or not machine.on_ray(base):
        visible = base.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else [str(i) for i in range(gpus)]
        result["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:gpus])
    if machine.on_ray(base):
        result.pop("FORCE_TORCHRUN", None)
        result |= {"RAY_USAGE_STATS_ENABLED": "0", FOLDER: os.getcwd()}
    else:
        result["NPROC_PER_NODE"] = str(max(gpus, 1))
        if gpus > 1:
            result["FORCE_TORCHRUN"] = "1"
    return result


def sha256(path: Path) -> str | None:
    """Of a file's content, in hexadecimal; ``None`` where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
