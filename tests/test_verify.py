"""verify tells same bits from rounding from different, and reruns what was asked in a clone."""

import hashlib
import json
import shlex
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from stages.commands import back, verify
from stages.commands.verify import DIFFERENT, ROUNDING, SAME
from stages.core.errors import UserError
from stages.tracking import tags
from tests.repository import begun

ACCURACY = "reward_margin,reward_accuracy\n"


def weights(scale):
    values = {"a": np.ones((8, 8), np.float32), "b": np.arange(8, dtype=np.float32) * scale}
    return lambda path: save_file(values, path)


def frame(move):
    table = pd.DataFrame({"id": ["x", "y"], "logps": [-30.0, -4.0 + move], "tokens": [[3], [4]]})
    return lambda path: table.to_parquet(path)


def folder(*names):
    def make(path):
        path.mkdir()
        for name in names:
            (path / name).write_text("x")

    return make


@pytest.mark.parametrize(
    ("name", "before", "after", "expected", "why"),
    [
        ("m.json", '{"a": 1.0}', '{"a": 1.0}', SAME, ""),
        ("m.json", '{"a": 0.98}', '{"a": 0.985}', ROUNDING, "m.json"),
        ("m.json", '{"a": 0.98}', '{"a": 0.9}', DIFFERENT, "0.98 != 0.9"),
        ("m.json", '{"a": [1, 2]}', '{"a": [1]}', DIFFERENT, ""),
        ("m.json", '{"a": NaN}', '{"a": 0}', DIFFERENT, "nan != 0"),
        ("m.json", '{"a": 1}', "{", DIFFERENT, "can't be read"),
        ("c.csv", "step,loss\n1,0.6931\n", "step,loss\n1,0.6932\n", ROUNDING, "c.csv"),
        ("c.csv", "step,loss\n1,0.6931\n", "step,loss\n1,0.7931\n", DIFFERENT, "0.6931 != 0.7931"),
        ("c.csv", f"{ACCURACY}1e-9,0.5\n", f"{ACCURACY}2e-9,0.25\n", ROUNDING, "c.csv"),
        ("c.csv", "a,b\n1.0,x\n2.0,\n", "a,b\n1.01,x\n2.0,\n", ROUNDING, "c.csv"),
        ("t.parquet", frame(0), frame(0.01), ROUNDING, ""),
        ("t.parquet", frame(0), frame(0.5), DIFFERENT, 'column name="logps"'),
        ("w.safetensors", weights(1.0), weights(1.001), ROUNDING, ""),
        ("w.safetensors", weights(1.0), weights(np.nan), DIFFERENT, "the weights are nan% apart"),
        ("a.bin", "1", "2", DIFFERENT, "other bytes"),
        ("data", folder("a", "b"), folder("a"), DIFFERENT, "b is gone"),
        ("data", None, folder("a"), DIFFERENT, "another hash, and no committed content"),
    ],
)
def test_an_output_is_judged_by_its_kind(tmp_path, name, before, after, expected, why):
    for side, content in (("before", before), ("after", after)):
        (tmp_path / side).mkdir()
        if content is not None:
            path = tmp_path / side / name
            content(path) if callable(content) else path.write_text(content)
    verdict, told = verify.output(tmp_path / "before" / name, tmp_path / "after" / name)
    assert verdict == expected
    assert why in told


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0.981, [ROUNDING, ROUNDING]), (0.98, [SAME, DIFFERENT]), (0.5, [DIFFERENT, DIFFERENT])],
)
def test_a_page_may_differ_only_where_the_numbers_that_it_shows_moved(tmp_path, number, expected):
    for side, value in (("before", 0.98), ("after", number)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "m.json").write_text(json.dumps({"a": value}))
        (tmp_path / side / "page.html").write_text(f"<p>{side}</p>")
    found = verify.compared(["m.json", "page.html"], tmp_path / "before", tmp_path / "after")
    assert [verdict for verdict, _ in found.values()] == expected


# a small repository

PIPELINE = """
stages:
  first:
    cmd: python add.py start.txt first.txt 1
    deps: [start.txt, add.py]
    outs: [{first.txt: {cache: false}}]
  second:
    cmd: python add.py first.txt second.json 1
    deps: [first.txt, add.py]
    outs: [second.json]
  third:
    cmd: python add.py second.json third.json 1
    deps: [second.json, add.py]
    outs: [third.json]
"""
ADD = """
import json, os, sys
source, out, more = sys.argv[1:]
assert "GIT_DIR" not in os.environ and os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite")
value = float(open(source).read()) + float(more) + float(os.environ.get("ROUNDING", 0))
open(out, "w").write(json.dumps(value))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    files = {"dvc.yaml": PIPELINE, "add.py": ADD, "start.txt": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        return begun(tmp_path_factory.mktemp("repository"), files)


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.slow
def test_results_that_come_out_again_pass_and_nothing_here_changes(project, tmp_path, capfd):
    before = {p: p.read_bytes() for p in project.iterdir() if p.is_file()}
    verify.main()
    out = capfd.readouterr().out
    assert "3 outputs: 3 same bits, 0 same within rounding, 0 different" in out
    assert {p: p.read_bytes() for p in project.iterdir() if p.is_file()} == before
    with pytest.raises(UserError, match=r"no stage thrid; choose from first, second, third"):
        verify.main("thrid")
    # The remote is named in the local configuration, as one with a password would be.
    verify.run(["dvc", "remote", "add", "--local", "-d", "r", str(tmp_path / "remote")], project)
    verify.run(["dvc", "push", "--quiet"], project)
    shutil.rmtree(project / ".dvc/cache")
    verify.main("third, second")
    assert "2 outputs: 2 same bits" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.rehearsal
def test_a_locked_hash_that_does_not_come_out_is_named(project, capfd):
    """Someone committed a result that the code does not make."""
    lock = project / "dvc.lock"
    md5 = hashlib.md5(b"7.0").hexdigest()
    cached = project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_text("7.0")
    known = tags.outputs(project)["second.json"]
    lock.write_text(lock.read_text().replace(known, md5))
    subprocess.run(["git", "commit", "-qam", "wrong"], check=True)
    with pytest.raises(UserError, match="some outputs are different"):
        verify.main("second")
    out = capfd.readouterr().out
    assert "7.0 != 3.0" in out
    assert "1 different" in out
    shutil.rmtree(project / ".dvc/cache")
    with pytest.raises(UserError, match="a stage failed in a clone of the commit"):
        verify.main("third")


@pytest.mark.slow
@pytest.mark.rehearsal
def test_another_machines_results_are_told_from_the_commits_and_never_taken_away(
    project, monkeypatch, capfd
):
    back.main(look="1")
    assert capfd.readouterr().out == ""
    monkeypatch.setenv("ROUNDING", "1e-9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    subprocess.run(["dvc", "repro", "--quiet", "--force"], check=True)
    back.main(look="1")
    said = capfd.readouterr().out
    assert "this machine's results: 3 of 3 outputs have other bits" in said
    assert "2 agree with them within rounding" in said
    assert "first.txt: other bytes" in said
    shutil.rmtree(".dvc/cache")
    with pytest.raises(UserError, match=r"lacks second\.json, third\.json of the last commit"):
        back.main()
    back.main(look="1")
    assert "third.json: another hash, and no committed content" in capfd.readouterr().out
    subprocess.run(["dvc", "commit", "--quiet", "--force"], check=True)
    subprocess.run(shlex.split(back.KEEP), check=True)
    (project / "start.txt").write_text("7")
    subprocess.run(["dvc", "repro", "--quiet"], check=True)
    back.main()
    assert json.loads((project / "third.json").read_text()) == pytest.approx(4)
    back.main(look="1")
    assert "results" not in capfd.readouterr().out


def test_outside_of_a_project_and_without_a_lock_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no Git repository with DVC here"):
        verify.main()
    with pytest.raises(UserError, match=r"dvc\.lock is missing; `dvc repro` writes it"):
        verify.outputs_by_stage(tmp_path)
