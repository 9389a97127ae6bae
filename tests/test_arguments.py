"""What the train section may hold: LLaMA-Factory's arguments, except those the pipeline sets."""

import json
from pathlib import Path

import pytest

from stages.params import arguments
from stages.tuning.config import dpo_config


def test_known_keys_with_fitting_values_pass():
    for key, value in {
        "lora_rank": 8,
        "learning_rate": 5.0e-5,
        "lora_target": "all",
        "finetuning_type": "lora",
        "bf16": True,
        "deepspeed": "examples/ds_z2.json",
        "save_total_limit": None,
        "max_steps": 10,
    }.items():
        assert arguments.problem_with(key, value) is None, key


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("lora_rnak", 8, "LLaMA-Factory has no option 'lora_rnak'; did you mean 'lora_rank'?"),
        ("betaa", 0.1, "did you mean 'beta'?"),
        ("zzzzzz", 0.1, "LLaMA-Factory has no option 'zzzzzz'"),
        ("learning_rate", 0, "must be greater than 0"),
        ("learning_rate", "fast", "'fast'"),
        ("lora_rank", 0, "must be at least 1"),
        ("lora_rank", 2.5, "2.5"),
        ("finetuning_type", "lara", "'lara'"),
        ("flash_attn", "fa9", "'fa2'"),
        ("output_dir", "x", "it comes from dvc.yaml"),
        ("pref_beta", 0.1, "it comes from train.beta"),
    ],
)
def test_a_wrong_key_or_value_is_told(key, value, told):
    assert told in (arguments.problem_with(key, value) or "no problem")


@pytest.mark.slow
def test_the_committed_file_says_what_the_installed_llamafactory_accepts(llamafactory):
    assert json.loads(arguments.FILE.read_text()) == arguments.document(), (
        "run python -m stages.params.arguments"
    )


def test_what_the_pipeline_sets_is_an_argument_or_was_one():
    # Names that other versions have are refused under their old reason, not as misspellings.
    gone = {"overwrite_output_dir", "hf_hub_token"}
    assert set(arguments.RESERVED) - set(arguments.arguments()) <= gone


def test_every_key_of_the_configuration_is_an_argument(params_with):
    made = dpo_config(
        params_with(),
        model=Path("m"),
        formatted=Path("f"),
        images=Path("i"),
        output=Path("o"),
        validated=True,
    )
    assert set(made) <= set(arguments.arguments())


def test_every_bound_is_of_an_argument():
    bounded = {key for keys in arguments.BOUNDS.values() for key in keys}
    assert bounded <= set(arguments.arguments())


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("lr_scheduler_type", "cosin", "'cosine'"),
        ("eval_strategy", "foo", "'epoch'"),
        ("optim", "adam", "'adamw_torch'"),
    ],
)
def test_a_value_outside_of_an_enumeration_is_refused_with_those_there_are(
    key: str, value: str, known: str
):
    problem = arguments.problem_with(key, value)
    assert problem is not None
    assert known in problem
    assert arguments.problem_with(key, known.strip("'")) is None
