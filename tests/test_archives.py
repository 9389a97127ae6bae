"""Archives of the kinds that people have, and of the kinds that are made to do harm."""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import tarfile
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.sources import archives

FILES = {"data/rows.json": b"[]", "data/images/a.png": b"a" * 1000, "b": b""}


def zipped(path: Path, files: dict[str, bytes], **attributes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(info, key, value)
            packed.writestr(info, content)
    return path


def tarred(path: Path, files: dict[str, bytes], mode: str = "w", **attributes) -> Path:
    with tarfile.open(path, mode) as packed:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            packed.addfile(info, io.BytesIO(content))
    return path


def read_all(path: Path) -> dict[str, bytes]:
    with archives.opened(path, path.name) as archive:
        return {name: archive.read(name) for name in archive.sizes}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.__cause__ is None
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_every_file_of_an_archive_is_read_in_any_order_and_nothing_is_left(
    tmp_path, suffix, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    path = tmp_path / f"x.{suffix}"
    if suffix == "zip":
        zipped(path, {"data/": b"", **FILES})
    else:
        tarred(path, FILES, f"w:{suffix[4:]}")
    assert archives.is_archive(path)
    with archives.opened(path, "x") as archive:
        assert archive.sizes == {name: len(content) for name, content in FILES.items()}
        for name in [*FILES, *reversed(FILES)]:
            assert archive.read(name) == FILES[name]
    assert list((tmp_path / "scratch").iterdir()) == []
    assert [each.name for each in tmp_path.iterdir()] in (
        [path.name, "scratch"],
        ["scratch", path.name],
    )


def test_what_is_no_archive_is_told_by_its_content(tmp_path):
    (tmp_path / "rows.zip").write_bytes(b'[{"a": 1}]')
    assert not archives.is_archive(tmp_path / "rows.zip")


OUT = ["/etc/passwd", "../x", "a/../../x", r"..\x", r"C:\x", "C:x", "//host/x", r"\\host\x"]


@pytest.mark.parametrize("name", OUT)
@pytest.mark.parametrize("make", [zipped, tarred])
def test_a_member_that_leads_out_is_refused_and_nothing_is_written(tmp_path, make, name):
    path = make(tmp_path / "x", {"fine.png": b"a", name: b"evil"})
    assert "leads out of its folder" in refusal(path)
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as packed:
        info = tarfile.TarInfo("images")
        info.type, info.linkname = kind, "/etc"
        packed.addfile(info)
    assert "is a link or a device" in refusal(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(tmp_path, kind):
    path = zipped(tmp_path / "x.zip", {"images": b"/etc"}, external_attr=(kind | 0o777) << 16)
    assert "is a link or a device" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["a.png", "./a.png", "b/../a.png"])
def test_two_members_of_one_name_are_refused(tmp_path, second):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a.png", b"1")
        packed.writestr(second, b"2")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
        tar.addfile(tarfile.TarInfo(second))
    for name in ("x.zip", "x.tar"):
        assert ("leads out" if ".." in second else "is there twice") in refusal(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_an_archive_that_unpacks_to_hundreds_of_times_its_size_is_refused(
    tmp_path, kind, monkeypatch
):
    monkeypatch.setattr(archives, "SMALL", 10**6)
    zeros = {"a.png": bytes(2 * 10**7)}
    path = tmp_path / f"x.{kind}"
    _ = zipped(path, zeros) if kind == "zip" else tarred(path, zeros, f"w:{kind[4:]}")
    assert "made to fill a disk" in refusal(path)


def test_a_size_that_no_memory_holds_is_refused_before_anything_is_read(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 2**50
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(1024))
    assert "2.1 GB is most" in refusal(tmp_path / "x.tar")


def test_a_zip_whose_members_share_their_bytes_is_refused(tmp_path):
    """As 42.zip's successors do, which no ratio of a single member gives away."""
    path = zipped(tmp_path / "x.zip", {"a": os.urandom(1000), "b": b"b"})
    with zipfile.ZipFile(path) as packed:
        start = packed.getinfo("b").header_offset
    data = path.read_bytes()
    place = data.index(start.to_bytes(4, "little"), data.index(b"PK\1\2"))
    path.write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    assert "damaged" in refusal(path)


def test_a_zip_with_a_password_is_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a.png": b"a"})
    data = bytearray(path.read_bytes())
    for mark, flag in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + flag] |= 1
    path.write_bytes(bytes(data))
    assert "needs a password" in refusal(path)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_damage_at_any_place_is_a_sentence_or_harmless(tmp_path, suffix):
    """150 damaged archives: no other exception than ours."""
    path = tmp_path / f"x.{suffix}"
    _ = zipped(path, FILES) if suffix == "zip" else tarred(path, FILES, f"w:{suffix[4:]}")
    whole = path.read_bytes()
    draw = random.Random(0)
    for number in range(150):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: draw.randrange(len(data))]
        else:
            for _ in range(number % 4 + 1):
                data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data))
        with suppress(UserError):
            read_all(path)


def test_what_the_reader_of_an_archive_raises_is_left_as_it_is(tmp_path):
    path = zipped(tmp_path / "x.zip", FILES)
    with pytest.raises(ValueError, match="mine"), archives.opened(path, "x"):
        raise ValueError("mine")


def test_the_openers_are_told_by_what_they_write():
    for opener, write in ((gzip, gzip.compress), (bz2, bz2.compress), (lzma, lzma.compress)):
        magic = next(m for m, found in archives._OPEN.items() if found is opener.open)
        assert write(b"x").startswith(magic)
