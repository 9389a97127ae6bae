"""A LLaMA-Factory training: its configuration and fingerprint, its process, its curves."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.errors import UserError
from stages.parameters.params import Params

# Packages whose version decides what a training computes.
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")

# Values of finetuning_type that leave the base model as it is and train an adapter beside it.
ADAPTERS = ("lora", "oft")

# Names in LLaMA-Factory's log history, and the field's terms that our curves use.
CURVES = {
    "loss": "loss",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}

# What a failed training prints, and what most likely helps; the first match is told.
FIXES = (
    (
        r"out of memory|OutOfMemoryError",
        "the GPU ran out of memory: lower train.per_device_train_batch_size (and raise "
        "train.gradient_accumulation_steps), lower format.image_max_pixels, set "
        "model.quantization_bit: 4, or use the preset for a smaller card "
        "(make use PRESET=qwen3-vl-4b-24gb)",
    ),
    (
        r"[Ii]mage features and image tokens do not match|tokens: \d+, features",
        "image tokens were cut or miscounted: run `dvc repro -f format`, and raise "
        "format.cutoff_len or lower format.image_max_pixels",
    ),
    (
        r"doesn't support bf16|bf16.{0,40}not supported|Bfloat16 is only supported",
        "this device has no bfloat16: set train.bf16: false (and train.fp16: true on an older GPU)",
    ),
    (
        r"No space left on device",
        "the disk is full: free some space, then run the same command again; training resumes "
        "from its last checkpoint",
    ),
    (
        r"No CUDA GPUs are available|CUDA-capable device|Found no NVIDIA driver",
        "no GPU could be used: set train.gpus: 0, or run where there is one",
    ),
    (
        r"Signal 9 \(SIGKILL\)|DefaultCPUAllocator: .*memory|Cannot allocate memory",
        "the machine ran out of memory: lower train.per_device_train_batch_size or "
        "train.preprocessing_num_workers",
    ),
    (
        # Not the bare name: every distributed run mentions NCCL.
        r"nccl[A-Z]\w*Error|NCCL error|collective operation timeout|Signal \d+ \(SIG\w+\)",
        "a process of the distributed run died or could not reach the others: see each rank's "
        "lines in the log; train.gpus: 1 tells whether distribution is the cause",
    ),
    (
        # Not the bare name: every quantised run says "with bitsandbytes".
        r"bitsandbytes.{0,80}(requires?\b|not (found|available|supported|compiled)|[Nn]o module)"
        r"|([Nn]o module named|supported by).{0,20}bitsandbytes",
        "quantisation failed: bitsandbytes needs an NVIDIA GPU; set model.quantization_bit: null",
    ),
)


def dpo_config(
    p: Params, *, model: Path, formatted: Path, images: Path, output: Path, validated: bool
) -> dict[str, Any]:
    """The complete configuration of a DPO training, as ``llamafactory-cli train`` reads it from
    YAML.

    ``validated``: whether there are validation pairs to watch.

    ``report_to`` is none here, so that the file does not depend on where runs are tracked; the
    train stage overrides it on the command line.

    Raises:
        UserError: ``train.finetuning_type`` makes no adapter, which is what the pipeline passes on.
    """
    method = p.train.passed_through.get("finetuning_type", "lora")
    if method not in ADAPTERS:
        raise UserError(
            f"train.finetuning_type is {method}, which makes no adapter; set it to "
            f"{' or '.join(ADAPTERS)}"
        )
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


def fingerprint(config: Mapping[str, Any], formatted: Path, model: Path, gpus: int) -> str:
    """A name for everything that decides what a training produces: 16 hex digits.

    It covers the LLaMA-Factory configuration (not where it writes or reports to), the number of
    processes (the effective batch follows from it), the formatted train and validation pairs (which
    name their images by content), the base model's files (by the hashes in its ``SOURCE.json``) and
    the versions of the packages that compute.
    """
    deciding = {k: v for k, v in config.items() if k not in {"output_dir", "report_to"}}
    parts = {
        "config": deciding,
        "processes": max(gpus, 1),
        "data": {
            name: _sha256(formatted / name)
            for name in ("train.json", "validation.json", "dataset_info.json")
        },
        "model": _sha256(model / "SOURCE.json"),
        "packages": {package: version(package) for package in PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def prepare(folder: Path) -> str | None:
    """Make a run's folder ready; the checkpoint it will resume from, or None for a clean start.

    LLaMA-Factory resumes from the newest checkpoint in its output folder. A checkpoint that was
    being written when the machine died is removed, so that the one before it is used. Without any,
    the folder is emptied: LLaMA-Factory refuses one that holds results but no checkpoint.
    """
    checkpoints = {}
    for checkpoint in folder.glob("checkpoint-*"):
        step = checkpoint.name.removeprefix("checkpoint-")
        if step.isdecimal() and _is_whole(checkpoint):
            checkpoints[int(step)] = checkpoint.name
        else:
            shutil.rmtree(checkpoint)
    if checkpoints:
        return checkpoints[max(checkpoints)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state is its last file."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def require_gpus(wanted: int) -> None:
    """Raise ``UserError`` if ``train.gpus`` wants more GPUs than there are; loads no model."""
    if wanted == 0:
        return
    import torch

    found = torch.cuda.device_count()
    if found < wanted:
        raise UserError(
            f"train.gpus is {wanted}, but torch finds {found or 'no'} GPU{'s' * (found > 1)} here; "
            "run on a machine that has them, lower train.gpus, or use the demo preset "
            "(make use PRESET=demo), which needs none"
        )


def environment(gpus: int, base: Mapping[str, str]) -> dict[str, str]:
    """Environment in which ``llamafactory-cli`` uses exactly ``gpus`` GPUs (0: the CPU).

    One GPU of several must be chosen here, since LLaMA-Factory turns to torchrun wherever it sees
    more than one. A choice the user already made (``CUDA_VISIBLE_DEVICES``) is narrowed, never
    widened.
    """
    visible = base.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(i) for i in range(gpus)]
    # Else every file and argument is listed, and the progress bar is hard to find.
    result = {"LLAMAFACTORY_VERBOSITY": "WARN"} | dict(base)
    result["CUDA_VISIBLE_DEVICES"] = ",".join(devices[:gpus])
    # LLaMA-Factory looks for torchrun on the path, also where .venv was never activated.
    tools = [str(Path(sys.executable).parent), *filter(None, [base.get("PATH")])]
    result["PATH"] = os.pathsep.join(tools)
    if gpus > 1:
        result |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(gpus)}
    return result


def launch(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run ``llamafactory-cli`` with ``arguments``, show what it prints, and keep that in ``log``.

    Raises:
        UserError: it failed; the message has its last meaningful lines and the likely fix.
    """
    executable = Path(sys.executable).with_name("llamafactory-cli")
    if not executable.exists():
        raise UserError(f"{executable} is missing; `make repro` installs the locked requirements")
    earlier = log.stat().st_size if log.exists() else 0
    with (
        log.open("ab") as file,
        subprocess.Popen(
            [str(executable), *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # torchrun and its workers can then be ended with it
        ) as process,
    ):
        assert process.stdout is not None
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        with log.open("rb") as file:
            file.seek(earlier)  # what an earlier attempt died of is not what this one did
            output = file.read().decode("utf-8", errors="replace")
        raise UserError(explain(process.returncode, output, log))


def explain(returncode: int, output: str, log: Path) -> str:
    """A failed training in one message: how it ended, its last lines, the likely fix."""
    ended = f"exit status {returncode}" if returncode > 0 else f"killed by signal {-returncode}"
    fix = next((fix for pattern, fix in FIXES if re.search(pattern, output)), None)
    if fix is None and returncode in (-9, 137):
        fix = (
            "most likely the machine ran out of memory: lower train.per_device_train_batch_size or "
            "train.preprocessing_num_workers"
        )
    lines = "\n".join(f"    {line}" for line in last_lines(output))
    likely = f"\nlikely fix: {fix}" if fix else ""
    return (
        f"llamafactory-cli failed ({ended}); its last lines:\n{lines}{likely}\n"
        f"the whole log is {log}; checkpoints are kept, the same command resumes"
    )


def last_lines(output: str, count: int = 6) -> list[str]:
    """The last lines that say something: no progress bars, no stack frames, no blank lines."""
    lines = [line.rpartition("\r")[2].rstrip() for line in output.splitlines()]
    frame = re.compile(r'^\s+(File ".*", line \d+|\^+|~+)|^Traceback|^\s{4}|\d+%\|')
    return [line for line in lines if line.strip() and not frame.search(line)][-count:]


def history(folder: Path) -> list[dict[str, Any]]:
    """The trainer's log history: one dict for each step that was logged or evaluated.

    Raises:
        UserError: the training left none, or its loss is not a number. The trainer replaces such a
            loss by the mean of those before (``logging_nan_inf_filter``), so the log-probs tell.
    """
    path = folder / "trainer_state.json"
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, KeyError, json.JSONDecodeError):
        raise UserError(
            f"the training ended without a readable {path}; see {folder / 'train.log'}"
        ) from None
    for entry in entries:
        for name in ("loss", "logps/chosen", "logps/rejected"):
            for key in (name, f"eval_{name}"):
                if not math.isfinite(entry.get(key, 0.0)):
                    raise UserError(
                        f"the training diverged: {key} is {entry[key]} at step {entry['step']}; "
                        "lower train.learning_rate or train.max_grad_norm"
                    )
    return entries


def cost(entries: Sequence[Mapping[str, Any]], gpus: int, resumed: bool) -> dict[str, Any]:
    """What the diary tells of a training: its device, and pairs/s.

    Of a resumed one the trainer divides all pairs by the time since it resumed; no rate then.
    """
    device = "cpu"
    if gpus:
        import torch

        device = f"{gpus} x {torch.cuda.get_device_name(0)}"
    rates = [entry["train_samples_per_second"] for entry in entries if "train_runtime" in entry]
    return {"device": device} | ({"pairs_per_second": rates[-1]} if rates and not resumed else {})


def check_first_step(entries: Sequence[Mapping[str, Any]], beta: float) -> float:
    """The first step's reward margin, which is about 0 if the policy starts at the reference.

    Step 1 is logged before its update, when the new adapter still changes nothing. Another margin
    means that the reference is not the base model, as when an adapter was stacked on an adapter
    (LLaMA-Factory#8974).

    Raises:
        UserError: the margin is further from 0 than rounding explains.
    """
    first = next((entry for entry in entries if "rewards/margins" in entry), None)
    if first is None or first["step"] != 1:
        raise UserError(
            "the training logged no reward margin for step 1; is its log history whole?"
        )
    margin = float(first["rewards/margins"])
    nats = max(abs(float(first["logps/chosen"])), abs(float(first["logps/rejected"])), 1.0)
    if abs(margin) > 0.005 * beta * nats:  # bfloat16 keeps 8 bits; equal passes differ far less
        raise UserError(
            f"the reward margin at step 1 is {margin:.4g}, not about 0: the policy does not start "
            "at the reference; is model.source a plain base model, without an adapter of its own?"
        )
    return margin


def curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """Curves keyed by split: columns ``step``, ``epoch`` and the values of ``CURVES``."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for entry in entries:
        split = "train" if "loss" in entry else "validation" if "eval_loss" in entry else None
        if split is None:
            continue  # the summary at the end
        prefix = "" if split == "train" else "eval_"
        rows[split].append(
            {"step": entry["step"], "epoch": round(entry["epoch"], 4)}
            | {
                ours: entry[prefix + name]
                for name, ours in CURVES.items()
                if prefix + name in entry
            }
        )
    tables = {
        split: pd.DataFrame(r, columns=["step", "epoch", *CURVES.values()])
        for split, r in rows.items()
    }
    # A table without rows keeps its columns: a plot of none of its points still names them.
    return {
        split: table if table.empty else table.dropna(axis=1, how="all")
        for split, table in tables.items()
    }


def is_trained(fingerprint: str, out: Path, curves: Path) -> bool:
    """Whether ``out`` holds the finished adapter of this training, byte for byte, and its curves
    are there."""
    try:
        made = json.loads((out / "fingerprint.json").read_text(encoding="utf-8"))
        return (
            made["fingerprint"] == fingerprint
            and made["adapter_sha256"] == _sha256(out / "adapter_model.safetensors")
            and (out / "adapter_config.json").is_file()
            and (out / "llamafactory.yaml").is_file()
            and (curves / "train.csv").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def publish(folder: Path, out: Path, fingerprint: str) -> None:
    """Copy the trained adapter, and nothing that holds a time or a path, to the stage's output.

    Until now ``out`` held what it had. The fingerprint goes first and comes back last: where
    it is, the adapter is complete.
    PEFT writes the adapted modules in the order of a set; sorted, equal adapters are equal files.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "fingerprint.json").unlink(missing_ok=True)
    for path in out.iterdir():  # never written into: with DVC's link types it is the cache's own
        path.unlink()
    for name in ("adapter_model.safetensors", "llamafactory.yaml"):
        shutil.copyfile(folder / name, out / name)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    (out / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    made = {
        "fingerprint": fingerprint,
        "adapter_sha256": _sha256(out / "adapter_model.safetensors"),
    }
    (out / "fingerprint.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


def discard_checkpoints(folder: Path) -> None:
    """Remove what only an interrupted training needs; log and trainer state stay."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
