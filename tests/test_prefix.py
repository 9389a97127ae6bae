"""A pair in one row has the log-probs and the gradients of its two sequences in a row each; every
known way to get that wrong is noticed.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.model import prefix, recurrence
from tests import tiny_models
from tests.one_by_one import (
    CLOSE,
    END,
    IMAGE,
    PATCH,
    Looks,
    adapted,
    apart,
    families,
    flexed,
    gradients,
    image,
    in_float64,
    loss,
    one_by_one,
    pair,
    pairs,
    shared,
    summed,
    tiny,
    unmasked,
)

pytestmark = pytest.mark.slow
MOE = "qwen3_vl_moe"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(model_dir):
    return tiny(model_dir)


# Equal to the plain way


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(families, st.lists(pairs(), min_size=1, max_size=4))
def test_log_probs_and_gradients_are_those_of_two_rows_in_float64(models, family, features):
    model, process = models[family], Looks(family)
    with in_float64(model):
        expected = one_by_one(model, features, process)
        process.seen.clear()
        output = shared(model, features, process)
        assert apart(summed(output), expected) < CLOSE
        assert apart(gradients(model, summed(output)), gradients(model, expected)) < CLOSE
    assert output["lengths"].tolist() == [
        [sum(label >= 0 for label in feature[f"{side}_labels"]) for feature in features]
        for side in ("chosen", "rejected")
    ]
    names = {name for feature in features for name in feature["images"]}
    assert [sorted(given_) for given_ in process.seen] == ([sorted(names)] if names else [])


@pytest.mark.parametrize("family", sorted(PATCH))
def test_a_prompt_may_end_with_its_image(models, family):
    model, process = models[family], Looks(family)
    feature = pair(0, 5, 7, [image(0, 1, 3)], question=0)
    end = feature["chosen_input_ids"].index(END)
    for side in ("chosen", "rejected"):
        for name in ("input_ids", "labels"):
            del feature[f"{side}_{name}"][end]
    with in_float64(model):
        expected = one_by_one(model, [feature], process)
        assert apart(summed(shared(model, [feature], process)), expected) < CLOSE


def test_empty_answers_have_log_probs_and_gradients_of_0(models):
    model, process = models["qwen3_vl"], Looks("qwen3_vl")
    output = shared(model, [pair(0, 0, 0), pair(1, 0, 0)], process)
    assert output["logps"].shape == (2, 2, 0)
    assert not gradients(model, summed(output)).any()
    output = shared(model, [pair(0, 0, 3)], process)
    assert output["lengths"].tolist() == [[0], [3]]
    assert apart(summed(output), one_by_one(model, [pair(0, 0, 3)], process)) < 1e-9


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_every_precision_sums_in_float32_and_agrees_within_its_rounding(models, dtype, close):
    model, process = copy.deepcopy(models["qwen3_vl"]).to(dtype), Looks("qwen3_vl")
    features = [pair(i, 25, 18, [image(i)], alike=i) for i in range(3)]
    expected = one_by_one(model, features, process)
    output = summed(shared(model, features, process))
    assert output.dtype == torch.float32
    assert apart(output, expected) < close
    assert apart(gradients(model, output), gradients(model, expected)) < 10 * close


def test_mixture_of_experts_agrees_too(model_dir):
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    text = config["text_config"] | sizes | {"model_type": "qwen3_vl_moe_text"}
    parts = {"text_config": text, "vision_config": config["vision_config"] | {"model_type": MOE}}
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config | parts))
    model = adapted(model).float()
    for weight in prefix.plain(model).parameters():
        torch.nn.init.normal_(weight, std=0.1)
    assert prefix.why_not(model) is None
    expected = one_by_one(model, FEATURES, looks_in_float32)
    output = summed(shared(model, FEATURES, looks_in_float32))
    assert apart(output, expected) < 1e-4
    assert apart(gradients(model, output), gradients(model, expected)) < 1e-3


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_flex_attention_has_the_log_probs_and_gradients_of_the_mask(models, family):
    model, process = models[family], Looks(family)
    features = [*FEATURES, pair(3, 150, 20), pair(4, 9, 140, [image(2)])]
    with in_float64(model):
        expected, found = (summed(way(model, features, process)) for way in (shared, flexed))
        assert apart(found, expected) < 1e-12
        assert apart(gradients(model, found), gradients(model, expected)) < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_compiled_flex_attention_has_them_too(models):
    model = copy.deepcopy(models["qwen3_vl"]).float().cuda()
    found = []
    for way in prefix.ATTENTIONS:
        prefix.attend(model, way)
        batch = prefix.pack([*FEATURES, pair(3, 150, 20)], model, looks_in_float32)
        batch = {name: tensor.cuda() for name, tensor in batch.items()}
        found.append(summed(prefix.forward(prefix.plain(model), **batch)))
    assert apart(*found) < 1e-4
    assert apart(*(gradients(model, each) for each in found)) < 1e-3


def looks_in_float32(names):
    seen = Looks("qwen3_vl")(names)
    return seen | {"pixel_values": seen["pixel_values"].float()}


# Traps: each is brought back, and noticed.

FEATURES = [
    pair(1, 5, 7, [image(0, 3, 2), image(1)]),
    pair(2, 6, 4, [image(1), image(2)]),
]


def causal_only(patch, model):
    patch.setattr(prefix, "attention_mask", unmasked)


def spoilt(change):
    """A way to spoil a batch after it was packed."""

    def spoil(patch, model):
        pack = prefix.pack

        def packed(*args, **more):
            batch = pack(*args, **more)
            change(batch)
            return batch

        patch.setattr(prefix, "pack", packed)

    spoil.__name__ = change.__name__
    return spoil


@spoilt
def rejected_goes_on_after_chosen(batch):
    chosen, rejected = (batch["segments"] == part for part in (prefix.CHOSEN, prefix.REJECTED))
    for number in (0, 1):
        batch["position_ids"][:, number, rejected[number]] += chosen[number].sum()


@spoilt
def rejected_starts_at_the_number_of_tokens(batch):
    rejected = batch["segments"] == prefix.REJECTED
    batch["position_ids"][1:, rejected] = batch["position_ids"][0, rejected]


@spoilt
def rejected_starts_at_one_axis_end(batch):
    rejected = batch["segments"] == prefix.REJECTED
    batch["position_ids"][2, rejected] -= 1


@spoilt
def first_token_from_the_end_of_chosen(batch):
    batch["predictors"][1, :, 0] = batch["predictors"][0].amax(dim=-1) + 1


@spoilt
def images_in_another_order(batch):
    batch["image_order"] = batch["image_order"].flip(0)


def deepstack_dropped(patch, model):
    seen = prefix._seen
    patch.setattr(prefix, "_seen", lambda *args: (seen(*args)[0], []))


def deepstack_beside_its_tokens(patch, model):
    text = prefix.plain(model).model.language_model
    process = text._deepstack_process
    patch.setattr(
        text, "_deepstack_process", lambda h, mask, embeds: process(h, mask.roll(1, 1), embeds)
    )


TRAPS = [
    causal_only,
    rejected_goes_on_after_chosen,
    rejected_starts_at_the_number_of_tokens,
    rejected_starts_at_one_axis_end,
    first_token_from_the_end_of_chosen,
    images_in_another_order,
    deepstack_dropped,
    deepstack_beside_its_tokens,
]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_each_trap_changes_the_log_probs(models, family, trap):
    if family == "qwen2_5_vl" and "deepstack" in trap.__name__:
        pytest.skip("Qwen2.5-VL has no deepstack")
    model, process = models[family], Looks(family)
    expected = one_by_one(model, FEATURES, process)
    assert apart(summed(shared(model, FEATURES, process)), expected) < 1e-9
    with pytest.MonkeyPatch.context() as patch:
        trap(patch, model)
        wrong = summed(shared(model, FEATURES, process))
    assert apart(wrong, expected) > 1e-6


def test_each_answer_goes_on_from_the_state_and_the_window_of_the_prompt(models):
    model, process, read = models["qwen3_5"], Looks("qwen3_5"), recurrence.read
    with in_float64(model):
        expected = one_by_one(model, FEATURES, process)
        for kept in (False, True), (True, False):  # window, state

            def afresh(net, given, where, window, state, kept=kept):
                state = None if state is None else state * kept[1]
                return read(net, given, where, window * kept[0], state)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(recurrence, "read", afresh)
                assert apart(summed(shared(model, FEATURES, process)), expected) > 1e-6


# Training


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(models, reentrant, family):
    model, process = copy.deepcopy(models[family]).train(), Looks(family)
    expected = gradients(model, summed(shared(model, FEATURES, process)))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # autograd.grad does not work with the reentrant kind, which LLaMA-Factory takes by default.
    loss(summed(shared(model, FEATURES, process))).backward()
    found = [w.grad.flatten() for w in model.parameters() if w.requires_grad]
    assert apart(torch.cat(found), expected) < 1e-12


@pytest.mark.parametrize("family", sorted(PATCH))
def test_full_training_has_the_gradients_of_tower_and_head_too(models, family):
    model, process = copy.deepcopy(models[family]), Looks(family)
    for weight in model.parameters():
        weight.requires_grad_()
    with in_float64(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "CHUNK", 5)
        names, found = zip(*touched(model, summed(shared(model, FEATURES, process))), strict=True)
        _, expected = zip(*touched(model, one_by_one(model, FEATURES, process)), strict=True)
    assert any("visual" in name for name in names)
    assert any("embed_tokens" in name or "lm_head" in name for name in names)
    # The tower turns queries and keys (rotary positions) in float32.
    assert apart(torch.cat(found), torch.cat(expected)) < max(1e-7, CLOSE)


def touched(model, logps):
    """Weights by name with their gradients, where there is one."""
    model.zero_grad()
    loss(logps).backward()
    return [(n, w.grad.flatten()) for n, w in model.named_parameters() if w.grad is not None]


@pytest.mark.parametrize("trained", [False, True])
def test_the_head_sees_a_chunk_of_answer_tokens_at_a_time(models, trained, monkeypatch):
    model, process = copy.deepcopy(models["qwen3_vl"]), Looks("qwen3_vl")
    head = prefix.plain(model).lm_head
    head.weight.requires_grad_(trained)
    features = [pair(i, 12, 9, [image(i)]) for i in range(3)]
    expected = gradients(model, summed(shared(model, features, process)))
    monkeypatch.setattr(prefix, "CHUNK", 5)
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    output = summed(shared(model, features, process))
    assert sum(seen) == 3 * (12 + 9)
    assert apart(gradients(model, output), expected) < 1e-12
    assert sum(seen) == 3 * (12 + 9) * (2 if trained else 1)  # trained: once more in backward
    assert max(seen) == 5


def test_a_frozen_tower_makes_no_graph(models):
    model = copy.deepcopy(models["qwen3_vl"])
    model.enable_input_require_grads()  # gradient checkpointing asks for it, of the tower too
    graphs = []
    prefix.plain(model).model.visual.register_forward_hook(
        lambda module, inputs, output: graphs.append(output.pooler_output.requires_grad)
    )
    shared(model, FEATURES, Looks("qwen3_vl"))
    assert graphs == [False]


def test_a_wrapped_model_takes_a_batch_and_anything_else_as_before(models):
    model, process = copy.deepcopy(models["qwen3_vl"]), Looks("qwen3_vl")
    expected = shared(model, FEATURES, process)
    plainly = one_by_one(model, FEATURES, process)
    prefix.install(model)
    prefix.install(model)
    assert torch.equal(model(**prefix.pack(FEATURES, model, process))["logps"], expected["logps"])
    assert torch.equal(one_by_one(model, FEATURES, process), plainly)
    with model.disable_adapter():
        base = model(**prefix.pack(FEATURES, model, process))["logps"]
    assert apart(base, expected["logps"]) > 1e-3
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(other(**prefix.pack(FEATURES, other, process))["logps"], expected["logps"])


def test_an_image_that_only_keeps_processes_together_changes_nothing(models):
    model, process = models["qwen3_vl"], Looks("qwen3_vl")
    features = [pair(0), pair(1)]
    expected = shared(model, features, process)["logps"]
    assert process.seen == []
    assert torch.equal(shared(model, features, process, always_look=image(9))["logps"], expected)
    assert process.seen == [[image(9)]]


# What can't be done


def test_why_not_tells_the_reason_in_a_sentence(models, model_dir):
    qwen3 = prefix.plain(models["qwen3_vl"])

    def reason(model):
        return prefix.why_not(model) or "none"

    assert [reason(model) for model in models.values()] == ["none"] * 3
    text_only = SimpleNamespace(config=SimpleNamespace(model_type="llama"), model=None)
    assert "this model is llama" in reason(text_only)
    flash = copy.deepcopy(qwen3)
    flash.model.language_model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 has no mask" in reason(flash)
    sliding = tiny_models.random_qwen2_5(
        use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    assert "sliding window" in reason(sliding)
    noisy = copy.deepcopy(models["qwen3_vl"])
    noisy.add_module("noise", torch.nn.Dropout(0.1))
    assert prefix.why_not(noisy.eval()) is None
    assert "dropout" in reason(noisy.train())


def test_pairs_that_do_not_fit_are_refused(models):
    model, process = models["qwen3_vl"], Looks("qwen3_vl")
    lost = pair(images=[image(0)])
    lost["images"] = [image(0, 3, 3)]
    with pytest.raises(ValueError, match="make 9 tokens, and its prompt has 4"):
        prefix.pack([lost], model, process)
    inside = pair()
    inside["rejected_input_ids"][-1] = IMAGE
    with pytest.raises(ValueError, match="outside of the prompt"):
        prefix.pack([inside], model, process)
