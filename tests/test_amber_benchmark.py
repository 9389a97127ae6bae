"""The benchmark that compares AMBER's script with the task, on published answers."""

import json
import subprocess

import pytest

from benchmarks import amber
from stages.answers import published
from stages.core.errors import UserError
from tests.test_published import AMBER_BY_HAND, AMBER_LISTS, DESCRIPTIONS


def clone(folder, files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for said in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "answers")):
        subprocess.run(["git", *said], cwd=folder, check=True)
    return folder


def test_the_tasks_figures_are_put_next_to_what_the_script_printed(monkeypatch, tmp_path, capsys):
    answers = [{"id": at + 1, "response": said} for at, said in enumerate(DESCRIPTIONS)]
    lists = clone(tmp_path / "lists", {f"data/{name}": t for name, t in AMBER_LISTS.items()})
    published_there = clone(
        tmp_path / "answers",
        {
            "AMBER/said.json": json.dumps(answers),
            "AMBER/result.txt": "100%|#|\nCHAIR:\t\t 39.5\nCover:    66.7\nHal: 70\nCog:  30.0 \n",
        },
    )
    monkeypatch.setattr(amber, "LISTS", "HEAD")
    monkeypatch.setattr(amber, "SETS", (("a model", "HEAD", "said.json", "result.txt"),))
    monkeypatch.setattr(published, "pinned", published.pinned)  # main replaces it
    amber.main(lists, published_there)
    row = capsys.readouterr().out.splitlines()[-1]
    ours = [100 * AMBER_BY_HAND[metric] for metric in amber.METRICS]
    theirs = (39.5, 66.7, 70.0, 30.0)
    for a, b in zip(ours, theirs, strict=True):
        assert f"{a:.1f} / {b:.1f} ({a - b:+.1f})" in row
    with pytest.raises(UserError, match="clone it with all of its history"):
        amber.shown(lists, "HEAD", "data/other.json")
