"""Every key of params.yaml with every kind of wrong value, and the keys that do not go together:
all refused by ``params.load``, which every stage calls first, and all at once.
"""

import importlib
import math
import re
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import pytest
from ruamel.yaml import YAML

from stages.core.errors import UserError
from stages.params import arguments, params, rules
from stages.tuning.config import dpo_config
from tests.contracts import MODULES, ROOT, leaves_of, types_of

DEMO = ROOT / "params" / "demo.yaml"

# Values that a key of ours refuses; of text, what is not text.
NOT_COUNTS = (0, -1, 1.5, True, "many")
OUT_OF_RANGE = {
    "preprocess.validation": (-0.1, 1, 0.8, math.nan),  # with test = 0.2, 0.8 leaves nothing
    "preprocess.test": (0, 1, 0.9, -0.1),
    "preprocess.jpeg_quality": (0, 101),
    "scoring.device": ("gpu", 0),
    "scoring.dtype": ("float", "bf16"),
    "scoring.portable": ("no", 1),
    "train.beta": (0, -1, math.inf, math.nan, "0.1"),
    "train.loss": ("dpo", "kto_pair"),
    "train.gpus": (-1, 1.5, True),
    "train.portable": ("no", 1),
    "train.shared_prefix": ("no", 1, 0),
    "train.keep_vision_features": ("no", 1),
    "evaluate.confidence": (0.5, 1, 95),
    "evaluate.resamples": (99, 0),
    "evaluate.seed": (-1, 0.5),
    "evaluate.controls": (-1, 0.5),
    "evaluate.generation.prompts": (-1, 0.5),
    "evaluate.generation.questions": (-1, 0.5),
    "evaluate.lm_eval": ({"easy_vqa": 0}, {"easy_vqa": "all"}, ["easy_vqa"], "", False),
    "model.trust.pickle": ("yes", 1),
    "model.trust.remote_code": ("no", 0),
    "model.quantization_bit": (5, "4", True),
    "model.template": ("qwen", "qwen2_vl"),  # the demo's model is a Qwen3-VL
    "preprocess.split_key": ("", "x" * 65),
    "preprocess.max_dropped": (-0.1, 1.1, "half"),
    "preprocess.wanted.text_only": ("no", 1),
    "preprocess.wanted.system_prompt": ("no", 0),
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
    **{f"data.columns.{name}": (7, ["image"], True) for name in params.Columns.model_fields},
}
MAY_BE_NULL = {
    *("data.columns.image", "data.columns.origin", "data.columns.kind"),
    *("model.quantization_bit", "evaluate.lm_eval"),
}
OURS = [key for key in leaves_of(params.Params) if not key.endswith(".source")]
KEYS = [(key, value) for key in OURS for value in OUT_OF_RANGE.get(key, ())]


def changed(**values):
    """The demo's document with other values; ``...`` takes a key out."""
    document = YAML(typ="safe").load(DEMO.read_text(encoding="utf-8"))
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


def refusal(**values):
    with pytest.raises(UserError) as caught:
        params.checked(changed(**values), "params.yaml")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1500
    return text


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the demo's model is


def test_our_own_names_in_train_are_known_for_a_hint():
    assert set(arguments.OURS) == set(params.Train.model_fields)


def test_the_demo_as_it_is_has_no_problem():
    params.checked(changed(), "params.yaml")


# every key


def test_every_key_of_ours_has_values_out_of_its_range_here():
    assert set(OURS) == set(OUT_OF_RANGE)


@pytest.mark.parametrize(("key", "value"), KEYS, ids=str)
def test_a_value_that_does_not_fit_its_key_is_refused_by_the_key(key, value):
    section, _, name = key.rpartition(".")
    said = refusal(**{key: value})
    assert f"'{key}" in said or (f"'{section}'" in said and name in said)


@pytest.mark.parametrize("key", OURS)
def test_a_key_that_is_missing_misspelt_or_empty_is_refused_by_its_name(key):
    assert f"'{key}' is missing" in refusal(**{key: ...})
    said = refusal(**{f"{key}x": 1})
    assert f"'{key}x'" in said
    assert "did you mean" in said
    wrong = {"a": 0} if key == "evaluate.lm_eval" else {"a": 1}  # it holds names and numbers
    for value in (wrong, [[1]], *(() if key in MAY_BE_NULL else (None,))):
        assert f"'{key}" in refusal(**{key: value})


def test_the_keys_that_may_be_null_may():
    params.checked(changed(**dict.fromkeys(MAY_BE_NULL)), "params.yaml")


PASSED_ON = sorted(set(arguments.arguments()) - set(arguments.RESERVED))


def test_every_option_of_llamafactory_refuses_what_is_not_its_type():
    for key in PASSED_ON:
        said = arguments.problem_with(key, object())
        if arguments.arguments()[key] is not arguments.Any:
            assert said, key
            assert "\n" not in said


def test_no_key_of_the_demo_that_is_passed_on_takes_a_wrong_value():
    for key in params.load(DEMO).train.passed_through:
        for value in ({"a": 1}, "nonsense!", -7):
            assert f"'train.{key}'" in refusal(**{f"train.{key}": value}), (key, value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("per_device_eval_batch_size", 0, "at least 1"),
        ("lora_dropout", 1.0, "less than 1"),
        ("warmup_ratio", 1.5, "at most 1"),
        ("dpo_label_smoothing", 0.5, "less than 0.5"),
        ("eval_steps", 2.5, "an integer of steps"),
        ("save_steps", 0, "greater than 0"),
        ("max_steps", 0, "at least 1, or -1"),
        ("save_total_limit", 0, "at least 1"),
        ("seed", 2**32, "at most"),
        ("dataloader_num_workers", -1, "at least 0"),
        ("max_samples", 0, "at least 1"),
        ("debug", "all", "must be underflow_overflow"),
    ],
)
def test_an_option_out_of_its_range_is_refused_with_its_bound(key, value, told):
    assert told in refusal(**{f"train.{key}": value})


# options that undo a promise


@pytest.mark.parametrize("key", sorted(arguments.REFUSED))
def test_an_option_that_undoes_a_promise_is_refused_with_the_reason(key):
    assert f"'train.{key}' {arguments.REFUSED[key]}" in refusal(**{f"train.{key}": 4})
    if key != "reward_model":  # off, as a copied YAML file may have it
        document = changed(**{f"train.{key}": off(key)})
        params.checked(document, "params.yaml")


def off(key):
    return next(value for value in (None, False) if is_of_type(key, value))


def is_of_type(key, value):
    return arguments.problem_with(key, value) is None


def test_what_is_refused_is_an_option_and_says_what_to_do():
    assert set(arguments.REFUSED) <= set(arguments.arguments())
    assert not set(arguments.REFUSED) & set(arguments.RESERVED)
    for key, reason in arguments.REFUSED.items():
        assert re.search(r"remove it|merge|set |tracked in MLflow", reason), key


@pytest.mark.parametrize("target", ["q_proj", "q_proj, v_proj", ["q_proj", "v_proj"], "all"])
def test_modules_are_named_in_a_list_or_a_text(target):
    params.checked(changed(**{"train.lora_target": target}), "params.yaml")


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (r".*\.self_attn\.(q|v)_proj", "takes no regular expressions here"),
        ("^model", "regular expressions"),
        (["q_proj", ".*"], "'.*' is not part of a module's name"),
        (["all", "q_proj"], "all stands alone"),
        ([], "must be names of modules"),
        ([1], "must be names of modules"),
        ("", "not part of a module's name"),
    ],
)
def test_what_names_no_module_is_refused_with_the_form_that_works(target, told):
    assert told in refusal(**{"train.lora_target": target})


# keys that do not go together

EARLY = {
    "train.early_stopping_steps": 3,
    "train.metric_for_best_model": "loss",
    "train.load_best_model_at_end": True,
}
CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"preprocess.validation": 0.5, "preprocess.test": 0.5}, "add up to 1; leave something"),
    ({"preprocess.min_side": 20_000}, "'preprocess.max_input_pixels' = 100000000: no image"),
    ({"format.image_min_pixels": 20_000}, "image_min_pixels is larger than image_max_pixels"),
    ({"format.image_max_pixels": 1023, "format.image_min_pixels": 1}, "of 32 by 32 pixels"),
    ({"format.cutoff_len": 16}, "becomes 16 tokens, so no pair would fit"),
    ({"model.template": "qwen2_vl"}, "one of qwen3_vl_nothink, qwen3_vl, for Qwen3-VL"),
    ({"data.columns.chosen": "rejected"}, "must name three columns"),
    ({"train.finetuning_type": "full"}, "makes no adapter"),
    ({"train.loss": "ipo", "train.shared_prefix": False}, "would train sigmoid under that name"),
    ({"train.dpo_label_smoothing": 0.1, "train.loss": "ipo"}, "does not go with train.loss: ipo"),
    ({"train.bf16": True, "train.fp16": True}, "'train.fp16' and train.bf16 are both true"),
    ({"train.fp16": True}, "'train.fp16' needs a GPU, and train.gpus is 0"),
    ({"train.pure_bf16": True}, "'train.pure_bf16' needs a GPU"),
    ({"train.tf32": True}, "'train.tf32' needs a GPU"),
    ({"model.quantization_bit": 4}, "'model.quantization_bit' needs a GPU"),
    ({"train.deepspeed": "none.json"}, "'train.deepspeed' is for several processes"),
    ({"train.deepspeed": "none.json", "train.gpus": 2}, "there is no such file"),
    (
        {"train.fsdp_config": "none.json"},
        "'train.fsdp_config' = 'none.json': there is no such file",
    ),
    ({"model.quantization_bit": 4, "train.resize_vocab": True}, "'train.resize_vocab' does not go"),
    (
        {"model.quantization_bit": 4, "train.quantization_method": "eetq"},
        "eetq, which needs model.quantization_bit: 8",
    ),
    (
        {"model.quantization_bit": 4, "train.quantization_method": "gptq"},
        "quantises nothing here; set it to bnb",
    ),
    (
        {"model.quantization_bit": 8, "train.fsdp": "full_shard", "train.gpus": 2},
        "'train.fsdp' takes a quantised base of 4 bits",
    ),
    ({"train.dataloader_prefetch_factor": 2}, "needs train.dataloader_num_workers above 0"),
    ({"train.fsdp": "full_shard", "train.gpus": 1}, "'train.fsdp' is for several processes"),
    ({"train.early_stopping_steps": 3}, "needs train.metric_for_best_model beside it"),
    ({**EARLY, "train.load_best_model_at_end": False}, "needs train.load_best_model_at_end: true"),
    ({**EARLY, "train.eval_strategy": "no"}, "needs train.eval_strategy: steps or epoch beside it"),
    ({**EARLY, "preprocess.validation": 0}, "needs validation pairs, and preprocess.validation"),
    ({**EARLY, "train.save_strategy": "epoch"}, "needs train.save_strategy: steps"),
    ({**EARLY, "train.save_steps": 65}, "a multiple of train.eval_steps (64); it is 65"),
    ({"train.save_strategy": "best"}, "'train.save_strategy' needs train.metric_for_best_model"),
    ({"train.save_only_model": True}, "'train.save_only_model' leaves the optimizer out"),
    ({"train.lr_scheduler_type": "cosine_with_min_lr"}, "needs train.lr_scheduler_kwargs beside"),
    ({"train.optim": "galore_adamw"}, "does not go with LoRA"),
    ({"train.optim": "paged_adamw_8bit"}, "needs a GPU"),
    ({"train.flash_attn": "fa3"}, "set it to auto"),
]


@pytest.mark.parametrize(("values", "told"), CONFLICTS, ids=lambda value: str(value)[:60])
def test_keys_that_do_not_go_together_are_refused_with_the_partner(values, told):
    assert told in refusal(**values)


@pytest.mark.parametrize(
    "values",
    [
        EARLY,
        {"train.save_only_model": True, "train.save_strategy": "no"},
        {
            "train.lr_scheduler_type": "cosine_with_min_lr",
            "train.lr_scheduler_kwargs": {"min_lr": 0.1},
        },
        {"train.bf16": True},
        {"train.neftune_noise_alpha": 5.0},
        {"model.quantization_bit": 4, "train.gpus": 1},
    ],
    ids=str,
)
def test_keys_that_go_together_are_not_refused(values):
    params.checked(changed(**values), "params.yaml")


def test_without_the_model_here_the_smallest_known_patch_is_the_bound(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = {"format.image_min_pixels": 1, "format.image_max_pixels": 28**2 - 1}
    assert "of 28 by 28 pixels; set it to 784" in refusal(**small)
    params.checked(changed(**small | {"format.image_max_pixels": 28**2}), "params.yaml")
    params.checked(changed(**{"model.template": "qwen2_vl"}), "params.yaml")


@pytest.mark.parametrize("option", rules.PACKAGES)
def test_an_option_that_needs_a_package_names_the_command_that_fits_the_lock(option, monkeypatch):
    monkeypatch.setattr(rules, "find_spec", lambda _: None)
    key, _, value = option.partition(": ")
    said = refusal(**{f"train.{key}": value or (True if key != "deepspeed" else "x.json")})
    assert f"'train.{key}' needs a package" in said
    assert f"-c requirements.txt {rules.PACKAGES[option][1]}`" in said
    monkeypatch.setattr(rules, "find_spec", lambda _: object())
    if key not in ("deepspeed",):
        params.checked(changed(**{f"train.{key}": value or True}), "params.yaml")


def test_every_rule_is_shown_here_to_refuse_something(monkeypatch):
    seen = set()
    monkeypatch.setattr(rules, "find_spec", lambda _: None)
    for values, _ in [*CONFLICTS, ({"train.use_liger_kernel": True}, "")]:
        document = changed(**values)
        for rule in rules.RULES:
            monkeypatch.setattr(rules, "RULES", (rule,))
            if list(rules.problems(document, set())):
                seen.add(rule.__name__)
            monkeypatch.undo()
            monkeypatch.chdir(ROOT)
            monkeypatch.setattr(rules, "find_spec", lambda _: None)
    assert seen == {rule.__name__ for rule in rules.RULES}


# all at once, by all stages


def test_all_problems_of_all_sections_are_told_at_once():
    said = refusal(
        **{
            "data.columns.image": 7,
            "preprocess.validation": 0.9,
            "format.image_max_pixels": 1,
            "scoring.dtype": "half",
            "train.beta": 0,
            "train.lora_rank": 0,
            "train.tokenized_path": "tokens",
            "train.early_stopping_steps": 3,
            "evaluate.seed": -1,
        }
    )
    for key in (
        *("data.columns.image", "preprocess'", "format", "scoring.dtype", "train.beta"),
        *("train.lora_rank", "train.tokenized_path", "train.early_stopping_steps"),
        "evaluate.seed",
    ):
        assert f"'{key}" in said, key
    assert said.count("params.yaml: ") >= 9


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith("stages.") and name != "stages.report"]
)
def test_every_stage_refuses_wrong_parameters_before_it_looks_at_anything(
    module, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO, tmp_path / "params.yaml")
    text = (tmp_path / "params.yaml").read_text().replace("lora_rank: 8", "lora_rank: 0")
    (tmp_path / "params.yaml").write_text(text)
    main = importlib.import_module(module).main
    given = {n: Path("none") if t == "Path" else "data" for n, t in types_of(module).items()}
    with pytest.raises(UserError, match=r"params\.yaml: 'train\.lora_rank' = 0: must be at least"):
        main(**given)


def test_checking_loads_nothing_that_takes_seconds():
    heavy = ("torch", "transformers", "llamafactory", "pandas", "pyarrow", "datasets")
    code = (
        "import sys; from pathlib import Path; from stages.params import params; "
        f"params.load(Path({str(DEMO)!r})); print(set(sys.modules) & set({heavy!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_value_is_never_printed_without_limit():
    said = refusal(**{"train.lora_target": "x y" * 10_000, "scoring.dtype": "z" * 10_000})
    assert len(said) < 800


# what is not refused


def values_of(kind: Any) -> list[Any]:
    """Some values of a type; of an enumeration, all."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in SOME:
        return SOME[kind]
    if origin is Literal:
        return list(inner)
    if origin in (Union, types.UnionType):
        return [value for each in inner for value in values_of(each)]
    return [[value] for value in values_of(inner[0])] if origin is list else [{"a": 1}]


SOME: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [1, 2],
    float: [0.5, 1.0],
    str: ["a"],
    type(None): [None],
    Any: ["a", True],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "around", [{}, {"model.quantization_bit": 4, "train.gpus": 1}], ids=["plain", "quantised"]
)
def test_what_is_not_refused_passes_llamafactorys_own_checks(around, llamafactory):
    """Else a training would end in a trace, after the imports."""
    from llamafactory.hparams import parser

    passed, failed = 0, {}
    folders = dict.fromkeys(("model", "formatted", "images", "output"), Path("none"))
    for key in PASSED_ON:
        for value in values_of(arguments.arguments()[key]):
            try:
                p = params.checked(changed(**around, **{f"train.{key}": value}), "params.yaml")
            except UserError:
                continue
            made = dpo_config(p, **folders, validated=True)
            try:
                parser.get_train_args(made | {"use_cpu": True})
                passed += 1
            except Exception as error:
                failed[f"{key}: {value!r}"] = str(error)
    of_the_gpu = {"pure_bf16: True", "tf32: True"}  # config.require_gpus asks it
    assert set(failed) <= (of_the_gpu if around else set()), failed
    assert passed > 300
