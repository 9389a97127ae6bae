"""A user's own data, in the shapes in which people have it, and each family go through every stage.

The demo and the 4B preset are of Qwen3-VL.
"""

import json
import shutil
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.pipeline import set_parameters
from stages.commands import ask, export
from stages.model import formatted
from stages.pairs.pairs import SPLITS
from stages.params import params
from stages.sources.hub import HubModel
from tests import run_stages
from tests.hub_server import preset_repos, serve
from tests.pictures import picture
from tests.run_stages import ROOT, fresh_clone
from tests.test_families import OTHERS

pytestmark = pytest.mark.slow


def answers(number):
    colour, other = (("red", "green", "blue", "teal")[(number + k) % 4] for k in (0, 1))
    return f"The shape is {colour}.", f"The shape is {other}."


def sharegpt_zip(folder):
    """What a notebook left on a drive: ranking data of LLaMA-Factory with the paths of the machine
    that wrote it, system prompts and earlier turns, in a zip with the images.
    """
    rows = []
    with zipfile.ZipFile(folder / "dpo.zip", "w") as archive:
        for number in range(30):
            archive.writestr(f"dataset/pictures/{number}.png", picture(number, (56 + number, 60)))
            chosen, rejected = answers(number)
            before = [
                {"from": "human", "value": "<image>\nIs there a shape?"},
                {"from": "gpt", "value": "Yes."},
                {"from": "human", "value": "What color is it?"},
            ]
            alone = [{"from": "human", "value": "<image>\nWhat color is the shape?"}]
            system = [{"from": "system", "value": "Answer in a sentence."}]
            rows.append(
                {
                    "conversations": system * (number % 3 == 0) + (before if number % 2 else alone),
                    "chosen": {"from": "gpt", "value": chosen},
                    "rejected": {"from": "gpt", "value": rejected},
                    "images": [f"/content/drive/MyDrive/dataset/pictures/{number}.png"],
                }
            )
        archive.writestr("dataset/train.json", json.dumps(rows[:22]))
        archive.writestr("dataset/val.json", json.dumps(rows[22:]))
    return {"kind": "path", "path": str(folder / "dpo.zip"), "licence": None}


def rlaif_parquet(folder):
    """RLAIF-V's columns."""
    rows = []
    for number in range(30, 60):
        chosen, rejected = answers(number)
        image = {"bytes": picture(number, (56 + number, 60)), "path": f"{number}.png"}
        rows.append(
            {
                "ds_name": "RLAIF-V",
                "image": image,
                "question": "What color is the shape?",
                "chosen": chosen,
                "rejected": rejected,
                "origin_dataset": f"set{number % 2}",
                "idx": number,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    columns = {"origin": "origin_dataset"}
    path = str(folder / "data.parquet")
    return {"kind": "path", "path": path, "licence": None, "columns": columns}


@pytest.mark.rehearsal
@pytest.mark.parametrize("family", OTHERS)
def test_own_data_go_through_every_stage_and_the_model_is_asked_and_exported(
    family, llamafactory, write_params, tmp_path, monkeypatch, capfd
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make, overrides = OTHERS[family]
    model = make(tmp_path / "model")
    mine, project = tmp_path / "mine", tmp_path / "project"
    mine.mkdir()
    project.mkdir()
    monkeypatch.chdir(project)
    (project / "tasks" / "easy_vqa").mkdir(parents=True)
    write_params(
        project / "params.yaml",
        **run_stages.SMALL
        | overrides
        | {
            "format.cutoff_len": 256,
            "data.sources": {"prepared": sharegpt_zip(mine), "rlaif": rlaif_parquet(mine)},
            "model.source": {"kind": "path", "path": str(model), "licence": "Apache-2.0"},
            "preprocess.wanted.turns": 2,
            "preprocess.wanted.system_prompt": True,
        },
    )
    run_stages.main()

    counted = json.loads((project / "reports" / "preprocess.json").read_text())
    assert counted["rows_kept"] == 60
    rows = [
        row for split in SPLITS for row in formatted.read(project / "data" / "formatted", split)
    ]
    assert all(
        sum(str(message["content"]).count("<image>") for message in row["messages"]) == 1
        for row in rows
    )
    scores = pd.read_parquet(project / "reports" / "details" / "scores.parquet")
    assert (scores["policy_chosen_logps"] != scores["reference_chosen_logps"]).all()
    curve = pd.read_csv(project / "reports" / "curves" / "train.csv")
    assert abs(curve["reward_margin"].iloc[0]) < 1e-3
    assert {len(row["messages"]) for row in rows} == {1, 2, 3, 4}
    pairs = pd.read_parquet(project / "data" / "pairs" / "pairs.parquet")
    assert dict(pairs["origin"].value_counts()) == {"prepared": 30, "set0": 15, "set1": 15}
    published = pairs[pairs["origin"] == "prepared"]["split"]
    assert (published == "validation").sum() == 8
    results = json.loads((project / "reports" / "results" / "metrics.json").read_text())
    assert len(scores) == results["pairs"] > 5
    assert 0 <= results["win_rate"] <= 1
    assert (project / "reports" / "report.html").stat().st_size > 10_000
    assert "## " in (project / "reports" / "model_card.md").read_text()
    first = json.loads((project / "reports" / "curves" / "first_batch.json").read_text())
    assert first["reference"] == "cached"
    if family != "Qwen3.5":
        return
    image = next((project / "data" / "pairs" / "images").iterdir())
    ask.main(image=str(image), question="What color is the shape?")
    export.main()
    assert "differ from those of base plus adapter by" in capfd.readouterr().out
    assert list((project / "models" / "merged").glob("*.safetensors"))


# The 4B preset, as a user with a GPU runs it, in miniature


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
