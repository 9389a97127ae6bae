"""Asking: what is refused, what is shown, and that it is what the evaluation counts."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages import commands
from stages.commands import ask
from stages.core.errors import UserError
from stages.model import formatted
from tests.contracts import ROOT, STAGES

MOST = 8  # tokens of an answer


def test_the_places_are_those_of_the_pipeline():
    outs = {Path(out) for stage in STAGES for out in stage.outs}
    places = [value for value in vars(commands).values() if isinstance(value, Path)]
    assert len(places) == 8
    assert {place.parent if place == commands.IMAGES else place for place in places} <= outs


def test_what_can_not_be_asked_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, name)
    with pytest.raises(UserError, match="nothing was asked"):
        ask.main(image="photo.jpg")
    with pytest.raises(UserError, match=r"none.jpg can't be read \(No such file"):
        ask.main("What is it?", "none.jpg")
    with pytest.raises(UserError, match="models/base is missing; `dvc repro` makes it"):
        ask.main("What is it?")


@pytest.mark.parametrize(
    "text", ["is it $5?", 'it\'s $(touch x) `id` "q" # 5% \\ $HOME', "--pairs"]
)
@pytest.mark.parametrize("in_environment", [True, False])
def test_a_question_reaches_the_command_as_it_was_typed(tmp_path, text, in_environment):
    """Whether make has it as a variable of its own or from the environment."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    recipe = ROOT.joinpath("Makefile").read_text(encoding="utf-8")
    recipe = re.sub(r"(?m)^ask: setup.*$", "ask:", recipe).replace("$$PWD/.venv/bin", str(tmp_path))
    (tmp_path / "Makefile").write_text(recipe)
    words = ["make", "ask", *([] if in_environment else [f"QUESTION={text}"])]
    environment = os.environ | ({"QUESTION": text} if in_environment else {})
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"--question={text}\n" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def models(tuned: Any, params_with: Callable[..., Any]) -> ask.Both:
    return ask.Both(tuned, params_with(), ["<|im_end|>", "<image>"])


@pytest.mark.slow
@pytest.mark.parametrize("with_picture", [True, False])
def test_answers_and_log_probs_are_those_of_the_evaluation(
    models, base, tuned, formatted_dir, pairs_dir, tmp_path, capsys, with_picture
):
    from stages.model import scoring

    images, (row, *_) = pairs_dir / "images", formatted.read(formatted_dir, "test")
    picture = (images / row["images"][0]).read_bytes() if with_picture else b""
    question = f"{formatted.question(row)} <|im_end|>"
    ask.ask(models, question, picture, tmp_path, MOST)
    shown = capsys.readouterr().out.splitlines()
    broken = question.replace("<|im", "< |im")
    row = {"images": row["images"], "messages": [{"role": "user", "content": f"<image>{broken}"}]}
    if not with_picture:
        row = {"images": [], "messages": [{"role": "user", "content": broken}]}
    settings: Any = {"batch_tokens": 4096, "label": ""}
    said = {
        name: scoring.answer(policy, [row], images, max_new_tokens=MOST, **settings)[0]
        for name, policy in (("base", base), ("tuned", tuned))
    }
    for line, (name, answer) in zip(shown, said.items(), strict=False):
        assert line.split(":", 1)[0] == name
        assert line.split(":", 1)[1].strip() == answer.text
    pair = {"id": "", **row} | {
        side: {"role": "assistant", "content": said[name].text}
        for side, name in (("chosen", "tuned"), ("rejected", "base"))
    }
    for policy, column in ((base, 2), (tuned, 3)):
        under = scoring.log_probs(policy, [pair], images, **settings)
        for line, side in ((shown[-2], "rejected"), (shown[-1], "chosen")):
            assert float(line.split()[column]) == pytest.approx(under[f"{side}_logps"][0], abs=0.01)


@pytest.mark.slow
def test_log_probs_that_are_no_numbers_are_an_error(models, tmp_path, monkeypatch):
    from stages.model import scoring

    nothing = scoring.Answer("red", 1, True)
    broken = pd.DataFrame({"chosen_logps": [float("nan")], "rejected_logps": [-1.0]})
    monkeypatch.setattr(scoring, "log_probs", lambda *_, **__: broken)
    row = formatted.prompt("what?", [], clean=models.clean)
    with pytest.raises(UserError, match="no numbers, so weights are broken"):
        ask.log_probs(models, row, {"base": nothing, "tuned": nothing}, tmp_path)
