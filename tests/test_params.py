"""A mistake in params.yaml is refused at once, by file, by key, and with the nearest valid name."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.core.errors import UserError
from stages.params import params
from stages.sources.kinds import KINDS

DEMO = (Path(__file__).parent.parent / "params" / "demo.yaml").read_text(encoding="utf-8")


@pytest.fixture
def refusal(tmp_path):
    """What ``params.load`` says of the demo preset after some text of it was replaced."""

    def refused(*changes: tuple[str, str]) -> str:
        text = DEMO
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} should occur once in params/demo.yaml"
            text = text.replace(old, new)
        return refusal_of(tmp_path, text)

    return refused


def refusal_of(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        params.load(folder / "mine.yaml")
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    return str(caught.value)


def loaded(folder: Path, old: str, new: str) -> params.Params:
    assert DEMO.count(old) == 1, f"{old!r} should occur once in params/demo.yaml"
    (folder / "mine.yaml").write_text(DEMO.replace(old, new), encoding="utf-8")
    return params.load(folder / "mine.yaml")


@pytest.mark.parametrize(
    ("old", "new", "key", "meant"),
    [
        ("  split_key:", "  splitkey:", "preprocess.splitkey", "split_key"),
        ("\nscoring:", "\nscorring:", "scorring", "scoring"),
        ("    prompts:", "    promts:", "evaluate.generation.promts", "prompts"),
        ("    path: demo", "    pth: demo", "model.source.pth", "path"),
        ("  learning_rate:", "  learning_rte:", "train.learning_rte", "learning_rate"),
        ("  lora_rank:", "  lora_rnk:", "train.lora_rnk", "lora_rank"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_known_name(refusal, old, new, key, meant):
    message = refusal((old, new))
    assert f"'{key}'" in message
    assert f"did you mean '{meant}'?" in message


def test_a_misspelt_key_of_ours_in_train_is_said_to_be_missing_under_its_right_name(refusal):
    """pydantic takes an unknown key of ``train`` for LLaMA-Factory's; the missing one tells."""
    message = refusal(("  beta:", "  bta:"))
    assert "'train.beta' is missing; is 'bta' meant for it?" in message


def test_an_extra_key_in_train_is_compared_with_our_own_names_too(refusal):
    assert "did you mean 'beta'?" in refusal(("  gpus: 0", "  bta: 0.2\n  gpus: 0"))


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ("  test: 0.2", "  test: 1.5", "preprocess.test", "less than 1"),
        ("  test: 0.2", "  test: 0", "preprocess.test", "greater than 0"),
        ("  validation: 0.1", "  validation: 0.9", "preprocess", "leave something below 1"),
        ("  jpeg_quality: 95", "  jpeg_quality: 101", "preprocess.jpeg_quality", "100"),
        ("  beta: 0.1", "  beta: 0", "train.beta", "greater than 0"),
        ("  beta: 0.1", "  beta: .inf", "train.beta", "finite"),
        ("  gpus: 0", "  gpus: -1", "train.gpus", "greater than or equal to 0"),
        ("  loss: sigmoid", "  loss: dpo", "train.loss", "'sigmoid'"),
        ("  device: cpu", "  device: gpu", "scoring.device", "'cuda'"),
        ("bit: null", "bit: 5", "model.quantization_bit", "4 or 8"),
        ("_min_pixels: 16384", "_min_pixels: 16385", "format", "image_min_pixels is larger"),
        ("  learning_rate: 1.0e-3", "  learning_rate: 0", "train.learning_rate", "greater than 0"),
        ("  learning_rate: 1.0e-3", "  learning_rate: .nan", "train.learning_rate", "finite"),
        ("  lora_rank: 8", "  lora_rank: 0", "train.lora_rank", "at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_bound(refusal, old, new, key, said):
    message = refusal((old, new))
    assert f"'{key}'" in message
    assert said in message


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ("jpeg_quality: 95", "jpeg_quality: high", "preprocess.jpeg_quality", "integer"),
        ("jpeg_quality: 95", "jpeg_quality: 9.5", "preprocess.jpeg_quality", "integer"),
        ("jpeg_quality: 95", "jpeg_quality:", "preprocess.jpeg_quality", "integer"),
        ("  lora_rank: 8", "  lora_rank: eight", "train.lora_rank", "integer"),
        ("  bf16: false", "  bf16: maybe", "train.bf16", "boolean"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_type_it_needs(refusal, old, new, key, said):
    message = refusal((old, new))
    assert f"'{key}'" in message
    assert said in message


def test_a_text_that_llamafactory_would_take_for_true_is_refused(refusal):
    """YAML 1.2 reads ``no`` as text, and ``TrainingArguments(bf16="no")`` trains in bfloat16."""
    assert "'train.bf16' = 'no'" in refusal(("  bf16: false", "  bf16: no"))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("preprocess.split_key", "  split_key:"),
        ("train.beta", "  beta:"),
        ("scoring.dtype", "  dtype:"),
        ("evaluate.generation.max_new_tokens", "    max_new_tokens:"),
        ("data.sources.easy-vqa.kind", "      kind: easy-vqa"),
    ],
)
def test_a_missing_key_is_refused_by_its_name(tmp_path, key, line):
    lines = DEMO.splitlines(keepends=True)
    kept = [text for text in lines if not text.startswith(line)]
    assert len(kept) == len(lines) - 1
    text = re.sub(r"easy-vqa: .*\n\n", "easy-vqa: {}\n\n", "".join(kept))
    assert f"'{key}' is missing" in refusal_of(tmp_path, text)


PATH = {"kind": "path", "path": "x", "licence": None}
SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"a": PATH | {"licens": None}},
        "unknown key 'data.sources.a.licens'; did you mean 'licence'?",
    ),
    "missing key": ({"a": {"kind": "path", "path": "x"}}, "'data.sources.a.licence' is missing"),
    "type": ({"a": PATH | {"path": 5}}, "'data.sources.a.path"),
    "no path": ({"a": PATH | {"path": []}}, "'data.sources.a.path"),
    "unknown column": (
        {"a": PATH | {"columns": {"imag": "x"}}},
        "unknown key 'data.sources.a.columns.imag'; did you mean 'image'?",
    ),
    "no text": ({"a": PATH | {"columns": {"chosen": 7}}}, "'data.sources.a.columns.chosen' = 7"),
    "one column twice": (
        {"a": PATH | {"columns": {"chosen": "rejected"}}},
        "'data.sources.a.columns': question, chosen and rejected must name three columns",
    ),
    "half a rule": ({"a": PATH | {"remap": [{"from": "/x"}]}}, "'data.sources.a.remap.0"),
    "columns of no table": (
        {"a": {"kind": "easy-vqa", "columns": {}}},
        "unknown key 'data.sources.a.columns'",
    ),
    "name": ({"../a": {"kind": "easy-vqa"}}, "'data.sources': a name is a letter, then"),
    "digit": ({"3d": {"kind": "easy-vqa"}}, "'data.sources': a name is a letter, then"),
    "names alike": ({name: {"kind": "easy-vqa"} for name in "aA"}, "differ in case alone"),
    "none": ({}, "'data.sources'"),
    "sharegpt": ({"a": {"kind": "sharegpt"}}, "kind sharegpt is gone: kind path reads these files"),
    "several": ({"a": {"kind": "several"}}, "each of its sources is an entry of data.sources"),
    "image_urls": ({"a": PATH | {"image_urls": None}}, "image_urls is gone: img2dataset"),
    "address": (
        {"a": PATH | {"path": "https://me:s3cret@host/x.json"}},
        "an address is no path: `dvc import-url`",
    ),
    "drive": ({"a": PATH | {"path": ["x", "gdrive:abc"]}}, "gdown one from Google Drive"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_a_mistake_in_a_source_names_it_and_the_key(tmp_path, write_params, what):
    sources, told = SOURCES[what]
    write_params(tmp_path / "params.yaml", **{"data.sources": sources})
    with pytest.raises(UserError) as caught:
        params.load(tmp_path / "params.yaml")
    assert told in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_keys_from_before_data_sources_are_answered_by_what_to_write_now(tmp_path, write_params):
    old = {"source": {"kind": "easy-vqa"}, "columns": {"image": "image"}}
    write_params(tmp_path / "params.yaml", **{"data": old})
    with pytest.raises(UserError) as caught:
        params.load(tmp_path / "params.yaml")
    assert "'data.source' is now one entry of data.sources" in str(caught.value)
    assert "'data.columns' is now a key of each source" in str(caught.value)
    assert "missing" not in str(caught.value)


def test_a_missing_section_is_refused_by_its_name(tmp_path):
    text = DEMO[: DEMO.index("\nevaluate:")]
    assert "'evaluate' is missing" in refusal_of(tmp_path, text)


def test_a_section_without_keys_is_refused(refusal):
    assert "'data.sources.mine' must hold keys, one of them kind" in refusal(
        ("  sources: ", "  sources: {mine: easy-vqa}\n  ignored:")
    )
    assert "'model.trust' must hold keys, such as pickle" in refusal(
        ("  trust:\n", "  trust: all\n  ignored:\n")
    )


def test_an_unknown_kind_of_source_is_refused_with_those_there_are(refusal):
    message = refusal(("kind: easy-vqa", "kind: easyvqa"))
    assert "'data.sources.easy-vqa.kind' = 'easyvqa'" in message
    assert f"{', '.join(KINDS)}; did you mean 'easy-vqa'?" in message


def test_a_data_set_is_no_model(refusal):
    message = refusal(("    kind: path ", "    kind: easy-vqa "))
    assert "'model.source.kind' = 'easy-vqa': must be one of hub, path" in message


def test_a_key_of_another_kind_of_source_is_refused(refusal):
    message = refusal(("    path: demo/model", "    path: demo/model\n    revision: main"))
    assert "unknown key 'model.source.revision'" in message


@pytest.mark.parametrize(
    ("line", "decided_by"),
    [
        ("output_dir: elsewhere", "dvc.yaml"),
        ("pref_beta: 0.2", "train.beta"),
        ("cutoff_len: 99", "format.cutoff_len"),
        ("val_size: 0.1", "preprocess.validation"),
        ("quantization_bit: 4", "model.quantization_bit"),
        ("report_to: wandb", "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_key_that_the_pipeline_sets_is_refused_with_what_decides_it(refusal, line, decided_by):
    message = refusal(("  gpus: 0", f"  {line}\n  gpus: 0"))
    assert f"'train.{line.split(':')[0]}' is not set here; it comes from {decided_by}" in message


@pytest.mark.parametrize("text", ["train: [1", "train:\n\t- beta", DEMO + "format: {}\n"])
def test_what_is_not_yaml_is_refused(tmp_path, text):
    assert "is not valid YAML" in refusal_of(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- data\n", "just words\n"])
def test_yaml_without_sections_is_refused_with_their_names(tmp_path, text):
    assert "must hold the sections data, model, preprocess" in refusal_of(tmp_path, text)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine\.yaml can't be read"):
        params.load(tmp_path / "mine.yaml")


def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml is missing; .*`make use PRESET=demo`"):
        params.load(tmp_path / "none.yaml")


def test_every_mistake_is_told_at_once(refusal):
    message = refusal(("  beta: 0.1", "  beta: 0"), ("  device: cpu", "  device: gpu"))
    assert "'train.beta'" in message
    assert "'scoring.device'" in message


@pytest.mark.parametrize("written", ["5e-06", "5e-6", "5.0e-6", "0.000005"])
def test_every_way_to_write_a_small_number_is_read_as_a_number(tmp_path, written):
    """DVC writes 5e-06; YAML 1.1 readers take 5e-6 for text."""
    p = loaded(tmp_path, "  learning_rate: 1.0e-3", f"  learning_rate: {written}")
    rate = p.train.passed_through["learning_rate"]
    assert isinstance(rate, float)
    assert rate == pytest.approx(5e-6)


def test_options_of_llamafactory_pass_through_as_they_are(tmp_path):
    p = loaded(tmp_path, "  gpus: 0", "  dpo_label_smoothing: 0.1\n  gpus: 0")
    assert p.train.passed_through["dpo_label_smoothing"] == 0.1
    assert not {"beta", "loss", "gpus"} & p.train.passed_through.keys()


def test_parameters_cannot_be_changed_once_loaded(tmp_path):
    p = loaded(tmp_path, "  gpus: 0", "  gpus: 0 ")
    with pytest.raises(ValidationError, match="frozen"):
        p.train.beta = 1.0


def test_flattened_joins_keys_by_dots_and_keeps_lists_and_empty_sections():
    nested = {"a": {"b": {"c": 1}, "d": [1, "x"]}, "e": None, "f": {}}
    assert params.flattened(nested) == {"a.b.c": 1, "a.d": [1, "x"], "e": None, "f": {}}
    assert params.flattened(5, "train.") == {"train": 5}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train.loss": "hinge"}, "'train.loss' is hinge, and LLaMA-Factory's own trainer would"),
        ({"train.loss": "ipo"}, "'train.loss' is ipo, and LLaMA-Factory's own trainer would train"),
        ({"train.keep_vision_features": True}, "'train.keep_vision_features' is true, and"),
    ],
)
def test_what_only_shared_prompts_can_do_is_refused_without_them(
    tmp_path, write_params, change, told
):
    path = tmp_path / "params.yaml"
    write_params(path, **change)
    params.load(path)
    write_params(path, **change, **{"train.shared_prefix": False})
    with pytest.raises(UserError, match=told):
        params.load(path)


def test_a_loss_that_trl_has_no_more_is_refused(tmp_path, write_params):
    write_params(tmp_path / "params.yaml", **{"train.loss": "kto_pair"})
    with pytest.raises(UserError, match=r"'train.loss' = 'kto_pair'.*'sigmoid', 'hinge', 'ipo'"):
        params.load(tmp_path / "params.yaml")
