"""A mistake in params.yaml is refused before any stage does any work: by file and key, with what is
right, and all mistakes at once.
"""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from stages.core.errors import UserError
from stages.params import arguments, params
from tests.conftest import document as demo
from tests.contracts import MODULES, ROOT, leaves_of, types_of

DEMO = (ROOT / "params" / "demo.yaml").read_text(encoding="utf-8")

# Values that a key of ours refuses; of text, what is not text.
NOT_COUNTS = (0, -1, 1.5, True, "many")
OUT_OF_RANGE = {
    "preprocess.validation": (-0.1, 1, 0.8, math.nan),  # with test = 0.2, 0.8 leaves nothing
    "preprocess.test": (0, 1, 0.9, -0.1),
    "preprocess.jpeg_quality": (0, 101, 9.5, None),
    "scoring.device": ("gpu", 0),
    "scoring.dtype": ("float", "bf16"),
    "train.beta": (0, -1, math.inf, math.nan, "0.1"),
    "train.loss": ("dpo", "kto_pair"),
    "train.view": ("whole",),
    "train.gpus": (-1, 1.5, True),
    "train.shared_prefix": ("no", 1, 0),
    "train.portable": ("no", 1),
    "scoring.portable": ("no", 1),
    "evaluate.confidence": (0.5, 1, 95),
    "evaluate.resamples": (99, 0),
    "evaluate.seed": (-1, 0.5),
    "evaluate.controls": (-1, 0.5),
    "evaluate.generation.prompts": (-1, 0.5),
    "evaluate.generation.questions": (-1, 0.5),
    "evaluate.generation.engine": ("vLLM", None),
    "evaluate.lm_eval": ({"easy_vqa": 0}, {"easy_vqa": "all"}, ["easy_vqa"], "", False),
    "model.trust.pickle": ("yes", 1),
    "model.trust.remote_code": ("no", 0),
    "model.quantization_bit": (5, "4", True),
    "model.template": ("qwen", 7),
    "preprocess.split_key": ("", "x" * 65),
    "preprocess.max_dropped": (-0.1, 1.1, "half"),
    "preprocess.wanted.text_only": ("no", 1),
    "preprocess.wanted.system_prompt": ("no", 0),
    "preprocess.refuse": ({"leak": "("}, {"a leak": "x"}, {"leak": 7}, "x"),
    "evaluate.task_files": (7,),
    "format.allowed_tokens": ("<|box_start|>", [7], [["<think>"]]),
    **dict.fromkeys(
        (
            *("preprocess.min_side", "preprocess.max_pixels", "preprocess.max_input_pixels"),
            *("preprocess.workers", "format.cutoff_len", "format.image_max_pixels"),
            *("format.image_min_pixels", "scoring.batch_tokens"),
            *("preprocess.wanted.images", "preprocess.wanted.turns"),
            "evaluate.generation.max_new_tokens",
        ),
        NOT_COUNTS,
    ),
}
MAY_BE_NULL = {"model.quantization_bit", "evaluate.lm_eval"}
OURS = [key for key in leaves_of(params.Params) if not key.startswith(("data.", "model.source"))]
TABLE = {"kind": "path", "path": "a.csv", "licence": None, "columns": {"image": "image"}}


def changed(**values: Any) -> dict[str, Any]:
    """The demo's document with other values; ``...`` takes a key out."""
    document = demo()
    for key, value in values.items():
        *sections, name = key.split(".")
        place = document
        for section in sections:
            place = place[section]
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return document


def refusal(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        params.checked(changed(**values), "mine.yaml")
    text = str(caught.value)
    assert text.startswith("mine.yaml: ")
    assert "\n" not in text
    assert len(text) < 1500
    return text


def test_every_key_of_ours_has_values_out_of_its_range_here_and_may_be_null_as_said():
    assert set(OURS) == set(OUT_OF_RANGE)
    params.checked(changed(**dict.fromkeys(MAY_BE_NULL)), "mine.yaml")


@pytest.mark.parametrize("key", OURS)
def test_a_key_that_is_wrong_missing_or_misspelt_is_refused_by_its_name(key):
    wrong = {"a": 0} if key == "evaluate.lm_eval" else {"a": 1}  # it holds names and numbers
    for value in (*OUT_OF_RANGE[key], wrong, [[1]], *(() if key in MAY_BE_NULL else (None,))):
        said = refusal(**{key: value})
        assert f"'{key}" in said or f"'{key.rpartition('.')[0]}'" in said, value
    assert f"'{key}' is missing" in refusal(**{key: ...})
    assert f"'{key}x'" in (said := refusal(**{f"{key}x": 1}))
    assert "did you mean" in said


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"train.bta": 0.1}, "unknown key 'train.bta'; did you mean 'beta'?"),
        ({"train.learning_rte": 1}, "unknown key 'train.learning_rte'; did you mean 'learning_ra"),
        ({"scorring": {}}, "unknown key 'scorring'; did you mean 'scoring'?"),
        ({"evaluate": ...}, "key 'evaluate' is missing"),
        ({"scoring.device": "gpu"}, "'scoring.device' = 'gpu': input should be 'auto', 'cpu' or"),
        ({"scoring.device": "z" * 9999}, "'scoring.device' = "),
        ({"train.bf16": "no"}, "'train.bf16' = 'no': input should be a valid boolean"),
        ({"model.trust": "all"}, "'model.trust' must be a section with keys of its own"),
        ({"data.sources": {}}, "'data.sources': dictionary should have at least 1 item"),
        ({"data.sources": {"a b": TABLE}}, "'data.sources.a b' = 'a b': string should match"),
        (
            {"data.sources": {"a": TABLE, "A": TABLE}},
            "two sources have names that differ only in case",
        ),
        (
            {"data.sources.mine": "easy-vqa"},
            "'data.sources.mine' must be a section with keys of its own",
        ),
        ({"data.sources.mine": {}}, "key 'data.sources.mine.kind' is missing"),
        ({"data.sources.mine": {"kind": "easyvqa"}}, "did you mean 'easy-vqa'?"),
        ({"data.sources.mine": TABLE | {"licens": 1}}, "unknown key 'data.sources.mine.licens'"),
        (
            {"data.sources.mine": TABLE | {"columns": {"chosen": "rejected"}}},
            "image, question, chosen and rejected must name four columns",
        ),
        ({"model.source.kind": "easy-vqa"}, "'easy-vqa': must be one of hub, path"),
        ({"model.source.revision": "main"}, "unknown key 'model.source.revision'"),
        (
            {"preprocess.validation": 0.8},
            "'preprocess': validation and test add up to 1, which leaves",
        ),
        ({"format.image_min_pixels": 20_000}, "image_min_pixels is larger than image_max_pixels"),
        (
            {"preprocess.refuse": {"leak": "("}},
            "'preprocess.refuse.leak' = '(': it is no regular expression: missing ), unterminated",
        ),
        ({"model.template": "qwen"}, "'model.template' = 'qwen': input should be 'qwen3_vl_not"),
        ({"model.quantization_bit": 4}, "'model.quantization_bit' needs a GPU, but train.gpus is"),
        ({"train.fp16": True}, "'train.fp16' needs a GPU, but train.gpus is 0"),
        (
            {"train.loss": "ipo", "train.shared_prefix": False},
            "'train': loss is ipo, but LLaMA-Factory's own trainer would train sigmoid under that",
        ),
        (
            {"train.loss": "ipo", "train.dpo_label_smoothing": 0.1},
            "'train': loss: ipo takes no dpo_label_smoothing",
        ),
    ],
)
def test_a_mistake_is_told_with_what_is_right(values, told):
    assert told in refusal(**values)


def test_all_mistakes_of_all_sections_are_told_at_once():
    wrong = {
        **{"evaluate.controls": -7, "format.image_max_pixels": 1, "scoring.dtype": "half"},
        **{"train.beta": 0, "train.lora_rank": 0, "train.tokenized_path": "tokens"},
        **{"train.early_stopping": 3, "evaluate.seed": -1},
    }
    said = refusal(**wrong, **{"preprocess.validation": 0.9})
    for key in (*wrong, "preprocess"):
        assert f"mine.yaml: '{key}'" in said or f"unknown key '{key}'" in said, key


def test_a_key_of_an_earlier_release_is_refused_with_the_new_way_alone(monkeypatch):
    for path in (ROOT / "params").glob("qwen3-vl-4b-*"):  # which somebody copied by hand
        with pytest.raises(UserError, match="'base' belongs to a preset; `make use PRESET=name`"):
            params.load(path)
    moved = {
        "data.source": {"kind": "path", "path": "a.csv"},
        "data.columns": {"image": None},
        "data.sources.a": {"kind": "several"},
        "data.sources.b": {"kind": "sharegpt", "image_urls": "urls"},
        "data.sources.c": {"kind": "path", "path": "s3://bucket/a.csv"},
        "data.sources.d": {"kind": "path", "path": ["a.csv", "gdrive:1234"]},
        "train.nodes": 2,
        "train.keep_vision_features": False,
    }
    said = refusal(**moved, **{"train.beta": 0}).split("; mine.yaml: ")
    assert len(said) == len(arguments.MOVED) - 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        *(
            (text, "is not valid YAML")
            for text in ("train: [1", "a:\n\t- b", DEMO + "format: {}\n")
        ),
        *((text, "must hold the sections data, model") for text in ("", "- data\n", "words\n")),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (None, "is missing; run from the project's root, or `make use PRESET=demo`"),
    ],
)
def test_what_is_no_parameters_file_is_refused_by_its_name(tmp_path, content, told):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"mine\.yaml {told}"):
        params.load(path)


@pytest.mark.parametrize("written", ["5e-06", "5e-6", "5.0e-6", "0.000005"])
def test_every_way_to_write_a_small_number_is_read_as_a_number(tmp_path, written):
    """DVC writes 5e-06; YAML 1.1 readers take 5e-6 for text."""
    path = tmp_path / "mine.yaml"
    path.write_text(DEMO.replace("learning_rate: 1.0e-3", f"learning_rate: {written}"))
    assert params.load(path).train.passed_through["learning_rate"] == pytest.approx(5e-6)


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith("stages.") and name != "stages.report"]
)
def test_every_stage_refuses_wrong_parameters_before_it_looks_at_anything(
    module, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(DEMO.replace("lora_rank: 8", "lora_rank: 0"))
    main = importlib.import_module(module).main
    given = {n: Path("none") if t == "Path" else "data" for n, t in types_of(module).items()}
    with pytest.raises(UserError, match=r"params\.yaml: 'train\.lora_rank' = 0: input should be"):
        main(**given)
