"""What LLaMA-Factory accepts, read from its own source.

Importing LLaMA-Factory takes about 20 s on two cores, so the names and types of its arguments are
read from the source of its argument classes instead (the same dataclasses that ``llamafactory-cli``
parses a YAML file into). A test holds this reading against the real classes.
"""

import ast
import difflib
import importlib.util
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.core.errors import UserError

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
    """Why ``key: value`` can't stand in the ``train`` section, or None if it can."""
    if key in RESERVED:
        return f"is not set here; it comes from {RESERVED[key]}"
    known = arguments()
    if key not in known:
        matches = difflib.get_close_matches(key, [*known, "beta", "loss", "gpus"], n=1, cutoff=0.6)
        hint = f"; did you mean '{matches[0]}'?" if matches else ""
        return f"is no argument of LLaMA-Factory's{hint}"
    # Strict, because LLaMA-Factory gets the value as it stands here: to it, the text 'no' is true.
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
    """Name and type of every argument that ``llamafactory-cli train`` takes.

    Types that cannot be told from the source alone become ``Any``.
    """
    return {name: annotation for path in _sources() for name, annotation in _fields(path)}


def _sources() -> list[Path]:
    transformers, factory = _folder("transformers"), _folder("llamafactory")
    # Base classes first: a field that LLaMA-Factory declares again overrides transformers'.
    return [
        transformers / "training_args.py",
        transformers / "training_args_seq2seq.py",
        *(
            factory / "hparams" / f"{name}_args.py"
            for name in ("model", "data", "generating", "finetuning", "training")
        ),
    ]


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} is not installed; `make test` or `make repro` sets it up")
    return Path(spec.origin).parent


def _fields(path: Path) -> Iterator[tuple[str, Any]]:
    """Fields of the dataclasses in a source file; ``init=False`` fields are no arguments."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or not any(
            "dataclass" in ast.unparse(d) for d in node.decorator_list
        ):
            continue
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            source = ast.unparse(item)
            if "init=False" not in source and "ClassVar" not in source:
                yield item.target.id, _annotation(ast.unparse(item.annotation))


def _annotation(source: str) -> Any:
    """The type that an annotation spells, ``Any`` where it needs names of other modules.

    ``SchedulerType | str`` means the scheduler's names: transformers says ``str`` because a string
    becomes the enumeration, and fails on any other only when the training starts.
    """
    first = source.partition(" | ")[0]
    if first in _enumerations():
        return typing.Literal[_enumerations()[first]]
    names: dict[str, Any] = {
        name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")
    }
    try:  # the source is an installed package's own
        return eval(source, {"__builtins__": {}}, names | _BUILTINS)
    except (NameError, TypeError, AttributeError):
        return Any


@cache
def _enumerations() -> dict[str, tuple[str, ...]]:
    """Values of the string enumerations that transformers' training arguments use, by name."""
    folder = _folder("transformers")
    return {
        node.name: tuple(
            str(item.value.value)
            for item in node.body
            if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
        )
        for path in (folder / "trainer_utils.py", folder / "training_args.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and "ExplicitEnum" in map(ast.unparse, node.bases)
    }


_BUILTINS = {t.__name__: t for t in (str, int, float, bool, dict, list, tuple)} | {"None": None}
