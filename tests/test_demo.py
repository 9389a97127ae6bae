"""The embedded default's base model: small, safe to load, and the one that its pipeline made."""

import hashlib
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

MODEL = Path("demo/model")
MEGABYTE = 1_000_000


def test_the_model_is_small_and_holds_no_pickle():
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".txt"}


def test_the_model_is_the_one_that_its_lock_pins():
    lock = YAML(typ="safe").load(Path("demo/dvc.lock"))["stages"]["base"]
    (out,) = [out for out in lock["outs"] if out["path"] == "demo/model"]
    listing = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.name}
        for path in sorted(MODEL.iterdir())
    ]
    # How DVC hashes a folder: the md5 of this JSON.
    manifest = json.dumps(listing, sort_keys=True).encode()
    assert out["md5"] == f"{hashlib.md5(manifest).hexdigest()}.dir"
    assert out["nfiles"] == len(listing)


def test_the_lock_was_made_by_this_code_and_these_knobs():
    lock = YAML(typ="safe").load(Path("demo/dvc.lock"))["stages"]["base"]
    for dependency in lock["deps"]:
        found = hashlib.md5(Path(dependency["path"]).read_bytes()).hexdigest()
        assert found == dependency["md5"], (
            f"{dependency['path']} has changed: run `dvc repro demo/dvc.yaml`"
        )
    knobs = YAML(typ="safe").load(Path("demo/params.yaml"))["base"]
    assert lock["params"]["demo/params.yaml"]["base"] == knobs


@pytest.mark.slow
def test_our_training_code_sees_what_the_processor_and_the_model_make_of_an_image():
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from demo import make_base, scenes

    processor = AutoProcessor.from_pretrained(MODEL)
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32").eval()
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    generator = np.random.default_rng(0)
    drawn = [scenes.draw(generator) for _ in range(3)]
    enlarged = np.stack([make_base.enlarged(image) for image, _ in drawn])
    pixels = torch.from_numpy(enlarged)
    official = processor.image_processor(
        [Image.fromarray(image) for image in enlarged], return_tensors="pt"
    )
    assert torch.equal(official["image_grid_thw"], make_base.grid(3))
    assert torch.allclose(official["pixel_values"], make_base.patches(pixels), atol=1e-6)

    text = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>what shape is present?"
    ids = processor.tokenizer([text] * 3, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        ours = make_base.read(model, ids, mask, make_base.look(model, pixels))
        theirs = model.model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == model.config.image_token_id).long(),
            **official,
        ).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_the_tokenizer_gives_back_every_sentence():
    from transformers import AutoTokenizer

    from demo import scenes

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in scenes.vocabulary():
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
