"""Keys of an earlier release, and options of the ``train`` section that do not go together.

A rule guards against what would be wrong in silence, or would stop the training after hours of the
stages before it.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stages.params import arguments

# Keys (or keys with a value) of an earlier release, and the new way, told for one release;
# * stands for any text.
MOVED: dict[str, str] = {
    "data.source.*": "is one entry of data.sources now: data.sources.<a name>: {kind: …}",
    "data.columns.*": "is a key of each source now: data.sources.<name>.columns",
    "*.kind: several": "is gone: each of its sources is an entry of data.sources",
    "*.kind: sharegpt": "is gone: kind path reads these files, as a folder or an archive, and "
    "takes remap and datasets too",
    "*.image_urls": "is gone: img2dataset downloads images by their addresses into tars, and kind "
    "path reads those (docs/guide.md)",
    **dict.fromkeys(
        ("*.path: *://*", "*.path: gdrive:*"),
        "is an address: `dvc import-url` brings a file from https or S3, gdown one from Google "
        "Drive, and kind path reads it (docs/guide.md)",
    ),
    "*.path: [[]*": "is a list; put these files into one folder, archives unpacked, and name that",
    "train.nodes": "is gone; Ray reaches the GPUs of other machines, see docs/scaling.md",
    "base": "is for a preset; `make use PRESET=name` writes params.yaml from it",
}

# What an option (or one with a value) needs besides the lock.
PACKAGES = {
    "deepspeed": "deepspeed",
    "*_liger_kernel": "liger-kernel",
    "use_adam_mini": "adam-mini",
    "fp8": "torchao",
    "flash_attn: fa2": "flash-attn",
    "quantization_method: hqq": "hqq",
    "quantization_method: eetq": "eetq",
    "optim: adamw_torch_[48]bit": "torchao",
    "optim: *lomo": "lomo-optim",
    "optim: grokadamw": "grokadamw",
    "optim: schedule_free_*": "schedulefree",
    "optim: stable_adamw": "torch-optimi",
}
INSTALL = ".venv/bin/uv pip install --python .venv/bin/python -c requirements.txt"

# What an option (or one with a value) needs beside it.
PARTNERS = {
    "early_stopping_steps": "load_best_model_at_end: true",
    "dataloader_prefetch_factor": "dataloader_num_workers: 2",
    "save_strategy: best": "metric_for_best_model: rewards/accuracies",
    "lr_scheduler_type: cosine*_with_min_lr": "lr_scheduler_kwargs: {min_lr_rate: 0.1}",
}
FILES = ("deepspeed", "fsdp_config")  # of which the value is a path, if it is a text


def moved(flat: Mapping[str, Any]) -> list[str]:
    """What became of the keys of an earlier release that a document (flattened) has."""
    found = {way: key for key in flat if (way := arguments.entry(MOVED, key, flat[key] or True))}
    return [f"'{key}' {way}" for way, key in found.items()]


def problems(options: Mapping[str, Any]) -> Iterator[str]:
    """What options need that is not there (another option, a package, a file), and which of them
    exclude each other.
    """
    for option, value in options.items():
        partner = arguments.entry(PARTNERS, option, value)
        if partner and not options.get(partner.partition(":")[0]):
            yield f"'train.{option}' needs {partner} beside it"
        if package := arguments.entry(PACKAGES, option, value):
            try:
                version(package)
            except PackageNotFoundError:
                yield (
                    f"'train.{option}' needs a package that is not in the lock: "
                    f"`{INSTALL} {package}` installs it beside the locked versions"
                )
        if option in FILES and isinstance(value, str) and not Path(value).is_file():
            yield f"'train.{option}': there is no file {value}"
    if options.get("bf16") and options.get("fp16"):
        yield "'train': bf16 and fp16 are both true; keep one"
    saved, evaluated = options.get("save_strategy"), options.get("eval_strategy")
    if options.get("load_best_model_at_end") and saved != "best":
        times = (options.get("save_steps") or 500) / (options.get("eval_steps") or 500)
        if saved != evaluated or (saved == "steps" and abs(times - round(times)) > 1e-9):
            yield (
                "'train.load_best_model_at_end' needs a save_strategy like eval_strategy, and a "
                "save_steps that is a multiple of eval_steps"
            )
