"""The evaluate stage around fakes of model and MLflow: what it writes and what it hands on."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stages import evaluate
from stages.answers import controls, lm_eval, task_results
from stages.core.errors import UserError
from stages.evaluation import shortcuts
from stages.evaluation.catalogue import KEYS
from stages.model import scoring
from tests.test_lm_eval import results_of


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


@pytest.mark.parametrize("scale", [1e-7, 0.013, 1.0, 48.0, 3e5])
def test_the_histograms_bins_are_round_and_none_holds_wins_and_losses(scale):
    margins = np.random.default_rng(0).normal(0.3, 1, 500) * scale
    table = evaluate.histogram(margins)
    width = np.diff(table["margin"]).mean()
    digits = f"{width:.3e}"
    assert digits[:5] in {"1.000", "2.000", "5.000"}, digits
    assert 10 <= len(table) <= 45
    below = table["margin"] < 0
    assert table.loc[below, "pairs"].sum() == (margins < 0).sum()
    assert table["pairs"].sum() == 500


# main


@pytest.fixture
def project(tmp_path, monkeypatch, write_params):
    """What the stages before leave, and fakes of the model."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml", **{"train.beta": 0.5, "evaluate.resamples": 200})
    for folder in ("formatted", "reference", "baseline", "base", "adapter", "images"):
        (tmp_path / folder).mkdir()
    for i, name in enumerate("abcd"):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / "images" / f"{name}.jpg")
    seen = [row("x", messages=PAIRS[0]["messages"])]  # the text of a test pair
    seen[0]["images"] = PAIRS[1]["images"]
    rows = {"train": seen, "validation": [], "test": PAIRS, "questions": QUESTIONS}
    for name, content in rows.items():
        (tmp_path / "formatted" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "adapter" / "fingerprint.json").write_text('{"fingerprint": "0123abcd"}')
    (tmp_path / "adapter" / "llamafactory.yaml").write_text("stage: dpo\n")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "base" / "SOURCE.json").write_text("{}")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    table("abcd", -5.0, -5.0).to_parquet(tmp_path / "reference" / "logps.parquet")
    controls_of("ab").to_parquet(tmp_path / "baseline" / "controls.parquet")
    answers_of("base").to_parquet(tmp_path / "baseline" / "answers.parquet")
    own = {"id": [*"abcd"], "chosen": [-0.1, -2, -3, -4], "rejected": -1.0, "own": -0.5}
    pd.DataFrame(own).to_parquet(tmp_path / "baseline" / "off_policy.parquet")

    monkeypatch.setattr(scoring, "load", lambda model, p, adapter: ("policy", model, adapter))
    monkeypatch.setattr(
        scoring,
        "log_probs",
        lambda policy, pairs, images, **_: table(
            "abcd", [-4.0, -4.0, -4.0, -6.0], [-6.0, -6.0, -6.0, -5.0]
        ),
    )
    monkeypatch.setattr(scoring, "device_name", lambda policy: "cpu")
    monkeypatch.setattr(
        controls,
        "log_probs",
        lambda checkpoint, pairs, images, label: pd.concat(
            [
                table("ab", [-5.0, -6.0], [-6.0, -5.0]).assign(shown="blank"),
                table("ab", [-6.0, -6.0], [-5.0, -5.0]).assign(shown="shuffled"),
            ]
        ),
    )
    task_results.write(results_of({"acc": [0, 1]}, "ab"), tmp_path / "baseline" / "lm_eval")
    monkeypatch.setattr(lm_eval, "run", lambda *_: results_of({"acc": [1, 1]}, "ab"))
    monkeypatch.setattr(
        evaluate.prompts, "answers", lambda checkpoint, asked, images, label: answers_of("tuned")
    )
    return tmp_path


def controls_of(names):
    tables = [table(names, -5.0, -5.0).assign(shown=way) for way in ("blank", "shuffled")]
    return pd.concat(tables)


def table(names, chosen, rejected):
    lengths = {"chosen_tokens": 3, "rejected_tokens": 3, "image_tokens": 16}
    logps = {"chosen_logps": chosen, "rejected_logps": rejected}
    return pd.DataFrame({"id": list(names)} | logps).assign(**lengths)


def answers_of(model):
    of = ["pair"] * 4 + ["question"] * 2
    right = "The shape is red." if model == "tuned" else "The shape is green."
    answers = ["yes"] * 4 + [right, "The shape is blue."]
    said = pd.DataFrame({"id": [*"abcd", "q", "a"], "of": of, "answer": answers}, dtype="str")
    return said.assign(tokens=3, finished=True)


def run(folder):
    shutil.rmtree(folder / "reports", ignore_errors=True)  # as DVC does with outputs
    return evaluate.main(
        formatted_data=folder / "formatted",
        images=folder / "images",
        model=folder / "base",
        adapter=folder / "adapter",
        reference=folder / "reference",
        baseline=folder / "baseline",
        task_files=folder / "tasks",
        headline=folder / "reports" / "headline.json",
        results=folder / "reports" / "results",
        details=folder / "reports" / "details",
    )


def test_everything_is_written(project, capsys):
    folder = project
    assert run(folder)["device"] == "cpu"
    reports = folder / "reports"
    result = json.loads((reports / "results" / "metrics.json").read_text())
    assert result["win_rate"] == 0.75
    assert result["reward_margin"] == 0.5 * (2 + 2 + 2 - 1) / 4
    assert (result["base_correct"], result["tuned_correct"]) == (0.5, 1.0)
    # Own image: a and b win. Blank: a wins; shuffled: neither.
    assert (result["control_pairs"], result["win_rate_blank"]) == (2, 0.5)
    assert result["win_rate_over_shuffled"] == 1.0
    assert result["lm_eval/t/acc/change"] == 0.5
    known = [key for key in result if not key.startswith("lm_eval/")]
    assert known == [key for key in KEYS if key in known]
    scores = pd.read_parquet(reports / "details" / "scores.parquet")
    assert list(scores["reward_margin"]) == [1.0, 1.0, 1.0, -0.5]
    assert len(pd.read_parquet(reports / "details" / "answers.parquet")) == 6
    audit = pd.read_csv(reports / "details" / "audit.csv")
    assert list(audit.columns) == list(shortcuts.LISTED)
    assert (result["audited_images"], result["bag_of_words_wins"]) == (4, 1.0)
    assert "win_rate_detectable" in result
    assert (result["own_answers"], result["off_policy_distance"]) == (4, 2.0)
    assert (result["off_policy_chosen"], result["off_policy_rejected"]) == (0.75, 0.75)
    assert list(pd.read_csv(reports / "results" / "off_policy.csv")["chosen"]) == [-0.1, -2, -3, -4]
    assert result["seen_text_pairs"] == 1
    assert set(pd.read_csv(reports / "results" / "slices.csv")["note"]) == {"too few pairs"}
    assert task_results.read(reports / "details" / "lm_eval").document["results"]["t"]
    assert pd.read_csv(reports / "results" / "margins.csv")["pairs"].sum() == 4
    assert "chosen-versus-rejected win rate 75.0%" in capsys.readouterr().out

    headline = json.loads((reports / "headline.json").read_text())
    assert (headline["win_rate"], headline["correct"]) == (0.75, 1.0)
    assert len(headline) <= 8


@pytest.mark.parametrize(
    ("file", "made", "said"),
    [
        ("baseline/controls.parquet", lambda: controls_of("b"), "1 of the 2 test pairs"),
        ("reference/logps.parquet", lambda: table("abcx", -5.0, -5.0), "3 of the 4 test pairs"),
    ],
)
def test_a_reference_of_other_pairs_is_told_before_anything_is_written(project, file, made, said):
    folder = project
    made().to_parquet(folder / file)
    with pytest.raises(UserError, match=rf"{said}.*dvc repro -f reference baseline"):
        run(folder)
    assert not (folder / "reports").exists()


def test_a_data_set_without_questions_has_no_metrics_of_them(project, monkeypatch):
    folder = project
    (folder / "formatted" / "questions.json").write_text("[]")
    answers_of("base")[:4].to_parquet(folder / "baseline" / "answers.parquet")
    monkeypatch.setattr(evaluate.prompts, "answers", lambda *_, **__: answers_of("tuned")[:4])
    run(folder)
    result = json.loads((folder / "reports" / "results" / "metrics.json").read_text())
    assert not [key for key in result if "correct" in key or key == "questions"]
