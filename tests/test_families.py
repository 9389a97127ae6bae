"""Every family of models is scored as LLaMA-Factory trains it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import Template
from PIL import Image

from stages.answers import lm_eval
from stages.core.errors import UserError
from stages.families import known
from stages.model import formatted, scoring, tokens
from tests import tiny_models
from tests.trainer import dpo_trainer, trainers_log_probs

ROOT = Path(__file__).parent.parent
# The families that the demo's model is not of: what makes a small one, and its parameters.
OTHERS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "Qwen2.5-VL": (
        tiny_models.qwen2_5_vl,
        {"model.template": "qwen2_vl", "format.cutoff_len": 256},
    ),
    "Qwen3.5": (tiny_models.qwen3_5, {"model.template": "qwen3_5_nothink"}),
}
BETA = 0.3


# the families that are known


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"model_type": "qwen3_vl_moe"}', "Qwen3-VL"),
        ('{"model_type": "qwen2_5_vl"}', "Qwen2.5-VL"),
        ('{"model_type": "llava"}', r"model_type llava.*Qwen3-VL, Qwen2\.5-VL and Qwen3\.5 models"),
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
            if file.stem not in (
                "prefix",
                "recurrence",
                "formatted",
            ):  # named there where a thread taught it
                assert "qwen" not in file.read_text().lower(), file


@pytest.mark.slow
@pytest.mark.parametrize("family", known.FAMILIES, ids=lambda family: family.name)
def test_llamafactory_uses_the_first_template_for_the_example(llamafactory, family):
    from llamafactory.data.template import TEMPLATES
    from llamafactory.extras.constants import DEFAULT_TEMPLATE

    name = family.example.partition("/")[2]
    if family.name == "Qwen3.5":  # one model, with and without thoughts
        assert DEFAULT_TEMPLATE[f"{name}-Thinking"] == family.templates[1]
    else:
        assert DEFAULT_TEMPLATE[name] == family.templates[0]
    for name in family.templates:
        assert TEMPLATES[name].mm_plugin.image_token == family.image_token


# as test_scoring.py does for Qwen3-VL


@pytest.fixture(scope="module", params=OTHERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def overrides(family):
    return OTHERS[family][1]


@pytest.fixture(scope="module")
def family_dir(llamafactory, family, tmp_path_factory):
    return OTHERS[family][0](tmp_path_factory.mktemp("models") / family)


@pytest.fixture(scope="module")
def p(params_with, overrides):
    return params_with(**overrides, **{"train.beta": BETA, "train.per_device_eval_batch_size": 4})


@pytest.fixture(scope="module")
def formatted_of_it(family_dir, overrides, pairs_dir, write_params, tmp_path_factory):
    from stages import format as format_stage

    folder = tmp_path_factory.mktemp("formatted")
    write_params(folder / "params.yaml", **overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        format_stage.main(pairs_dir, family_dir, Path("formatted"), Path("format.json"))
    return folder / "formatted"


@pytest.fixture(scope="module")
def images(pairs_dir):
    return pairs_dir / "images"


@pytest.fixture(scope="module")
def pairs(formatted_of_it):
    return formatted.read(formatted_of_it, "test")


@pytest.fixture(scope="module")
def policy(family_dir, p):
    return scoring.load(family_dir, p)


@pytest.fixture(scope="module")
def adapter(policy, save_adapter, tmp_path_factory):
    return save_adapter(policy.model, tmp_path_factory.mktemp("adapter"))


def score(policy, pairs, images):
    return scoring.log_probs(policy, pairs, images, batch_tokens=512, label="test")


@pytest.mark.slow
def test_log_probs_are_the_trainers_and_depend_on_the_image(
    p, family_dir, formatted_of_it, pairs, images, policy, adapter, tmp_path
):
    logps = score(policy, pairs, images)
    tuned = score(scoring.load(family_dir, p, adapter), pairs, images)
    theirs = dpo_trainer(p, family_dir, formatted_of_it, images, adapter, tmp_path)
    for ours, found in zip((tuned, logps), trainers_log_probs(theirs), strict=True):
        assert np.abs(ours[scoring.LOGPS].to_numpy().T - found).max() < 1e-3
    assert (tuned["chosen_logps"] - logps["chosen_logps"]).abs().min() > 1e-2
    for pair in pairs:
        Image.effect_noise((90, 70), 80).convert("RGB").save(tmp_path / pair["images"][0])
    changed = score(policy, pairs, tmp_path)
    assert (changed[scoring.LOGPS] - logps[scoring.LOGPS]).abs().to_numpy().min() > 1e-4


@pytest.mark.slow
def test_lm_eval_gets_the_answers_that_scoring_gets(
    family, overrides, policy, params_with, formatted_of_it, images, checkpoint_of, tmp_path
):
    """With the system prompt that Qwen2.5-VL's chat template opens with, from either side."""
    for path in images.iterdir():  # square, as easy-VQA's are: see test_lm_eval.py
        with Image.open(path) as image:
            image.resize((60, 60)).save(tmp_path / path.name)
    p = params_with(**overrides, **{"evaluate.lm_eval": {"easy_vqa": 4}})
    found = lm_eval.run(
        checkpoint_of(policy, p), ROOT / "tasks" / "easy_vqa", formatted_of_it, tmp_path
    )
    rows = formatted.sample(formatted.read(formatted_of_it, "questions"), 4)
    answers = scoring.answer(
        policy, rows, tmp_path, max_new_tokens=32, batch_tokens=400, label="test"
    )
    samples = found.samples["easy_vqa"]
    assert [row["filtered_resps"][0].strip() for row in samples] == [a.text for a in answers]
    opens = "system\nYou are a helpful" if family == "Qwen2.5-VL" else "user\n"
    assert samples[0]["arguments"][0][0].startswith(f"<|im_start|>{opens}")


def test_lm_eval_asks_for_no_thought_where_the_template_has_none():
    tail = "{%- if enable_thinking is defined and enable_thinking is false %}none{%- else %}open"
    assert Template(f"{lm_eval.WITHOUT_THOUGHT}\n{tail}{{%- endif %}}").render() == "none"
    demo = (tiny_models.DEMO / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": "What is it?"}]
    plain, told = (
        Template(each).render(messages=messages) for each in (demo, lm_eval.WITHOUT_THOUGHT + demo)
    )
    assert plain == told


# what is the same in each family


def test_every_family_is_tested_here():
    assert {family.name for family in known.FAMILIES} == {"Qwen3-VL", *OTHERS}


@pytest.mark.slow
@pytest.mark.parametrize("of_the_demo", [True, False])
def test_positions_go_on_after_the_longer_side_of_an_image(of_the_demo, base, policy):
    """The rule in ``families/family.py``."""
    import torch

    each = base if of_the_demo else policy
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
