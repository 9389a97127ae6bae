"""verify tells same bits from rounding from different, and reruns what was asked in a clone."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML
from safetensors.numpy import save_file

from stages.commands import lockfile, same_results, statement, verify
from stages.commands.same_results import DIFFERENT, ROUNDING, SAME, Bound
from stages.core.errors import UserError


def verdict(tmp_path, name, before, after):
    paths = []
    for side, content in (("before", before), ("after", after)):
        path = tmp_path / side / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content(path) if callable(content) else path.write_text(content)
        paths.append(path)
    return same_results.one(name, *paths)


def weights(scale):
    values = {"a": np.ones((8, 8), np.float32), "b": np.arange(8, dtype=np.float32) * scale}
    return lambda path: save_file(values, path)


def frame(move):
    table = pd.DataFrame({"id": ["x", "y"], "logps": [-30.0, -4.0 + move], "tokens": [3, 4]})
    return lambda path: table.to_parquet(path)


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("m.json", '{"a": 1.0}', '{"a": 1.0}', SAME),
        ("m.json", '{"a": 0.98}', '{"a": 0.985}', ROUNDING),
        ("m.json", '{"a": 0.98}', '{"a": 0.9}', DIFFERENT),
        ("m.json", '{"a": 0.98}', '{"b": 0.98}', DIFFERENT),
        ("m.json", '{"a": "yes"}', '{"a": "no"}', DIFFERENT),
        ("m.json", '{"a": [1, 2]}', '{"a": [1]}', DIFFERENT),
        ("m.json", '{"a": 1}', "{", DIFFERENT),
        ("c.csv", "step,loss\n1,0.6931\n", "step,loss\n1,0.6932\n", ROUNDING),
        ("c.csv", "step,loss\n1,0.6931\n", "step,loss\n1,0.7931\n", DIFFERENT),
        ("c.csv", "step,loss\n1,0.6931\n", "step,cost\n1,0.6931\n", DIFFERENT),
        ("t.parquet", frame(0), frame(0.01), ROUNDING),
        ("t.parquet", frame(0), frame(0.5), DIFFERENT),
        ("w.safetensors", weights(1.0), weights(1.001), ROUNDING),
        ("w.safetensors", weights(1.0), weights(1.2), DIFFERENT),
        ("a.bin", "1", "2", DIFFERENT),
    ],
)
def test_a_file_is_judged_by_its_kind(tmp_path, name, before, after, expected):
    assert verdict(tmp_path, name, before, after).verdict == expected


def test_not_a_number_agrees_with_itself_alone():
    bound = Bound(0.01, 0.02)
    assert bound.holds([float("nan"), float("inf")], [float("nan"), float("inf")])
    assert not bound.holds([float("nan")], [0.0])
    assert not bound.holds([float("inf")], [1.0])


def test_a_file_that_is_new_or_gone_is_named(tmp_path):
    for side, names in (("before", ("a", "b")), ("after", ("a",))):
        (tmp_path / side).mkdir()
        for name in names:
            (tmp_path / side / name).write_text("x")
    found = same_results.one("data/x", tmp_path / "before", tmp_path / "after")
    assert (found.verdict, found.why) == (DIFFERENT, "b is no longer made")


def test_a_page_may_differ_only_where_the_numbers_that_it_shows_moved(tmp_path):
    def outputs(number):
        sides = []
        for side, value in (("before", 0.98), ("after", number)):
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / "m.json").write_text(json.dumps({"a": value}))
            (tmp_path / side / "page.html").write_text(f"<p>{side}</p>")
            sides.append({n: tmp_path / side / n for n in ("m.json", "page.html")})
        return [each.verdict for each in same_results.outputs(*sides)]

    assert outputs(0.981) == [ROUNDING, ROUNDING]
    assert outputs(0.98) == [SAME, DIFFERENT]
    assert outputs(0.5) == [DIFFERENT, DIFFERENT]


# a small repository

PIPELINE = """
stages:
  third:
    cmd: python add.py second.json third.json 1
    deps: [second.json, add.py]
    outs: [third.json]
  second:
    cmd: python add.py first.txt second.json 1
    deps: [first.txt, add.py]
    outs: [second.json]
  first:
    cmd: python add.py start.txt first.txt 1
    deps: [start.txt, add.py]
    outs: [{first.txt: {cache: false}}]
"""
ADD = """
import json, os, sys
source, out, more = sys.argv[1:]
assert "GIT_DIR" not in os.environ and os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite")
value = float(open(source).read()) + float(more)
open(out, "w").write(json.dumps(value))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository whose two stages were run and committed."""
    root = tmp_path_factory.mktemp("repository")
    for name, text in (("dvc.yaml", PIPELINE), ("add.py", ADD), ("start.txt", "1")):
        (root / name).write_text(text)
    for words in (
        ["git", "init", "--quiet"],
        ["git", "config", "user.email", "a@b.invalid"],
        ["git", "config", "user.name", "a"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "repro", "--quiet"],
        ["git", "add", "-A"],
        ["git", "commit", "--quiet", "-m", "made"],
    ):
        subprocess.run(words, cwd=root, check=True, env=verify.environment())
    return root


def commit(root, message):
    subprocess.run(["git", "commit", "-qam", message], cwd=root, check=True)


@pytest.mark.slow
def test_results_that_come_out_again_pass_and_nothing_here_changes(made, monkeypatch, capfd):
    monkeypatch.chdir(made)
    monkeypatch.setattr(verify, "issue", lambda *_: print("issued"))
    before = {p: p.read_bytes() for p in made.iterdir() if p.is_file()}
    verify.main()
    out = capfd.readouterr().out
    assert "3 outputs: 3 same bits, 0 same within rounding, 0 different" in out
    assert "issued" in out
    assert {p: p.read_bytes() for p in made.iterdir() if p.is_file()} == before
    verify.main(stages="second")  # its input from the commit; no certificate of a part
    assert "issued" not in capfd.readouterr().out


@pytest.mark.slow
def test_inputs_come_from_the_remote_where_the_cache_lacks_them(made, monkeypatch, capfd, tmp_path):
    """The remote is named in the local configuration, as one with a password would be."""
    monkeypatch.chdir(made)
    cache = made / ".dvc/cache"
    shutil.move(cache, tmp_path / "away")
    with pytest.raises(UserError, match=r"second\.json is neither in DVC's cache nor in a remote"):
        verify.main(stages="third")
    shutil.rmtree(cache, ignore_errors=True)
    shutil.move(tmp_path / "away", cache)
    verify.run(["dvc", "remote", "add", "--local", "-d", "r", str(tmp_path / "remote")], made)
    verify.run(["dvc", "push", "--quiet"], made)
    shutil.rmtree(cache)
    verify.main(stages="third")
    assert "1 outputs: 1 same bits" in capfd.readouterr().out


@pytest.mark.slow
def test_a_locked_hash_that_does_not_come_out_is_named(made, monkeypatch, capfd):
    """Someone committed a result that the code does not make."""
    monkeypatch.chdir(made)
    lock = made / "dvc.lock"
    honest = lock.read_text()
    wrong = "7.0"
    cache = made / ".dvc/cache/files/md5"
    md5 = hashlib.md5(wrong.encode()).hexdigest()
    (cache / md5[:2]).mkdir(parents=True, exist_ok=True)
    (cache / md5[:2] / md5[2:]).write_text(wrong)
    known = lockfile.read(lock)["second"].outs["second.json"].md5
    lock.write_text(honest.replace(known, md5))
    commit(made, "wrong")
    try:
        with pytest.raises(UserError, match="some outputs are different"):
            verify.main(stages="second")
    finally:
        lock.write_text(honest)
        commit(made, "right")
    out = capfd.readouterr().out
    assert "second.json: it is 3.0, not 7.0" in out
    assert "1 different" in out


@pytest.mark.slow
def test_a_certificate_is_refused_where_dvc_lock_is_out_of_date(made):
    statement.require_current(made)
    start = made / "start.txt"
    start.write_text("2")
    try:
        with pytest.raises(UserError, match=r"dvc\.lock is out of date: first changed since"):
            statement.require_current(made)
    finally:
        start.write_text("1")


def test_what_can_not_be_compared_is_different(tmp_path):
    (tmp_path / "new").write_text("x")
    found = same_results.one("data/x", tmp_path / "gone", tmp_path / "new")
    assert (found.verdict, found.why) == (
        DIFFERENT,
        "another hash, and no committed content to compare",
    )


def test_stages_are_chosen_in_the_order_in_which_they_run(tmp_path):
    entry = {"cmd": "c", "deps": [], "outs": []}

    def content(path):
        return {"path": path, "md5": "a", "size": 1}

    stages = {
        "late": entry | {"deps": [content("x/part")]},
        "fetch@data": entry | {"outs": [content("x")]},
        "fetch@model": entry,
    }
    with (tmp_path / "dvc.lock").open("w") as file:
        YAML().dump({"stages": stages}, file)
    locked = lockfile.read(tmp_path / "dvc.lock")
    assert verify.chosen("late fetch", locked) == ["fetch@data", "fetch@model", "late"]
    assert verify.chosen("", locked) == list(locked)
    with pytest.raises(UserError, match=r"no stage lat; choose from .*; did you mean 'late'"):
        verify.chosen("lat", locked)


def test_outside_of_a_project_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no Git repository with DVC here"):
        verify.main()


def test_a_lock_file_that_is_none_is_refused_in_a_sentence(tmp_path):
    path = Path(tmp_path, "dvc.lock")
    with pytest.raises(UserError, match=r"dvc\.lock is missing; `dvc repro` writes it"):
        lockfile.read(path)
    for text in ("stages: [1]", "a: [", "{}", "stages: {a: {cmd: c, outs: [{path: x}]}}"):
        path.write_text(text)
        with pytest.raises(UserError, match="can't be read as DVC's lock file"):
            lockfile.read(path)
    assert os.listdir(tmp_path) == ["dvc.lock"]
