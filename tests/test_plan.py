"""plan: arithmetic against what is known, and a plan of each preset before anything is fetched."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import stages.commands.planning
from benchmarks import flops
from stages.commands import plan, use
from stages.commands.planning.dimensions import Pair, parameters
from stages.core.errors import UserError
from stages.families import known
from stages.params import machine
from tests.contracts import PRESETS, ROOT, preset_of

DEMO, BIG = (preset_of(ROOT / "params" / f"{name}.yaml") for name in ("demo", "qwen3-vl-4b"))
QWEN = known.published()["Qwen/Qwen3-VL-4B-Instruct"]
LARGE = [path.stem for path in PRESETS if path.stem not in ("demo", "own-data")]


def training(p, **options):
    return p.model_copy(update={"train": type(p.train)(**p.train.model_dump() | options)})


def test_steps_are_those_that_the_trainer_took():
    assert plan.steps(DEMO, 2713) == 128  # as the committed training logs
    assert plan.steps(BIG, 17_101) == 6_414  # 2,138 an epoch
    assert plan.steps(training(BIG, max_steps=7), 17_101) == 7
    assert plan.steps(training(BIG, max_samples=80), 17_101) == 30


@pytest.mark.parametrize(
    ("size", "number"), [("2B", 2_127_532_032), ("4B", 4_437_815_808), ("8B", 8_767_123_696)]
)
def test_parameters_follow_from_the_dimensions(size, number):
    found = parameters(known.published()[f"Qwen/Qwen3-VL-{size}-Instruct"])
    assert sum(found.values()) == pytest.approx(number, rel=0.0025)


@pytest.mark.parametrize(
    ("p", "way"),
    [
        (BIG, "… and the head on answer tokens alone (ours)"),
        (training(BIG, shared_prefix=False), "LLaMA-Factory"),
        (training(BIG, disable_gradient_checkpointing=True), "ours, without checkpointing"),
    ],
    ids=["ours", "stock", "activations kept"],
)
def test_the_work_of_a_step_is_about_what_attention_counted_makes_it(p, way):
    (exact,) = (each for name, each in flops.WAYS.items() if name.startswith(way))
    counted = sum(flops.step(QWEN, Pair(), exact).values())
    assert plan.step(p, QWEN, Pair()) == pytest.approx(counted, rel=0.03)


def test_what_is_published_is_what_tasks_and_presets_say():
    tasks = {}
    for task in (ROOT / "tasks").rglob("*yaml"):
        text = task.read_text(encoding="utf-8")
        if found := re.search(r"max_gen_toks: (\d+)", text):
            name = task.stem.lstrip("_").removesuffix("_yaml")
            paths = re.findall(r"dataset_path: (?:&\w+ )?(\S+)", text)
            tasks[name] = (int(found[1]), paths)
    said = plan.published()["tasks"]
    for name, (most, data) in tasks.items():
        assert said[name][2] == most, name
        assert set(data) <= set(said[name][3]), name
    named = {task for path in PRESETS for task in preset_of(path).evaluate.lm_eval}
    assert named <= said.keys()
    assert {data for _, _, _, where in said.values() for data in where} == set(
        plan.published()["benchmarks"]
    )
    for path in PRESETS:
        for source in preset_of(path).data.sources.values():
            if pairs := plan.announced(source)[0]:
                assert f"{pairs:,} pairs" in use.whole(path)


# this machine


@pytest.fixture
def here(monkeypatch):
    """``here(gpus)``: so many GPUs that torch finds, none of which has bfloat16; the driver is too
    old where they are -1.
    """

    def set_up(gpus):
        def init():
            said = "driver on your system is too old" if gpus < 0 else "no NVIDIA driver"
            raise RuntimeError(f"Found {said}")

        cuda = SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            init=init,
            is_bf16_supported=lambda including_emulation: False,
            get_device_name=lambda _: "Tesla T4",
        )
        monkeypatch.setitem(
            sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))
        )

    return set_up


@pytest.mark.parametrize(
    ("p", "gpus", "ray", "said"),
    [
        (DEMO, 0, "0", []),
        (BIG, 1, "0", ["the Tesla T4 has no bfloat16"]),
        (BIG, 0, "0", ["train.gpus is 1, but torch finds no GPU", "scoring.device is cuda, but"]),
        (BIG, -1, "0", ["train.gpus", "scoring.device", "too old for torch, which is built for"]),
        (training(BIG, gpus=2), 1, "0", ["train.gpus is 2, but torch finds 1 GPU", "bfloat16"]),
        (training(BIG, gpus=2), 1, "1", ["bfloat16"]),
    ],
)  # fmt: skip
def test_what_this_machine_lacks_is_said(here, monkeypatch, p, gpus, ray, said):
    here(gpus)
    monkeypatch.setenv("USE_RAY", ray)
    for line, expected in zip(machine.lacking(p), said, strict=True):
        assert expected in line


def test_the_first_command_refuses_a_machine_without_the_gpu_before_it_fetches(
    here, project, monkeypatch
):
    from stages import fetch

    here(0)
    project("qwen3-vl-4b")
    monkeypatch.delenv(machine.ELSEWHERE, raising=False)
    with pytest.raises(UserError, match=r"torch finds no GPU here.*WITHOUT_GPU=1 dvc repro format"):
        fetch.main("model.source", Path("models/base"))
    monkeypatch.setenv(machine.ELSEWHERE, "1")
    machine.require(BIG)


# plans


@pytest.fixture
def project(tmp_path, monkeypatch):
    """``project(preset)``: a folder with its parameters, the tasks and nothing else. What a step
    holds is not measured, which takes torch and half a minute (tests/test_benchmarks.py).
    """
    step = SimpleNamespace(of_process=lambda *_, kept: {"weights": 9, "step": 50 if kept else 4})
    monkeypatch.setattr(stages.commands.planning, "step_memory", step, raising=False)
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "stale", list)

    def written(preset):
        text = use.whole(ROOT / "params" / f"{preset}.yaml")
        Path("params.yaml").write_text(text, encoding="utf-8")

    return written


@pytest.mark.parametrize("preset", LARGE)
def test_a_preset_is_planned_on_a_laptop_before_anything_is_fetched(project, here, preset, capsys):
    here(0)
    project(preset)
    plan.main()
    text = capsys.readouterr().out
    for expected in (
        *(*plan.published()["gpus"], "steps of", "answers to pope", "torch finds no GPU here"),
        *("topic-overwrite, 1.2 GB (fetch@topic-overwrite)", "AMBER_base64, 6.2 GB (lm-eval"),
    ):
        assert expected in text
    assert re.search(r"(Instruct|4B), [\d.]+ GB \(fetch-model\)", text)


def test_the_largest_batch_that_fits_each_gpu_at_the_same_step_is_proposed(project, here, capsys):
    here(0)
    project("qwen3-vl-4b")
    plan.main()
    said = re.sub(r"-S \+\+train\.(\w)\w+", r"\1", capsys.readouterr().out)
    for line in (
        "24 GB: p=4 g=2 (17.0 GB)",  # per_device_train_batch_size, gradient_accumulation_steps
        "40 or 48 GB: p=8 g=1 (25.0 GB)",
        "80 GB: d=true (59.0 GB)",  # disable_gradient_checkpointing
        "141 GB: p=4 g=2 d=true (109.0 GB)",
    ):
        assert f"  - {line}\n" in said


def test_what_is_not_known_is_refused_or_said(project, here, capsys):
    here(0)
    project("demo")
    shutil.copytree(ROOT / "demo" / "model", "demo/model")
    with pytest.raises(UserError, match="are not counted here"):
        plan.main()
    project("qwen3-vl-4b")
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("chartqa:", "gqa:"))
    plan.main()
    assert "nothing of gqa" in capsys.readouterr().out
    path.write_text(path.read_text().replace("repo: Qwen/Qwen3-VL-4B-Instruct", "repo: a/b"))
    with pytest.raises(UserError, match="whose dimensions are not known here"):
        plan.main()


def test_after_format_the_plan_counts_what_it_counted_unless_it_would_run_again(
    project, monkeypatch, capsys
):
    project("demo")
    shutil.copytree(ROOT / "demo" / "model", "models/base")
    Path("data/formatted").mkdir(parents=True)
    Path("data/formatted/questions.json").write_text("[{}, {}]")
    Path("reports").mkdir()
    shutil.copy(ROOT / "reports" / "format.json", "reports")
    shutil.copy(ROOT / "dvc.lock", ".")
    monkeypatch.setattr(plan, "stale", lambda: ["train"])
    plan.main()
    text = capsys.readouterr().out
    assert "2,713 train, 420 validation, 799 test" in text  # as reports/format.json has them
    assert "2 x 402 answers to questions, 24 tokens" in text
    monkeypatch.setattr(plan, "stale", lambda: ["format"])
    with pytest.raises(UserError, match="are not counted here"):
        plan.main()
