"""Scores are those of LLaMA-Factory's own DPO trainer; they depend on the image, on the adapter,
and on nothing that they should not depend on.
"""

import copy
import functools
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stages.answers import controls
from stages.core.errors import UserError
from stages.model import by_vllm, formatted, prefix, scoring
from tests.trainer import dpo_trainer, trainers_log_probs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(formatted_dir):
    return formatted.read(formatted_dir, "test")


@pytest.fixture(scope="module")
def images(pairs_dir):
    return pairs_dir / "images"


def score(policy, pairs, images, batch_tokens=512):
    return scoring.log_probs(policy, pairs, images, batch_tokens=batch_tokens, label="test")


@pytest.fixture(scope="module")
def base_logps(base, pairs, images):
    return score(base, pairs, images)


@pytest.fixture(scope="module")
def tuned_logps(tuned, pairs, images):
    return score(tuned, pairs, images)


def apart(one, other):
    """The differences of log-probs, chosen and rejected, pair by pair."""
    return np.abs(one[scoring.LOGPS].to_numpy() - other[scoring.LOGPS].to_numpy())


# LLaMA-Factory's trainer

BETA = 0.3


@pytest.fixture(scope="module")
def theirs(
    llamafactory, params_with, model_dir, formatted_dir, images, adapter_dir, tmp_path_factory
):
    p = params_with(**{"train.beta": BETA, "train.per_device_eval_batch_size": 4})
    folder = tmp_path_factory.mktemp("trainer")
    return dpo_trainer(p, model_dir, formatted_dir, images, adapter_dir, folder)


def test_log_probs_are_the_trainers(theirs, pairs, tuned_logps, base_logps):
    policy, reference = trainers_log_probs(theirs)
    for ours, found in ((tuned_logps, policy), (base_logps, reference)):
        assert np.abs(ours[scoring.LOGPS].to_numpy().T - np.array(found)).max() < 1e-3
    # The adapter changes far more than that, so the comparison says something.
    assert apart(tuned_logps, base_logps).max(axis=1).min() > 1e-2


def test_answers_are_counted_as_the_trainers_labels_are(theirs, tuned_logps):
    labels = theirs.eval_dataset["chosen_labels"]
    assert list(tuned_logps["chosen_tokens"]) == [sum(i != -100 for i in row) for row in labels]


# what scores depend on


def test_batches_and_order_change_nothing(tuned, pairs, images, tuned_logps):
    for found in (
        score(tuned, pairs, images, batch_tokens=1),
        score(tuned, pairs, images, batch_tokens=10**6),
        score(tuned, pairs[::-1], images)[::-1],
    ):
        assert apart(found, tuned_logps).max() < 1e-4
        assert list(found["id"]) == [pair["id"] for pair in pairs]
        assert list(found["chosen_tokens"]) == list(tuned_logps["chosen_tokens"])


def test_another_image_changes_every_log_prob(base, pairs, images, base_logps, tmp_path):
    for pair in pairs:
        Image.effect_noise((90, 70), 80).convert("RGB").save(tmp_path / pair["images"][0])
    assert apart(score(base, pairs, tmp_path), base_logps).min() > 1e-4


def test_with_the_adapter_switched_off_the_scores_are_the_bases(tuned, pairs, images, base_logps):
    with tuned.model.disable_adapter():
        assert apart(score(tuned, pairs, images), base_logps).max() < 1e-4


def test_a_missing_image_is_an_error_not_a_blank(base, pairs, tmp_path):
    with pytest.raises(FileNotFoundError):
        score(base, pairs[:1], tmp_path)


# answers


def test_a_token_is_as_likely_in_generation_as_in_scoring(tuned, pairs, images):
    import torch

    asked = [scoring.prompt_tokens(tuned, pairs[0], images)]
    batch = scoring._left_padded(tuned, pairs[:1], asked, images)
    with torch.inference_mode():
        said = tuned.model(**batch).logits[0, -1].log_softmax(-1)
    (feature,) = scoring.encode(tuned, pairs[:1], images)
    process = functools.partial(prefix.process_images, tuned.template, tuned.processor)
    scored = prefix.log_probs(tuned.model, prefix.pack([feature], tuned.model, process))["logps"]
    for side, logps in zip(("chosen", "rejected"), scored, strict=True):
        ids = feature[f"{side}_input_ids"]
        assert ids[: len(asked[0])] == asked[0]
        assert logps[0, 0] == pytest.approx(said[ids[len(asked[0])]].item(), abs=1e-4)


@pytest.mark.parametrize("tunes", [False, True])
def test_vllm_gives_the_answers_of_transformers(
    base, tuned, model_dir, adapter_dir, pairs, images, params_with, tunes
):
    pytest.importorskip("vllm")
    adapter = adapter_dir if tunes else None
    given = by_vllm.answer(model_dir, params_with(), adapter, pairs, images, 16)
    policy, label = tuned if tunes else base, "test"
    expected = scoring.answer(
        policy, pairs, images, max_new_tokens=16, batch_tokens=999, label=label
    )
    assert given == expected


def test_an_answer_says_how_long_it_is_and_whether_it_ended(base, pairs, images):
    whole = scoring.answer(base, pairs, images, max_new_tokens=64, batch_tokens=999, label="test")
    cut = scoring.answer(base, pairs, images, max_new_tokens=4, batch_tokens=999, label="test")
    ended = [answer for answer in whole if answer.finished]
    assert ended
    for answer in ended:
        again = base.tokenizer.encode(answer.text, add_special_tokens=False)
        assert abs(len(again) - answer.tokens) <= 1  # white space at the ends is stripped
    for before, after in zip(cut, whole, strict=True):
        assert after.text.startswith(before.text)
        assert before.finished is (after.finished and after.tokens < 4)
        assert before.tokens == min(after.tokens, 4)


def test_controls_have_the_tokens_of_the_pair_and_another_image(
    base, checkpoint_of, pairs, images, params_with
):
    p = params_with(**{"evaluate.controls": 6, "scoring.batch_tokens": 256})
    table = controls.log_probs(checkpoint_of(base, p), pairs, images, label="test")
    sample = formatted.sample(pairs, 6)
    own = score(base, sample, images)
    assert sorted(table["shown"].unique()) == ["blank", "shuffled"]
    for _, shown in table.groupby("shown"):
        lengths = ["id", "chosen_tokens", "rejected_tokens", "image_tokens"]
        pd.testing.assert_frame_equal(shown[lengths].reset_index(drop=True), own[lengths])
        assert (shown["chosen_logps"].to_numpy() != own["chosen_logps"].to_numpy()).all()


# refusals


@pytest.mark.parametrize(
    ("wanted", "there", "found"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_auto_takes_a_gpu_if_there_is_one(params_with, monkeypatch, wanted, there, found):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert scoring.device_of(params_with(**{"scoring.device": wanted})) == found


def test_a_gpu_that_is_not_there_is_one_clear_error(model_dir, params_with, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"scoring\.device is cuda, but torch finds no GPU"):
        scoring.load(model_dir, params_with(**{"scoring.device": "cuda"}))


def test_a_model_that_can_not_share_a_prompt_is_told(
    llamafactory, model_dir, params_with, monkeypatch
):
    monkeypatch.setattr(prefix, "why_not", lambda model: "it is Tuesday")
    with pytest.raises(UserError, match="can't be scored: it is Tuesday"):
        scoring.load(model_dir, params_with())


def edited(**changes):
    def edit(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return edit


def torn(folder):
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])


def retensored(too_many):
    def edit(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        name = min(tensors)
        value = tensors.pop(name)
        if too_many:
            tensors |= {name: value, name.replace("layers.0", "layers.99"): value.clone()}
        save_file(tensors, folder / WEIGHTS)

    return edit


WEIGHTS = "adapter_model.safetensors"
DAMAGES = {
    "other rank": edited(r=2),
    "other modules": edited(target_modules=["no_such_module"]),
    "damaged weights": torn,
    "weights lacking": retensored(too_many=False),
    "weights too many": retensored(too_many=True),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_an_adapter_that_does_not_fit_is_told(base, adapter_dir, tmp_path, how, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = shutil.copytree(adapter_dir, tmp_path / "adapter")
    DAMAGES[how](adapter)
    with pytest.raises(UserError, match="does not fit the base model") as error:
        scoring._with_adapter(copy.deepcopy(base.model), adapter)
    assert str(adapter) in str(error.value)


# the base's own files


def renamed(model_dir, folder, change):
    """The model with other tensors: ``change`` gets all of them by name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").chmod(0o644)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(NORM), rf"1 of the model's tensors are in none .*{NORM}"),
        (lambda tensors: tensors.update(other=tensors.pop(NORM)), rf"none of the files .*{NORM}"),
        (lambda tensors: tensors.update({NORM: tensors[NORM][:64].clone()}), "can't be loaded: "),
    ],
)
def test_a_tensor_that_transformers_would_make_up_is_refused(
    llamafactory, model_dir, params_with, tmp_path, change, told
):
    from transformers import AutoModelForImageTextToText

    before = vars(AutoModelForImageTextToText)["from_pretrained"]
    folder = renamed(model_dir, tmp_path / "model", change)
    with pytest.raises(UserError, match=told):
        scoring.load(folder, params_with())
    assert vars(AutoModelForImageTextToText)["from_pretrained"] is before
