"""What a training is made of: its configuration, its fingerprint, its environment."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest

from stages.core.errors import UserError
from stages.model import reference_logps
from stages.params import arguments
from stages.tuning import config as tuning


@pytest.fixture
def inputs(tmp_path):
    """A formatted data set and a base model, as far as a fingerprint looks at them."""
    (tmp_path / "formatted").mkdir()
    for name in ("train", "validation", "dataset_info"):
        (tmp_path / "formatted" / f"{name}.json").write_text(f'["{name}"]')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "SOURCE.json").write_text('{"commit": "1"}')
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    return tmp_path / "formatted", tmp_path / "base"


def config(p, output="models/training", validated=True):
    paths = {"model": Path("base"), "formatted": Path("formatted"), "images": Path("images")}
    return tuning.dpo_config(p, **paths, output=Path(output), validated=validated)


def test_the_configuration_holds_our_names_and_llamafactorys(params_with):
    values = {"train.beta": 0.3, "train.lora_target": ["q_proj", "v_proj"], "train.loss": "ipo"}
    made = config(params_with(**values))
    assert (made["stage"], made["pref_beta"], made["pref_loss"]) == ("dpo", 0.3, "ipo")
    assert made["lora_target"] == ["q_proj", "v_proj"]
    assert made["eval_dataset"] == "validation"
    assert not {"beta", "loss", "gpus"} & set(made)
    without = config(params_with(), validated=False)
    assert without["eval_strategy"] == "no"
    assert not {"eval_dataset", "eval_steps"} & set(without)


@pytest.mark.parametrize(
    ("change", "starts"),
    [
        ({}, True),
        ({"train.neftune_noise_alpha": 5.0}, False),
        ({"train.neftune_noise_alpha": None}, True),
        ({"train.loss": "orpo"}, False),
    ],
)
def test_noise_and_losses_without_a_reference_have_no_margin_of_0_at_step_1(
    params_with, change, starts
):
    """history.check would end such a training for a reason that is none."""
    assert tuning.starts_at_reference(params_with(**change)) is starts


@pytest.mark.parametrize(
    ("target", "frozen", "told"),
    [
        ("all", True, None),
        ("q_proj,v_proj", True, None),
        (["q_proj", "mlp.down_proj"], True, None),
        ("v_proj,q_porj", True, "'q_porj' in its name; did you mean 'q_proj'"),
        ("qkv", True, "'qkv' in its name"),  # the vision tower's, which is frozen
        ("qkv", False, None),
    ],
)
def test_a_module_that_is_not_trained_is_refused_before_the_model_is_loaded(
    params_with, model_dir, target, frozen, told
):
    p = params_with(**{"train.lora_target": target, "train.freeze_vision_tower": frozen})
    with pytest.raises(UserError, match=told) if told else nullcontext():
        tuning.check_modules(p, model_dir)


def mark(p, inputs, cached=None, **changes):
    formatted, model = inputs
    return tuning.fingerprint(config(p) | changes, p, formatted, model, cached)


FILES = ("train.json", "validation.json", "dataset_info.json", "../base/SOURCE.json")


@pytest.mark.parametrize(
    "change",
    [
        *({file: "[]"} for file in FILES),
        {"package": "torch"},
        *({"train.gpus": 8}, {"train.shared_prefix": False}, {"train.portable": False}),
        *({"train.beta": 0.11}, {"train.seed": 7}, {"train.lora_rank": 4}),
        {"format.cutoff_len": 99},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_what_decides_the_result(
    params_with, inputs, monkeypatch, change
):
    """The code is in test_meaning.py."""
    before = mark(params_with(), inputs)
    assert before == mark(params_with(), inputs, output_dir="elsewhere")
    assert len(before) == 16
    ((name, value),) = change.items()
    p = params_with()
    if name in FILES:
        (inputs[0] / name).write_text(value)
    elif name == "package":
        version = tuning.version
        monkeypatch.setattr(tuning, "version", lambda p: "0.0" if p == value else version(p))
    else:
        p = params_with(**change)
    assert mark(p, inputs) != before


# the cached reference


def logps(chosen):
    return pd.DataFrame({"key": ["a"], "chosen_logps": [chosen], "rejected_logps": [-2.0]})


@pytest.fixture
def reference_dir(inputs, params_with):
    """``data/reference`` of the demo."""
    folder = inputs[0].parent / "reference"
    made = reference_logps.made_with(inputs[1], params_with(), dtype="float32")
    reference_logps.write(folder, logps(-1.0), made)
    return folder


def test_the_reference_is_looked_up_where_it_was_made_the_same_way(
    params_with, inputs, reference_dir, capsys
):
    p = params_with()
    assert tuning.cached_reference(p, reference_dir, inputs[1]) == reference_dir
    assert capsys.readouterr().out == ""
    before = mark(p, inputs, cached=reference_dir)
    made = reference_logps.made_with(inputs[1], p, dtype="float32")
    reference_logps.write(reference_dir, logps(-1.0).assign(more=1), made)
    assert mark(p, inputs, cached=reference_dir) == before  # how they lie on disk says nothing
    reference_logps.write(reference_dir, logps(-1.5), made)
    assert mark(p, inputs, cached=reference_dir) != before
    assert mark(p, inputs) != before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train.bf16": True}, "other values of dtype), so it computes the reference in each step"),
        ({"train.fp16": True, "train.gpus": 1}, "dtype"),
        ({"train.upcast_layernorm": True}, "train.upcast_layernorm"),
        ({"model.template": "qwen3_vl"}, "model.template"),
    ],
)
def test_a_reference_made_otherwise_is_computed_in_training_and_that_is_told(
    params_with, inputs, reference_dir, capsys, change, told
):
    assert tuning.cached_reference(params_with(**change), reference_dir, inputs[1]) is None
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"train.shared_prefix": False}, {"train.loss": "orpo"}, {"train.loss": "simpo"}]
)
def test_stock_and_losses_without_a_reference_look_nothing_up(params_with, inputs, change):
    nowhere = inputs[0] / "no_such_folder"
    assert tuning.cached_reference(params_with(**change), nowhere, inputs[1]) is None


def test_every_option_that_changes_the_reference_is_llamafactorys():
    for name in tuning.CHANGE_THE_REFERENCE:
        assert name in arguments.options().model_fields
        assert not arguments.refusal(name, "bnb"), name


# devices


def test_ray_gets_no_torchrun_chooses_the_gpus_and_reports_to_nobody():
    given = {"USE_RAY": "1", "FORCE_TORCHRUN": "1", "PATH": "/usr/bin"}
    made = tuning.environment(16, given, is_portable=True)
    assert not {"FORCE_TORCHRUN", "CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE"} & set(made)
    assert made["RAY_USAGE_STATS_ENABLED"] == "0"
    assert made["TRAINING_FOLDER"] == str(Path.cwd())
    assert tuning.environment(0, given, is_portable=True)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_training_computes_portably_on_the_cpu_where_that_is_asked_for():
    def of(gpus, is_portable):
        made = tuning.environment(gpus, {"OMP_NUM_THREADS": "7"}, is_portable=is_portable)
        return made["OMP_NUM_THREADS"], made.get("MKL_CBWR"), made.get("OMP_WAIT_POLICY")

    assert of(0, True) == ("2", "COMPATIBLE", "PASSIVE")
    assert of(0, False) == ("7", None, "PASSIVE")
    assert of(1, True) == ("7", None, None)


@pytest.mark.parametrize(
    ("gpus", "given", "visible"),
    [
        (0, None, ""),
        (0, "3,5", ""),
        (1, None, "0"),
        (1, "3,5", "3"),
        (8, None, "0,1,2,3,4,5,6,7"),
        (8, "8,7,6,5,4,3,2,1,0", "8,7,6,5,4,3,2,1"),
    ],
)
def test_exactly_the_wanted_gpus_are_visible_and_more_than_one_take_torchrun(gpus, given, visible):
    base = {"KEPT": "yes", "PATH": "/usr/bin"}
    base |= {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    made = tuning.environment(gpus, base, is_portable=True)
    assert made["CUDA_VISIBLE_DEVICES"] == visible
    assert made["KEPT"] == "yes"
    assert made.get("FORCE_TORCHRUN") == ("1" if gpus > 1 else None)
    assert made["NPROC_PER_NODE"] == str(max(gpus, 1))
    assert made["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]
