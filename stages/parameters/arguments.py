"""What LLaMA-Factory accepts in the ``train`` section, without importing it, which takes 20 s.

Names and types of its arguments are kept in ``arguments.json``, which

    python -m stages.parameters.arguments

writes from the dataclasses that it parses a YAML file into; run it after a change of LLaMA-Factory
or transformers. A test compares the file with the installed versions.
"""

import dataclasses
import json
import types
import typing
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
    "push_to_hub": "nothing here: publish models/adapter yourself",
    "hub_token": "HF_TOKEN in the environment",
    "hf_hub_token": "HF_TOKEN in the environment",
    "plot_loss": "reports/curves, which `dvc plots show` draws",
    "logging_first_step": "this project (step 1 shows that the policy starts at the reference)",
}

# Bounds that the argument classes leave unsaid: (lowest, is the lowest itself allowed).
_LOWEST: dict[str, tuple[float, bool]] = {
    "learning_rate": (0, False),
    "num_train_epochs": (0, False),
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "lora_rank": (1, True),
    "lora_alpha": (1, True),
    "lora_dropout": (0, True),
    "warmup_ratio": (0, True),
    "warmup_steps": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "logging_steps": (0, False),
    "eval_steps": (0, False),
    "save_steps": (0, False),
    "pref_ftx": (0, True),
    "dpo_label_smoothing": (0, True),
}


def problem_with(key: str, value: Any) -> str | None:
    """What is wrong with ``key: value`` in the ``train`` section, or None."""
    if key in RESERVED:
        return f"is not set here; it comes from {RESERVED[key]}"
    known = arguments()
    if key not in known:
        hint = did_you_mean(key, [*known, "beta", "loss", "gpus"])
        return f"is unknown: LLaMA-Factory has no option '{key}'{hint}"
    # Strict, because LLaMA-Factory gets the value as it is: to it, the text 'no' is true.
    settings = ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)
    try:
        typed = TypeAdapter(known[key], config=settings).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return f"= {value!r}: {message[0].lower()}{message[1:]}"
    if key in _LOWEST and isinstance(typed, int | float):
        lowest, included = _LOWEST[key]
        if typed < lowest or (typed == lowest and not included):
            return f"= {value!r}: must be {'at least' if included else 'greater than'} {lowest:g}"
    return None


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
