"""Keys of ``params.yaml`` that do not go together, checked before any stage does any work.

A rule looks at several keys of the document as it was written, and says what is wrong with one of
them. It is passed over where a key that it needs is missing or wrong by itself, which is told
already; so all problems of a file are told at once.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.families import known
from stages.params.losses import LOSSES

# What an option needs besides the lock: the module that tells, and the package that brings it.
PACKAGES = {
    "deepspeed": ("deepspeed", "deepspeed"),
    "enable_liger_kernel": ("liger_kernel", "liger-kernel"),
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
    "use_adam_mini": ("adam_mini", "adam-mini"),
    "flash_attn: fa2": ("flash_attn", "flash-attn --no-build-isolation"),
    "quantization_method: hqq": ("hqq", "hqq"),
    "quantization_method: eetq": ("eetq", "eetq"),
    "fp8": ("torchao", "torchao"),
    **{
        f"optim: {name}": needed
        for needed, names in {
            ("torchao", "torchao"): ("adamw_torch_4bit", "adamw_torch_8bit"),
            ("lomo_optim", "lomo-optim"): ("lomo", "adalomo"),
            ("grokadamw", "grokadamw"): ("grokadamw",),
            ("schedulefree", "schedulefree"): (
                *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
            ),
            ("optimi", "torch-optimi"): ("stable_adamw",),
        }.items()
        for name in names
    },
}
INSTALL = ".venv/bin/uv pip install --python .venv/bin/python -c requirements.txt"

ADAPTERS = ("lora", "oft")  # of finetuning_type: they leave the base as it is and train beside it

Get = Callable[..., Any]


class _Unknown(Exception):
    """A key that a rule needs is missing, or wrong by itself."""


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


def _image_limits(get: Get) -> Iterator[str]:
    side = get("preprocess.min_side")
    for key in ("max_pixels", "max_input_pixels"):
        if side**2 > (most := get(f"preprocess.{key}")):
            yield (
                f"'preprocess.{key}' = {most}: no image of min_side = {side} pixels is within it; "
                f"set it to {side**2} or more"
            )


def _pixel_bounds(get: Get) -> Iterator[str]:
    if get("format.image_min_pixels") > get("format.image_max_pixels"):
        yield "'format': image_min_pixels is larger than image_max_pixels"


def _a_token_of_image(get: Get) -> Iterator[str]:
    side = _token_side(get)
    if (most := get("format.image_max_pixels")) < side**2:
        yield (
            f"'format.image_max_pixels' = {most}: an image becomes at least one token of {side} by "
            f"{side} pixels; set it to {side**2} or more"
        )


def _cutoff(get: Get) -> Iterator[str]:
    tokens = get("format.image_min_pixels") // max(_token_side(get), 32) ** 2
    if (cutoff := get("format.cutoff_len")) <= tokens:
        yield (
            f"'format.cutoff_len' = {cutoff}: an image of image_min_pixels becomes {tokens} "
            "tokens, so no pair would fit; raise it, or lower image_min_pixels"
        )


def _token_side(get: Get) -> int:
    """Pixels of a side of what becomes a token, by the model's configuration if it is here."""
    vision = _config(get).get("vision_config")
    sizes = vision if isinstance(vision, dict) else {}
    side = 1
    for name in ("patch_size", "spatial_merge_size"):
        pixels = sizes.get(name)
        if not isinstance(pixels, int) or not 0 < pixels < 1000:
            return min(family.token_side for family in known.FAMILIES)
        side *= pixels
    return side


def _config(get: Get) -> dict[str, Any]:
    """config.json of a local base model; empty where there is none, or none that can be read."""
    if get("model.source.kind") != "path":
        return {}
    path = Path(get("model.source.path")).expanduser() / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _template(get: Get) -> Iterator[str]:
    template, kind = get("model.template"), _config(get).get("model_type")
    fitting = [family for family in known.FAMILIES if kind in family.model_types]
    names = [name for family in fitting or known.FAMILIES for name in family.templates]
    if template not in names:
        model = f", for {fitting[0].name}" if fitting else ""
        yield f"'model.template' = {template!r}: must be one of {', '.join(names)}{model}"


def _adapter(get: Get) -> Iterator[str]:
    if (method := get("train.finetuning_type", "lora")) not in ADAPTERS:
        yield (
            f"'train.finetuning_type' is {method}, which makes no adapter, and an adapter is what "
            f"the pipeline passes on; set it to {' or '.join(ADAPTERS)}"
        )


def _stock_trainer(get: Get) -> Iterator[str]:
    if get("train.shared_prefix"):
        return
    if get("train.keep_vision_features"):
        yield (
            "'train.keep_vision_features' is true, and LLaMA-Factory's own trainer keeps none; it "
            "needs train.shared_prefix: true"
        )
    if not LOSSES[loss := get("train.loss")].stock:
        yield (
            f"'train.loss' is {loss}, and LLaMA-Factory's own trainer would train sigmoid under "
            "that name; train.shared_prefix: true passes the name on"
        )


def _label_smoothing(get: Get) -> Iterator[str]:
    loss = get("train.loss")
    if get("train.dpo_label_smoothing", 0) and not LOSSES[loss].smoothed:
        yield f"'train.dpo_label_smoothing' does not go with train.loss: {loss}; remove it"


def _precision(get: Get) -> Iterator[str]:
    on = [name for name in ("bf16", "fp16", "pure_bf16") if get(f"train.{name}", False)]
    if len(on) > 1:
        yield f"'train.{on[1]}' and train.{on[0]} are both true; keep one"
    if get("train.gpus") > 0:
        return
    for name in ("fp16", "pure_bf16", "tf32"):
        if get(f"train.{name}", False):
            other = "" if name == "tf32" else " (train.bf16 also works on a CPU)"
            yield f"'train.{name}' needs a GPU, and train.gpus is 0; set it to false{other}"


def _quantization(get: Get) -> Iterator[str]:
    if not (bits := get("model.quantization_bit")):
        return
    if get("train.gpus") == 0:
        yield "'model.quantization_bit' needs a GPU, and train.gpus is 0; set it to null"
    for key in ("resize_vocab", "fp8"):
        if get(f"train.{key}", False):
            yield f"'train.{key}' does not go with model.quantization_bit; remove one of them"
    method = get("train.quantization_method", "bnb")
    if method not in ("bnb", "eetq", "hqq"):
        yield f"'train.quantization_method' = {method!r} quantises nothing here; set it to bnb"
    if method == "eetq" and bits != 8:
        yield "'train.quantization_method' is eetq, which needs model.quantization_bit: 8"
    if get("train.fsdp", None) and (method, bits) != ("bnb", 4):
        yield "'train.fsdp' takes a quantised base of 4 bits by bitsandbytes alone; remove it"


def _distributed(get: Get) -> Iterator[str]:
    for key in ("deepspeed", "fsdp"):
        if not get(f"train.{key}", None):
            continue
        if get("train.gpus") < 2 and "FORCE_TORCHRUN" not in os.environ:
            yield (
                f"'train.{key}' is for several processes, and train.gpus is {get('train.gpus')}; "
                "raise that, or remove it"
            )


def _files(get: Get) -> Iterator[str]:
    for key in ("deepspeed", "fsdp_config", "new_special_tokens_config"):
        value = get(f"train.{key}", None)
        if isinstance(value, str) and not Path(value).is_file():
            yield f"'train.{key}' = {value!r}: there is no such file"


def _evaluated(get: Get) -> Iterator[str]:
    """What needs a metric of the validation pairs, and how often that is there."""
    wanted = [
        key
        for key, value in (
            ("early_stopping_steps", get("train.early_stopping_steps", None)),
            ("load_best_model_at_end", get("train.load_best_model_at_end", False)),
            ("save_strategy: best", get("train.save_strategy", "steps") == "best"),
            (
                "lr_scheduler_type: reduce_lr_on_plateau",
                get("train.lr_scheduler_type", "linear") == "reduce_lr_on_plateau",
            ),
        )
        if value
    ]
    for key in wanted:
        name = key.partition(":")[0]
        if get("preprocess.validation") == 0:
            yield f"'train.{name}' needs validation pairs, and preprocess.validation is 0"
        if get("train.eval_strategy", "no") == "no":
            yield f"'train.{name}' needs train.eval_strategy: steps or epoch beside it"
    if {"early_stopping_steps", "save_strategy: best"} & set(wanted) and not get(
        "train.metric_for_best_model", None
    ):
        name = wanted[0].partition(":")[0]
        yield (
            f"'train.{name}' needs train.metric_for_best_model beside it, such as "
            "rewards/accuracies with greater_is_better: true, or loss"
        )
    if "early_stopping_steps" in wanted and "load_best_model_at_end" not in wanted:
        yield (
            "'train.early_stopping_steps' needs train.load_best_model_at_end: true beside it, else "
            "the adapter of the last step is kept, not the best one"
        )
    if "load_best_model_at_end" in wanted:
        yield from _saved_when_evaluated(get)


def _saved_when_evaluated(get: Get) -> Iterator[str]:
    saved, evaluated = get("train.save_strategy", "steps"), get("train.eval_strategy", "no")
    if saved == "best" or evaluated == "no":
        return
    if saved != evaluated:
        yield (
            f"'train.load_best_model_at_end' needs train.save_strategy: {evaluated}, as "
            f"train.eval_strategy is; it is {saved}"
        )
    elif saved == "steps":
        every = get("train.eval_steps", None) or get("train.logging_steps", 500)
        kept = get("train.save_steps", 500)
        times = kept / every
        if (every < 1) != (kept < 1) or abs(times - round(times)) > 1e-9:
            yield (
                f"'train.load_best_model_at_end' needs a train.save_steps that is a multiple of "
                f"train.eval_steps ({every:g}); it is {kept:g}"
            )


def _resuming(get: Get) -> Iterator[str]:
    if get("train.save_only_model", False) and get("train.save_strategy", "steps") != "no":
        yield (
            "'train.save_only_model' leaves the optimizer out of the checkpoints, and a training "
            "that is interrupted would go on with another one, silently; set it to false, or "
            "train.save_strategy: no"
        )


def _loading(get: Get) -> Iterator[str]:
    if get("train.dataloader_prefetch_factor", None) and not get("train.dataloader_num_workers", 0):
        yield (
            "'train.dataloader_prefetch_factor' needs train.dataloader_num_workers above 0 beside "
            "it; remove it"
        )


def _schedule(get: Get) -> Iterator[str]:
    kind = get("train.lr_scheduler_type", "linear")
    given = get("train.lr_scheduler_kwargs", None) or {}
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not (
        isinstance(given, str) or {"min_lr", "min_lr_rate"} & set(given)
    ):
        yield (
            f"'train.lr_scheduler_type' = {kind!r} needs train.lr_scheduler_kwargs beside it, such "
            "as {min_lr_rate: 0.1}"
        )


def _optimizer(get: Get) -> Iterator[str]:
    name = str(get("train.optim", "adamw_torch"))
    if name.startswith(("galore", "apollo")):
        yield f"'train.optim' = {name!r} trains the full model and does not go with LoRA; remove it"
    of_bitsandbytes = any(part in name for part in ("8bit", "paged", "bnb", "lion"))
    if of_bitsandbytes and not name.startswith("adamw_torch") and get("train.gpus") == 0:
        yield f"'train.optim' = {name!r} needs a GPU, and train.gpus is 0; remove it"


def _attention(get: Get) -> Iterator[str]:
    if get("train.flash_attn", "auto") == "fa3":
        yield "'train.flash_attn' is fa3, which LLaMA-Factory 0.9.5 can't use here; set it to auto"


def _packages(get: Get) -> Iterator[str]:
    for option, (module, package) in PACKAGES.items():
        key, _, wanted = option.partition(": ")
        value = get(f"train.{key}", None)
        if (value == wanted if wanted else value) and find_spec(module) is None:
            yield (
                f"'train.{key}' needs a package that the lock has not got; `{INSTALL} {package}` "
                "installs it beside the locked versions"
            )


RULES: tuple[Callable[[Get], Iterator[str]], ...] = (
    *(_template, _quantization, _splits, _image_limits),
    *(_pixel_bounds, _a_token_of_image, _cutoff),
    *(_adapter, _stock_trainer, _label_smoothing, _precision, _distributed, _evaluated),
    *(_files, _loading, _resuming, _schedule, _optimizer, _attention, _packages),
)
