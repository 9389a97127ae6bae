"""Which file a row means, and which image a cell: fetch copies it, and preprocess reads it."""

import base64

import pytest
from ruamel.yaml import YAML

from stages.core.errors import UserError
from stages.pairs import files, tables
from stages.pairs.formats import Unreadable
from stages.pairs.layouts import Odd
from tests.pictures import picture
from tests.test_inputs import CASES

NAMES = YAML(typ="safe").load((CASES / "names.yaml").read_text(encoding="utf-8"))


def made(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.mark.parametrize("case", NAMES, ids=[case["about"] for case in NAMES])
def test_a_name_means_the_file_that_it_should(case, tmp_path):
    made(tmp_path, case["files"])
    folder = files.Folder(tmp_path, case.get("remap", ()))
    for name, expected in case["names"].items():
        found = folder.find(name, case.get("beside", ""))
        if expected in case["files"]:
            assert found == tmp_path / expected, name
        else:
            assert isinstance(found, str), name
            assert expected in found
            assert len(found) < 250
            found.encode()


def test_no_link_may_lead_out_but_where_fetch_put_it(tmp_path):
    made(tmp_path, ["secret.png", "mine/a.png"])
    (tmp_path / "mine" / "b.png").symlink_to("a.png")
    assert files.walk(tmp_path / "mine") == ["a.png", "b.png"]
    (tmp_path / "mine" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"link\.png links to a folder or out of"):
        files.walk(tmp_path / "mine")
    assert "no such file" in str(files.Folder(tmp_path / "mine").find("link.png"))
    (tmp_path / "mine" / "SOURCE.json").write_text("{}")
    assert "link.png" in files.walk(tmp_path / "mine")
    (tmp_path / "mine" / "more").symlink_to(tmp_path)
    with pytest.raises(UserError, match="more links to a folder"):
        files.walk(tmp_path / "mine")


def test_the_hubs_own_cache_may_link_to_its_blobs(tmp_path):
    made(tmp_path, ["models--a--b/blobs/1", "models--a--b/snapshots/c/.keep"])
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c"
    (snapshot / "a.parquet").symlink_to("../../blobs/1")
    assert files.walk(snapshot) == ["a.parquet"]


# Cells


def cell_of(cell, path="no such file"):
    return tables.image_of(cell, lambda name: path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_base64_of_an_image_is_the_image(kind):
    data = picture(0, kind=kind)
    plain = base64.b64encode(data).decode()
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    for text in (plain, lines, plain.rstrip("="), base64.urlsafe_b64encode(data).decode()):
        assert cell_of(text) == data
        assert cell_of(f"data:image/{kind.lower()};base64,{text}") == data


def test_a_name_that_could_be_base64_is_a_name(tmp_path):
    (tmp_path / "x").write_bytes(b"named by a hash")
    assert cell_of("0123456789abcdef" * 4, tmp_path / "x") == b"named by a hash"
    assert cell_of({"path": "9j/a", "bytes": None}, tmp_path / "x") == b"named by a hash"
    assert cell_of({"path": "9j/a", "bytes": b"own"}, tmp_path / "x") == b"own"


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        *((cell, "no image") for cell in (None, {"bytes": None, "path": None}, {}, "")),
        (b"", "no bytes"),
        ("data:image/png;base64,!!!", "is not valid base64"),
        ("data:image/svg+xml,%3Csvg/%3E", "a data URL without base64"),
        ("x./" * 100_000, "is not a file name"),
    ],
)
def test_a_cell_without_an_image_says_why(cell, why):
    found = cell_of(cell)
    assert why in found
    assert len(found) < 300


@pytest.mark.parametrize(
    "cell",
    [
        *(5, 0.5, True, {"bytes": 5}, {"path": 5}, Unreadable("is broken")),
        *("https://a.example/b.png", "s3://a/b.png"),
    ],
)
def test_a_cell_that_can_be_no_image_is_odd(cell):
    with pytest.raises(Odd, match=r"^the image "):
        cell_of(cell)
