"""Controls show another image in the same place, and change nothing else."""

import pytest
from PIL import Image, ImageChops

from stages.answers import controls


def pair(name, image):
    return {"id": name, "images": [image], "messages": [f"what is {name}?"], "chosen": "yes"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size, colour in (
        ("a.jpg", (40, 30), "red"),
        ("b.jpg", (40, 30), "blue"),
        ("c.png", (64, 48), "green"),
    ):
        Image.new("RGB", size, colour).save(folder / name)
    return folder


PAIRS = [pair("1", "a.jpg"), pair("2", "a.jpg"), pair("3", "b.jpg"), pair("4", "c.png")]


def seen(row):
    with Image.open(row["images"][0]) as image:
        return image.convert("RGB")


def test_only_the_image_is_exchanged_and_its_size_stays(images, tmp_path):
    found = controls.shown(PAIRS, images, tmp_path)
    assert list(found) == ["blank", "shuffled"]
    for rows in found.values():
        for before, after in zip(PAIRS, rows, strict=True):
            assert after | {"images": before["images"]} == before
            with Image.open(images / before["images"][0]) as own:
                assert seen(after).size == own.size
                assert ImageChops.difference(seen(after), own.convert("RGB")).getbbox()


def test_every_image_is_shown_for_another_one(images, tmp_path):
    rows = controls.shown(PAIRS, images, tmp_path)["shuffled"]
    # By size, then name: a is followed by b, b by c (made as small as b), c by a.
    assert rows[0]["images"] == rows[1]["images"] == [str((images / "b.jpg").resolve())]
    assert seen(rows[2]).getpixel((20, 15)) == (0, 128, 0)
    red, green, blue = seen(rows[3]).getpixel((20, 15))
    assert red > 200
    assert max(green, blue) < 60


def test_one_image_alone_cannot_be_exchanged_and_no_sample_loads_no_model(
    images, tmp_path, checkpoint_of, params_with
):
    assert list(controls.shown(PAIRS[:2], images, tmp_path)) == ["blank"]
    checkpoint = checkpoint_of(None, params_with(**{"evaluate.controls": 0}))
    table = controls.log_probs(checkpoint, PAIRS, images, label="test")
    assert table.empty
    assert list(table.columns) == ["id", "shown"]
