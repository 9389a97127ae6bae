"""Kind ``hub``: a repository on the Hugging Face Hub at one commit.

The Hub's own library downloads, by Xet where the repository has it. This module resolves the
commit once, checks the room on the disk first, leaves out what may run code, and holds each file
against the size and digest that the Hub announced.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from tqdm import tqdm

from stages.core import console
from stages.core.errors import UserError, listed, of_the_hub, site_of
from stages.pairs.files import FETCHED, is_hidden
from stages.sources import base_model, source
from stages.sources.source import (
    PARTIAL,
    File,
    Kind,
    Source,
    SourceSection,
    Tables,
    is_permitted,
)

CONNECTIONS = 8  # as many as snapshot_download opens
RepoType = Literal["dataset", "model"]


class HubModel(SourceSection):
    """A repository on the Hugging Face Hub (or whatever ``HF_ENDPOINT`` names)."""

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(min_length=1)]
    files: Annotated[list[str], Field(min_length=1)]


class HubData(HubModel, Tables):
    """Of data."""


def is_right(path: Path, announced: File) -> bool:
    """Whether the file at ``path`` has the size and content that the Hub announced.

    Instead of its sha256, a small file has the id of its git blob: sha1 of ``b"blob <size>\\0"``
    and the content.
    """
    if len(announced.sha256) == 64:
        return source.is_there(path, announced)
    if not path.is_file() or path.stat().st_size != announced.size:
        return False
    blob = b"blob %d\0" % announced.size + path.read_bytes()
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == announced.sha256


def fetch(asked: HubModel, out: Path, repo_type: RepoType, **allowed: bool) -> Source:
    """Bring the files of a repository that match any pattern of ``asked.files`` into ``out``.

    A ``revision`` may be a branch, a tag or a commit. Of a commit that ``out`` holds already,
    nothing is asked; else only what is missing or wrong is downloaded. ``HF_ENDPOINT``,
    ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and ``HF_HUB_DOWNLOAD_TIMEOUT`` hold. ``allowed``, of a model
    alone, may be ``allow_pickle`` and ``allow_code``.

    Raises:
        UserError: no access, no such repository, revision or file, no network, wrong content, no
            room, or a model that later stages can't use.
    """
    if not any(allowed.values()) and (kept := _kept(asked, out)):
        return kept
    repo = asked.repo
    commit, licence, files = _look_up(asked, repo_type)
    wanted = _select(asked, files, **allowed)
    names = [file.path for file in wanted]
    weights = {name for name in names if repo_type == "model" and base_model.is_weights(name)}
    allow_pickle = allowed.get("allow_pickle", False)
    if repo_type == "model":
        base_model.check_weights_exist(repo, names, [file.path for file in files], allow_pickle)
    source.begin(out)
    missing = [file for file in wanted if not is_right(out / file.path, file)]
    source.check_room(out, sum(file.size for file in missing), what=repo)
    with _explained(asked, repo_type):
        _bring([f for f in missing if f.path not in weights], out, repo, repo_type, commit)
    if repo_type == "model":  # refused before gigabytes arrive
        base_model.check_model(out, names, name=repo)
        with _explained(asked, repo_type):
            _bring([f for f in missing if f.path in weights], out, repo, repo_type, commit)
        base_model.check_weights(out, names, name=repo)
    found = (
        file if len(file.sha256) == 64 else source.described(out / file.path, file.path)
        for file in wanted
    )
    given = ("hub", repo, asked.revision, commit, licence)
    return source.finish(out, Source(*given, tuple(found), tuple(asked.files)))


def _kept(asked: HubModel, out: Path) -> Source | None:
    """What an earlier fetch left, if it is all that is asked for, and right."""
    try:
        had = source.read(out)
    except UserError:
        return None
    has = (had.kind, had.repo, had.revision, had.commit, had.patterns)
    if has != ("hub", asked.repo, asked.revision, asked.revision, tuple(asked.files)):
        return None
    right = all(is_permitted(f.path) and source.is_there(out / f.path, f) for f in had.files)
    return had if right else None


def _look_up(asked: HubModel, repo_type: RepoType) -> tuple[str, str | None, list[File]]:
    """The commit of a revision, the licence and all files there, by one request.

    Raises:
        UserError: offline, no access, no such repository or revision, no answer, no Hub.
    """
    from huggingface_hub import HfApi, constants

    with _explained(asked, repo_type):
        info: Any = HfApi().repo_info(
            asked.repo,
            revision=asked.revision,
            repo_type=repo_type,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,  # without one, httpx would wait for ever
        )
        files = [
            File(file.rfilename, int(file.size), file.lfs.sha256 if file.lfs else file.blob_id)
            for file in sorted(info.siblings or (), key=lambda file: file.rfilename)
        ]
        digests = [str(info.sha), *(file.sha256 for file in files)]
        if not all(re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", each) for each in digests):
            raise ValueError("no digests")
        card = info.card_data or {}
        licence = card.get("license")
        licence = card.get("license_name") or licence if licence == "other" else licence
        licence = ", ".join(licence) if isinstance(licence, list) else licence
    return digests[0], licence, files


def _select(asked: HubModel, files: Sequence[File], **allowed: bool) -> list[File]:
    """The files that match a pattern and may be fetched."""
    from huggingface_hub.utils import filter_repo_objects

    others = (file for file in files if file.path != FETCHED)
    # "*" also crosses "/", "folder/" is all of it.
    matching = list(
        filter_repo_objects(others, allow_patterns=asked.files, key=lambda file: file.path)
    )
    if not matching:
        raise UserError(
            f"{asked.repo}: no file matches {', '.join(asked.files)}; the repository holds "
            f"{listed((file.path for file in files), 5, longest=80) or 'nothing'}"
        )
    for path in (file.path for file in matching):
        parts = path.split("/")
        if {"", ".", ".."} & set(parts) or re.search(r"[\\\0\n\r]", path) or ":" in parts[0]:
            raise UserError(
                f"{asked.repo}: the file name {path!r} leads out of its folder; this repository "
                "can't be trusted"
            )
    visible = [file for file in matching if not is_hidden(file.path)]
    safe = [file for file in visible if is_permitted(file.path, **allowed)]
    if left_out := sorted({file.path for file in visible} - {file.path for file in safe}):
        those = listed(left_out, longest=200)
        print(f"{asked.repo}: left out, because they can run code when loaded: {those}")
    return safe


def _bring(missing: Sequence[File], out: Path, repo: str, repo_type: RepoType, commit: str) -> None:
    """Download files into ``out``, each complete and as announced.

    ``snapshot_download`` calls the same function for each file, but waits for all files under way
    when one fails or Ctrl-C is pressed. The threads here are daemons: nobody waits for them.
    """
    from huggingface_hub import hf_hub_download

    unfinished = out / PARTIAL
    for abandoned in unfinished.rglob("*.incomplete"):  # which the library never resumes
        abandoned.unlink()

    class Part(tqdm):
        """What huggingface_hub takes for the bar of one file: all files move one bar."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            bar.update(int(n or 0))

        def update_transfer(self, *_: Any, **__: Any) -> None:
            """Xet tells apart what was received and what is written; the latter counts."""

        set_transfer_postfix_str = update_transfer

    def bring(file: File) -> None:
        place: Any = {"revision": commit, "repo_type": repo_type, "local_dir": unfinished}
        hf_hub_download(repo, file.path, tqdm_class=Part, **place)
        if not is_right(unfinished / file.path, file):
            (unfinished / file.path).unlink(missing_ok=True)
            raise UserError(
                f"{repo}: {file.path} does not have the content that the Hub announces for it "
                f"({file.sha256[:12]}…), so it was deleted. Run again; if that does not help, a "
                "proxy or mirror (HF_ENDPOINT) alters files"
            )
        source.place(unfinished / file.path, out, file.path)

    total = sum(file.size for file in missing)
    with console.bar(total, repo, "B") as bar, ThreadPool(CONNECTIONS) as pool:
        for _ in pool.imap_unordered(bring, missing):
            pass


@contextmanager
def _explained(asked: HubModel, repo_type: RepoType) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into one sentence with the fix."""
    import httpx
    from huggingface_hub import constants, logging

    # Its warnings hold the addresses that it asks, and those may hold passwords and signatures.
    logging.set_verbosity_error()
    site = site_of(constants.ENDPOINT)
    page = f"{site}/{'datasets/' if repo_type == 'dataset' else ''}{asked.repo}"
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, TypeError) as error:
        told = of_the_hub(error, asked.repo, page=page, revision=asked.revision)
        if told is None and isinstance(error, OSError):
            if error.errno is not None:  # of the disk
                raise
            told = f"{asked.repo} arrived incomplete; run the same command again"
        raise UserError(
            told
            or f"{site} does not answer as a Hugging Face Hub does (a commit, and the size and "
            "digest of each file); check HF_ENDPOINT and the proxy"
        ) from None


KIND = Kind(
    section=HubData,
    model_section=HubModel,
    fetch_data=partial(fetch, repo_type="dataset"),
    fetch_model=partial(fetch, repo_type="model"),
)
