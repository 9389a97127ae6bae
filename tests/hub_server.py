"""A real local HTTP server that speaks as much of the Hugging Face Hub's API as downloads need, and
as an upload without Xet needs.

``with serve([Repo("owner/name", files={...})]) as url:`` answers the real client, for instance by
``HF_ENDPOINT=url``. Large files are led to another address, as the Hub does it. ``Repo.requests``
says what was asked. Whoever has the token ``writer`` may create repositories; a commit replaces
``Repo.files``. Nothing leaves the machine.
"""

import base64
import fnmatch
import hashlib
import io
import json
import mmap
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

from stages.params.params import Params
from stages.sources.hub import HubModel

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "tasks" / "published"
DEMO = ROOT / "demo" / "model"
Content = bytes | mmap.mmap  # of a folder, mapped: a model of 9 GB is never held in memory
Files = Mapping[str, bytes] | Path
LFS = ("*.parquet", "*.safetensors", "*.bin", "*.pt", "*.png", "*.jpg", "tokenizer.json")


@dataclass(frozen=True)
class Asked:
    """One request that a repository answered. ``file`` is None unless a file's bytes were asked."""

    headers: Mapping[str, str]  # names in lower case
    file: str | None
    at_storage: bool  # the address to which ``resolve`` leads


@dataclass
class Repo:
    """A repository: ``files`` is the head of ``main``; ``tags`` are older states under a tag.

    ``commit`` is main's commit (else made from the content). Failures: ``status`` answers
    everything with that HTTP status; ``private`` and ``gated`` want ``token``, for everything or
    for files only; ``wrong`` files are served with their last byte changed, ``short`` files lack
    it; ``hang`` files stop half-way and keep the connection open.
    """

    name: str
    files: Files
    type: Literal["dataset", "model"] = "model"
    licence: str | None = "apache-2.0"
    commit: str | None = None
    tags: Mapping[str, Files] = field(default_factory=dict)
    status: int | None = None
    private: bool = False
    gated: bool = False
    token: str | None = None
    wrong: Sequence[str] = ()
    short: Sequence[str] = ()
    hang: Sequence[str] = ()
    requests: list[Asked] = field(default_factory=list)

    def downloads(self, file: str | None = None) -> list[Asked]:
        """The requests that asked for bytes (of one file), not those that were redirected."""
        return [each for each in self.requests if each.file and file in (None, each.file)]

    def snapshots(self) -> dict[str, tuple[str, Mapping[str, Content]]]:
        """Every revision that can be asked for: name or commit -> (commit, files)."""
        found = {}
        for revision, files in {**self.tags, "main": self.files}.items():
            held = _contents(files)
            listing = "".join(f"{path} {_digest('sha1', held[path])}\n" for path in sorted(held))
            commit = hashlib.sha1(f"{self.name}\n{listing}".encode()).hexdigest()
            commit = self.commit or commit if revision == "main" else commit
            found[revision] = found[commit] = commit, held
        return found


@contextmanager
def serve(
    repos: Iterable[Repo],
    writer: str | None = None,
    made: dict[tuple[str, str], Repo] | None = None,
) -> Iterator[str]:
    """Serve the repositories on a free local port; yields the base address, for ``HF_ENDPOINT``.

    ``made``: repositories that are created are put there too, by type and name.
    """
    known = {} if made is None else made
    known |= {(repo.type, repo.name): repo for repo in repos}
    hub = _Hub(known, writer)
    servers = [make_server("127.0.0.1", 0, hub.app, threaded=True) for _ in range(2)]
    hub.storage = f"localhost:{servers[1].port}"  # of large files: another host, as the Hub's is
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{servers[0].port}"
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def closed_port() -> str:
    """An address on this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# Repositories to serve


def topic_overwrite_rows(count: int) -> list[dict[str, Any]]:
    """Rows with topic-overwrite's nine columns; two share each ``image``, an encoded JPEG."""
    colours = ["red", "green", "blue", "yellow", "black", "orange"]
    rows = []
    for i in range(count):
        picture = i // 2
        colour, other = colours[picture % 6], colours[(picture + 1 + i % 2) % 6]
        row = {"ds_name": "TPO-Dataset", "origin_split": '{"split": "train"}', "idx": str(i)}
        row |= {
            "question": ["What do you see?", "What colour is the picture?"][i % 2],
            "chosen": f"The picture is {colour} from edge to edge.",
            "rejected": f"The picture is {other} from edge to edge.",
            "origin_dataset": ["LCS-558K", "VQAv2", "OK-VQA"][i % 3],
            "image_path": f"images/{picture:06d}.jpg",
        }
        rows.append(row | {"image": _jpeg(96 + 8 * (picture % 5), 96 + picture // 5, colour)})
    return rows


def topic_overwrite_repo(
    rows: int | Sequence[Mapping[str, Any]], shards: int = 2, **options: Any
) -> Repo:
    """A data set laid out as ``helehan/topic-overwrite``: shards named by their length, of so many
    rows or of these; ``options`` go to ``Repo``."""
    rows = topic_overwrite_rows(rows) if isinstance(rows, int) else rows
    size = -(-len(rows) // shards)
    files = {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"}
    for shard in range(shards):
        part = [
            {**row, "image": {"bytes": row["image"], "path": row["image_path"]}}
            for row in rows[shard * size : (shard + 1) * size]
        ]
        files[f"TPO-Dataset_{shard:03d}-{len(part)}.parquet"] = parquet(part)
    usual = {"name": "helehan/topic-overwrite", "type": "dataset", "licence": "cc-by-nc-4.0"}
    return Repo(files=files, **(usual | options))


def pope_repo(images: int = 3, **options: Any) -> Repo:
    """A data set laid out as ``lmms-lab/POPE``: a card that names splits, and a shard for each, of
    six questions of each image in a row, a yes and a no in turn."""
    settings = ("adversarial", "popular", "random")
    card = "---\nconfigs:\n- config_name: Full\n  data_files:\n"
    card += "".join(f"  - split: {name}\n    path: Full/{name}-*\n" for name in settings)
    files = {"README.md": f"{card}---\n".encode()}
    for category in settings:
        rows = [
            {
                **{"id": str(i), "question_id": str(i + 1), "category": category},
                "question": f"Is there a {category} object {i % 6} in the image?",
                "answer": ("yes", "no")[i % 2],
                "image_source": f"COCO_val2014_{i // 6:012d}",
                "image": {"bytes": _jpeg(64 + 8 * (i // 6), 48, (40 * (i // 6), 90, 150))},
            }
            for i in range(6 * images)
        ]
        files[f"Full/{category}-00000-of-00001.parquet"] = parquet(rows)
    usual = {"name": "lmms-lab/POPE", "type": "dataset", "licence": None}
    return Repo(files=files, **(usual | options))


def preset_repos(p: Params, model: Path, rows: int | Sequence[Mapping[str, Any]]) -> list[Repo]:
    """What a preset of the 4B model fetches, at the commits that it pins: ``rows`` laid out as
    topic-overwrite, the model in a folder, and POPE.
    """
    pinned = re.search(r"revision: (\w{40})", (TASKS / "pope" / "_pope_yaml").read_text())
    (data,), base = p.data.sources.values(), p.model.source
    assert pinned
    assert isinstance(data, HubModel)
    assert isinstance(base, HubModel)
    return [
        topic_overwrite_repo(rows, shards=3, name=data.repo, commit=data.revision),
        Repo(base.repo, model, commit=base.revision),
        pope_repo(commit=pinned[1]),
    ]


def _jpeg(width: int, height: int, colour: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A file of texts, numbers and an image column, described as the Hub's are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    found = pa.Table.from_pylist([dict(row) for row in rows]).schema
    types = {n: image if n == "image" else found.field(n).type for n in rows[0]}
    features: dict[str, Any] = {n: {"dtype": str(t), "_type": "Value"} for n, t in types.items()}
    about = json.dumps({"info": {"features": features | {"image": {"_type": "Image"}}}})
    schema = pa.schema(list(types.items()), {"huggingface": about})
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), stream)
    return stream.getvalue()


# The server


class _Hub:
    def __init__(self, repos: dict[tuple[str, str], Repo], writer: str | None) -> None:
        self.repos, self.writer, self.storage = repos, writer, ""
        self.app = Flask(__name__)
        place = "/<owner>/<name>"
        for rule, answer in (
            (f"/api/<kind>{place}", self.info),
            (f"/api/<kind>{place}/revision/<revision>", self.info),
            (f"/api/<kind>{place}/tree/<revision>", self.tree),
            (f"/api/<kind>{place}/tree/<revision>/<path:folder>", self.tree),
            (f"/api/<kind>{place}/paths-info/<revision>", self.paths),
            (f"{place}/resolve/<revision>/<path:path>", self.file),
            (f"/<kind>{place}/resolve/<revision>/<path:path>", self.file),
            ("/api/repos/create", self.create),
            ("/api/validate-yaml", lambda: {"errors": [], "warnings": []}),
            (f"/api/<kind>{place}/<any(preupload, commit, tag):what>/<_>", self.write),
        ):
            ways: Any = {"methods": ["GET", "POST"], "strict_slashes": False}
            self.app.add_url_rule(rule, rule, answer, **ways)

    def found(
        self, kind: str, owner: str, name: str, revision: str, file: str | None = None
    ) -> tuple[Repo, str, Mapping[str, Content]]:
        """A repository at a revision, unless it is refused, as the Hub words it."""
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.repos.get((kind.removesuffix("s"), f"{owner}/{name}"))
        if repo is None:
            # Without a token the Hub does not tell "there is none" from "not for you".
            raise _refusal(404 if given else 401, "RepoNotFound")
        at_storage = request.host == self.storage
        headers = {key.lower(): value for key, value in request.headers.items()}
        repo.requests.append(Asked(headers, file, at_storage))
        if repo.status:
            raise _refusal(repo.status)
        if given and given != repo.token and not at_storage:
            raise _refusal(401)
        if repo.private and not given:
            raise _refusal(401, "RepoNotFound")
        if repo.gated and "/resolve/" in request.path and not (given or at_storage):
            raise _refusal(401, "GatedRepo")
        if revision not in repo.snapshots():
            raise _refusal(404, "RevisionNotFound")
        return repo, *repo.snapshots()[revision]

    def info(self, kind: str, owner: str, name: str, revision: str = "main") -> Any:
        repo, commit, files = self.found(kind, owner, name, revision)
        about = {"id": repo.name, "sha": commit, "private": repo.private, "gated": repo.gated}
        card = {"license": repo.licence} if repo.licence else {}
        siblings = [_entry(path, files[path]) for path in sorted(files)]
        return about | {"_id": "0", "tags": [], "cardData": card, "siblings": siblings}

    def tree(self, kind: str, owner: str, name: str, revision: str, folder: str = "") -> Any:
        _, _, files = self.found(kind, owner, name, revision)
        start = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path.removeprefix(start) for path in files if path.startswith(start)}
        folders = {str(above) for path in inside for above in list(Path(path).parents)[:-1]}
        entries = [_entry(start + path, files[start + path]) for path in sorted(inside)]
        directory = {"type": "directory", "oid": "0" * 40, "size": 0}
        entries += [directory | {"path": start + each} for each in sorted(folders)]
        deep = request.args.get("recursive", "").lower() == "true"
        return [each for each in entries if deep or "/" not in each["path"].removeprefix(start)]

    def paths(self, kind: str, owner: str, name: str, revision: str) -> Any:
        _, _, files = self.found(kind, owner, name, revision)
        wanted = request.get_json()["paths"] if request.is_json else request.form.getlist("paths")
        return [_entry(path, files[path]) for path in wanted if path in files]

    def file(
        self, owner: str, name: str, revision: str, path: str, kind: str = "models"
    ) -> Response:
        leads_on = _is_large(path) and request.host != self.storage
        asked = None if leads_on or request.method == "HEAD" else path
        repo, commit, files = self.found(kind, owner, name, revision, asked)
        if path not in files:
            raise _refusal(404, "EntryNotFound")
        content = files[path]
        digest = _digest("sha256" if _is_large(path) else "sha1", content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if leads_on:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            place = f"http://{self.storage}/{kind}/{owner}/{name}/resolve/{commit}/{quote(path)}"
            return Response(b"", 302, headers | {"Location": f"{place}?X-Signature=secret"})
        if path in repo.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        content = content[:-1] if path in repo.short else content
        headers["Content-Length"] = str(len(content))
        return Response(_sent(content, path in repo.hang), 200, headers, mimetype="any/thing")

    def create(self) -> Any:
        asked = request.get_json()
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given or given != self.writer:
            raise _refusal(401)
        answer = {"url": f"{request.host_url}{name}", "error": "You already created this repo"}
        if ("model", name) in self.repos:
            return answer, 409
        private = asked.get("visibility") == "private"
        self.repos["model", name] = Repo(name, {}, private=private, token=given)
        return answer

    def write(self, kind: str, owner: str, name: str, what: str, **_: str) -> Any:
        repo, _, files = self.found(kind, owner, name, "main")  # type: ignore[assignment]
        if what == "tag":
            repo.tags = {**repo.tags, request.get_json()["tag"]: repo.files}
            return {}
        if what == "preupload":
            asked = [each["path"] for each in request.get_json()["files"]]
            said = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [said | {"path": path} for path in asked]}
        lines = map(json.loads, request.get_data().splitlines())
        added = [line["value"] for line in lines if line["key"] == "file"]
        given = {each["path"]: base64.b64decode(each["content"]) for each in added}
        repo.files = {**files, **given}  # type: ignore[dict-item]
        commit, _ = repo.snapshots()["main"]  # type: ignore[assignment]
        page = f"{request.host_url}{repo.name}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": page}


def _sent(content: Content, hang: bool) -> Iterator[bytes]:
    for start in range(0, len(content) // 2 if hang else len(content), 2**20):
        yield bytes(content[start : start + 2**20])
    if hang:
        threading.Event().wait(60)


def _refusal(status: int, code: str | None = None) -> HTTPException:
    headers = {"X-Error-Message": f"Status {status}", **({"X-Error-Code": code} if code else {})}
    return HTTPException(response=Response('{"error": "refused"}', status, headers))


def _contents(files: Files) -> Mapping[str, Content]:
    if not isinstance(files, Path):
        return dict(files)
    there = {path.relative_to(files).as_posix(): path for path in files.rglob("*")}
    names = sorted(name for name, path in there.items() if path.is_file())
    return {name: _mapped(there[name]) for name in names if name != "SOURCE.json"}


@lru_cache(maxsize=512)  # once, so that its digests are known by it
def _mapped(path: Path) -> Content:
    with path.open("rb") as stream:
        if not path.stat().st_size:
            return b""
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


@lru_cache(maxsize=512)  # large files are asked about often
def _digest(kind: str, content: Content) -> str:
    """Of a large file the sha256, of others the id of their git blob."""
    digest = hashlib.new(kind, b"blob %d\0" % len(content) if kind == "sha1" else b"")
    digest.update(content)
    return digest.hexdigest()


def _is_large(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in LFS)


def _entry(path: str, content: Content) -> dict[str, Any]:
    """A file as ``/tree`` and repository information describe it."""
    digest, size = _digest("sha1", content), len(content)
    entry = {"type": "file", "path": path, "size": size, "oid": digest}
    entry |= {"rfilename": path, "blobId": digest}
    if _is_large(path):
        sha256 = _digest("sha256", content)
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}
    return entry
