"""The script for a machine with a GPU, rehearsed without one at the smallest size."""

import runpy
import sys

import pytest

from benchmarks import gpu
from benchmarks.pipeline import set_parameters
from stages.params import params
from tests.conftest import ROOT

TINY = gpu.parts("tiny", "cpu", "float32", "weights")


def test_the_parts_take_12_minutes_at_most():
    assert sum(part.limit for part in gpu.parts("4b", "cuda", "bfloat16", "")) <= 12 * 60


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in TINY if "--size" in part.words])
def test_every_measurement_prints_its_table(
    llamafactory, part, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    words = [tmp_path_factory.getbasetemp() / w if w == "weights" else w for w in part.words]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    runpy.run_module(part.words[0], run_name="__main__")
    assert capsys.readouterr().out.rstrip().endswith("|")


def test_the_demo_is_asked_for_with_parameters_that_there_are(write_params, tmp_path):
    [words] = [
        part.words for part in gpu.parts("4b", "cuda", "bfloat16", "") if part.asks == "The demo"
    ]
    values = dict(word.split("=") for word in words[1:])
    write_params(tmp_path / "params.yaml")
    as_typed = {key: {"1": 1, "true": True}.get(value, value) for key, value in values.items()}
    set_parameters(tmp_path / "params.yaml", as_typed)
    p = params.load(tmp_path / "params.yaml")
    assert (p.train.gpus, p.scoring.device, p.scoring.dtype) == (1, "cuda", "bfloat16")


@pytest.mark.parametrize(
    ("words", "well", "said"),
    [
        (("platform",), True, "Ended by 0"),
        (("no_such_module",), False, "No module named no_such_module"),
        (("http.server", "0"), False, "Ended by its time limit"),
    ],
)
def test_a_part_ends_at_its_limit_and_says_why_it_failed(words, well, said, tmp_path):
    out = tmp_path / "results.md"
    assert gpu.answered(gpu.Part("What is it?", 2, words), out) is well
    assert said in out.read_text()
    assert f"python -m {' '.join(words)}" in out.read_text()
