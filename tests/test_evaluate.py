"""The evaluate stage around fakes of model and MLflow: what it writes and what it hands on."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from stages import evaluate, formatted, metrics, scoring, tracking
from stages.errors import UserError
from stages.prompts import Prompts


def row(name, kind="", **more):
    return {
        "id": name,
        "group": f"g{name}",
        "origin": "o",
        "kind": kind,
        "messages": [{"role": "user", "content": f"<image>What is {name}?"}],
        "images": [f"{name}.jpg"],
        "chosen": {"role": "assistant", "content": "yes"},
        "rejected": {"role": "assistant", "content": "no"},
        **more,
    }


PAIRS = [row(name) for name in "abcd"]
COLOUR = [{"role": "user", "content": "<image>what color is the shape?"}]
QUESTIONS = [
    row("q", "colour", answer="red", messages=COLOUR),
    row("a", "colour", answer="blue", messages=COLOUR),
]
ASKED = Prompts(PAIRS[:2], QUESTIONS)


def given(*answers):
    of = ["pair", "pair", "question", "question"]
    return pd.DataFrame({"id": ["a", "b", "q", "a"], "of": of, "answer": answers}, dtype="str")


BASE = given("yes", "no", "The shape is green.", "The shape is blue.")
TUNED = given("yes", "yes", "The shape is red.", "The shape is blue.")


def test_answers_stand_beside_each_other_and_are_graded_where_the_truth_is_known():
    table = evaluate.beside_each_other(ASKED, BASE.iloc[::-1], TUNED)
    assert list(table["id"]) == ["a", "b", "q", "a"]
    assert list(table["of"]) == ["pair", "pair", "question", "question"]
    assert list(table["question"])[1:3] == ["What is b?", "what color is the shape?"]
    assert list(table["image"]) == ["a.jpg", "b.jpg", "q.jpg", "a.jpg"]
    assert list(table["base_answer"]) == list(BASE["answer"])
    assert list(table["tuned_answer"]) == list(TUNED["answer"])
    assert list(table["base_correct"]) == [None, None, False, True]
    assert list(table["tuned_correct"]) == [None, None, True, True]


def test_answers_to_other_prompts_are_refused():
    for other in (BASE.iloc[1:-1], BASE.assign(id=["a", "b", "x", "a"])):
        with pytest.raises(UserError, match="the base model answered other prompts"):
            evaluate.beside_each_other(ASKED, other, TUNED)


def test_a_prompt_answered_as_a_pair_is_no_answer_to_the_question_of_its_name():
    # Pair and question "a" share a name; the question's own answer is missing here.
    with pytest.raises(UserError, match="the base model answered other prompts"):
        evaluate.beside_each_other(ASKED, BASE.iloc[:3], TUNED)


def test_nothing_asked_is_an_empty_table():
    nothing = BASE.iloc[:0]
    table = evaluate.beside_each_other(Prompts([], []), nothing, nothing)
    assert table.empty
    assert {"base_answer", "tuned_correct"} <= set(table.columns)


def test_the_histogram_holds_every_pair_once():
    margins = np.array([-1.0, 0.0, 0.1, 0.1, 3.0])
    table = evaluate.histogram(margins, bins=4)
    assert list(table["margin"]) == [-0.5, 0.5, 1.5, 2.5]
    assert list(table["pairs"]) == [1, 3, 0, 1]
    assert evaluate.histogram(np.zeros(7))["pairs"].sum() == 7


def test_a_data_set_is_known_by_the_md5_that_dvc_has(tmp_path):
    (tmp_path / "test.json").write_text("[]")
    made = evaluate.dataset(tmp_path / "test.json")
    assert (made.name, made.digest) == ("test", hashlib.md5(b"[]").hexdigest())


# main


@pytest.fixture
def project(tmp_path, monkeypatch, write_params):
    """What the stages before leave, and fakes of the model and of the tracker."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml", **{"train.beta": 0.5, "evaluate.resamples": 200})
    for folder in ("formatted", "reference", "adapter", "curves"):
        (tmp_path / folder).mkdir()
    rows = {"train": [], "validation": [], "test": PAIRS, "questions": QUESTIONS}
    for name, content in rows.items():
        (tmp_path / "formatted" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "adapter" / "fingerprint.json").write_text('{"fingerprint": "0123abcd"}')
    (tmp_path / "adapter" / "llamafactory.yaml").write_text("stage: dpo\n")
    table("abcd", [-5.0] * 4, [-5.0] * 4).to_parquet(tmp_path / "reference" / "logps.parquet")
    answers_of("base").to_parquet(tmp_path / "reference" / "answers.parquet")

    monkeypatch.setattr(scoring, "load", lambda model, p, adapter: ("policy", model, adapter))
    monkeypatch.setattr(
        scoring,
        "log_probs",
        lambda policy, pairs, images, **_: scoring.PairLogProbs(
            np.array([-4.0, -4.0, -4.0, -6.0]),
            np.array([-6.0, -6.0, -6.0, -5.0]),
            np.full(4, 3),
            np.full(4, 3),
        ),
    )
    monkeypatch.setattr(
        evaluate.prompts, "answers", lambda policy, asked, images, p, label: answers_of("tuned")
    )
    completed = []
    monkeypatch.setattr(
        tracking,
        "complete_run",
        lambda fingerprint, record: completed.append((fingerprint, record)),
    )
    monkeypatch.setattr(tracking, "provenance", lambda: {"git.commit": "c0ffee"})
    monkeypatch.setattr(tracking, "experiment_name", lambda: "brave-cat")
    return tmp_path, completed


def table(names, chosen, rejected):
    lengths = {"chosen_tokens": 3, "rejected_tokens": 3}
    logps = {"chosen_logps": chosen, "rejected_logps": rejected}
    return pd.DataFrame({"id": list(names)} | logps).assign(**lengths)


def answers_of(model):
    of = ["pair"] * 4 + ["question"] * 2
    right = "The shape is red." if model == "tuned" else "The shape is green."
    answers = ["yes"] * 4 + [right, "The shape is blue."]
    return pd.DataFrame({"id": [*"abcd", "q", "a"], "of": of, "answer": answers}, dtype="str")


def run(folder):
    evaluate.main(
        formatted_data=folder / "formatted",
        images=folder / "images",
        model=folder / "base",
        adapter=folder / "adapter",
        reference=folder / "reference",
        curves=folder / "curves",
        metrics=folder / "reports" / "metrics.json",
        scores=folder / "reports" / "scores.parquet",
        answers=folder / "reports" / "answers.parquet",
        margins=folder / "reports" / "margins.csv",
    )


def test_everything_is_written_and_the_run_completed(project, capsys):
    folder, completed = project
    run(folder)
    result = json.loads((folder / "reports" / "metrics.json").read_text())
    assert result["win_rate"] == 0.75
    assert result["reward_margin"] == 0.5 * (2 + 2 + 2 - 1) / 4
    assert (result["base_correct"], result["tuned_correct"]) == (0.5, 1.0)
    assert [key for key in result if not key.endswith(("_low", "_high"))] == list(metrics.MEANING)
    scores = pd.read_parquet(folder / "reports" / "scores.parquet")
    assert list(scores["reward_margin"]) == [1.0, 1.0, 1.0, -0.5]
    assert len(pd.read_parquet(folder / "reports" / "answers.parquet")) == 6
    assert pd.read_csv(folder / "reports" / "margins.csv")["pairs"].sum() == 4
    assert "win rate 0.750" in capsys.readouterr().out

    ((fingerprint, record),) = completed
    assert fingerprint == "0123abcd"
    assert (record.name, record.tags) == ("brave-cat", {"git.commit": "c0ffee"})
    assert record.metrics == result
    assert record.parameters["train"]["beta"] == 0.5
    assert record.parameters["train"]["lora_rank"] == 8
    assert record.curves == folder / "curves"
    assert all(path.exists() for path in record.artifacts)
    assert {path.name for path in record.artifacts} >= {"metrics.json", "llamafactory.yaml"}
    assert [data.name for data in record.datasets] == ["train", "validation", "test"]


def test_metrics_hold_no_time_path_or_host(project):
    folder, _ = project
    run(folder)
    first = {path.name: path.read_bytes() for path in (folder / "reports").iterdir()}
    run(folder)
    assert {path.name: path.read_bytes() for path in (folder / "reports").iterdir()} == first
    assert not any(str(folder).encode() in content for content in first.values())


def test_a_reference_of_other_pairs_is_told_before_anything_is_written(project):
    folder, completed = project
    table("abcx", [-5.0] * 4, [-5.0] * 4).to_parquet(folder / "reference" / "logps.parquet")
    with pytest.raises(UserError, match=r"3 of the 4 test pairs.*dvc repro reference"):
        run(folder)
    assert not (folder / "reports").exists()
    assert completed == []


def test_a_data_set_without_questions_has_no_metrics_of_them(project, monkeypatch):
    folder, _ = project
    (folder / "formatted" / "questions.json").write_text("[]")
    answers_of("base")[:4].to_parquet(folder / "reference" / "answers.parquet")
    monkeypatch.setattr(evaluate.prompts, "answers", lambda *_, **__: answers_of("tuned")[:4])
    run(folder)
    result = json.loads((folder / "reports" / "metrics.json").read_text())
    assert not set(metrics.QUESTION_KEYS) & set(result)


def test_the_placeholder_is_no_part_of_a_question():
    assert formatted.IMAGE_PLACEHOLDER not in "".join(
        evaluate.beside_each_other(ASKED, BASE, TUNED)["question"]
    )
