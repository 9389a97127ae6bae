"""The arithmetic of ``benchmarks.flops`` is what torch counts, and what its tables say."""

import json

import pytest

from benchmarks import flops, memory
from benchmarks.throughput import SIZES
from stages.commands import plan
from tests.contracts import ROOT, preset_of

pytestmark = pytest.mark.slow  # the import of benchmarks.memory, too


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
