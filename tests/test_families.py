"""Every family of models is scored as LLaMA-Factory trains it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.answers import lm_eval
from stages.core.errors import UserError
from stages.families import known
from stages.model import formatted, scoring, tokens
from tests import tiny_models
from tests.trainer import dpo_trainer, trainers_log_probs

ROOT = Path(__file__).parent.parent
QWEN2_5 = {"model.template": "qwen2_vl", "format.cutoff_len": 256}
BETA = 0.3


# the families that are known


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"model_type": "qwen3_vl_moe"}', "Qwen3-VL"),
        ('{"model_type": "qwen2_5_vl"}', "Qwen2.5-VL"),
        ('{"model_type": "llava"}', r"model_type llava.*Qwen3-VL and Qwen2\.5-VL models"),
        *((broken, "is missing or names no model_type") for broken in (None, "{", "[]", "{}")),
    ],
)
def test_a_model_is_of_the_family_that_its_config_names(tmp_path, content, found):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    if found.startswith("Qwen"):
        assert known.of_model(tmp_path).name == found
        return
    with pytest.raises(UserError, match=found):
        known.of_model(tmp_path)


def test_a_template_of_another_family_is_refused_before_anything_is_loaded(
    model_dir, params_with, monkeypatch
):
    p = params_with(**{"model.template": "qwen2_vl"})
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(UserError, match=r"qwen2_vl, but .* Qwen3-VL; set it to qwen3_vl_nothink"):
        tokens.load(model_dir, p)


def test_model_and_answers_name_no_family():
    for folder in ("model", "answers"):
        for file in (ROOT / "stages" / folder).glob("*.py"):
            if file.stem not in ("prefix", "formatted"):  # named there where a thread taught it
                assert "qwen" not in file.read_text().lower(), file


@pytest.mark.slow
@pytest.mark.parametrize("family", known.FAMILIES, ids=lambda family: family.name)
def test_llamafactory_uses_the_first_template_for_the_example(llamafactory, family):
    from llamafactory.data.template import TEMPLATES
    from llamafactory.extras.constants import DEFAULT_TEMPLATE

    assert DEFAULT_TEMPLATE[family.example.partition("/")[2]] == family.templates[0]
    for name in family.templates:
        assert TEMPLATES[name].mm_plugin.image_token == family.image_token


# Qwen2.5-VL, as test_scoring.py does for Qwen3-VL


@pytest.fixture(scope="module")
def qwen2_5_dir(llamafactory, tmp_path_factory):
    return tiny_models.qwen2_5_vl(tmp_path_factory.mktemp("models") / "qwen2.5-vl")


@pytest.fixture(scope="module")
def p(params_with):
    return params_with(**QWEN2_5, **{"train.beta": BETA, "train.per_device_eval_batch_size": 4})


@pytest.fixture(scope="module")
def formatted_of_it(qwen2_5_dir, pairs_dir, write_params, tmp_path_factory):
    from stages import format as format_stage

    folder = tmp_path_factory.mktemp("formatted")
    write_params(folder / "params.yaml", **QWEN2_5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        format_stage.main(pairs_dir, qwen2_5_dir, Path("formatted"), Path("format.json"))
    return folder / "formatted"


@pytest.fixture(scope="module")
def images(pairs_dir):
    return pairs_dir / "images"


@pytest.fixture(scope="module")
def pairs(formatted_of_it):
    return formatted.read(formatted_of_it, "test")


@pytest.fixture(scope="module")
def policy(qwen2_5_dir, p):
    return scoring.load(qwen2_5_dir, p)


@pytest.fixture(scope="module")
def adapter(policy, save_adapter, tmp_path_factory):
    return save_adapter(policy.model, tmp_path_factory.mktemp("adapter"))


def score(policy, pairs, images):
    return scoring.log_probs(policy, pairs, images, batch_tokens=512, label="test")


@pytest.mark.slow
def test_log_probs_of_qwen2_5_vl_are_the_trainers_and_depend_on_the_image(
    p, qwen2_5_dir, formatted_of_it, pairs, images, policy, adapter, tmp_path
):
    logps = score(policy, pairs, images)
    tuned = score(scoring.load(qwen2_5_dir, p, adapter), pairs, images)
    theirs = dpo_trainer(p, qwen2_5_dir, formatted_of_it, images, adapter, tmp_path)
    for ours, found in zip((tuned, logps), trainers_log_probs(theirs), strict=True):
        assert np.abs(ours[scoring.LOGPS].to_numpy().T - found).max() < 1e-3
    assert (tuned["chosen_logps"] - logps["chosen_logps"]).abs().min() > 1e-2
    for pair in pairs:
        Image.effect_noise((90, 70), 80).convert("RGB").save(tmp_path / pair["images"][0])
    changed = score(policy, pairs, tmp_path)
    assert (changed[scoring.LOGPS] - logps[scoring.LOGPS]).abs().to_numpy().min() > 1e-4


@pytest.mark.slow
def test_lm_eval_gets_the_answers_of_qwen2_5_vl_that_scoring_gets(
    policy, params_with, formatted_of_it, images, checkpoint_of, tmp_path
):
    """With the system prompt that its chat template opens with, from either side."""
    for path in images.iterdir():  # square, as easy-VQA's are: see test_lm_eval.py
        with Image.open(path) as image:
            image.resize((60, 60)).save(tmp_path / path.name)
    p = params_with(**QWEN2_5, **{"evaluate.lm_eval": {"easy_vqa": 4}})
    found = lm_eval.run(
        checkpoint_of(policy, p), ROOT / "tasks" / "easy_vqa", formatted_of_it, tmp_path
    )
    rows = formatted.sample(formatted.read(formatted_of_it, "questions"), 4)
    answers = scoring.answer(
        policy, rows, tmp_path, max_new_tokens=32, batch_tokens=400, label="test"
    )
    samples = found.samples["easy_vqa"]
    assert [row["filtered_resps"][0].strip() for row in samples] == [a.text for a in answers]
    assert samples[0]["arguments"][0][0].startswith("<|im_start|>system\nYou are a helpful")


# what is the same in each family


@pytest.fixture(params=[family.name for family in known.FAMILIES])
def each(request):
    """A loaded policy of each family."""
    return request.getfixturevalue({"Qwen3-VL": "base", "Qwen2.5-VL": "policy"}[request.param])


@pytest.mark.slow
def test_positions_go_on_after_the_longer_side_of_an_image(each):
    """The rule in ``families/family.py``."""
    import torch

    grid = torch.tensor([[1, 6, 10]])  # patches: 3 by 5 tokens
    ids = torch.tensor([[3, *[each.image_token_id] * 15, 4, 5]])
    kinds = (ids == each.image_token_id).long()
    positions, _ = each.model.model.get_rope_index(
        ids, image_grid_thw=grid, mm_token_type_ids=kinds
    )
    time, row, column = positions[:, 0].tolist()
    assert time == [0, *[1] * 15, 6, 7]
    assert row == [0, *(1 + i for i in range(3) for _ in range(5)), 6, 7]
    assert column == [0, *(1 + i for _ in range(3) for i in range(5)), 6, 7]
