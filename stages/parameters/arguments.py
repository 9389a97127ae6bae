"""What LLaMA-Factory accepts in the ``train`` section, without importing it, which takes 20 s.

Names and types of its arguments are kept in ``arguments.json``, which ``python -m
benchmarks.arguments`` writes from its own argument classes. A test compares the two.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.core.errors import did_you_mean

FILE = Path(__file__).with_suffix(".json")
_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}

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
    """The type that a JSON schema describes, as far as ``benchmarks.arguments`` writes it."""
    if "anyOf" in schema:
        return Union[tuple(map(_type, schema["anyOf"]))]  # noqa: UP007  # members are not known here
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if schema.get("type") == "array":
        return list[_type(schema["items"])]  # type: ignore[misc]
    if schema.get("type") == "object":
        return dict[str, _type(schema.get("additionalProperties", {}))]  # type: ignore[misc]
    return _TYPES[schema["type"]] if schema else Any
