"""What LLaMA-Factory takes in the ``train`` section, without importing it, which takes 20 s.

Names and types of its options are read from the source of the classes that it parses a YAML file
into (0.1 s), so they are those of the installed versions. A test compares them with the classes.
The tables say what is refused: what would be wrong in silence, or would stop the training after
hours of the stages before it.
"""

import ast
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, create_model

# Where the classes are, after the enumerations that they name.
SOURCES = {
    "transformers": ("debug_utils", "trainer_utils", "training_args", "training_args_seq2seq"),
    "llamafactory": (
        *("extras/constants", "hparams/model_args", "hparams/data_args"),
        *("hparams/training_args", "hparams/finetuning_args", "hparams/generating_args"),
    ),
}

# Options that the pipeline sets, whatever their value, and what a user sets or uses instead.
SET_ELSEWHERE = {
    "model_name_or_path": "set model.source",
    "model_revision": "set model.source",
    "adapter_name_or_path": "set model.source to a model with the adapter merged in",
    "trust_remote_code": "set model.trust.remote_code",
    "template": "set model.template",
    "enable_thinking": "set model.template (qwen3_vl is for Thinking models)",
    "quantization_bit": "set model.quantization_bit",
    "cutoff_len": "set format.cutoff_len",
    "image_max_pixels": "set format.image_max_pixels",
    "image_min_pixels": "set format.image_min_pixels",
    "pref_beta": "set train.beta",
    "pref_loss": "set train.loss",
    "use_cpu": "set train.gpus",
    "do_eval": "set train.eval_strategy and train.eval_steps",
    "predict_with_generate": "set evaluate.generation",
    "ref_model*": "the reference is always the base (model.source, model.quantization_bit)",
    "val_size": "set preprocess.validation",
    "report_to": "runs are tracked in MLflow, and MLFLOW_TRACKING_URI names its server",
    "run_name": "name the experiment with `dvc exp run --name`",
    "ray_*": "set train.gpus, and RAY_ADDRESS and the like in the environment (docs/scaling.md)",
    "push_to_hub": "`make publish` uploads a release",
    "*hub_token": "set HF_TOKEN in the environment",
    "plot_loss": "`dvc plots show` draws the curves",
    **dict.fromkeys(
        (
            *("stage", "do_train", "do_predict", "dataset", "eval_dataset", "use_fast_tokenizer"),
            *("dataset_dir", "media_dir", "output_dir", "overwrite_output_dir", "master_*"),
            *("resume_from_checkpoint", "logging_first_step", "infer_backend"),
        ),
        "the pipeline sets it for every run",
    ),
}

# Options that undo a promise of this pipeline, or do nothing in it, and why: those of which
# LLaMA-Factory says so in a trace after loading the model, or not at all.
REFUSED = {
    "default_system": "would be shown to the model in training alone; give the pairs a system "
    "prompt of their own, which every stage keeps with preprocess.wanted.system_prompt: true",
    "ignore_pad_token_for_loss: False": "trains on padding too; remove it",
    "max_steps: 0": "trains num_train_epochs; set it to -1 for that, or to 1 or more",
    "finetuning_type: f*": "makes no adapter; set it to lora or oft",
    "quantization_method: [!beh]*": "quantises nothing here; set it to bnb",
    "flash_attn: fa3": "can't be used with LLaMA-Factory 0.9.5; set it to auto",
    **dict.fromkeys(
        (
            *("preserve_thinking", "tool_format", "split_special_tokens", "add*_tokens"),
            *("new_special_tokens_config", "resize_vocab", "rope_scaling", "train_from_scratch"),
            *("use_llama_pro", "use_unsloth", "use_v1_kernels"),
        ),
        "would change the model or its prompts in training alone, not in scoring and serving; "
        "remove it, and set model.source to a model that has it",
    ),
    **dict.fromkeys(
        (
            *("tokenized_path", "packing", "streaming", "dataloader_drop_last"),
            *("ignore_data_skip", "accelerator_config"),
        ),
        "would train on other pairs than those of data/formatted; remove it",
    ),
    **dict.fromkeys(
        ("save_only_model", "save_on_each_node", "*swanlab*"),
        "would break how a training is resumed and tracked; remove it",
    ),
    **dict.fromkeys(
        (
            *("shift_attn", "crop_to_patches", "image_do_*", "use_audio_*", "audio_*", "video_*"),
            *("optim: galore_*", "optim: apollo_*", "use_galore", "use_apollo", "use_badam"),
            *("pissa_init", "mixture_of_depths", "use_kt", "quantization_device_map"),
            *("use_*_loss", "compute_accuracy", "use_hyper_parallel", "use_mca", "reward_model*"),
            *("ppo_*", "kto_*", "do_sample", "temperature", "top_[kp]", "max_new_tokens"),
            *("generation_*", "*num_beams", "max_length", "*_penalty", "export_*", "vllm_*"),
            *("train_on_prompt", "mask_history", "neat_packing", "galore_*", "apollo_*"),
            *("badam_*", "kt_*", "sglang_*"),
        ),
        "does nothing, or can't be used, in DPO of an adapter; remove it (evaluate.generation is "
        "for answers)",
    ),
}

# Packages that an option (or one with a value) needs besides the lock.
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

# Names of modules, which LLaMA-Factory splits at commas, so that a list will do as well.
MODULES = ("lora_target", "oft_target", "additional_target")

# Bounds that the classes leave unsaid, for options or (with *) for several; numbers that are not
# here are 0 or more. pydantic itself refuses what is not a finite number.
BOUNDS: dict[tuple[str, ...], dict[str, Any]] = {
    MODULES: {"min_length": 1},
    ("max_steps", "local_rank", "freeze_trainable_layers"): {"ge": -1},
    ("learning_rate", "adam_epsilon", "num_train_epochs"): {"gt": 0},
    ("logging_steps", "eval_steps", "save_steps"): {"gt": 0},
    ("*_batch_size", "*accumulation_steps", "early_stopping_steps", "save_total_limit"): {"ge": 1},
    ("lora_rank", "lora_alpha", "max_samples", "preprocessing_num_workers"): {"ge": 1},
    ("*_dropout", "adam_beta?"): {"ge": 0, "lt": 1},
    ("dpo_label_smoothing",): {"ge": 0, "lt": 0.5},
    ("warmup_ratio", "ld_alpha"): {"ge": 0, "le": 1},
    ("seed", "data_seed"): {"ge": 0, "le": 2**32 - 1},  # numpy takes no larger one
}


def refusal(key: str, value: Any) -> str | None:
    """Why the ``train`` section can't hold an option, as the end of a sentence; None: it can."""
    if instead := entry(SET_ELSEWHERE, key, True):
        return f"is not set here: {instead}"
    return entry(REFUSED, key, value)


def entry(table: Mapping[str, str], key: str, value: Any) -> str | None:
    """What a table says of an option with a value. The table names an option that is not off
    (``fp8``), or one with a value (``flash_attn: fa2``); ``*`` stands for any text.
    """
    is_on = value not in (None, False, "")  # 0 is False
    for pattern, said in table.items():
        if ": " in pattern:
            found = fnmatchcase(f"{key}: {value}", pattern)
        else:
            found = is_on and fnmatchcase(key, pattern)
        if found:
            return said
    return None


def problems(options: Mapping[str, Any]) -> Iterator[str]:
    """What options need that is not there (another option, a package, a file), and which of them
    exclude each other.
    """
    for option, value in options.items():
        partner = entry(PARTNERS, option, value)
        if partner and not options.get(partner.partition(":")[0]):
            yield f"'train.{option}' also needs {partner}"
        if package := entry(PACKAGES, option, value):
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


@cache
def options() -> type[BaseModel]:
    """The options that ``llamafactory-cli train`` takes, with their types, as a model.

    It is strict, because LLaMA-Factory gets a value as it is: to it, the text 'no' is true.
    """
    names: dict[str, Any] = {"Any": Any, "Literal": Literal, "Optional": Optional}
    fields: dict[str, Any] = {}
    for node in _classes():
        if any(ast.unparse(base).endswith("Enum") for base in node.bases):
            values = [line.value for line in node.body if isinstance(line, ast.Assign)]
            names[node.name] = Literal[tuple(map(ast.literal_eval, values))]
        for line in node.body if "Argument" in node.name else ():
            if isinstance(line, ast.AnnAssign) and "init=False" not in ast.unparse(line):
                name, annotation = ast.unparse(line.target), ast.unparse(line.annotation)
                bounds: Any = _bounds(name, annotation)
                fields[name] = (_type(name, annotation, names), Field(None, **bounds))
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return create_model("Options", __config__=config, **fields)


def _classes() -> Iterator[ast.ClassDef]:
    """The classes of ``SOURCES``, from the source of the installed packages."""
    for package, modules in SOURCES.items():
        spec = find_spec(package)  # which imports nothing
        folders = spec.submodule_search_locations if spec else None
        for module in modules:
            path = Path((folders or [package])[0], f"{module}.py")
            nodes = ast.parse(path.read_text(encoding="utf-8")).body
            yield from (node for node in nodes if isinstance(node, ast.ClassDef))


def _type(name: str, annotation: str, names: dict[str, Any]) -> Any:
    """The type that an annotation means to someone who writes YAML."""
    if annotation.removesuffix(" | str") in names:
        # An enumeration's name and str: a text becomes a member, or fails when training starts.
        annotation = annotation.removesuffix(" | str")
    if name in MODULES:
        annotation += " | list[str]"
    try:
        return eval(annotation, names)  # of packages that a training imports anyway
    except NameError:
        return Any  # an object that YAML can't hold


def _bounds(name: str, annotation: str) -> dict[str, Any]:
    for names, bounds in BOUNDS.items():
        if any(fnmatchcase(name, pattern) for pattern in names):
            return bounds
    return {"ge": 0} if annotation.removesuffix(" | None") in ("int", "float") else {}
