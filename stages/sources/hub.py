"""Kind ``hub``: a repository on the Hugging Face Hub at one commit."""

from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.errors import UserError
from stages.core.schema import SourceSection
from stages.core.text import listed
from stages.pairs import suffixes
from stages.pairs.named import key, shown
from stages.sources import base_model, manifest, web_images
from stages.sources.kind import About, Kind
from stages.sources.manifest import MANIFEST, PARTIAL, File, Source
from stages.sources.names import is_permitted, is_weights, matches

if TYPE_CHECKING:
    from stages.sources import download

CONNECTIONS = 8  # as many as snapshot_download opens


class HubSource(SourceSection):
    """A repository on the Hugging Face Hub (or whatever ``HF_ENDPOINT`` names)."""

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(min_length=1)]
    files: Annotated[list[str], Field(min_length=1)]


class HubData(HubSource):
    """Of data; ``image_urls`` is the column whose addresses are downloaded, null for none."""

    image_urls: str | None = None


def fetch_data(source: HubData, out: Path) -> Source:
    """Data are tables and images: pickles and code are never fetched with them."""
    return fetch(source, out, repo_type="dataset")


def fetch_model(source: HubSource, out: Path, *, allow_pickle: bool, allow_code: bool) -> Source:
    """Weights are safetensors, unless a parameter allows more."""
    return fetch(source, out, repo_type="model", allow_pickle=allow_pickle, allow_code=allow_code)


def fetch(
    source: HubSource,
    out: Path,
    *,
    repo_type: Literal["dataset", "model"],
    allow_pickle: bool = False,
    allow_code: bool = False,
    endpoint: str | None = None,
) -> Source:
    """Bring the files of a repository that match any pattern of ``source.files`` into ``out``.

    Its ``revision`` is a branch, a tag or a commit, resolved once; everything is taken at that
    commit. Patterns are the Hub's own (``fnmatch`` over the path). Files that are right already, in
    ``out`` or in the Hugging Face cache, are not downloaded again, and a partial file is resumed;
    a commit that was fetched before, and is all here, is not even looked up. ``HF_ENDPOINT``
    (unless ``endpoint`` is given), ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and
    ``HF_HUB_DOWNLOAD_TIMEOUT`` hold. The images at addresses in the column ``image_urls`` of its
    tables are downloaded.

    Raises:
        UserError: no access, no such repository, revision or file, no network, wrong content, no
            room, or a model that later stages can't use.
    """
    from huggingface_hub.utils import tqdm

    from stages.sources import download

    repo = source.repo
    repository = download.look_up(repo, source.revision, repo_type, endpoint)
    wanted = _select(repository, source.files, allow_pickle=allow_pickle, allow_code=allow_code)
    names = [file.path for file in wanted]
    if repo_type == "model":
        there = [file.path for file in repository.files]
        base_model.check_weights_exist(repo, names, there, allow_pickle)
    elif not suffixes.tables(names):
        raise UserError(
            f"{repo}: none of the files that match {', '.join(source.files)} is a parquet, JSON or "
            "JSONL table; name some in data.source.files"
        )
    manifest.begin(out)
    partial = {file: out / PARTIAL / file.partial_name for file in wanted}
    missing = [file for file in wanted if not download.is_right(out / file.path, file)]
    arrived = sum(manifest.size_of(partial[file]) for file in missing)
    manifest.check_room(out, sum(file.size for file in missing) - arrived, what=repo)
    total = sum(file.size for file in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, desc=repo) as bar:
        bar.update(total - sum(file.size for file in missing))

        def bring(file: "download.Announced") -> None:
            download.download(repository, file, partial[file], bar)
            manifest.place(partial[file], out, file.path)

        # Its threads are daemons: when one fails, or Ctrl-C is pressed, nobody waits for the rest.
        with ThreadPool(CONNECTIONS) as pool:
            # Weights last: a model that can't be used is refused before gigabytes have arrived.
            pool.map(bring, [file for file in missing if not is_weights(file.path)], chunksize=1)
            if repo_type == "model":
                base_model.check_model(out, names, name=repo, allow_pickle=allow_pickle)
            pool.map(bring, [file for file in missing if is_weights(file.path)], chunksize=1)
    if repo_type == "model":
        base_model.check_weights(out, names, name=repo)
    described = [
        File(file.path, file.size, file.digest if file.lfs else manifest.sha256_of(out / file.path))
        for file in wanted
    ]
    if isinstance(source, HubData):
        described += web_images.bring(out, names, source.image_urls)
    commit, licence = repository.commit, repository.licence
    return manifest.finish(
        out, Source("hub", repo, source.revision, commit, licence, tuple(described))
    )


def _select(
    repository: "download.Repository",
    patterns: Sequence[str],
    *,
    allow_pickle: bool,
    allow_code: bool,
) -> "list[download.Announced]":
    """The files that match a pattern and may be fetched."""
    name, files = repository.name, repository.files
    matching = [file for file in files if file.path != MANIFEST and matches(file.path, patterns)]
    if not matching:
        there = ", ".join(file.path for file in files[:5]) or "nothing"
        raise UserError(
            f"{name}: no file matches {', '.join(patterns)}; the repository holds {there}"
            + (f" and {len(files) - 5} more (see {repository.page})" if len(files) > 5 else "")
        )
    for file in matching:
        _refuse_outside(file.path, name)
    _refuse_collisions([file.path for file in matching], name)
    safe = [
        file
        for file in matching
        if is_permitted(file.path, allow_pickle=allow_pickle, allow_code=allow_code)
    ]
    left_out = sorted({file.path for file in matching} - {file.path for file in safe})
    if left_out:
        those = listed(left_out, longest=200)
        print(f"{name}: left out, because they can run code when loaded: {those}")
    return safe


def _refuse_outside(name: str, repo: str) -> None:
    """Refuse a path that would be written outside the folder, or over the folder's own files."""
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or any(character in name for character in "\\\0\n\r")
        or ":" in parts[0]
        or parts[0] in (PARTIAL, MANIFEST)
    ):
        raise UserError(
            f"{repo}: the file name {name!r} leads out of its folder; this repository can't be "
            "trusted"
        )


def _refuse_collisions(names: Sequence[str], repo: str) -> None:
    """Refuse names that are one file on a system which looks past case, as macOS and Windows do."""
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(key(name), name)
        if other != name:
            raise UserError(
                f"{repo}: {shown(other)} and {shown(name)} differ in case alone, so that some "
                "systems can keep only one of them; leave one out by the patterns of files"
            )


def _about(fetched: Source) -> About | None:
    return _KNOWN.get(str(fetched.repo))


_KNOWN = {
    "helehan/topic-overwrite": About(
        "en",
        "Its answers come from another model (LLaVA-1.5-7B), with topics rewritten: what that "
        "model gets wrong may be among the chosen answers.",
        ("tpo",),
    ),
}


def _address(name: str, commit: str, is_data: bool) -> str:
    where = f"datasets/{name}" if is_data else name
    return f"https://huggingface.co/{where}/tree/{commit}"


KIND = Kind(
    section=HubData,
    model_section=HubSource,
    fetch_data=fetch_data,
    fetch_model=fetch_model,
    name=lambda source, fetched: str(fetched.repo or source.repo),
    words=lambda fetched: f"`{fetched.repo}` on the Hugging Face Hub",
    address=_address,
    about=_about,
)
