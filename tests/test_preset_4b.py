"""The 4B preset through every stage, as a user with a GPU runs it, in miniature."""

import json
import shutil

import pytest

from benchmarks.pipeline import set_parameters
from stages.params import params
from stages.sources.hub import HubModel
from tests import run_stages
from tests.hub_server import preset_repos, serve
from tests.run_stages import ROOT, fresh_clone


@pytest.mark.rehearsal
@pytest.mark.slow
def test_the_4b_preset_runs_through_every_stage(hub, llamafactory, tmp_path, monkeypatch):
    """The Hub replaced by a local server, the model by the small one, the GPU by the CPU."""
    clone = fresh_clone(tmp_path)
    preset = clone / "params.yaml"
    shutil.copyfile(clone / "params" / "qwen3-vl-4b.yaml", preset)
    p = params.load(preset)
    ((name, data),) = p.data.sources.items()
    assert isinstance(data, HubModel)
    on_cpu = {
        "train.gpus": 0,
        "train.bf16": False,
        "train.num_train_epochs": 1.0,
        "scoring.device": "cpu",
        "scoring.dtype": "float32",
    }
    # POPE in miniature; MMMU and ChartQA can't be had without the Hub.
    shorter = {
        "format.image_max_pixels": 16384,
        "evaluate.generation.max_new_tokens": 16,
        "evaluate.resamples": 200,
        "evaluate.controls": 8,
        "evaluate.generation.prompts": 6,
        "evaluate.lm_eval": {"pope": 4},
    }
    set_parameters(preset, on_cpu | shorter)
    with serve(preset_repos(p, ROOT / "demo" / "model", rows=120)) as url:
        hub(monkeypatch, tmp_path / "home", url)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        monkeypatch.chdir(clone)
        run_stages.main()
    source = json.loads((clone / "data" / "raw" / name / "SOURCE.json").read_text())
    assert source["commit"] == data.revision
    found = json.loads((clone / "reports" / "results" / "metrics.json").read_text())
    assert found["pairs"] > 0
    assert 0 <= found["win_rate"] <= 1
    for kind in ("random", "popular", "adversarial"):
        assert f"lm_eval/pope_{kind}/yes_ratio/change" in found
    card = (clone / "reports" / "model_card.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert data.repo in (clone / "reports" / "report.html").read_text()
