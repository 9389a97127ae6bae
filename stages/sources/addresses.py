"""Files from elsewhere: https, S3 and Google Drive; resumed, and checked against a hash.

What can't be had is one sentence with the fix. Nothing of an original message is repeated, since it
may hold a signed address; no token of the Hub is sent, and no password leads on to another host.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tqdm import tqdm

from stages.core.errors import UserError
from stages.core.text import readable
from stages.sources.hub_errors import site_of
from stages.sources.manifest import check_room, sha256_of, size_of

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/|gdrive:", re.IGNORECASE)  # Path makes one slash of two
_SECRET = re.compile(r"(?i)signature|\bsig\b|token|secret|passw|credential|api.?key")
_DRIVE = re.compile(
    re.escape("https://drive.google.com/") + r"(?:file/d/|(?:open|uc)\?(?:.*&)?id=)([\w-]{10,})"
)
_TRIES = 5  # in a row that bring nothing new
_PATIENCE = 60  # seconds that a server may ask to be waited for
_TIMEOUT = 30.0  # seconds without a byte
_STEP = 2**20


class Gone(UserError):
    """An address that leads to nothing of use; ``why`` in a few words, to be counted by."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def is_remote(place: str) -> bool:
    """Whether a place is an address, and no path of this machine."""
    return bool(_REMOTE.match(place))


def problem_with(place: str) -> str | None:
    """Why an address can't be used, if so; it is not repeated where it holds a password."""
    place = re.sub(r"^(\w[\w+.-]*):/+", r"\1://", place)
    parts = urlsplit(place)
    scheme = parts.scheme.lower()
    if parts.username is not None or parts.password is not None:
        return (
            f"the address at {site_of(place)} holds a user or password, which params.yaml, "
            "dvc.lock and MLflow would keep; put them into ~/.netrc and leave them out here"
        )
    if any(_SECRET.search(key) for key, _ in parse_qsl(parts.query, keep_blank_values=True)):
        return (
            f"the address {shown(place)} is signed or holds a token, which params.yaml, dvc.lock "
            "and MLflow would keep, and which expires; name the file by s3://bucket/path, or "
            "download it and name its path"
        )
    if scheme not in ("https", "http", "s3", "gdrive"):
        return f"{shown(place)} is none of https://, s3://, gdrive: and a path; download the file"
    if scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1"):
        return f"{shown(place)} is not encrypted, so anyone on the way may alter it; write https://"
    if scheme == "s3" and not (parts.netloc and parts.path.strip("/")):
        return f"{shown(place)} names no file; write s3://bucket/path/of/the/file"
    return None


def shown(place: str) -> str:
    """An address fit to be shown and kept: without user, password, query and fragment."""
    if drive := _DRIVE.match(place):
        return f"gdrive:{drive[1]}"
    parts = urlsplit(place)
    return f"{site_of(place)}{parts.path}" if parts.netloc else place


def key_of(place: str) -> str:
    """16 digits that tell an address from others, query and all."""
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def name_of(place: str) -> str:
    """A file's name for an address: the last part of its path."""
    name = unquote(PurePosixPath(shown(place).removeprefix("gdrive:")).name)
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".")[-100:] or "file"


def bring(place: str, folder: Path, sha256: str | None = None) -> Path:
    """The complete file at an address, in ``folder`` under a name of its own.

    What has arrived of it stays there, and the next call goes on from it, unless the file has
    changed meanwhile. A file that is complete is not asked for again.

    Raises:
        UserError: no such file, no access, no network, no package that reads it, or another hash.
    """
    digest = hashlib.sha256(f"{place} {sha256}".encode()).hexdigest()[:32]
    complete, partial = folder / f"{digest}.complete", folder / f"{digest}.part"
    if not complete.exists():
        scheme = "gdrive" if _DRIVE.match(place) else place.partition(":")[0].lower()
        ways = {"https": _https, "http": _https, "s3": _s3, "gdrive": _drive}
        with _explained(shown(place)):
            ways[scheme](place, partial)
            partial.rename(complete)
    if sha256 is not None and sha256_of(complete) != sha256.lower():
        found = sha256_of(complete)
        complete.unlink()
        raise UserError(
            f"{shown(place)} has the sha256 {found[:12]}…, and params.yaml says {sha256[:12]}…; it "
            "was deleted. Check the address, or set sha256 to the new one if you trust the change"
        )
    return complete


# https


def _https(place: str, partial: Path) -> None:
    import httpx

    with httpx.Client(follow_redirects=True, timeout=_TIMEOUT, auth=_netrc()) as client:
        download(client, place, partial, tries=_TRIES)


def download(
    client: Any,
    place: str,
    partial: Path,
    *,
    tries: int,
    most: int | None = None,
    seconds: float | None = None,
) -> None:
    """Make ``partial`` hold what is at an address, by a ``httpx.Client``; it is resumed.

    ``tries`` in a row may bring nothing. Above ``most`` bytes, or after ``seconds``, it is given
    up.

    Raises:
        Gone: the server refuses it, or it is more than that.
        httpx.HTTPError, httpx.InvalidURL: no answer, or no address.
        OSError: it can't be written.
    """
    import httpx

    failed = waits = 0
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        before, patience = size_of(partial), _PATIENCE if waits < 3 else -1
        try:
            if _ask(client, place, partial, patience=patience, most=most, until=until):
                return
        except _Later as later:
            waits += 1
            time.sleep(later.seconds)
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.TimeoutException) as error:
            failed = 0 if size_of(partial) > before else failed + 1
            if failed >= tries or (isinstance(error, httpx.ConnectError) and not before):
                raise
            time.sleep(min(2**failed, 8) / 10)


class _Later(Exception):
    """A server asks to be waited for."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"in {seconds} seconds")
        self.seconds = seconds


def _ask(
    client: Any, place: str, partial: Path, *, patience: int, most: int | None, until: float | None
) -> bool:
    """One request for what is missing; whether it is complete now."""
    have, mark = size_of(partial), partial.with_suffix(".mark")
    headers = {"Accept-Encoding": "identity"}  # what is packed on the way can't be resumed
    known = mark.read_text() if mark.exists() else ""
    if have and known:
        headers |= {"Range": f"bytes={have}-", "If-Range": known}
    # Led elsewhere, a request still says what was asked for first.
    asked = {"asked": place}
    with client.stream("GET", place, headers=headers, extensions=asked) as answer:
        if answer.status_code == 416 and have:  # it is shorter than what is here
            partial.unlink()
            return False
        if answer.status_code in (429, 503):
            wait = answer.headers.get("Retry-After", "")
            if wait.isdigit() and int(wait) <= patience:
                raise _Later(int(wait))
        if answer.status_code >= 400:
            raise Gone(_refusal(answer, place), f"HTTP {answer.status_code}")
        if place.lower().startswith("https:") and answer.url.scheme != "https":
            raise Gone(
                f"{shown(place)} leads on to an address that is not encrypted; name another one",
                "not encrypted",
            )
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise Gone(
                f"{shown(place)} answers with a web page, not a file; name the address of the "
                "download itself",
                "a web page",
            )
        goes_on = answer.status_code == 206
        etag = answer.headers.get("ETag", "")
        strong = "" if etag.startswith("W/") else etag
        packed = "Content-Encoding" in answer.headers  # although not asked for: can't be resumed
        mark.write_text("" if packed else strong or answer.headers.get("Last-Modified", ""))
        start = have if goes_on else 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        _check_size(place, total or 0, most)
        check_room(partial.parent, (total or 0) - start, what=shown(place))
        with (
            partial.open("ab" if goes_on else "wb") as file,
            _bar(place, start, 0 if most else total) as bar,
        ):
            for block in answer.iter_bytes() if packed else answer.iter_raw():
                start += len(block)
                _check_size(place, start, most)
                if until is not None and time.monotonic() > until:
                    raise Gone(f"{shown(place)} arrives too slowly; download it", "too slow")
                file.write(block)
                bar.update(len(block))
    mark.unlink()  # httpx itself refuses a body that ends before its announced length
    return True


def _check_size(place: str, size: int, most: int | None) -> None:
    if most is not None and size > most:
        text = f"larger than {readable(most)}"
        raise Gone(f"{shown(place)} is {text}; leave it out", text)


def _bar(place: str, start: int, total: int | None) -> Any:
    """Progress on standard error; none for what takes no time."""
    small = total is not None and total < 10 * _STEP
    name = name_of(place)[:30]
    return tqdm(initial=start, total=total, unit="B", unit_scale=True, desc=name, disable=small)


def _refusal(answer: Any, place: str) -> str:
    site, status = site_of(str(answer.url)), answer.status_code
    if status in (401, 403):
        return (
            f"{shown(place)}: {site} refuses access (HTTP {status}); name a public address, or put "
            "user and password for that host into ~/.netrc"
        )
    if status in (404, 410):
        return f"{shown(place)}: {site} has no such file (HTTP {status}); check the address"
    if status == 429:
        later = answer.headers.get("Retry-After", "")
        when = f"in {later} seconds" if later.isdigit() else "later"
        return f"{shown(place)}: {site} has been asked too often (HTTP 429); try again {when}"
    return f"{shown(place)} can't be downloaded now ({site} answers HTTP {status}); try again later"


def _netrc() -> Any:
    """Users and passwords by host, if the user keeps such a file."""
    import netrc

    import httpx

    with suppress(OSError, netrc.NetrcParseError):
        return httpx.NetRCAuth()
    return None


# S3


def _s3(place: str, partial: Path) -> None:
    fsspec = _package("fsspec", place)
    _package("s3fs", place)
    path = place[len("s3://") :]
    patience = {"connect_timeout": 10, "read_timeout": _TIMEOUT, "retries": {"max_attempts": 3}}
    files = fsspec.filesystem("s3", config_kwargs=patience)
    try:
        info = files.info(path)
    except Exception as error:
        if "NoCredentials" not in type(error).__name__:
            raise
        files = fsspec.filesystem("s3", config_kwargs=patience, anon=True)  # a public bucket
        info = files.info(path)
    if info.get("type") == "directory":
        raise UserError(f"{shown(place)} is a folder; name the file itself")
    mark = partial.with_suffix(".mark")
    if not mark.exists() or mark.read_text() != str(info.get("ETag")):
        partial.unlink(missing_ok=True)
        mark.write_text(str(info.get("ETag")))
    have, total = size_of(partial), info["size"]
    check_room(partial.parent, total - have, what=shown(place))
    with (
        files.open(path, "rb", cache_type="none") as source,
        partial.open("ab") as file,
        _bar(place, have, total) as bar,
    ):
        source.seek(have)
        while block := source.read(8 * _STEP):
            file.write(block)
            bar.update(len(block))
    if size_of(partial) != info["size"]:
        raise UserError(f"{shown(place)} arrived incomplete; run the same command again to go on")
    mark.unlink()


# Google Drive


def _drive(place: str, partial: Path) -> None:
    gdown = _package("gdown", place)
    found = _DRIVE.match(place)
    number = found[1] if found else re.split(r":(?://)?", place, maxsplit=1)[1]
    gdown.download(id=number, output=str(partial), quiet=True, resume=True)
    with partial.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        partial.unlink()
        raise UserError(
            f"{shown(place)}: Google Drive answers with a web page; share the file with anyone who "
            "has the link, or download it yourself and name its path"
        )


def _package(name: str, place: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{shown(place)} is read by {name}, which is not installed; run `make extras`, or "
            "download the file and name its path"
        ) from None


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """What goes wrong on the way as one sentence, told by the names of classes (``hub_errors``)."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        for names, message in _MESSAGES:
            if kinds & names:
                raise UserError(message(what)) from None
        if isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
            raise UserError(f"{what} can't be downloaded or written ({reason})") from None
        raise


_MESSAGES: tuple[tuple[set[str], Callable[[str], str]], ...] = (
    (
        {"FileNotFoundError", "NoSuchBucket"},
        lambda what: f"{what} does not exist; check the address",
    ),
    (
        {"PermissionError", "NoCredentialsError", "PartialCredentialsError"},
        lambda what: (
            f"{what} refuses access; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, to an account that may read it"
        ),
    ),
    (
        {"FileURLRetrievalError"},
        lambda what: (
            f"{what} can't be had from Google Drive; check the id, share the file with anyone who "
            "has the link, or download it yourself and name its path"
        ),
    ),
    (
        {"TimeoutException", "TimeoutError", "ConnectTimeoutError", "ReadTimeoutError"},
        lambda what: f"{what} did not arrive in time; run the same command again to go on",
    ),
    (
        {"TooManyRedirects", "UnsupportedProtocol", "InvalidURL"},
        lambda what: f"{what} leads to no file; check the address",
    ),
    (
        {"RequestError", "EndpointConnectionError", "HTTPClientError", "ConnectionError"},
        lambda what: (
            f"{what} can't be reached, or broke off; check the network and the proxy, and run the "
            "same command again to go on"
        ),
    ),
)
