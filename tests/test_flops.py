"""The arithmetic of ``benchmarks.flops`` is what torch counts, and what its tables say."""

import json

import pytest

from benchmarks import flops, memory
from stages.commands import step_memory
from stages.commands.dimensions import Pair
from stages.families.known import FAMILIES
from tests.contracts import ROOT, preset_of
from tests.one_by_one import tiny

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


@pytest.mark.parametrize(
    ("template", "way"),
    [*(("qwen3_vl", way) for way in memory.WAYS), ("qwen2_vl", "ours"), ("qwen3_5", "ours")],
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
    size["text"].setdefault("head_dim", 16)
    fake = step_memory.measured(p, size, Pair(36, 20, 40), kept=kept)
    allocated, _ = memory.on_real_tensors(p, size, Pair(36, 20, 40), kept=kept)
    assert fake == pytest.approx(allocated, rel=0.1)
