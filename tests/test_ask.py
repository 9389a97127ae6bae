"""Asking: what is refused, what is shown, and that it is what the evaluation counts."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from stages.commands import ask, asking, outputs
from stages.commands.asking import Asked
from stages.commands.outputs import Places
from stages.core.errors import UserError
from stages.model import formatted
from stages.params import params
from tests.contracts import ROOT, STAGES
from tests.experiment import pair_rows, score_table

MOST = 8  # tokens of an answer


def test_the_places_are_those_of_the_pipeline(monkeypatch):
    monkeypatch.chdir(ROOT)
    at = outputs.read()
    outs = {out for stage in STAGES for out in stage.outs}
    assert any(out.startswith(f"{at.raw.as_posix()}/") for out in outs)
    for path in (at.formatted_data, at.model, at.adapter, at.results, at.details, at.page):
        assert path.as_posix() in outs
    assert at.card.as_posix() in outs
    assert at.images.parent.as_posix() in outs


def test_without_a_pipeline_the_places_are_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no dvc.yaml here"):
        outputs.read()
    (tmp_path / "dvc.yaml").write_text("stages: {report: {cmd: python -m x --model models/base}}")
    with pytest.raises(UserError, match="has no 'raw' for the stage report"):
        outputs.read()


# what is refused, before a model is loaded


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This project's pipeline without any output, as the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def test_nothing_asked_outside_of_a_terminal_is_refused(here, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a question"))
    with pytest.raises(UserError, match="nothing was asked"):
        ask.main()


def test_a_picture_without_a_question_and_a_missing_adapter_are_refused(here):
    with pytest.raises(UserError, match="--image needs a --question"):
        ask.main(image="photo.jpg")
    with pytest.raises(UserError, match="models/base is missing; `dvc repro` makes it"):
        ask.main(question="What is it?")


def test_a_picture_that_preprocess_would_leave_out_is_refused_with_the_reason(here):
    p = params.load()
    small, text = here / "small.png", here / "text.jpg"
    Image.new("RGB", (9, 200)).save(small)
    text.write_text("no picture")
    for file, reason in (
        (small, "9 x 200 pixels"),
        (text, "read are JPEG, PNG"),
        (here / "none.jpg", "No such file"),
    ):
        with pytest.raises(UserError, match=reason):
            asking.picture(file, here, p)


def test_a_picture_is_stored_upright_as_preprocess_does(here):
    picture = Image.new("RGB", (60, 40), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(here / "turned.jpg", exif=exif)
    name = asking.picture(here / "turned.jpg", here, params.load())
    assert Image.open(here / name).size == (40, 60)


# test pairs


@pytest.fixture
def measured(tmp_path: Path) -> Places:
    (tmp_path / "details").mkdir()
    score_table().to_parquet(tmp_path / "details" / "scores.parquet")
    write_rows(tmp_path, pair_rows())
    anywhere = dict.fromkeys(Places.__annotations__, tmp_path)
    return Places(**anywhere | {"details": tmp_path / "details"})


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    pd.DataFrame(rows).to_json(folder / "test.json", orient="records")


def test_the_most_changed_pairs_have_the_margins_furthest_from_0(measured):
    found = ask.most_changed(measured, 3)
    margins = [abs(scores["reward_margin"]) for _, scores in found]
    assert margins == sorted(score_table()["reward_margin"].abs(), reverse=True)[:3]
    ids = dict(zip(score_table()["id"], score_table()["reward_margin"].abs(), strict=True))
    assert [ids[row["id"]] for row, _ in found] == margins


def test_a_pair_is_shown_with_what_training_did_to_its_answers(measured, capsys):
    ((row, scores),) = ask.most_changed(measured, 1)
    ask.show_pair(row, Path("images"), scores)
    said = capsys.readouterr().out
    assert f"images/{row['images'][0]}" in said
    assert "question: What color is the shape?" in said
    before, after = scores["reference_chosen_logps"], scores["policy_chosen_logps"]
    assert f"{row['chosen']['content']}  [{before:z.2f} → {after:z.2f} nats]" in said


def test_scores_of_other_pairs_and_no_scores_are_refused(measured):
    write_rows(measured.formatted_data, pair_rows(3))
    with pytest.raises(UserError, match="scores pairs that are not in"):
        ask.most_changed(measured, 1)
    (measured.details / "scores.parquet").unlink()
    with pytest.raises(UserError, match=r"scores.parquet is missing"):
        ask.most_changed(measured, 1)


# what is shown


def test_the_table_has_each_answer_under_both_models_and_one_row_where_they_agree():
    base, tuned = Asked("Blue.", True, 3, -0.5, -7.25), Asked("Red.", False, 4, -6, -0.125)
    lines = ask.log_probs({"base": base, "tuned": tuned}).splitlines()
    assert lines[2].split() == ["base's", "answer", "-0.50", "-7.25", "3"]
    assert lines[3].split() == ["tuned's", "answer", "-6.00", "-0.12", "4", "cut", "off"]
    (row,) = ask.log_probs({"base": base, "tuned": base}).splitlines()[2:]
    assert row.startswith("the answer of both")


# the models


@pytest.fixture(scope="module")
def models(tuned: Any, params_with: Callable[..., Any]) -> asking.Models:
    return asking.Models(tuned, params_with(), ["<|im_end|>", "<image>"])


@pytest.mark.slow
def test_answers_and_log_probs_are_those_of_the_evaluation(
    models, base, tuned, formatted_dir, pairs_dir
):
    from stages.model import scoring

    images, (row, *_) = pairs_dir / "images", formatted.read(formatted_dir, "test")
    said: dict[str, str] = {"base": "", "tuned": ""}

    def write(name: str, text: str) -> None:
        said[name] += text

    answers = asking.ask(models, row, images, max_new_tokens=MOST, write=write)
    assert answers["base"].under_base != answers["base"].under_tuned
    for name, policy in (("base", base), ("tuned", tuned)):
        settings: Any = {"batch_tokens": 4096, "label": name}
        (alone,) = scoring.answer(policy, [row], images, max_new_tokens=MOST, **settings)
        assert answers[name].text == alone.text
        assert answers[name].finished == alone.finished
        assert said[name].strip() == alone.text
        assert said[name].endswith("\n")
        pair = row | {
            side: {"role": "assistant", "content": answers[of].text}
            for side, of in (("chosen", "tuned"), ("rejected", "base"))
        }
        under = scoring.log_probs(policy, [pair], images, **settings)
        for of, side in (("tuned", "chosen"), ("base", "rejected")):
            found = getattr(answers[of], f"under_{name}")
            assert found == pytest.approx(getattr(under, side)[0], abs=1e-3)
            assert answers[of].tokens == getattr(under, f"{side}_tokens")[0]


@pytest.mark.slow
def test_a_conversation_keeps_the_picture_and_survives_a_mistake(
    models, tmp_path, monkeypatch, capsys
):
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    typed = iter(
        [str(tmp_path / "none.png"), str(picture), "What color is it?", "", "And <|im_end|> now?"]
    )

    def typing(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typing)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ask, "show", lambda models, row, folder, most: asked.append(row))
    ask.converse(models, tmp_path, MOST)
    assert "none.png can't be read" in capsys.readouterr().out
    first, second = asked
    assert first["images"] == second["images"]
    assert formatted.question(second) == "And < |im_end|> now?"


@pytest.mark.slow
def test_a_question_without_a_picture_and_one_longer_than_cutoff_len_are_answered(
    model_dir, adapter_dir, tmp_path, params_with, capsys
):
    loaded = asking.load(model_dir, adapter_dir, params_with(**{"format.cutoff_len": 32}))
    assert "<|im_end|>" in loaded.markers
    row = asking.prompt(loaded, "What color is the shape? " * 12, [])
    ask.show(loaded, row, tmp_path, MOST)
    said = capsys.readouterr().out
    assert said.startswith("base:  ")
    assert "\ntuned: " in said
    assert "tuned's answer" in said or "the answer of both" in said
