"""Presets are valid, complete and explained."""

from pathlib import Path

import pytest

from stages import fetch
from stages.core.errors import UserError
from stages.params import params
from tests.contracts import PRESETS, ROOT, agree, is_passed_on, key_lines


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_valid(preset):
    assert params.load(preset).train.loss == "sigmoid"


def test_params_yaml_starts_as_the_demo_preset():
    """As the files are, or as they are committed: an experiment in the workspace is no mistake."""
    assert agree(
        lambda read: read("params.yaml") == read("params/demo.yaml"),
    ), "cp params/demo.yaml params.yaml"


def test_own_data_says_first_of_all_where_to_name_the_data(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((ROOT / "params" / "own-data.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"data\.sources\.mine: set/data\.sources\.mine\.path/to/your/pairs does"
    ):
        fetch.main("data.sources.mine", tmp_path / "raw")


def test_own_data_has_the_demos_model_and_no_task_of_its_data():
    own, demo = (params.load(ROOT / "params" / f"{name}.yaml") for name in ("own-data", "demo"))
    assert own.model == demo.model
    assert own.evaluate.lm_eval == {}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_the_keys_of_the_demo(preset):
    """Of our own keys, that is; sources differ, and ``train`` passes on what a preset wants."""

    def ours(path: Path) -> set[str]:
        return {
            key
            for key, _, _ in key_lines(path)
            if ".source" not in key and ".lm_eval." not in key and not is_passed_on(key)
        }

    assert ours(preset) == ours(ROOT / "params" / "demo.yaml")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_parameter_of_ours_is_explained_where_people_meet_it(preset):
    """By a comment on its line, or by one that its section's line has for all of it."""
    clear_from_their_values = {"kind", "revision", "files"}  # of a source
    told = {key for key, _, comment in key_lines(preset) if comment}
    for key, value, _ in key_lines(preset):
        section, _, name = key.rpartition(".")
        if (
            value
            and not is_passed_on(key)
            and not (section.endswith(".source") and name in clear_from_their_values)
        ):
            assert {key, section} & told, f"{preset.name}: say what {key} does, in a comment"


def test_presets_explain_equal_settings_in_equal_words():
    """What a comment says of a value is true in every preset that has the value."""
    said: dict[tuple[str, str], dict[str, str]] = {}
    for preset in PRESETS:
        for key, value, comment in key_lines(preset):
            if ".source" not in key and not key.startswith(("train.", "data.sources")):
                said.setdefault((key, value), {}).setdefault(comment, preset.name)
    differing = {setting: comments for setting, comments in said.items() if len(comments) > 1}
    assert not differing
