"""Base models with something silent or unsafe about them: each is refused by fetch in one sentence,
and none is loaded.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from stages.core.errors import UserError
from tests.copies import copied_model
from tests.hub_server import DEMO

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path):
    """The demo's model in a folder of its own, to be damaged."""
    return shutil.copytree(DEMO, tmp_path / "model")


def refusal(folder: Path) -> str:
    out = folder.parent / "base"
    with pytest.raises(UserError) as caught:
        copied_model(folder, out)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 800
    assert not out.exists()
    return text


def edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Change a JSON file; keys are dotted."""
    document = json.loads(path.read_text())
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = document
        for section in sections:
            place = place[section]
        place[name] = value
    path.write_text(json.dumps(document))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "config.json says model_type llama"),
    ({"architectures": ["Qwen3VLForSequenceClassification"]}, "generates no text"),
    ({"text_config.num_hidden_layers": 36}, "num_hidden_layers = 36, but the weights have 3"),
    ({"text_config.num_hidden_layers": 2}, "num_hidden_layers = 2, but the weights have 3"),
    ({"vision_config.depth": 10**9}, "depth = 1000000000, but the weights have 3"),
    ({"quantization_config": {"quant_method": "gptq"}}, "are quantised already"),
    ({"text_config.quantization_config": {"bits": 4}}, "model.quantization_bit: 4 or 8"),
    ({"_attn_implementation": "kernels-community/evil"}, "attention kernel kernels-community"),
    ({"text_config.attn_implementation": "x/y"}, "would be downloaded and run"),
]


@pytest.mark.parametrize(("changes", "told"), CONFIGS)
def test_a_configuration_that_would_do_something_else_is_refused(model, changes, told):
    edit(model / "config.json", changes)
    assert told in refusal(model)


@pytest.mark.parametrize("token", [" ", "  ", "\n", "a", ""])
def test_a_special_token_that_any_text_may_hold_is_refused(model, token):
    edit(model / "tokenizer_config.json", {"pad_token": {"content": token}})
    assert f"has the special token {token!r}" in refusal(model)
    shutil.copy(DEMO / "tokenizer_config.json", model)
    document = json.loads((model / "tokenizer.json").read_text())
    document["added_tokens"].append({"id": 368, "content": token, "special": True})
    (model / "tokenizer.json").write_text(json.dumps(document))
    assert f"has the special token {token!r}" in refusal(model)


FILES: dict[str, tuple[dict[str, bytes], str]] = {
    "adapter": ({"adapter_config.json": b"{}"}, "the folder holds a LoRA adapter"),
    "no object": ({"config.json": b"[]"}, "config.json is not a JSON object"),
    "deep": ({"config.json": b'{"a":' * 100_000}, "config.json is not a JSON object"),
    "pointer": (
        {WEIGHTS: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"},
        "model.safetensors is a Git LFS pointer",
    ),
    "web page": ({WEIGHTS: b"<html>"}, "model.safetensors is truncated or not a safetensors"),
    "empty": ({WEIGHTS: b""}, "model.safetensors is truncated or not a safetensors"),
    "cut": ({WEIGHTS: (DEMO / WEIGHTS).read_bytes()[:-1]}, "model.safetensors is truncated or"),
    "cut header": ({WEIGHTS: (DEMO / WEIGHTS).read_bytes()[:20]}, "is truncated or not"),
    "too long": ({WEIGHTS: (DEMO / WEIGHTS).read_bytes() + b"x"}, "is truncated or not"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_damaged_or_does_not_belong_there_is_named(model, what):
    files, told = FILES[what]
    for name, content in files.items():
        (model / name).write_bytes(content)
    assert told in refusal(model)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_value_that_is_not_finite_is_found_in_every_precision(model, dtype, value):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / WEIGHTS)
    tensors[Q] = tensors[Q].to(getattr(torch, dtype))
    tensors[Q][-1, -1] = value
    save_file(tensors, model / WEIGHTS)
    assert (
        "model.safetensors: model.language_model.layers.1.self_attn.q_proj.weight holds values"
        in refusal(model)
    )


def sharded(folder: Path) -> tuple[Path, Path]:
    """The weights in two shards and an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[:40], sorted(tensors)[40:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    first, second = sorted(folder.glob("model-*.safetensors"))
    return first, second


@pytest.mark.slow
def test_shards_are_accepted_if_all_are_there_and_hold_what_the_index_says(model, tmp_path):
    first, second = sharded(model)
    assert copied_model(model, tmp_path / "accepted").files
    kept = second.read_bytes()
    breaks: list[tuple[Callable[[], Any], str]] = [
        (second.unlink, f"is in {second.name}, which does not hold it"),
        (lambda: shutil.copy(first, second), f"is in {second.name}, which does not hold it"),
        ((model / INDEX).unlink, f"{INDEX} is not a JSON object"),
    ]
    for damage, told in breaks:
        damage()
        assert told in refusal(model)
        second.write_bytes(kept)
