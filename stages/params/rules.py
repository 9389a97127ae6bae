"""Keys of ``params.yaml`` that do not go together, and those of an earlier release, refused before
any stage does any work.

A rule guards against what would be wrong in silence, or would fail only after minutes. What
LLaMA-Factory or transformers refuse while they parse their arguments is theirs to refuse. A rule is
passed over where a key that it needs is missing or wrong by itself, which is told already; so all
problems of a file are told at once.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from stages.families import known
from stages.params import arguments

# Keys (or keys with a value) of an earlier release, and the new way, told for one release;
# * stands for any text.
MOVED: dict[str, str] = {}

# What an option (or one with a value) needs besides the lock.
PACKAGES = {
    "deepspeed": "deepspeed",
    "enable_liger_kernel": "liger-kernel",
    "use_liger_kernel": "liger-kernel",
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
    "save_strategy: best": "metric_for_best_model: rewards/accuracies",
    "lr_scheduler_type: cosine*_with_min_lr": "lr_scheduler_kwargs: {min_lr_rate: 0.1}",
}

Get = Callable[..., Any]


class _Unknown(Exception):
    """A key that a rule needs is missing, or wrong by itself."""


def moved(flat: Mapping[str, Any]) -> Iterator[str]:
    """What became of the keys of an earlier release that a document (flattened) has."""
    for pattern, way in MOVED.items():
        for key, value in flat.items():
            if any(fnmatchcase(at, pattern) for at in (key, f"{key}: {value}")):
                yield f"'{key}' {way}"
                break


def problems(document: Mapping[str, Any], wrong: Collection[str]) -> Iterator[str]:
    """What the rules say of a document; ``wrong`` are keys (dotted) that are told already."""

    def get(key: str, *default: Any) -> Any:
        if any(f"{key}.".startswith(f"{bad}.") for bad in wrong):
            raise _Unknown
        value: Any = document
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                if default:
                    return default[0]
                raise _Unknown
            value = value[name]
        return value

    for rule in RULES:
        try:
            yield from rule(get)
        except _Unknown:
            continue


def _splits(get: Get) -> Iterator[str]:
    total = get("preprocess.validation") + get("preprocess.test")
    if total >= 1:
        yield (
            f"'preprocess': validation and test add up to {total:g}; leave something below 1 for "
            "train"
        )


def _pixels(get: Get) -> Iterator[str]:
    if get("format.image_min_pixels") > get("format.image_max_pixels"):
        yield "'format': image_min_pixels is larger than image_max_pixels"


def _template(get: Get) -> Iterator[str]:
    names = [name for family in known.FAMILIES for name in family.templates]
    if (template := get("model.template")) not in names:
        yield f"'model.template' = {template!r}: must be one of {', '.join(names)}"


def _columns(get: Get) -> Iterator[str]:
    names = ("question", "chosen", "rejected")
    if len({get(f"data.columns.{name}") for name in names}) < len(names):
        yield "'data.columns': question, chosen and rejected must name three columns"


def _stock_trainer(get: Get) -> Iterator[str]:
    if get("train.shared_prefix"):
        return
    if get("train.keep_vision_features"):
        yield "'train.keep_vision_features' needs train.shared_prefix: true"
    # LLaMA-Factory 0.9.5 calls TRL's dpo_loss without the name: its trainer takes sigmoid.
    if (loss := get("train.loss")) in ("hinge", "ipo"):
        yield (
            f"'train.loss' is {loss}, and LLaMA-Factory's own trainer would train sigmoid under "
            "that name; train.shared_prefix: true passes the name on"
        )


def _quantized(get: Get) -> Iterator[str]:
    if get("model.quantization_bit") and get("train.gpus") == 0:
        yield "'model.quantization_bit' needs a GPU, and train.gpus is 0; set it to null"


def _beside(get: Get) -> Iterator[str]:
    """Options that need another option beside them, or a package."""
    for option, value in get("train").items():
        if partner := arguments.entry(PARTNERS, str(option), value):
            name = partner.partition(":")[0]
            if not get(f"train.{name}", None):
                yield f"'train.{option}' needs train.{name} beside it, such as {partner}"
        if package := arguments.entry(PACKAGES, str(option), value):
            try:
                version(package)
            except PackageNotFoundError:
                yield (
                    f"'train.{option}' needs a package that is not in the lock: `{INSTALL} "
                    f"{package}` installs it beside the locked versions"
                )


RULES: tuple[Callable[[Get], Iterator[str]], ...] = (
    *(_columns, _template, _splits, _pixels, _stock_trainer, _quantized, _beside),
)
