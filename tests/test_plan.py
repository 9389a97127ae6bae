"""plan: arithmetic against what is known, and a plan of each preset before anything is fetched."""

import json
import re
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.commands import estimate, flops, plan
from stages.commands.flops import Pair
from stages.core.errors import UserError
from stages.params import params
from tests.contracts import PRESETS, ROOT
from tests.test_shortcuts import pair, scene

DEMO = params.load(ROOT / "params" / "demo.yaml")
QWEN = "Qwen/Qwen3-VL-4B-Instruct"
BIG = params.load(ROOT / "params" / "qwen3-vl-4b.yaml")


def training(p, **options):
    return p.model_copy(update={"train": type(p.train)(**p.train.model_dump() | options)})


def test_steps_are_those_that_the_trainer_took():
    assert estimate.steps(DEMO, 2713) == 128  # as the committed training logs
    assert estimate.steps(BIG, 17_101) == 6_414  # 2,138 an epoch
    assert estimate.steps(training(BIG, max_steps=7), 17_101) == 7
    assert estimate.steps(training(BIG, max_samples=80), 17_101) == 30


def test_parameters_follow_from_the_dimensions():
    count = sum(flops.parameters(flops.PUBLISHED[QWEN]).values())
    assert count == pytest.approx(4_437_815_808, rel=0.002)
    qwen2_5 = sum(flops.parameters(flops.PUBLISHED["Qwen/Qwen2.5-VL-3B-Instruct"]).values())
    assert qwen2_5 == pytest.approx(3_754_622_976, rel=0.002)


def test_an_adapter_has_as_many_parameters_as_peft_makes_of_the_demo():
    config = json.loads((ROOT / "demo" / "model" / "config.json").read_text())
    assert flops.adapter_parameters(plan.flops_size(config), 8) == 58_368


def test_memory_of_the_4b_model_by_hand():
    pair = Pair(256, 40, 120)
    parts = estimate.memory(BIG, flops.PUBLISHED[QWEN], pair, "bfloat16")
    assert parts["weights"] == pytest.approx(8.87, abs=0.01)
    assert parts["optimizer"] == pytest.approx(16 * 16_515_072 / 1e9)
    assert parts["logits"] == pytest.approx(3 * 4 * 256 * 151_936 / 1e9)
    stock = estimate.memory(
        training(BIG, shared_prefix=False), flops.PUBLISHED[QWEN], pair, "bfloat16"
    )
    assert stock["logits"] == pytest.approx(3 * flops.logits_bytes(2, pair) / 1e9)
    small = params.load(ROOT / "params" / "qwen3-vl-4b-24gb.yaml")
    four_bits = estimate.memory(small, flops.PUBLISHED[QWEN], pair, "bfloat16")
    assert four_bits["weights"] == pytest.approx(0.56 * 3.633 + 2 * 0.800, abs=0.01)


def test_hours_at_a_share_of_the_peak():
    gpu = estimate.Gpu("made up", 100, 24)
    assert estimate.hours(3600 * 50e12, gpu, 0.5, 1) == pytest.approx(1)
    assert estimate.hours(3600 * 50e12, gpu, 0.5, 4) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("2 x NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("1 x NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("cpu", None),
    ],
)
def test_a_device_of_the_diary_is_known_by_its_name(device, name):
    found = estimate.named(device)
    assert (found.name if found else None) == name


def test_the_published_number_of_pairs_is_what_the_presets_say():
    for path in PRESETS:
        p = params.load(path)
        if (name := plan.named(p.data.source)) in plan.PUBLISHED:
            assert f"{plan.PUBLISHED[name][0]:,} pairs" in path.read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the parameters of a preset, its tasks and nothing else."""
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "gpus_here", list)

    def use(preset):
        shutil.copy(ROOT / "params" / f"{preset}.yaml", "params.yaml")

    return use


def part(text, title):
    (found,) = re.findall(rf"(?ms)^{re.escape(title)}:\n(.*?)(?:\n\n|\Z)", text)
    return found


LARGE = [path.stem for path in PRESETS if path.stem not in ("demo", "own-data")]


@pytest.mark.parametrize("preset", LARGE)
def test_a_preset_is_planned_on_a_laptop_before_anything_is_fetched(project, preset, capsys):
    project(preset)
    plan.main()
    text = capsys.readouterr().out
    assert "steps" in text
    for gpu in estimate.GPUS:
        assert gpu.name in text
    missing = part(text, "Missing")
    assert "the pairs: 21,376 are taken" in missing
    assert "the base model: its published dimensions are taken" in missing
    brought = part(text, "The network must bring")
    assert "helehan/topic-overwrite at 818d38f4, about 1.2 GB" in brought
    assert re.search(r"Instruct at \w{8}, about [78]\.\d GB, from the Hugging Face Hub", brought)
    assert "pope" in brought
    assert "this machine has no GPU" in part(text, "Would be refused here")


def test_the_demo_says_which_command_counts_its_pairs(project):
    project("demo")
    shutil.copytree(ROOT / "demo" / "model", "demo/model")
    with pytest.raises(UserError, match=r"run `dvc repro format`, or .* PAIRS=1000"):
        plan.main()


def test_an_unknown_model_and_a_share_above_1_are_refused(project):
    project("qwen3-vl-4b")
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("repo: Qwen/Qwen3-VL-4B-Instruct", "repo: a/b"))
    with pytest.raises(UserError, match="whose dimensions are not known here"):
        plan.main()
    with pytest.raises(UserError, match="a share of the peak"):
        plan.main(utilisation=35)


def made(project, stages):
    """The demo's project after ``format``, small: four pairs, and a lock that says so."""
    project("demo")
    p = params.load().model_dump(mode="json")
    Path("data/formatted").mkdir(parents=True)
    Path("data/pairs/images").mkdir(parents=True)
    shutil.copytree(ROOT / "demo" / "model", "models/base")
    for i, split in enumerate(("train", "validation", "test")):
        rows = [
            pair(f"{split}{j}", "It is red.", "It is blue.") | {"group": f"{split}{j}"}
            for j in range(4)
        ]
        Path(f"data/formatted/{split}.json").write_text(json.dumps(rows))
        for j, row in enumerate(rows):
            scene(10 * i + j).save(Path("data/pairs/images", row["images"][0]))
    for name in ("format.json", "token_lengths.csv"):
        Path("reports").mkdir(exist_ok=True)
        shutil.copy(ROOT / "reports" / name, "reports")
    entry = {"cmd": "c", "deps": [], "outs": []}
    lock = {
        "fetch@model": entry
        | {
            "outs": [{"path": "models/base", "md5": "a.dir", "size": 1, "nfiles": 1}],
            "params": {"params.yaml": {"model.source": p["model"]["source"]}},
        },
        "format": entry
        | {
            "deps": [{"path": "models/base", "md5": "a.dir", "size": 1, "nfiles": 1}],
            "outs": [{"path": "data/formatted", "md5": "b.dir", "size": 1, "nfiles": 1}],
            "params": {"params.yaml": {"format": p["format"]}},
        },
    }
    with Path("dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": {k: lock[k] for k in stages}}, file)
    Path("reports/diary").mkdir()
    for stage in ("reference", "train"):
        note = {"stage": stage, "device": "cpu", "pairs_per_second": 100.0}
        Path(f"reports/diary/{stage}.json").write_text(json.dumps(note))


def test_after_format_the_plan_counts_audits_and_takes_the_diary(project, capsys):
    made(project, ("fetch@model", "format"))
    plan.main()
    text = capsys.readouterr().out
    assert "2,713 train, 420 validation, 799 test" in text  # as reports/format.json has them
    assert "Measured here on cpu: reference 100.0 pairs/s" in text
    assert "so 39.3 s for these pairs" in text
    seen = part(text, "Will we see it?")
    assert "bag_of_words_wins 100.0%" in seen
    assert "win_rate_detectable" in seen
    assert "is known after `dvc repro reference`" in seen
    assert part(text, "Missing").strip() == "nothing"


def test_what_was_made_with_other_parameters_is_not_taken(project):
    made(project, ("fetch@model", "format"))
    assert plan.made(params.load(), Path("dvc.lock")).here == {"fetch@model", "format"}
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("cutoff_len: 128", "cutoff_len: 64"))
    assert plan.made(params.load(), Path("dvc.lock")).here == {"fetch@model"}
    shutil.rmtree("models/base")
    assert plan.made(params.load(), Path("dvc.lock")).here == set()
