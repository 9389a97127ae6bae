"""Zip and tar archives, read where they are: no member is ever written under its own name.

So an archive has no way out of its folder. One that tries all the same, or that can't have been
made in good faith, is refused before a byte of a member is read: absolute names, ``..``, links,
devices, two members of one name, and sizes that no data set has (``LARGEST``, ``RATIO``, ``MOST``).
"""

import bz2
import errno
import gzip
import lzma
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from stages.core.errors import UserError
from stages.core.text import readable
from stages.pairs.named import shown

LARGEST = 200 * 10**9  # bytes of all members together
RATIO = 200  # of members to archive; JSON reaches 20, and deflate can't pass 1,032
SMALL = 10**8  # bytes below which no ratio is asked for
MOST = 2_000_000  # members
MEMBER = 2**31  # bytes of one member, which is read at once

_OPEN: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_BROKEN = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, tarfile.TarError, lzma.LZMAError, zlib.error),
    *(EOFError, ValueError, IndexError, NotImplementedError, RuntimeError, OverflowError, OSError),
    MemoryError,  # of an LZMA member that asks for a dictionary of 4 GB
)


@dataclass(frozen=True)
class Archive:
    """An open archive: the size of each file in it by name (POSIX), and their content."""

    sizes: Mapping[str, int]
    read: Callable[[str], bytes]


def is_archive(path: Path) -> bool:
    """Whether a file's content says that it is a zip or tar archive, whatever its name."""
    with path.open("rb") as file:
        start = file.read(512)
    compressed = any(start.startswith(magic) for magic in _OPEN)
    return start.startswith((b"PK\3\4", b"PK\5\6")) or start[257:262] == b"ustar" or compressed


@contextmanager
def opened(path: Path, name: str) -> Iterator[Archive]:
    """An archive that was found in order; ``name`` is what messages call it.

    One that is compressed as a whole (``.tar.gz``) is unpacked into a temporary file without a
    name, to be read in any order.

    Raises:
        UserError: it is damaged, needs a password, or holds what no data set does.
    """
    with ExitStack() as stack:
        with _explained(name):
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(8)
            if start.startswith(b"PK"):
                found = _zip(stack.enter_context(zipfile.ZipFile(path)), size, name)
            else:
                plain = stack.enter_context(_plain(path, start, name))
                tar = stack.enter_context(tarfile.open(fileobj=plain, mode="r:"))
                found = _tar(tar, size, name)
        yield found


def _zip(packed: zipfile.ZipFile, size: int, name: str) -> Archive:
    members: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in packed.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(name, info.filename, "is a link or a device")
        if info.flag_bits & 1:
            raise UserError(f"{name} needs a password; pack it again without one")
        path = _checked(info.orig_filename, name)
        total = _sum(total, info.file_size, len(members), size, name, path)
        if not info.is_dir():
            if path in members:
                raise _refused(name, path, "is there twice")
            members[path] = info
    sizes = {path: info.file_size for path, info in members.items()}
    return _archive(sizes, lambda path: packed.read(members[path]), name)


def _tar(tar: tarfile.TarFile, size: int, name: str) -> Archive:
    members: dict[str, tarfile.TarInfo] = {}
    total = 0
    for info in tar:
        path = _checked(info.name, name)
        if info.isdir():
            continue
        if not info.isreg():
            raise _refused(name, path, "is a link or a device")
        if path in members:
            raise _refused(name, path, "is there twice")
        total = _sum(total, info.size, len(members), size, name, path)
        members[path] = info

    def content(path: str) -> bytes:
        file = tar.extractfile(members[path])
        return file.read() if file else b""

    return _archive({path: info.size for path, info in members.items()}, content, name)


def _archive(sizes: Mapping[str, int], content: Callable[[str], bytes], name: str) -> Archive:
    def read(path: str) -> bytes:
        with _explained(f"{name}, {shown(path)}"):
            data = content(path)
            if len(data) != sizes[path]:  # zipfile is content with less
                raise EOFError("it ends early")
            return data

    return Archive(sizes, read)


def _checked(member: str, name: str) -> str:
    """A member's name with slashes, unless it leads out."""
    path = member.replace("\\", "/")
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path or ":" in (parts or ("",))[0]:
        raise _refused(name, member, "leads out of its folder")
    return PurePosixPath(path).as_posix()


def _sum(total: int, more: int, count: int, size: int, name: str, path: str) -> int:
    total += more
    if more > MEMBER:
        raise _refused(name, path, f"is {readable(more)} unpacked, and {readable(MEMBER)} is most")
    _check_total(total, size, name)
    if count >= MOST:
        raise UserError(f"{name} holds more than {MOST:,} files; divide it")
    return total


def _check_total(total: int, size: int, name: str) -> None:
    if total > LARGEST or total > max(RATIO * size, SMALL):
        raise UserError(
            f"{name} ({readable(size)}) would unpack to {readable(total)} or more, as an archive "
            "does that is made to fill a disk; pack your data again, or divide it"
        )


@contextmanager
def _plain(path: Path, start: bytes, name: str) -> Iterator[IO[bytes]]:
    """The tar archive itself, without the compression around it."""
    openers = [found for magic, found in _OPEN.items() if start.startswith(magic)]
    if not openers:
        with path.open("rb") as file:
            yield file
        return
    size, total = path.stat().st_size, 0
    with tempfile.TemporaryFile() as plain, openers[0](path, "rb") as packed:
        while block := packed.read(2**20):
            total += len(block)
            _check_total(total, size, name)
            plain.write(block)
        plain.seek(0)
        yield plain


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(
                f"{name} does not fit unpacked into {tempfile.gettempdir()}; set TMPDIR to a "
                "folder with room"
            ) from None
        message = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(
            f"{name} is damaged or no zip or tar archive ({message}); get it again"
        ) from None


def _refused(name: str, member: str, why: str) -> UserError:
    return UserError(
        f"{name}: its member {shown(member)} {why}; such an archive is not read: pack it again "
        "with plain files alone"
    )
