"""What a training is made of: its configuration, its fingerprint, its environment."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from stages.core.errors import UserError
from stages.model import reference_logps
from stages.params import arguments
from stages.tuning import config as tuning

ROOT = Path(__file__).parent.parent


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
    made = config(params_with(**{"train.beta": 0.3, "train.lora_rank": 5, "train.loss": "ipo"}))
    assert (made["stage"], made["pref_beta"], made["pref_loss"]) == ("dpo", 0.3, "ipo")
    assert made["lora_rank"] == 5
    assert made["eval_dataset"] == "validation"
    assert not {"beta", "loss", "gpus"} & set(made)


def test_without_validation_pairs_nothing_is_evaluated_in_training(params_with):
    made = config(params_with(), validated=False)
    assert made["eval_strategy"] == "no"
    assert not {"eval_dataset", "eval_steps"} & set(made)


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


@pytest.mark.parametrize("target", ["all", "q_proj,v_proj", ["q_proj", "mlp.down_proj"]])
def test_modules_that_the_model_has_can_be_named(params_with, model_dir, target):
    tuning.check_modules(params_with(**{"train.lora_target": target}), model_dir)


def test_a_module_that_the_model_has_not_got_is_refused_before_it_is_loaded(params_with, model_dir):
    for target, told in (("q_porj", "'q_porj' in its name; did you mean 'q_proj'"), ("qkv", "qkv")):
        with pytest.raises(UserError, match=told):  # qkv is the frozen vision tower's
            tuning.check_modules(params_with(**{"train.lora_target": target}), model_dir)
    unfrozen = params_with(**{"train.lora_target": "qkv", "train.freeze_vision_tower": False})
    tuning.check_modules(unfrozen, model_dir)


def test_a_list_of_modules_reaches_llamafactory_as_a_list(params_with):
    assert config(params_with(**{"train.lora_target": ["q_proj", "v_proj"]}))["lora_target"] == [
        "q_proj",
        "v_proj",
    ]


def mark(p, inputs, gpus=0, cached=None, **changes):
    formatted, model = inputs
    return tuning.fingerprint(
        config(p) | changes,
        formatted,
        model,
        gpus,
        shared_prefix=p.train.shared_prefix,
        keep_vision_features=p.train.keep_vision_features,
        cached=cached,
    )


def test_the_fingerprint_does_not_depend_on_where_results_go(params_with, inputs):
    one = mark(params_with(), inputs)
    assert one == mark(params_with(), inputs, output_dir="elsewhere")
    assert len(one) == 16
    assert int(one, 16) >= 0


@pytest.mark.parametrize(
    "file",
    [f"formatted/{name}.json" for name in ("train", "validation", "dataset_info")]
    + ["base/SOURCE.json"],
)
def test_the_fingerprint_changes_with_data_and_model(params_with, inputs, tmp_path, file):
    before = mark(params_with(), inputs)
    (tmp_path / file).write_text("[]")
    assert mark(params_with(), inputs) != before


def test_the_fingerprint_changes_with_packages_and_processes(params_with, inputs, monkeypatch):
    seen = {mark(params_with(), inputs), mark(params_with(), inputs, gpus=8)}
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "version", lambda package: f"{package} of another day")
        seen.add(mark(params_with(), inputs))
    assert len(seen) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"train.keep_vision_features": True},
        {"train.beta": 0.11},
        {"train.seed": 7},
        {"train.lora_rank": 4},
        {"format.cutoff_len": 99},
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_result(params_with, inputs, change):
    before = mark(params_with(), inputs)
    assert mark(params_with(**change), inputs) != before


def test_liger_is_said_to_do_nothing_where_it_does_nothing(params_with, inputs):
    base = inputs[1]
    (base / "config.json").write_text('{"model_type": "qwen3_vl"}')
    told = tuning.without_effect(params_with(**{"train.enable_liger_kernel": True}), base)
    assert told is not None
    assert "does nothing for qwen3_vl" in told
    assert tuning.without_effect(params_with(), base) is None
    (base / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert tuning.without_effect(params_with(**{"train.enable_liger_kernel": True}), base) is None


@pytest.mark.slow
def test_llamafactory_still_has_no_liger_kernels_for_qwen3_vl():
    from llamafactory.model.model_utils import liger_kernel

    source = Path(str(liger_kernel.__file__)).read_text()
    assert '"qwen2_5_vl"' in source
    assert '"qwen3_vl"' not in source


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
        ({"train.bf16": True}, "dtype is float32 in the reference and bfloat16 in training"),
        (
            {"train.fp16": True, "train.gpus": 1},
            "dtype is float32 in the reference and float16",
        ),
        ({"train.pure_bf16": True, "train.gpus": 1}, "bfloat16"),
        ({"train.upcast_layernorm": True}, "train.upcast_layernorm is None in the reference"),
        ({"model.template": "qwen3_vl"}, "model.template"),
    ],
)
def test_a_reference_made_otherwise_is_computed_in_training_and_that_is_told(
    params_with, inputs, reference_dir, capsys, change, told
):
    assert tuning.cached_reference(params_with(**change), reference_dir, inputs[1]) is None
    said = capsys.readouterr().out
    assert told in said
    assert "computed in each step" in said


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


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("NNODES", "2", r"NNODES is set, and several machines train by Ray.*docs/scaling\.md"),
        ("RDZV_ID", "7", r"RDZV_ID is set, and several machines train by Ray"),
        ("USE_RAY", "1", r"USE_RAY is set, and Ray is not installed: `make extras`"),
        ("USE_V1", "true", r"USE_V1 is set.*unset it"),
    ],
)
def test_what_would_start_other_processes_is_refused(variable, value, told, monkeypatch):
    monkeypatch.setattr(tuning, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=told):
        tuning.check_environment({variable: value})
    tuning.check_environment({"NNODES": "1", "NODE_RANK": "0", "USE_RAY": "0"})


def test_ray_gets_no_torchrun_chooses_the_gpus_and_reports_to_nobody():
    given = {"USE_RAY": "1", "FORCE_TORCHRUN": "1", "PATH": "/usr/bin"}
    made = tuning.environment(16, given)
    assert not {"FORCE_TORCHRUN", "CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE"} & set(made)
    assert made["RAY_USAGE_STATS_ENABLED"] == "0"
    assert made["TRAINING_FOLDER"] == str(Path.cwd())
    assert tuning.environment(0, given)["CUDA_VISIBLE_DEVICES"] == ""


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
def test_exactly_the_wanted_gpus_are_visible(gpus, given, visible):
    base = {"KEPT": "yes"} | ({} if given is None else {"CUDA_VISIBLE_DEVICES": given})
    made = tuning.environment(gpus, base)
    assert made["CUDA_VISIBLE_DEVICES"] == visible
    assert made["KEPT"] == "yes"


def test_only_more_than_one_gpu_takes_torchrun():
    assert "FORCE_TORCHRUN" not in tuning.environment(0, {}) | tuning.environment(1, {})
    eight = tuning.environment(8, {})
    assert (eight["FORCE_TORCHRUN"], eight["NPROC_PER_NODE"]) == ("1", "8")


def test_the_tools_beside_the_interpreter_are_on_the_path():
    path = tuning.environment(8, {"PATH": "/usr/bin"})["PATH"]
    assert path.split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


@pytest.mark.slow
def test_gpus_that_are_not_there_are_missed_before_anything_is_loaded(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"train.gpus is 1, but torch finds no GPU here"):
        tuning.require_gpus(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=r"train.gpus is 8, but torch finds 4 GPUs here"):
        tuning.require_gpus(8)
    tuning.require_gpus(4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    tuning.require_gpus(4)
    with pytest.raises(UserError, match=r"train.bf16 is true, and the Tesla T4 has no bfloat16"):
        tuning.require_gpus(4, bf16=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"train.tf32 is true, and the Tesla T4 has none"):
        tuning.require_gpus(4, tf32=True)


def test_a_training_on_the_cpu_does_not_even_import_torch():
    code = (
        "import sys; from stages.tuning import config; config.require_gpus(0); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
