"""Presets are valid and explained, and ``use`` writes them whole, with their comments."""

import shutil

import pytest
from ruamel.yaml import YAML

from stages import fetch
from stages.commands import use
from stages.core.errors import UserError
from stages.params import params
from tests.contracts import PRESETS, ROOT, agree, is_passed_on, key_lines, preset_of
from tests.repository import call


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clone with the presets and ``params.yaml``, committed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "params", "params")
    shutil.copy("params/demo.yaml", "params.yaml")
    call("git", "init", "-q", folder=tmp_path)
    call("git", "add", ".", folder=tmp_path)
    call("git", "commit", "-qm", "presets", folder=tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_valid_and_explains_every_key_of_ours(path, project):
    """By a comment on its line, or by one that its section's line has for all of it."""
    assert preset_of(path).train.loss == "sigmoid"
    use.main(path.stem)
    clear_from_their_values = {"kind", "revision", "files"}  # of a source
    lines = list(key_lines(project / "params.yaml"))
    told = {key for key, _, comment in lines if comment}
    for key, value, _ in lines:
        section, _, name = key.rpartition(".")
        if not value or is_passed_on(key):
            continue
        if ".source" not in section or name not in clear_from_their_values:
            assert {key, section} & told, f"say what {key} does, in a comment"


def test_params_yaml_starts_as_the_demo_preset():
    """As the files are, or as they are committed: an experiment in the workspace is no mistake."""
    assert agree(
        lambda read: read("params.yaml") == read("params/demo.yaml"),
    ), "cp params/demo.yaml params.yaml"


def test_own_data_is_the_demos_model_and_says_first_of_all_where_to_name_the_data(project):
    use.main("own-data")
    p = params.load()
    assert p.model == preset_of(ROOT / "params" / "demo.yaml").model
    assert p.evaluate.lm_eval == {}
    with pytest.raises(UserError, match=r"set/data\.sources\.mine\.path/to/your/pairs"):
        fetch.main("mine", project / "raw")


BASE = """\
# Preset a: what it is.

data:
  sources:                    # where from
    one: {kind: hub}          # which kind
train:
  loss: sigmoid               # which loss
  beta: 0.1                   # how strong

evaluate:
  tasks: {a: 1, b: "2"}       # how many
  none: null                  # nothing
"""
OVER = """\
# Preset b: another one.
base: a

data:
  sources: {two: {kind: path}}
train:
  loss: ipo
  gpus: 2                     # how many
evaluate:
  none: 7                     # a number
"""
MERGED = """\
# Preset b: another one.
# This file is params/a.yaml with the changes of params/b.yaml.

data:
  sources: {two: {kind: path}} # where from
train:
  loss: ipo                   # which loss
  gpus: 2                     # how many
  beta: 0.1                   # how strong

evaluate:
  tasks: {a: 1, b: "2"}       # how many
  none: 7                     # a number
"""


def test_an_overlay_changes_its_base_and_keeps_the_comments(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE)
    (tmp_path / "b.yaml").write_text(OVER)
    assert use.whole(tmp_path / "a.yaml") == BASE
    assert use.whole(tmp_path / "b.yaml") == MERGED


def test_use_never_overwrites_edits_unless_they_are_committed_or_it_is_forced(project, capsys):
    path = project / "params.yaml"
    use.main("own-data")
    use.main("demo")  # uncommitted, but a preset
    edited = path.read_text().replace("beta: 0.1", "beta: 0.7")
    path.write_text(edited)
    with pytest.raises(UserError, match="uncommitted edits; FORCE=1"):
        use.main("own-data")
    assert path.read_text() == edited
    use.main("own-data", "1")
    path.write_text(edited)
    call("git", "commit", "-qam", "edit", folder=project)
    use.main("own-data")
    assert YAML(typ="safe").load(path)["data"]["sources"]["mine"]["kind"] == "path"
    assert capsys.readouterr().out.count("params.yaml is now the preset") == 4
    path.unlink()
    use.main("demo")


def test_use_lists_the_presets_when_none_or_an_unknown_one_is_named(project):
    for preset in ("", "dem", "../params"):
        with pytest.raises(UserError, match=r"one of: demo, own-data, qwen2\.5-vl-3b, qwen3"):
            use.main(preset)
