"""The report stage: what it writes, from its inputs alone, and what joins the run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from stages import report
from stages.tracking import runs
from tests.experiment import Page, inputs_with, picture_of


def write_inputs(folder: Path) -> dict[str, Path]:
    """Files as the stages write them; the arguments of ``main``."""
    inputs = inputs_with()
    for name in ("curves", "formatted", "images", "base", "adapter", "results", "details"):
        (folder / name).mkdir()
    (folder / "raw" / "easy-vqa").mkdir(parents=True)
    (folder / "results" / "metrics.json").write_text(json.dumps(inputs.metrics))
    for name in ("preprocess", "format"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(inputs, name)))
    inputs.scores.to_parquet(folder / "details" / "scores.parquet")
    inputs.answers.to_parquet(folder / "details" / "answers.parquet")
    inputs.slices.to_csv(folder / "results" / "slices.csv", index=False)
    inputs.audit.to_csv(folder / "details" / "audit.csv", index=False)
    for split, rows in (("train", []), ("validation", []), ("test", inputs.test_pairs)):
        (folder / "formatted" / f"{split}.json").write_text(json.dumps(rows))
    for i, pair in enumerate(inputs.test_pairs):
        (folder / "images" / pair["images"][0]).write_bytes(picture_of(i))
    for name, kind, licence in (("raw/easy-vqa", "easy-vqa", "MIT"), ("base", "path", None)):
        source: dict[str, Any] = dict.fromkeys(("repo", "revision", "commit")) | {"files": []}
        source |= {"kind": kind, "licence": licence, "repo": kind if licence else None}
        (folder / name / "SOURCE.json").write_text(json.dumps(source))
    (folder / "base" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (folder / "adapter" / "llamafactory.yaml").write_text(inputs.configuration)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(inputs.adapter))
    (folder / "adapter" / "fingerprint.json").write_text('{"fingerprint": "0123abcd"}')
    return {
        **{name: folder / name for name in ("curves", "images", "raw", "adapter")},
        **{name: folder / name for name in ("results", "details")},
        "preprocess": folder / "preprocess.json",
        "format_report": folder / "format.json",
        "formatted_data": folder / "formatted",
        "model": folder / "base",
        "page": folder / "report.html",
        "card": folder / "model_card.md",
    }


@pytest.fixture
def joined() -> list[Any]:
    """What completed an MLflow run."""
    return []


@pytest.fixture
def arguments(tmp_path, monkeypatch, write_params, joined) -> dict[str, Path]:
    write_params(tmp_path / "params.yaml", **{"train.beta": 0.25})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_EXP_NAME", "brave-lion")
    monkeypatch.setattr(runs, "complete_run", lambda *given: joined.append(given))
    return write_inputs(tmp_path)


def test_page_and_card_follow_from_what_the_stages_wrote_and_nothing_else(
    arguments, joined, tmp_path, monkeypatch, capsys
):
    report.main(**arguments)
    first = [arguments[name].read_bytes() for name in ("page", "card")]
    of_the_run = [arguments[name] for name in ("results", "curves", "adapter", "page", "card")]
    assert joined == [(*of_the_run[:3], tuple(of_the_run[3:]))]
    page = Page(first[0].decode())
    assert "Preference tuning of demo/model on easy-vqa" in page.text
    assert "beta: 0.25" in page.text
    assert len(page.all("img")) >= 20
    assert len(first[0]) < 1_500_000
    assert "model_card.md: the adapter's model card" in capsys.readouterr().out

    # Another experiment, time and device: the same bytes.
    monkeypatch.setenv("DVC_EXP_NAME", "calm-cat")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    (tmp_path / "reports" / "diary").mkdir(parents=True)
    (tmp_path / "reports" / "diary" / "train.json").write_text('{"device": "gpu", "seconds": 9}')
    report.main(**arguments)
    assert [arguments[name].read_bytes() for name in ("page", "card")] == first
    for content in first:
        assert str(tmp_path).encode() not in content
        assert b"brave-lion" not in content
