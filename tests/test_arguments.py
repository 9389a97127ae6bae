"""What the train section may hold beside our own keys: LLaMA-Factory's options, except those that
the pipeline sets, that undo a promise of it, or that need what is not there.
"""

import dataclasses
import types
import typing
from enum import Enum
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Literal, Union

import pytest

from stages.core.errors import UserError
from stages.params import arguments, params
from stages.tuning.config import CHANGE_THE_REFERENCE, dpo_config
from tests.test_params import changed, refusal

OPTIONS = arguments.options().model_fields
TABLES: dict[str, Any] = {
    "SET_ELSEWHERE": arguments.SET_ELSEWHERE,
    "REFUSED": arguments.REFUSED,
    "BOUNDS": [name for names, _ in arguments.BOUNDS for name in names],
    "PACKAGES": arguments.PACKAGES,
    "PARTNERS": [*arguments.PARTNERS, *arguments.PARTNERS.values()],
    "FILES": arguments.FILES,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_name_in_our_tables_is_an_option(table):
    # Names that other versions have are refused under their reason, not as misspellings.
    gone = {"overwrite_output_dir"}
    names = {pattern.partition(":")[0] for pattern in TABLES[table]} - gone
    assert not {name for name in names if not any(fnmatchcase(key, name) for key in OPTIONS)}


@pytest.mark.parametrize("key", arguments.REFUSED)
def test_an_option_that_undoes_a_promise_says_what_to_do_and_may_be_off(key):
    name, _, value = key.partition(": ")
    name = next(option for option in OPTIONS if fnmatchcase(option, name))
    said = refusal(**{f"train.{name}": value or 4})
    assert f"'train.{name}' " in said
    assert any(word in said for word in ("remove it", "set it to", "set model", "give"))
    if not value:  # as a copied YAML file may have it
        assert arguments.refusal(name, None) is arguments.refusal(name, False) is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lora_rank": 0}, "'train.lora_rank' = 0: input should be greater than or equal to 1"),
        ({"lora_rank": 2.5}, "integer"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"warmup_ratio": 1.5}, "less than or equal to 1"),
        ({"dpo_label_smoothing": 0.5}, "less than 0.5"),
        ({"save_steps": 0}, "greater than 0"),
        ({"max_steps": 0}, "set it to -1 for that, or to 1 or more"),
        ({"seed": 2**32}, "less than or equal to"),
        ({"dataloader_num_workers": -1}, "greater than or equal to 0"),
        ({"finetuning_type": "lara"}, "'lora'"),
        ({"lr_scheduler_type": "cosin"}, "'cosine'"),
        ({"lora_target": []}, "at least 1"),
        ({"lora_rnak": 8}, "did you mean 'lora_rank'?"),
        ({"pref_beta": 0.2}, "'train.pref_beta' is not set here: set train.beta"),
        ({"cutoff_len": 99}, "set format.cutoff_len"),
        ({"output_dir": "elsewhere"}, "'train.output_dir' is not set here"),
        ({"report_to": "wandb"}, "tracked in MLflow"),
        ({"push_to_hub": True}, "`make publish` uploads"),
        ({"default_system": "Be brief."}, "preprocess.wanted.system_prompt: true"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        (
            {"early_stopping_steps": 3},
            "'train.early_stopping_steps' also needs load_best_model_at_end: true",
        ),
        ({"save_strategy": "best"}, "also needs metric_for_best_model: rewards/accuracies"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs lr_scheduler_kwargs: {min_lr_rate"),
        ({"dataloader_prefetch_factor": 2}, "also needs dataloader_num_workers: 2"),
        ({"deepspeed": "none.json"}, "there is no file none.json"),
        ({"load_best_model_at_end": True, "save_steps": 65}, "a multiple of eval_steps"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "a save_strategy like eval_s"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_with_what_is_right(values, told):
    assert told in refusal(**{f"train.{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    "values",
    [
        {"lora_target": "q_proj, v_proj"},
        {"lora_target": ["q_proj", "v_proj"]},
        {"bf16": True, "neftune_noise_alpha": 5.0},
        {"load_best_model_at_end": True, "early_stopping_steps": 3, "save_steps": 128},
        {"load_best_model_at_end": True, "save_steps": 0.3, "eval_steps": 0.1},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}},
        {"save_total_limit": None, "max_steps": -1, "dpo_label_smoothing": 0.1},
    ],
    ids=str,
)
def test_options_pass_through_as_they_are(values):
    p = params.checked(changed(**{f"train.{k}": v for k, v in values.items()}), "mine.yaml")
    assert values.items() <= p.train.passed_through.items()
    assert not p.train.passed_through.keys() & params.Train.model_fields.keys()


@pytest.mark.parametrize("option", arguments.PACKAGES)
def test_an_option_that_needs_a_package_names_the_command_that_fits_the_lock(option, monkeypatch):
    def missing(_: str) -> str:
        raise PackageNotFoundError

    key, _, value = option.partition(": ")
    key = key.replace("*", "use")
    given = {key: value.replace("[48]", "4").replace("*", "a") or True}
    monkeypatch.setattr(arguments, "version", missing)
    (said,) = arguments.problems(given)
    assert said.startswith(f"'train.{key}' needs a package")
    assert f"-c requirements.txt {arguments.PACKAGES[option]}`" in said
    monkeypatch.setattr(arguments, "version", str)
    assert not list(arguments.problems(given))


@pytest.mark.slow
def test_the_options_are_those_that_the_installed_llamafactory_parses(llamafactory):
    from llamafactory.hparams import parser

    parsed = {f.name: f for kind in parser._TRAIN_ARGS for f in dataclasses.fields(kind) if f.init}
    assert set(OPTIONS) == set(parsed)
    for kind in parser._TRAIN_ARGS:
        for name, hint in typing.get_type_hints(kind).items():
            for enum in {hint, *typing.get_args(hint)}:
                if name in OPTIONS and isinstance(enum, type) and issubclass(enum, Enum):
                    known = values_of(OPTIONS[name].annotation)
                    assert {member.value for member in enum} <= set(known), name


@pytest.mark.slow
def test_no_option_is_taken_that_changes_what_the_model_is_shown_in_training_alone(llamafactory):
    """Of a new version's options, each that is not refused has to be looked at, and put here."""
    from llamafactory.hparams import DataArguments, ModelArguments

    data, model = (
        {f.name for f in dataclasses.fields(kind) if f.init and not arguments.refusal(f.name, 1)}
        for kind in (DataArguments, ModelArguments)
    )
    assert data == {
        *("buffer_size", "mix_strategy", "interleave_probs", "overwrite_cache", "max_samples"),
        *("preprocessing_batch_size", "preprocessing_num_workers", "ignore_pad_token_for_loss"),
        *("eval_on_each_dataset", "data_shared_file_system"),
    }
    assert model - set(CHANGE_THE_REFERENCE) == {
        *("adapter_folder", "cache_dir", "offload_folder", "low_cpu_mem_usage", "infer_dtype"),
        *("init_special_tokens", "moe_aux_loss_coef", "print_param_status", "use_kv_cache"),
        *("disable_gradient_checkpointing", "use_unsloth_gc", "use_reentrant_gc", "flash_attn"),
    }


def values_of(kind: Any) -> list[Any]:
    """Some values of a type; of an enumeration, all."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in SOME:
        return SOME[kind]
    if origin is Literal:
        return list(inner)
    if origin in (Union, types.UnionType):
        return [value for each in inner for value in values_of(each)]
    return [[value] for value in values_of(inner[0])] if origin is list else [{"a": 1}]


SOME: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [1, 2],
    float: [0.5, 1.0],
    str: ["a"],
    type(None): [None],
    Any: ["a", True],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "around", [{}, {"model.quantization_bit": 4, "train.gpus": 1}], ids=["plain", "quantised"]
)
def test_what_is_not_refused_passes_llamafactorys_own_checks(around, llamafactory, monkeypatch):
    """Else a training would end in a trace, after hours of the stages before it."""
    from llamafactory.hparams import parser

    made_once = parser.HfArgumentParser(parser._TRAIN_ARGS)  # of 480; it takes most of the time
    monkeypatch.setattr(parser, "HfArgumentParser", lambda _: made_once)
    passed, failed = 0, {}
    folders = dict.fromkeys(("model", "formatted", "images", "output"), Path("none"))
    for key, field in OPTIONS.items():
        for value in values_of(field.annotation):
            try:
                p = params.checked(changed(**around, **{f"train.{key}": value}), "params.yaml")
            except UserError:
                continue
            made = dpo_config(p, **folders, validated=True)
            try:
                parser.get_train_args(made | {"use_cpu": True})
                passed += 1
            except Exception as error:
                failed[key] = str(error)
    of_the_gpu = {"pure_bf16", "tf32"}  # machine.lacking asks it
    senseless = {"ddp_backend", "fsdp", "debug", "interleave_probs"}
    assert set(failed) <= of_the_gpu | senseless, failed
    assert passed > 300
