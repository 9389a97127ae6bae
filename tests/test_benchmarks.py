"""Measurements in small: the script for a machine with a GPU, without one, and what tables say."""

import json
import runpy
import sys

import pytest
import torch

from benchmarks import flops, gpu, memory, parity
from benchmarks.pipeline import set_parameters
from stages.commands.planning import step_memory
from stages.commands.planning.dimensions import Pair
from stages.families.known import FAMILIES
from stages.model import prefix
from stages.params import params
from tests import rounding
from tests.contracts import ROOT, preset_of, text_of
from tests.one_by_one import tiny, unmasked

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
    from tests.one_by_one import Looks, image, one_by_one, pair

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


@pytest.mark.parametrize(
    ("template", "way"),
    [
        ("qwen3_vl", "ours, without checkpointing"),
        pytest.param("qwen3_vl", "ours", marks=pytest.mark.rehearsal),
        pytest.param("qwen3_vl", "LLaMA-Factory's", marks=pytest.mark.rehearsal),
        pytest.param("qwen2_vl", "ours", marks=pytest.mark.rehearsal),
        pytest.param("qwen3_5", "ours", marks=pytest.mark.rehearsal),
    ],
)
def test_a_step_on_fake_tensors_holds_what_torch_hands_out_for_a_real_one(
    template, way, model_dir, llamafactory
):
    shared, kept = memory.WAYS[way]
    p = memory.with_train(preset_of(ROOT / "params" / "demo.yaml"), shared_prefix=shared)
    p = p.model_copy(update={"model": p.model.model_copy(update={"template": template})})
    model = tiny(model_dir)[next(f for f in FAMILIES if template in f.templates).model_types[0]]
    config = model.config.to_dict()
    size = {part: config[f"{part}_config"] for part in ("text", "vision")}
    size["text"].setdefault("head_dim", 32)
    fake = step_memory.measured(p, size, Pair(36, 20, 40), kept=kept)
    allocated, _ = memory.on_real_tensors(p, size, Pair(36, 20, 40), kept=kept)
    assert fake == pytest.approx(allocated, rel=0.1)
    if kept:
        deep = step_memory.with_layers(size, 10)
        fake, all_layers = (
            measure(p, deep, Pair(36, 20, 40), kept=kept)
            for measure in (step_memory.measured, step_memory.of_all_layers)
        )
        assert fake == pytest.approx(all_layers, rel=0.01)


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
