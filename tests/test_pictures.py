"""What a cell of an image column may be."""

import base64
import io

import pytest
from PIL import Image

from stages.pairs import pictures
from stages.pairs.layouts import Odd, Unreadable


def made(kind):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, kind)
    return file.getvalue()


KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "part" / "images").mkdir(parents=True)
    (tmp_path / "part" / "images" / "a.png").write_bytes(b"near")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"far")
    (tmp_path / "images" / "b.png").write_bytes(b"b")
    return (tmp_path / "part", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_base64_of_an_image_is_the_image(kind, folders):
    data = made(kind)
    plain = base64.b64encode(data).decode()
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    for text in (plain, lines, plain.rstrip("="), base64.urlsafe_b64encode(data).decode()):
        assert pictures.encoded(text, folders) == data
        assert pictures.encoded(f"data:image/{kind.lower()};base64,{text}", folders) == data


def test_a_name_that_could_be_base64_is_a_name(folders):
    name = "0123456789abcdef" * 4  # as files are named by their hash
    (folders[0] / name).write_bytes(b"named by a hash")
    assert pictures.encoded(name, folders) == b"named by a hash"
    (folders[0] / "9j").mkdir()
    (folders[0] / "9j" / "a").write_bytes(b"short")
    assert pictures.encoded("9j/a", folders) == b"short"


def test_a_path_is_looked_for_next_to_the_table_and_then_from_the_top(folders):
    assert pictures.encoded("images/a.png", folders) == b"near"
    assert pictures.encoded("images/b.png", folders) == b"b"
    assert pictures.encoded({"path": "images/b.png", "bytes": None}, folders) == b"b"
    assert pictures.encoded({"path": "images/b.png", "bytes": b"own"}, folders) == b"own"


@pytest.mark.parametrize("name", ["pictures/b.png", "B.png", "x/y/z/b.PNG"])
def test_a_file_that_is_not_there_is_met_with_a_likely_one(folders, name):
    assert "(is it images/b.png?)" in pictures.encoded(name, folders)


def test_no_file_is_likely_where_two_have_the_name(folders):
    assert "is it" not in pictures.encoded("pictures/a.png", folders)


@pytest.mark.parametrize("path", ["/content/drive/MyDrive/images/b.png", r"C:\me\b.png"])
def test_a_path_of_another_machine_is_odd_and_met_with_a_likely_file(folders, path):
    with pytest.raises(Odd, match=r"leaves the folder.*is it images/b\.png\?"):
        pictures.encoded(path, folders)


@pytest.mark.parametrize(
    "url", ["https://a.example/b.png", "http://host", "s3://a/b.png", "gs://a/b"]
)
def test_an_address_is_odd_and_says_what_to_do(folders, url):
    with pytest.raises(
        Odd, match=r"nothing is downloaded while rows are read; set data\.source\.image_urls to"
    ):
        pictures.encoded(url, folders)


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (b"", "no bytes"),
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        ({}, "no image"),
        ("", "no image"),
        ("data:image/png;base64,!!!", "is not valid base64"),
        ("data:image/svg+xml,%3Csvg/%3E", "a data URL without base64"),
        ("images", "is not a file"),
    ],
)
def test_a_cell_without_an_image_says_why(folders, cell, why):
    assert why in pictures.encoded(cell, folders)


@pytest.mark.parametrize("cell", [5, 0.5, True, {"bytes": 5}, {"path": 5}, Unreadable("is broken")])
def test_a_cell_that_can_be_no_image_is_odd(folders, cell):
    with pytest.raises(Odd, match="the image"):
        pictures.encoded(cell, folders)
