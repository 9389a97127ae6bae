"""The reference's log-probs: what made them is known, and a pair is found by its content."""

from typing import Any

import pandas as pd
import pytest

from stages.core.errors import UserError
from stages.model import prefix, reference_logps

FEATURE = {
    "chosen_input_ids": [1, 2, 3],
    "rejected_input_ids": [1, 2, 4],
    "images": ["/data/images/ab.jpg"],
}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "SOURCE.json").write_text("{}")
    return tmp_path / "base"


@pytest.fixture
def written(tmp_path, base, params_with):
    """``data/reference`` of the demo's parameters, one pair."""
    logps = pd.DataFrame(
        {
            "key": [prefix.pair_key(FEATURE)],
            "chosen_logps": [-3.5],
            "rejected_logps": [-4.5],
        }
    )
    made = reference_logps.made_with(base, params_with(), dtype="float32")
    reference_logps.write(tmp_path / "reference", logps, made)
    return tmp_path / "reference"


def otherwise(written, base, p, **more):
    wanted = reference_logps.made_with(base, p, **{"dtype": "float32"} | more)
    return reference_logps.differences(written, wanted)


@pytest.mark.parametrize(
    ("change", "more", "told"),
    [
        ({"train.beta": 0.7, "scoring.batch_tokens": 9}, {}, []),
        ({"model.template": "qwen2_vl"}, {}, ["model.template"]),
        ({"model.quantization_bit": 4}, {}, ["model.quantization_bit"]),
        ({"format.image_max_pixels": 32768}, {}, ["format.image_max_pixels"]),
        ({"format.image_min_pixels": 1024}, {}, ["format.image_min_pixels"]),
        ({"model.trust": {"pickle": False, "remote_code": True}}, {}, ["model.trust.remote_code"]),
        ({}, {"dtype": "bfloat16"}, ["dtype"]),
        ({}, {"train.fp8": True}, ["train.fp8"]),
    ],
    ids=str,
)
def test_what_is_done_otherwise_is_told(written, base, params_with, change, more, told):
    assert otherwise(written, base, params_with(**change), **more) == told


def test_other_weights_are_told(written, base, params_with):
    (base / "SOURCE.json").write_text('{"commit": "another"}')
    assert otherwise(written, base, params_with()) == ["weights"]


@pytest.mark.parametrize("package", reference_logps.PACKAGES)
def test_another_version_of_a_package_that_computes_is_told(
    written, base, params_with, monkeypatch, package
):
    version = reference_logps.version
    monkeypatch.setattr(reference_logps, "version", lambda n: "0.0" if n == package else version(n))
    assert otherwise(written, base, params_with()) == [package]


def test_a_base_that_was_not_fetched_is_told(tmp_path, params_with):
    with pytest.raises(UserError, match="dvc repro fetch-model"):
        reference_logps.made_with(tmp_path, params_with(), dtype="float32")


def test_a_pair_is_found_by_its_tokens_and_images_wherever_they_lie(written):
    found = reference_logps.by_pair(written)
    moved = FEATURE | {"images": ["/elsewhere/ab.jpg"]}
    assert found[prefix.pair_key(moved)] == (-3.5, -4.5)
    changes: tuple[dict[str, list[Any]], ...] = (
        {"chosen_input_ids": [1, 2, 3, 4]},
        {"rejected_input_ids": [1, 2, 3]},
        {"images": ["/data/images/ac.jpg"]},
        {"images": []},
        {"chosen_input_ids": [1, 2, 4], "rejected_input_ids": [1, 2, 3]},
    )
    for change in changes:
        assert prefix.pair_key(FEATURE | change) not in found
