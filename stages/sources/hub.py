"""The Hugging Face Hub: what a repository holds at a revision, and its files, resumed and checked.

Why not ``snapshot_download``: since huggingface_hub#4228 it downloads to a temporary name that is
unique to the process and deletes it on failure, so a shard of 5 GB that was cut at 4.9 GB starts
again from 0. Here the client's own ``http_get`` appends to a file that survives the process, and
every byte is checked against the digest that the Hub announces for the commit: the sha256 of a
large file, the git blob id of a small one.
"""

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, tqdm

from stages.core.errors import UserError

RepoType = Literal["dataset", "model"]


@dataclass(frozen=True)
class Announced:
    """A file as the Hub announces it at one commit, before a byte of it is here.

    ``digest`` is the sha256 of a large (LFS) file, else the id of its git blob:
    sha1 of ``b"blob <size>\\0"`` and the content.
    """

    path: str
    size: int
    digest: str
    lfs: bool


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: what ``revision`` (a branch, tag or commit) was resolved to."""

    name: str
    type: RepoType
    revision: str
    commit: str
    licence: str | None
    files: tuple[Announced, ...]  # sorted by path
    endpoint: str | None  # None: what HF_ENDPOINT says

    @property
    def page(self) -> str:
        """The repository's page, for messages."""
        return _page(self.name, self.type, self.endpoint)


def look_up(
    name: str, revision: str, repo_type: RepoType, endpoint: str | None = None
) -> Repository:
    """Resolve a revision, and list what is there: one request, so that both are of the same commit.

    Raises:
        UserError: offline, no access, no such repository or revision, no answer, no Hub.
    """
    with _explained(name, revision, _page(name, repo_type, endpoint)):
        api = HfApi(endpoint=endpoint)
        ask = api.dataset_info if repo_type == "dataset" else api.model_info
        timeout = constants.HF_HUB_ETAG_TIMEOUT  # without one, httpx would wait for ever
        try:
            info = ask(name, revision=revision, files_metadata=True, timeout=timeout)
            files = [
                Announced(file.rfilename, file.size or 0, digest, lfs=file.lfs is not None)
                for file in info.siblings or []
                for digest in [file.lfs.sha256 if file.lfs else str(file.blob_id)]
            ]
            # Digests become the names of partial files, so they can't be just anything.
            for file in files:
                if not re.fullmatch(r"[0-9a-f]{64}" if file.lfs else r"[0-9a-f]{40}", file.digest):
                    raise ValueError(file.path)
            if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
                raise ValueError(info.sha)
            card: Any = info.card_data or {}
            licence = card.get("license")
        except (OSError, HFValidationError, UnicodeEncodeError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{_site(endpoint)} does not answer as a Hugging Face Hub does (a commit, and the "
                "size and digest of each file); check HF_ENDPOINT and the proxy"
            ) from None
    if licence == "other":
        licence = card.get("license_name") or licence
    if isinstance(licence, list):
        licence = ", ".join(licence)
    files.sort(key=lambda file: file.path)
    return Repository(name, repo_type, revision, str(info.sha), licence, tuple(files), endpoint)


def download(repository: Repository, file: Announced, partial: Path, bar: tqdm) -> None:
    """Make ``partial`` hold the announced content of one file.

    It is copied from the Hugging Face cache if it is there; else what ``partial`` already holds is
    kept, and the rest asked for with a ``Range`` request. ``bar`` counts bytes.

    Raises:
        UserError: no access, no connection, a full disk; or other content than announced, which is
            deleted.
    """
    name, commit, endpoint = repository.name, repository.commit, repository.endpoint
    cached = try_to_load_from_cache(name, file.path, revision=commit, repo_type=repository.type)
    with _explained(name, repository.revision, repository.page, file.path):
        if isinstance(cached, str) and is_right(Path(cached), file):
            shutil.copyfile(cached, partial)
            bar.update(file.size)
            return
        if size_of(partial) > file.size:
            partial.unlink()
        bar.update(size_of(partial))
        # The repository's own address, not the storage that it leads to: that one is signed and
        # expires. httpx drops the token when it is led to another host.
        url = hf_hub_url(
            name, file.path, repo_type=repository.type, revision=commit, endpoint=endpoint
        )
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # gzip can't be resumed
        while True:
            before = size_of(partial)
            try:
                with partial.open("ab") as stream:
                    http_get(
                        url,
                        stream,
                        resume_size=before,
                        headers=headers,
                        expected_size=file.size,
                        _tqdm_bar=bar,
                    )
                break
            except httpx.NetworkError:  # a reset connection, which http_get itself does not retry
                if size_of(partial) == before:
                    raise
        if not is_right(partial, file):
            partial.unlink()
            raise UserError(
                f"{name}: {file.path} does not have the content that the Hub announces for it "
                f"({'sha256' if file.lfs else 'git blob'} {file.digest[:12]}…), so it was deleted. "
                "Run again; if that does not help, a proxy or mirror (HF_ENDPOINT) alters files"
            )


@contextmanager
def _explained(repo: str, revision: str, page: str, path: str | None = None) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into one sentence with the fix.

    Nothing of the original message is repeated: it may hold a signed address or a header with a
    token.
    """
    what = f"{repo}, {path}" if path else repo
    kept = "; what has arrived is kept, run the same command again to go on" if path else ""
    site = _site_of(page)
    try:
        yield
    except OfflineModeIsEnabled:
        message = (
            f"{what} is not here yet and HF_HUB_OFFLINE is set. Unset it, or download the "
            "repository on a machine with a network (`hf download`) and name the folder (kind: "
            "path)"
        )
    except GatedRepoError:
        message = (
            f"{what} is gated. Accept its licence on {page} while logged in, create a token with "
            "read access (https://huggingface.co/settings/tokens), and set it in the environment "
            "as HF_TOKEN"
        )
    except RepositoryNotFoundError:
        message = (
            f"{repo} was not found on {site}. Check the spelling ({page}); if it is private, set "
            "HF_TOKEN to a token that may read it"
        )
    except DisabledRepoError:
        message = f"{repo} has been disabled by the Hub; choose another source (see {page})"
    except RevisionNotFoundError:
        message = (
            f"{repo} has no revision {revision} (any more); choose one that is listed on "
            f"{page}/commits/main"
        )
    except RemoteEntryNotFoundError:
        message = (
            f"{what} is listed but can't be downloaded; choose another revision than {revision} or "
            f"report it on {page}"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            message = (
                f"{site} refuses the token for {what} (HTTP {status}). Set HF_TOKEN to a valid "
                f"token that may read {page}, or unset it if the repository is public"
            )
        elif status == 429:
            message = (
                f"{site} says that this address has asked too often (HTTP 429). Wait a few "
                f"minutes, or set HF_TOKEN{kept}"
            )
        else:
            message = f"{site} can't serve {what} now (HTTP {status}). Try again later{kept}"
    except HFValidationError:
        message = f"{repo} is not a repository's name; write owner/name"
    except UnicodeEncodeError:
        message = "HF_TOKEN holds characters that no token has; set it again"
    except httpx.TimeoutException:
        message = (
            f"{site} did not answer in time for {what}. Check the network, or allow more seconds "
            f"with HF_HUB_DOWNLOAD_TIMEOUT{kept}"
        )
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        message = f"HF_ENDPOINT is not an address; write it as https://host, not {site}"
    except httpx.RequestError:
        message = (
            f"{site} can't be reached for {what}. Check the network, the proxy and "
            f"HF_ENDPOINT{kept}"
        )
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"the disk is full, while fetching {what}; free some space{kept}"
        elif error.errno is not None:
            message = f"{what} can't be written ({error.strerror})"
        else:  # http_get's own: the body ended before the announced size
            message = f"{what} arrived incomplete{kept}"
    else:
        return
    raise UserError(message) from None


def _site(endpoint: str | None) -> str:
    return _site_of(endpoint or constants.ENDPOINT)


def _site_of(address: str) -> str:
    """Scheme and host of an address, without a user or password that it may hold."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if parts.scheme and host else address.rpartition("@")[2]


def _page(repo: str, repo_type: RepoType, endpoint: str | None) -> str:
    return f"{_site(endpoint)}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"


def is_right(path: Path, file: Announced) -> bool:
    """Whether the file at ``path`` has the announced size and content."""
    if not path.is_file() or size_of(path) != file.size:
        return False
    if file.lfs:
        return sha256_of(path) == file.digest
    digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == file.digest


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Size in bytes; 0 where there is no file."""
    return path.stat().st_size if path.is_file() else 0
