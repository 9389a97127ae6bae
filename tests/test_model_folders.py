"""Base models that are damaged, foreign or hostile, by kind: each is refused by fetch within a few
seconds, in one sentence that says what to do, and none is loaded.
"""

import json
import shutil
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.sources import base_model, weights
from tests import tiny_models
from tests.copies import copied_model

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo" / "model"
SECONDS = 5  # on a busy machine; 0.1 to 0.5 otherwise
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path):
    """The demo's model in a folder of its own, to be damaged."""
    return shutil.copytree(DEMO, tmp_path / "model")


def refusal(folder):
    out = folder.parent / "base"
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        copied_model(folder, out)
    assert time.monotonic() - start < SECONDS
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 800
    assert not out.exists()
    return text


def edit(path, **changes):
    """Change a JSON file; keys are dotted, ``...`` takes one out."""
    document = json.loads(path.read_text())
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        if value is ...:
            place.pop(name)
        else:
            place[name] = value
    path.write_text(json.dumps(document))


def test_the_demos_model_is_accepted(model, tmp_path):
    assert copied_model(model, tmp_path / "base").files


@pytest.mark.slow
def test_a_model_laid_out_as_qwen2_5_vl_is_on_the_hub_is_accepted(tmp_path):
    folder = tiny_models.qwen2_5_vl(tmp_path / "tiny")
    assert copied_model(folder, tmp_path / "base").files


# safetensors headers


def parts(folder):
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(folder, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)


EMBED = "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"


def entry(**changes):
    return lambda header: header[NORM].update(changes)


HEADERS = {
    "shifted": lambda header: header[NORM].update(
        data_offsets=[place + 2 for place in header[NORM]["data_offsets"]]
    ),
    "overlapping": lambda header: header[NORM].update(data_offsets=header[EMBED]["data_offsets"]),
    "backwards": lambda header: header[NORM]["data_offsets"].reverse(),
    "beyond the file": entry(data_offsets=[10**12, 10**12 + 256]),
    "negative": entry(data_offsets=[-256, 0]),
    "no offsets": lambda header: header[NORM].pop("data_offsets"),
    "unknown dtype": entry(dtype="F4_MADE_UP"),
    "no dtype": lambda header: header[NORM].pop("dtype"),
    "huge shape": entry(shape=[2**62, 2**62]),
    "shape of text": entry(shape=["128"]),
    "negative shape": entry(shape=[-128]),
    "many dimensions": entry(shape=[1] * 10_000),
    "smaller shape": entry(shape=[64]),
    "not an entry": lambda header: header.update({NORM: 7}),
    "a tensor of nobody": lambda header: header.pop(NORM),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_that_does_not_fit_is_refused(model, damage):
    header, body = parts(model)
    HEADERS[damage](header)
    write(model, header, body)
    assert "model.safetensors is truncated or not a safetensors file" in refusal(model)


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"a": ' * 50_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a":1,"a":2}',
    ],
)
def test_what_is_no_header_is_refused(model, text):
    write(model, text, b"")
    assert "is truncated or not a safetensors file" in refusal(model)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_bytes_are_a_header_or_refused(tmp_path_factory, text, length):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    for size in (length, len(text)):
        path.write_bytes(struct.pack("<Q", size) + text)
        with suppress(ValueError):  # anything else is a trace
            weights.header(path)


# the weights, and the model that config.json describes


def retensor(folder, change):
    """Change names and content of the tensors: ``change`` gets a dict of name to (dtype, array)."""
    header, body = parts(folder)
    header.pop("__metadata__", None)
    tensors = {
        name: (about, np.frombuffer(body[slice(*about["data_offsets"])], np.uint16).copy())
        for name, about in header.items()
    }
    change(tensors)
    made, content = {}, b""
    for name, (about, values) in tensors.items():
        data = values.tobytes()
        made[name] = about | {"data_offsets": [len(content), len(content) + len(data)]}
        content += data
    write(folder, made, content)


Q = "model.language_model.layers.1.self_attn.q_proj.weight"


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def poison(bits, at=0):
    return lambda tensors: tensors[Q][1].__setitem__(at, bits)


def reshape(name, shape):
    return lambda tensors: tensors[name][0].update(shape=shape)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(Q), "1 of 3 (num_hidden_layers), self_attn.q_proj.weight is missing"),
        (rename(Q, Q.replace("q_proj", "q_porj")), "layer 1 of 3"),
        (reshape(Q, [64, 256]), "of the shape (64, 256), unlike in the others"),
        (lambda t: t.pop("model.visual.blocks.2.norm1.bias"), "layer 2 of 3 (vision_config.depth)"),
        (lambda t: t.pop(EMBED), "the weights have no embed_tokens.weight"),
        (reshape(EMBED, [128, 369]), "config.json says vocab_size and hidden_size (369, 128)"),
        (lambda t: t.pop("model.visual.patch_embed.proj.weight"), "no visual.patch_embed.proj"),
        (poison(0x7FC0), "q_proj.weight in model.safetensors holds values that are"),
        (poison(0xFF80, -1), "holds values that are infinite"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_models_are_refused(model, change, told):
    retensor(model, change)
    assert told in refusal(model)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)]
)
def test_a_value_that_is_not_finite_is_found_in_every_precision(tmp_path, dtype, kind, monkeypatch):
    monkeypatch.setattr(weights, "AT_ONCE", 7)
    for bad in (np.nan, np.inf, -np.inf):
        values = np.linspace(-6e4, 6e4, 100).astype(kind)
        about = {"w": weights.Tensor(dtype, (100,), 3)}
        path = tmp_path / "file"
        path.write_bytes(b"abc" + values.tobytes())
        assert weights.not_finite(path, about) is None
        values[99] = bad
        path.write_bytes(b"abc" + values.tobytes())
        assert weights.not_finite(path, about) == "w"


def sharded(folder, change=lambda index: None):
    """The weights in two shards and an index."""
    header, body = parts(folder)
    header.pop("__metadata__", None)
    names = sorted(header)
    index: dict[str, dict[str, str]] = {"weight_map": {}}
    for number, those in enumerate((names[:40], names[40:])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        made, content = {}, b""
        for name in those:
            data = body[slice(*header[name]["data_offsets"])]
            made[name] = header[name] | {"data_offsets": [len(content), len(content) + len(data)]}
            content += data
            index["weight_map"][name] = file
        write(folder, made, content)
        (folder / WEIGHTS).rename(folder / file)
    change(index["weight_map"])
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_shards_are_accepted_and_one_that_is_missing_or_mixed_up_is_refused(model, tmp_path):
    sharded(model)
    assert copied_model(model, tmp_path / "accepted").files
    first, second = sorted(model.glob("model-*.safetensors"))
    kept = second.read_bytes()
    second.unlink()
    assert f"names {second.name}, which is missing" in refusal(model)
    shutil.copy(first, second)
    assert f"is in {second.name}, which has not got it" in refusal(model)
    second.write_bytes(kept)
    (model / f"{WEIGHTS}.index.json").unlink()
    assert "there is no model.safetensors.index.json that says what is where" in refusal(model)


# config.json


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text_config.num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 in text_config"),
        ({"text_config.num_hidden_layers": 36}, "num_hidden_layers = 36, and the weights have 3"),
        ({"text_config.num_hidden_layers": 2}, "(number 2 is too many)"),
        ({"vision_config.depth": 10**9}, "depth = 1000000000 in vision_config"),
        ({"vision_config.depth": 4}, "vision_config.depth = 4, and the weights have 3"),
        ({"text_config.hidden_size": 0}, "hidden_size = 0"),
        ({"text_config.vocab_size": "369"}, "vocab_size = 369"),
        ({"text_config.num_attention_heads": -4}, "num_attention_heads = -4"),
        ({"text_config.intermediate_size": 10**12}, "intermediate_size"),
        ({"vision_config.patch_size": ...}, "patch_size = None in vision_config"),
        ({"vision_config": 5}, "has no vision_config"),
        ({"text_config": []}, "has no text_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "are quantised already"),
        ({"text_config.quantization_config": {"bits": 4}}, "model.quantization_bit: 4 or 8"),
        ({"_attn_implementation": "kernels-community/evil"}, "attention kernel kernels-community"),
        ({"text_config.attn_implementation": "x/y"}, "would be downloaded and run"),
        ({"tie_word_embeddings": False}, "the weights have no lm_head.weight"),
        ({"image_token_id": 7}, "<|image_pad|> is number 6 in the tokenizer"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_the_models_is_refused(model, changes, told):
    edit(model / "config.json", **changes)
    assert told in refusal(model)


def test_a_configuration_nested_100_000_deep_is_refused(model):
    (model / "config.json").write_text('{"a":' * 100_000)
    assert "config.json is not a JSON object" in refusal(model)


def test_an_adapter_in_the_folder_is_refused(model):
    (model / "adapter_config.json").write_text("{}")
    assert "an adapter lies in the folder" in refusal(model)


# the processor


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_std": [0.5, 0, 0.5]}, "image_std[1] = 0, which must be above 0"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "image_std[1] = nan"),
        ({"image_std": -1}, "image_std[0] = -1"),
        ({"image_mean": [0.5, "a", 0.5]}, "image_mean[1] = a"),
        ({"size": {"shortest_edge": 0, "longest_edge": 16384}}, "size.shortest_edge = 0"),
        ({"size": {"shortest_edge": 9, "longest_edge": 1}}, "smallest image size above its"),
        ({"size": 224}, "size = 224, where this family has shortest_edge"),
        ({"size": {"shortest_edge": [1]}}, "size.shortest_edge = [1], which must be above 0"),
        ({"min_pixels": 0}, "min_pixels = 0"),
        ({"rescale_factor": 0}, "rescale_factor = 0"),
        ({"patch_size": 0}, "patch_size = 0, and config.json says patch_size = 16"),
        ({"patch_size": 14}, "patch_size = 14, and config.json says patch_size = 16"),
        ({"merge_size": 4}, "merge_size = 4, and config.json says spatial_merge_size = 2"),
        ({"temporal_patch_size": -2}, "temporal_patch_size = -2"),
        ({"image_processor_type": "CLIPImageProcessor"}, "is another family's"),
    ],
)  # fmt: skip
def test_a_processor_that_makes_nothing_of_an_image_is_refused(model, changes, told):
    path = model / "processor_config.json"
    edit(path, **{f"image_processor.{key}": value for key, value in changes.items()})
    assert told in refusal(model)
    # As the Hub has it: a file of its own.
    processor = json.loads(path.read_text())["image_processor"]
    shutil.copy(DEMO / path.name, path)
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    assert told in refusal(model)


# the tokenizer


def with_token(content, special=True):
    def change(folder):
        document = json.loads((folder / "tokenizer.json").read_text())
        document["added_tokens"].append(
            {"id": 368, "content": content, "special": special}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        )
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return change


def without_token(content):
    def change(folder):
        document = json.loads((folder / "tokenizer.json").read_text())
        document["added_tokens"] = [
            token for token in document["added_tokens"] if token["content"] != content
        ]
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return change


def settings_of_tokenizer(**changes):
    return lambda folder: edit(folder / "tokenizer_config.json", **changes)


def text_of_tokenizer(text):
    return lambda folder: (folder / "tokenizer.json").write_text(text)


def larger_vocabulary(folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {f"zz{i}": 1000 + i for i in range(10)}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def fewer_bytes(folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"].pop("a")
    document["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (text_of_tokenizer("{"), "the tokenizer can't be loaded"),
        (text_of_tokenizer("{}"), "the tokenizer can't be loaded"),
        (text_of_tokenizer("[" * 100_000), "the tokenizer can't be loaded"),
        (text_of_tokenizer('{"added_tokens": 7}'), "the tokenizer can't be loaded"),
        (text_of_tokenizer('{"added_tokens": [{}]}'), "the tokenizer can't be loaded"),
        (without_token("<|image_pad|>"), "has no token <|image_pad|>"),
        (without_token("<|im_end|>"), "has no token <|im_end|>"),
        (with_token(" "), "the special token ' ', which any text may hold"),
        (with_token("  "), "the special token '  ', which any text"),
        (with_token("a"), "which any text may hold"),
        (settings_of_tokenizer(eos_token=" "), "has the special token ' '"),
        (settings_of_tokenizer(pad_token={"content": "\n"}), "has the special token '\\n'"),
        (settings_of_tokenizer(eos_token="<|eot_id|>"), "<|eot_id|>' of tokenizer_config.json is"),
        (settings_of_tokenizer(extra_special_tokens=["<|x|>"]), "is not in the vocabulary"),
        (settings_of_tokenizer(tokenizer_class="LlamaTokenizer"), "the class LlamaTokenizer"),
        (larger_vocabulary, "a token of number 1009, and the model's vocab_size is 369"),
        (fewer_bytes, "the tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "not a JSON object"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_broken_or_foreign_is_refused(model, change, told):
    change(model)
    assert told in refusal(model)


def test_a_tokenizer_in_two_files_is_tried_too(model, tmp_path):
    document = json.loads((model / "tokenizer.json").read_text())
    added = {
        str(token["id"]): {"content": token["content"], "special": True}
        for token in document["added_tokens"]
    }
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    merges = (" ".join(p) if isinstance(p, list) else p for p in document["model"]["merges"])
    (model / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    edit(model / "tokenizer_config.json", added_tokens_decoder=added)
    assert copied_model(model, tmp_path / "accepted").files
    del added["6"]
    edit(model / "tokenizer_config.json", added_tokens_decoder=added)
    assert "has no token <|image_pad|>" in refusal(model)


FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    "",
    "x",
    [],
    {},
    [None],
    {"a": [{}]},
    "\ud800",
    float("nan"),
]


def places(value, path=()):
    """Every place in a JSON document, the vocabulary's and the merges' own aside."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("vocab", "merges"):
                yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return shutil.copytree(DEMO, tmp_path_factory.mktemp("fuzzed") / "model")


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_file_with_any_value_changed_is_accepted_or_refused_in_a_sentence(twin, data):
    name = data.draw(st.sampled_from(FILES))
    document = json.loads((DEMO / name).read_text())
    path = data.draw(st.sampled_from(list(places(document))[1:]))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = data.draw(st.sampled_from(ODD))
    try:
        (twin / name).write_text(json.dumps(document))
        with suppress(UserError):
            names = [file.name for file in twin.iterdir()]
            base_model.check_model(twin, names, name="model")
            base_model.check_weights(twin, names, name="model")
    finally:
        shutil.copyfile(DEMO / name, twin / name)


def test_checking_a_model_loads_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.copies import copied_model; "
        f"copied_model(Path({str(DEMO)!r}), Path({str(tmp_path / 'base')!r})); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_every_family_is_of_the_templates_tokens_that_are_looked_for():
    from stages.families import known
    from stages.sources.tokenizer import TOKENS

    assert {family.image_token for family in known.FAMILIES} <= set(TOKENS)
    assert base_model._TEXT.keys() >= {"num_hidden_layers"}
