"""What LLaMA-Factory accepts in the ``train`` section, without importing it, which takes 20 s.

Names and types of its arguments are kept in ``arguments.json``, which

    python -m stages.params.arguments

writes from the dataclasses that it parses a YAML file into; run it after a change of LLaMA-Factory
or transformers. A test compares the file with the installed versions.
"""

import dataclasses
import json
import operator
import re
import types
import typing
from collections.abc import Callable
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.core.errors import did_you_mean

FILE = Path(__file__).with_suffix(".json")
_TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "null": type(None),
    "object": dict,
}

# In the same section.
OURS = ("beta", "loss", "gpus", "portable", "shared_prefix", "keep_vision_features")

# Keys of LLaMA-Factory's that the pipeline sets, and the parameter (or path) that decides each.
RESERVED = {
    "model_name_or_path": "model.source",
    "adapter_name_or_path": "model.source (a model to start from, already merged)",
    "trust_remote_code": "model.trust.remote_code",
    "template": "model.template",
    "quantization_bit": "model.quantization_bit",
    "cutoff_len": "format.cutoff_len",
    "image_max_pixels": "format.image_max_pixels",
    "image_min_pixels": "format.image_min_pixels",
    "pref_beta": "train.beta",
    "pref_loss": "train.loss",
    "stage": "this project (it is always dpo)",
    "do_train": "this project (it is always true)",
    "do_eval": "this project (train.eval_steps and train.eval_strategy decide)",
    "do_predict": "this project (the evaluate stage)",
    "predict_with_generate": "evaluate.generation",
    "ref_model": "model.source (the reference is the base model)",
    "dataset": "the format stage",
    "eval_dataset": "the format stage (its validation split)",
    "val_size": "preprocess.validation",
    "dataset_dir": "dvc.yaml",
    "media_dir": "dvc.yaml",
    "output_dir": "dvc.yaml",
    "overwrite_output_dir": "this project (the fingerprint decides whether training resumes)",
    "resume_from_checkpoint": "this project (the fingerprint decides whether training resumes)",
    "report_to": "MLFLOW_TRACKING_URI",
    "run_name": "DVC_EXP_NAME",
    "use_cpu": "train.gpus",
    "ray_num_workers": "train.gpus",
    "ray_init_kwargs": "RAY_ADDRESS and the like (docs/scaling.md)",
    "master_addr": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
    "push_to_hub": "nothing here: publish models/adapter yourself",
    "hub_token": "HF_TOKEN in the environment",
    "hf_hub_token": "HF_TOKEN in the environment",
    "plot_loss": "reports/curves, which `dvc plots show` draws",
    "infer_backend": "this project (training has none)",
    "video_max_pixels": "nothing here: there are no videos",
    "video_min_pixels": "nothing here: there are no videos",
    "logging_first_step": "this project (step 1 shows that the policy starts at the reference)",
}

_OTHER_STAGE = "belongs to another of LLaMA-Factory's stages and does nothing in DPO; remove it"
_NO_ADAPTER = "trains the full model, which LLaMA-Factory refuses together with LoRA; remove it"

# Options that undo a promise of this pipeline, or do nothing in it, and why. LLaMA-Factory itself
# says so in a trace after loading the model, or not at all. Off (false, null, 0) they may be given.
REFUSED = {
    "tokenized_path": "trains on the tokens that lie there, whatever the data are by now; remove "
    "it (LLaMA-Factory keeps its tokens by their content anyway)",
    "packing": "packs nothing in DPO, and takes one token off format.cutoff_len, so that pairs "
    "which fit would be cut; remove it",
    "neat_packing": "packs nothing in DPO, and takes one token off format.cutoff_len, so that "
    "pairs which fit would be cut; remove it",
    "streaming": "ends in a StopIteration: LLaMA-Factory 0.9.5 can't stream preference pairs with "
    "images; remove it (rows are read from the disk as they are needed)",
    "ignore_data_skip": "makes a resumed training see its first pairs again; remove it",
    "ref_model_adapters": "does nothing without ref_model: the reference is the base model, the "
    "adapter switched off; remove it, or merge those adapters into model.source",
    "ref_model_quantization_bit": "does nothing without ref_model: the reference is the base "
    "model, the adapter switched off; set model.quantization_bit, which is for both",
    "pissa_init": "takes the first directions out of the base's weights, so that the reference "
    "(the adapter switched off) is another model than the base; remove it",
    "pissa_convert": "goes with pissa_init, which changes the base; remove it",
    "split_special_tokens": "breaks up the template's own special tokens too; remove it (in the "
    "data they are neutralised, see format.allowed_tokens)",
    "train_from_scratch": "starts from random weights; remove it",
    "use_llama_pro": "is for a base that was expanded by layers; remove it (train.lora_target "
    "names what is trained)",
    "use_unsloth": "loads another implementation of the model, which the reference's log-probs "
    "were not made with, and its package asks for other versions than the lock; remove it",
    "mixture_of_depths": "makes another model of the base, for which there is no reference; remove "
    "it",
    "use_swanlab": "sends runs to another service; they are tracked in MLflow, at "
    "MLFLOW_TRACKING_URI",
    "save_on_each_node": "lets several machines write the same files; remove it",
    "accelerator_config": "deals the pairs out to the processes in another way, so that a step "
    "takes others than the parameters say; remove it",
    "ddp_backend": "is chosen by torch, nccl for GPUs and gloo for a CPU; remove it",
    "interleave_probs": "mixes several data sets, and there is one; remove it",
    "quantization_device_map": "spreads the model over GPUs, which LLaMA-Factory refuses in "
    "training; remove it",
    "use_kt": "needs other builds of transformers and accelerate than the lock has; remove it",
    "export_quantization_bit": "does nothing in training; remove it",
    **dict.fromkeys(("use_galore", "use_apollo", "use_badam"), _NO_ADAPTER),
    **dict.fromkeys(
        (
            *("train_on_prompt", "mask_history", "use_dft_loss", "use_asft_loss", "use_eaft_loss"),
            *("compute_accuracy", "use_hyper_parallel", "use_mca", "reward_model"),
            *("reward_model_adapters", "reward_model_quantization_bit", "ppo_score_norm"),
            "ppo_whiten_rewards",
        ),
        _OTHER_STAGE,
    ),
}

# What LLaMA-Factory splits at commas, so that its YAML may hold a list.
SPLIT = (
    *("lora_target", "oft_target", "additional_target"),
    *("freeze_trainable_modules", "freeze_extra_modules"),
)
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

# Bounds that the argument classes leave unsaid, and the options that have them.
BOUNDS: dict[tuple[str, Callable[[float, float], bool], float], tuple[str, ...]] = {
    ("at least", operator.ge, 1): (
        *("max_samples", "save_total_limit", "preprocessing_num_workers", "lora_rank"),
        *("preprocessing_batch_size", "eval_accumulation_steps", "early_stopping_steps"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "lora_alpha"),
        "gradient_accumulation_steps",
    ),
    ("at least", operator.ge, 0): (
        *("dataloader_num_workers", "eval_delay", "neftune_noise_alpha", "simpo_gamma"),
        *("ld_alpha", "adam_beta1", "adam_beta2", "seed", "data_seed", "lora_dropout"),
        *("warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "pref_ftx"),
        "dpo_label_smoothing",
    ),
    ("greater than", operator.gt, 0): (
        *("adam_epsilon", "learning_rate", "num_train_epochs"),
        *("logging_steps", "eval_steps", "save_steps"),
    ),
    ("less than", operator.lt, 0.5): ("dpo_label_smoothing",),
    ("less than", operator.lt, 1): ("lora_dropout", "adam_beta1", "adam_beta2"),
    ("at most", operator.le, 1): ("warmup_ratio", "ld_alpha"),
    ("at most", operator.le, 2**32 - 1): ("seed", "data_seed"),  # numpy takes no larger one
}
_STEPS = ("logging_steps", "eval_steps", "save_steps")  # below 1: a share of all steps


def problem_with(key: str, value: Any) -> str | None:
    """What is wrong with ``key: value`` in the ``train`` section, or None."""
    if key in RESERVED:
        return f"is not set here; it comes from {RESERVED[key]}"
    if key in REFUSED and value not in (None, False, 0, ""):
        return REFUSED[key]
    known = arguments()
    if key not in known:
        hint = did_you_mean(key, [*known, *OURS])
        return f"is unknown: LLaMA-Factory has no option '{key}'{hint}"
    if key in SPLIT and value is not None:
        return _problem_with_modules(value)
    # Strict, because LLaMA-Factory gets the value as it is: to it, the text 'no' is true.
    settings = ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)
    try:
        typed = TypeAdapter(known[key], config=settings).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return f"= {shown(value)}: {message[0].lower()}{message[1:]}"
    for (words, holds, bound), keys in BOUNDS.items():
        if key in keys and isinstance(typed, int | float) and not holds(typed, bound):
            return f"= {value!r}: must be {words} {bound:g}"
    if key in _STEPS and typed is not None and typed > 1 and typed != int(typed):
        return f"= {value!r}: must be an integer of steps, or below 1, a share of all steps"
    if key == "debug" and typed not in ("", "underflow_overflow"):
        return f"= {shown(value)}: must be underflow_overflow"
    if key == "max_steps" and typed != -1 and typed < 1:
        return f"= {value!r}: must be at least 1, or -1 for all of num_train_epochs"
    return None


def _problem_with_modules(value: Any) -> str | None:
    """What is wrong with names of modules, as a list or separated by commas."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        return f"= {shown(value)}: must be names of modules, as a list or separated by commas"
    names = [name.strip() for name in names]
    for name in names:
        if not _MODULE.fullmatch(name):
            return (
                f"= {shown(value)}: {shown(name)} is not part of a module's name. LLaMA-Factory "
                "takes no regular expressions here; write names, such as q_proj,v_proj, or all"
            )
    if "all" in names and len(names) > 1:
        return f"= {shown(value)}: all stands alone, without other names"
    return None


def shown(value: Any) -> str:
    """A value in a message: at most 100 characters of it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@cache
def arguments() -> dict[str, Any]:
    """Name and type of every argument that ``llamafactory-cli train`` takes."""
    schemas = json.loads(FILE.read_text(encoding="utf-8"))["arguments"]
    return {name: _type(schema) for name, schema in schemas.items()}


def _type(schema: dict[str, Any]) -> Any:
    """The type that a JSON schema describes, as far as ``_schema`` writes it."""
    if "anyOf" in schema:
        return Union[tuple(map(_type, schema["anyOf"]))]  # noqa: UP007  # members are not known here
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if schema.get("type") == "array":
        return list[_type(schema["items"])]  # type: ignore[misc]
    if schema.get("type") == "object":
        return dict[str, _type(schema.get("additionalProperties", {}))]  # type: ignore[misc]
    return _TYPES[schema["type"]] if schema else Any


# The file, from the real classes


def document() -> dict[str, Any]:
    """The content of the file, from the installed packages; importing them takes 20 s or more."""
    from llamafactory.hparams import parser

    arguments = {}
    for arguments_class in parser._TRAIN_ARGS:
        hints = typing.get_type_hints(arguments_class)
        for field in dataclasses.fields(arguments_class):
            if field.init:
                arguments[field.name] = _schema(hints[field.name]) or {}
    return {
        "versions": {name: version(name) for name in ("llamafactory", "transformers")},
        "arguments": dict(sorted(arguments.items())),
    }


def _schema(hint: Any) -> dict[str, Any] | None:
    """The JSON schema of a type; ``None``: anything goes, since YAML can't hold such an object.

    ``SchedulerType | str`` means the scheduler's names: transformers says ``str`` because a string
    becomes the enumeration, and fails on any other only when the training starts.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if name := next((name for name, known in _TYPES.items() if hint is known), None):
        return {"type": name}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0]) or {}}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(inner[1]) or {}}
    if origin in (typing.Union, types.UnionType):
        enumerated = any(isinstance(each, type) and issubclass(each, Enum) for each in inner)
        options = [_schema(each) for each in inner if not (enumerated and each is str)]
        if None in options:
            return None
        return options[0] if len(options) == 1 else {"anyOf": options}
    return None


def main() -> None:
    """Write the file again, after a change of LLaMA-Factory or transformers."""
    content = document()
    head = json.dumps({"versions": content["versions"]}, indent=1).removesuffix("\n}")
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content["arguments"].items()
    )
    FILE.write_text(f'{head},\n "arguments": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
