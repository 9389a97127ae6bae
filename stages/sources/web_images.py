"""Images that tables name by https addresses, downloaded once: preprocess needs no network.

A table is anyone's, so no user, password or token goes along, nothing that is not encrypted or of a
private network is asked, and size and time are bounded. What can't be had is left to preprocess,
which leaves out its row and says why.
"""

import ipaddress
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tqdm import tqdm

from stages.core.errors import UserError
from stages.core.text import listed, shown
from stages.pairs import magic, suffixes, web_index
from stages.sources import addresses, manifest
from stages.sources.manifest import PARTIAL, File
from stages.sources.mentions import texts_in

if TYPE_CHECKING:
    import httpx

CONNECTIONS = 8
_TIMEOUT = 20.0  # seconds without a byte
_SECONDS = 300.0  # for one image
_SILENT = 3  # images of a host without an answer, after which it is not asked again
_NO_ANSWER = "no answer"
_LOOPBACK = ("localhost", "127.0.0.1")


def bring(out: Path, names: Iterable[str], column: str | None) -> list[File]:
    """The images at the addresses in a column of the tables among ``names``, and their index.

    Files in ``out``; nothing if ``column`` is None. What an earlier call brought stays, what it
    could not get is asked for again.

    Raises:
        UserError: the column has no address, no image could be had, most hosts give no answer, or
            the disk is full.
    """
    if column is None:
        return []
    paths = [out / name for name in suffixes.tables(names)]
    wanted = list(dict.fromkeys(_addresses(paths, column)))
    if not wanted:
        raise UserError(
            f"data.source.image_urls: no column '{shown(column, 40)}' holds an address in "
            f"{listed(path.name for path in paths)}; name the column that does, or set it to null"
        )
    try:
        why = dict(_brought(wanted, out))
        web_index.write(out / PARTIAL / "index", why)
        manifest.place(out / PARTIAL / "index", out, web_index.INDEX)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror})") from None
    _report(why, column)
    found = (web_index.name_of(address) for address in wanted if not why[address])
    return [manifest.described(out, name) for name in (web_index.INDEX, *found)]


def _addresses(paths: Iterable[Path], column: str) -> Iterator[str]:
    from stages.pairs import formats

    for path in paths:
        table = formats.open_table(path)
        for row in table.rows([column]) if column in table.names else ():
            cell = row.get(column) if isinstance(row, dict) else None
            yield from filter(web_index.is_address, map(str.strip, texts_in(cell)))


def _brought(wanted: list[str], out: Path) -> Iterator[tuple[str, str]]:
    """Each address with why it brought no image; empty if it did."""
    import httpx

    silent: Counter[str] = Counter()

    def one(address: str) -> tuple[str, str]:
        if (out / web_index.name_of(address)).is_file():
            return address, ""
        return address, _image(client, address, out, silent)

    hooks = {"request": [_refuse_unsafe]}
    with (
        httpx.Client(follow_redirects=True, timeout=_TIMEOUT, event_hooks=hooks) as client,
        ThreadPool(CONNECTIONS) as pool,
    ):
        found = pool.imap_unordered(one, wanted)
        yield from tqdm(found, total=len(wanted), desc="images", disable=len(wanted) < 100)


def _image(client: "httpx.Client", address: str, out: Path, silent: Counter[str]) -> str:
    """Download one image to its place; why it is none, else the empty string."""
    import httpx

    from stages.pairs.formats import MOST_BYTES

    name = web_index.name_of(address)
    partial = out / PARTIAL / Path(name).name
    try:
        host = urlsplit(address).netloc
        if silent[host] >= _SILENT:
            return _NO_ANSWER
        addresses.download(client, address, partial, tries=2, most=MOST_BYTES, seconds=_SECONDS)
    except addresses.Gone as gone:
        partial.unlink(missing_ok=True)
        return gone.why
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError):
        return "no valid address"
    except httpx.TooManyRedirects:
        return "redirects without end"
    except httpx.HTTPError:
        silent[host] += 1
        return _NO_ANSWER
    silent[host] = 0
    with partial.open("rb") as file:
        if magic.format_of(file.read(512)) not in (*magic.IMAGES, "HEIC"):
            partial.unlink()
            return "not an image"
    manifest.place(partial, out, name)
    return ""


def _refuse_unsafe(request: "httpx.Request") -> None:
    """Refuse a request before it is sent, those included that an answer leads to."""
    url = request.url
    # Only what was itself asked for on this machine may lead to this machine.
    local = urlsplit(request.extensions.get("asked", "")).hostname in _LOOPBACK
    allowed = local and url.host in _LOOPBACK
    if url.scheme not in ("http", "https"):
        raise addresses.Gone("", "not an https address")
    if url.userinfo:
        raise addresses.Gone("", "it holds a user or password")
    if url.scheme != "https" and not allowed:
        raise addresses.Gone("", "not encrypted")
    if not allowed and _is_private(url.host):
        raise addresses.Gone("", "of a private network")


@lru_cache(maxsize=10_000)
def _is_private(host: str) -> bool:
    """Whether a name leads to this machine or its network. One that is not known here may be known
    to a proxy, so it is not."""
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    numbers = [ipaddress.ip_address(each.partition("%")[0]) for each in found]
    return not all((getattr(each, "ipv4_mapped", None) or each).is_global for each in numbers)


def _report(why: dict[str, str], column: str) -> None:
    """Print how many there are, and why others are not.

    Raises:
        UserError: none is there, or most failed in a way that may pass.
    """
    reasons = Counter(reason for reason in why.values() if reason)
    missing = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
    text = f"of {len(why):,} addresses in column '{shown(column, 40)}'"
    if reasons:
        first = next(address for address, reason in why.items() if reason)
        missing += f"; the first is {web_index.label(first)}, {why[first]}"
    passing = sum(number for reason, number in reasons.items() if _may_pass(reason))
    if passing * 2 > len(why):
        raise UserError(
            f"data.source.image_urls: {text} {passing:,} can't be reached now ({missing}); check "
            "the network and the proxy, and run the same command again: what arrived is kept"
        )
    if reasons.total() == len(why):
        raise UserError(
            f"data.source.image_urls: {text} none leads to an image ({missing}); check the column"
        )
    there = f"images downloaded {text}: {len(why) - reasons.total():,}"
    print(there + (f"; not to be had: {missing}" if reasons else ""))


def _may_pass(reason: str) -> bool:
    return reason in (_NO_ANSWER, "HTTP 429") or reason.startswith("HTTP 5")
