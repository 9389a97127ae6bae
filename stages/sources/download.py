"""The Hugging Face Hub: what a repository holds at a revision, and its files, resumed and checked.

Not ``snapshot_download``: after a kill it fetches every unfinished file from byte 0 again (since
huggingface_hub#4228 it writes under a name that no other process knows), where this loses at most
the last 10 MiB of each. With as many connections it is not faster (``benchmarks/download.py``).
"""

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session, tqdm

from stages.core.errors import UserError
from stages.sources import hub_errors
from stages.sources.manifest import sha256_of, size_of

RepoType = Literal["dataset", "model"]
_PATIENCE = 60  # seconds that a server may ask to be waited for; huggingface_hub waits for days
_COMMIT = re.compile(r"[0-9a-f]{40}")


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

    @property
    def partial_name(self) -> str:
        """A name for what has arrived of it: never resumed into another file or other content."""
        return hashlib.sha256(f"{self.digest} {self.path}".encode()).hexdigest()


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

    What a commit holds never changes, so it is kept in the Hugging Face cache, and asked once.

    Raises:
        UserError: offline, no access, no such repository or revision, no answer, no Hub.
    """
    listing = _listing(name, repo_type, revision)
    if listing is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(listing.read_text(encoding="utf-8"))
            files = tuple(Announced(**file) for file in values["files"])
            return Repository(
                name, repo_type, revision, revision, values["licence"], files, endpoint
            )
    found = _ask(name, revision, repo_type, endpoint)
    listing = _listing(name, repo_type, found.commit)
    if listing is not None:
        with suppress(OSError):
            listing.parent.mkdir(parents=True, exist_ok=True)
            values = {"licence": found.licence, "files": [asdict(file) for file in found.files]}
            listing.write_text(json.dumps(values), encoding="utf-8")
    return found


def _listing(name: str, repo_type: RepoType, commit: str) -> Path | None:
    """Where the list of a commit's files is kept; None if ``commit`` is a branch or a tag."""
    if not _COMMIT.fullmatch(commit):
        return None
    folder = repo_folder_name(repo_id=name, repo_type=repo_type)
    return Path(constants.HF_HUB_CACHE) / folder / "listed" / f"{commit}.json"


def _ask(name: str, revision: str, repo_type: RepoType, endpoint: str | None) -> Repository:
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
            for file in files:
                if not re.fullmatch(r"[0-9a-f]{64}" if file.lfs else r"[0-9a-f]{40}", file.digest):
                    raise ValueError(file.path)
            if not _COMMIT.fullmatch(str(info.sha)):
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
        hooks = get_session().event_hooks["response"]
        if _refuse_long_waits not in hooks:
            hooks.append(_refuse_long_waits)
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


def _without_password(record: logging.LogRecord) -> bool:
    """huggingface_hub warns with the address that it asks, and ``HF_ENDPOINT`` may hold a password
    or lead to a signed one."""
    record.msg = re.sub(
        r"(\b[\w+.-]+://)(?:[^/\s@]+@)?([^\s?]+)(?:\?\S*)?", r"\1\2", record.getMessage()
    )
    record.args = ()
    return True


for _handler in logging.getLogger("huggingface_hub").handlers:
    _handler.addFilter(_without_password)


def _refuse_long_waits(response: httpx.Response) -> None:
    seconds = response.headers.get("Retry-After", "")
    if response.status_code == 429 and seconds.isdigit() and int(seconds) > _PATIENCE:
        raise UserError(hub_errors.too_often(hub_errors.site_of(str(response.url)), seconds))


@contextmanager
def _explained(repo: str, revision: str, page: str, path: str | None = None) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into one sentence with the fix."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        what = f"{repo}, {path}" if path else repo
        message = hub_errors.explain(error, what, page=page, revision=revision)
        if message is None and isinstance(error, OSError):
            if error.errno == errno.ENOSPC:
                message = f"the disk is full, while fetching {what}; free some space"
            elif error.errno is not None:
                message = f"{what} can't be written ({error.strerror})"
            else:  # http_get's own: the body ended before the announced size
                message = f"{what} arrived incomplete"
        if message is None:
            raise
        if isinstance(error, OfflineModeIsEnabled):
            message += ", or name a folder to which it was downloaded elsewhere (kind: path)"
        elif path:
            message += "; what has arrived is kept, run the same command again to go on"
        raise UserError(message) from None


def _site(endpoint: str | None) -> str:
    return hub_errors.site_of(endpoint or constants.ENDPOINT)


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
