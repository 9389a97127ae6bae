"""Measurements in small: the script for a machine with a GPU, without one, and what tables say."""

import json
import runpy
import sys

import pytest
import torch

from benchmarks import flops, gpu, memory, parity
from benchmarks.pipeline import set_parameters
from benchmarks.throughput import SIZES
from stages.commands import plan
from stages.model import prefix
from stages.params import params
from tests import rounding
from tests.contracts import ROOT, preset_of, text_of
from tests.one_by_one import unmasked

pytestmark = pytest.mark.slow  # the imports, too
TINY = gpu.parts("tiny", "cpu", "float32", "weights")


def test_the_parts_take_12_minutes_at_most():
    assert sum(part.limit for part in gpu.parts("4b", "cuda", "bfloat16", "")) <= 12 * 60


@pytest.mark.rehearsal
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


# The arithmetic of benchmarks.flops is what torch counts, and what its tables say


def test_torch_counts_the_products_of_a_forward_as_the_formula_does(model_dir):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from stages.model import prefix
    from tests.one_by_one import Looks, image, one_by_one, pair, tiny

    adapted = tiny(model_dir)["qwen3_vl"]
    model = prefix.plain(adapted)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    size = {"text": config["text_config"], "vision": config["vision_config"]}
    feature = pair(0, 60, 60, [image(0, 4, 4)], question=40)
    length = len(feature["chosen_input_ids"])
    counted = flops.Pair(image=16, question=length - 60 - 16, answer=60)
    for shared, work in (
        (True, lambda: prefix.forward(model, **prefix.pack([feature], model, Looks("qwen3_vl")))),
        (False, lambda: one_by_one(model, [feature], Looks("qwen3_vl"))),
    ):
        with (
            torch.no_grad(),
            adapted.disable_adapter(),  # the formula leaves it out
            FlopCounterMode(display=False) as counter,
        ):
            work()
        # torch counts what a mask hides and what pads a row.
        assert flops.score(size, counted, shared=shared) == pytest.approx(
            counter.get_total_flops(), rel=0.1
        )


@pytest.mark.rehearsal
@pytest.mark.parametrize("way", memory.WAYS)
def test_the_memory_that_is_planned_is_what_a_step_holds(way, llamafactory):
    how, p = memory.WAYS[way], preset_of(ROOT / "params" / "qwen3-vl-4b.yaml")
    pair = plan.Pair(256, answer=p.format.cutoff_len - plan.Pair(256).prompt)
    _, found = memory.held(SIZES["100m"], pair, **how)
    told = memory.by_arithmetic(p, SIZES["100m"], "bfloat16", **how)
    assert found == pytest.approx(told, rel=0.25)  # of the 4B model 10%: RESULTS.md


# Small versions of benchmarks.parity, and what it wrote is about the code as it is


PARITY = text_of("benchmarks/PARITY.md")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.rehearsal
@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_every_switch_keeps_its_bounds(dtype):
    which = parity.ways()
    found = parity.random_part(dtype, parity.random_batches(3, 40), 3, which)
    assert parity.broken(dtype, found, which) == []
    steps = 0 if dtype == "bfloat16" else 3
    assert all(len(found[name].steps) == steps for name, way in which.items() if way.gradients)


@pytest.mark.rehearsal
@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_an_answer_that_sees_the_other_breaks_them(dtype, monkeypatch):
    monkeypatch.setattr(prefix, "attention_mask", unmasked)
    every = parity.ways()
    which = {name: every[name] for name in (parity.STOCK, parity.SHARED)}
    found = parity.compare(dtype, parity.random_batches(4, 40), which)
    assert any(parity.SHARED in sentence for sentence in parity.broken(dtype, found, which))


def test_parity_md_has_a_row_for_every_way_and_training_and_no_broken_bound():
    for dtype in parity.DTYPES:
        section = PARITY.partition(f"### {dtype}\n")[2].partition("#")[0]
        assert [line.split(" | ")[0][2:] for line in section.splitlines()[3:] if line] == list(
            parity.ways()
        )
    for title, *_ in parity.SAME:
        assert f"\n| {title} | " in PARITY
    assert f"`{rounding.COMMITTED}`" in PARITY
    assert PARITY.endswith("All are kept.\n")


def test_each_training_that_is_compared_is_run_and_the_other_way_round():
    compared = {name for _, *names, _ in parity.SAME for name in names}
    assert compared == set(parity.TRAININGS)
