"""A real local HTTP server that speaks as much of the Hugging Face Hub's API as downloads need, and
as an upload without Xet needs.

``with serve([Repo("owner/name", files={...})]) as url:`` answers the real client, for instance by
``HF_ENDPOINT=url``: repository information with sizes and digests, trees in pages, ``resolve`` with
ETag and commit, and, as the Hub does it, large files by a redirect to another address, with Range
requests. ``Repo.failure`` and its neighbours switch failures on; ``Repo.requests`` says what was
asked. Whoever has the token ``writer`` may create repositories; a commit replaces ``Repo.files``.
Nothing leaves the machine.
"""

import base64
import fnmatch
import hashlib
import io
import json
import math
import mmap
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

from stages.params.params import Params
from stages.sources.hub import HubSource

TASKS = Path(__file__).parent.parent / "tasks" / "published"
Content = bytes | mmap.mmap  # of a folder, mapped: a model of 9 GB is never held in memory
Files = Mapping[str, bytes] | Path
LFS = ("*.parquet", "*.safetensors", "*.bin", "*.pt", "*.png", "*.jpg", "tokenizer.json")
PAGE_SIZE = 1000  # entries of a tree page, as the Hub's


@dataclass(frozen=True)
class Request:
    """One request that a repository answered. ``file`` is None unless a file's bytes were asked."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    file: str | None = None
    redirected: bool = False  # asked at the address to which ``resolve`` leads


@dataclass
class Repo:
    """A repository: ``files`` is the head of ``main``; ``tags`` are older states under a tag.

    ``commit`` is main's commit (else made from the content). Failures: ``status`` answers
    everything with that HTTP status; ``private`` and ``gated`` want ``token``, for everything or
    for files only; ``wrong`` files are served with their last byte changed; ``cut`` files break
    off, once, before that byte (with a TCP reset if ``reset``, which may lose what is under way);
    ``hang`` files stop there, once, and keep the connection open;
    ``short`` files lack their last byte;
    ``gone`` files are listed but answer 404; ``stall`` waits that many seconds before every answer;
    ``rate`` is how many bytes a second one connection gets; the first ``busy`` requests are told to
    come again after ``retry_after`` seconds.
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
    cut: dict[str, int] = field(default_factory=dict)
    reset: bool = False
    hang: dict[str, int] = field(default_factory=dict)
    gone: Sequence[str] = ()
    short: Sequence[str] = ()
    stall: float = 0.0
    rate: float = 0.0
    busy: int = 0
    retry_after: int = 0
    requests: list[Request] = field(default_factory=list)

    def downloads(self, file: str | None = None) -> list[Request]:
        """The requests that asked for bytes (of one file), not those that were redirected."""
        return [
            request
            for request in self.requests
            if request.method == "GET" and request.file and file in (None, request.file)
        ]

    def snapshots(self) -> dict[str, tuple[str, Mapping[str, Content]]]:
        """Every revision that can be asked for: name or commit -> (commit, files)."""
        head = _contents(self.files)
        commit = self.commit or _commit(self.name, head)
        found = {"main": (commit, head), commit: (commit, head)}
        for tag, files in self.tags.items():
            older = _contents(files)
            found[tag] = found[_commit(self.name, older)] = (_commit(self.name, older), older)
        return found


Answer = tuple[int, Mapping[str, str], bytes]


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], Answer]) -> Iterator[str]:
    """A server that gives each request to ``answer``."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(
    repos: Iterable[Repo],
    writer: str | None = None,
    made: dict[tuple[str, str], Repo] | None = None,
) -> Iterator[str]:
    """Serve the repositories on a free local port; yields the base address, for ``HF_ENDPOINT``.

    ``made``: repositories that are created are put there too, by type and name.
    """
    hub = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    storage = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)  # another origin, as the Hub's is
    threads = []
    for server in (hub, storage):
        server.daemon_threads = True
        known = {} if made is None else made
        known |= {(repo.type, repo.name): repo for repo in repos}
        server.repos = known  # type: ignore[attr-defined]
        server.writer, server.uploaded = writer, {}  # type: ignore[attr-defined]
        server.storage = _address(storage)  # type: ignore[attr-defined]
        threads.append(threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True))
        threads[-1].start()
    try:
        yield _address(hub)
    finally:
        for server, thread in zip((hub, storage), threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def closed_port() -> str:
    """An address on this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# --------------------------------------------------------------------------------------------------
# Repositories to serve

COLUMNS = (
    *("ds_name", "image", "question", "chosen", "rejected"),
    *("origin_dataset", "origin_split", "idx", "image_path"),
)


def topic_overwrite_rows(count: int) -> list[dict[str, Any]]:
    """Rows with topic-overwrite's nine columns; ``image`` is an encoded JPEG.

    Two rows share each image, as there. The rejected answer overwrites one topic of the chosen one.
    """
    from PIL import Image, ImageDraw

    colours = ["red", "green", "blue", "yellow", "black", "orange"]
    shapes = ["circle", "square"]
    rows = []
    for i in range(count):
        picture = i // 2
        colour, shape = colours[picture % 6], shapes[picture // 6 % 2]
        width, height = 96 + 8 * (picture % 5), 96 + picture // 5
        image = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(image)
        box = (16, 16, 72, 72)
        draw.ellipse(box, colour) if shape == "circle" else draw.rectangle(box, colour)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        other = colours[(picture + 1 + i % 2) % 6]
        questions = ["What do you see in the picture?", f"What colour is the {shape}?"]
        rows.append(
            {
                "ds_name": "TPO-Dataset",
                "image": stream.getvalue(),
                "question": questions[i % 2],
                "chosen": f"There is a {colour} {shape} on a white ground.",
                "rejected": f"There is a {other} {shape} on a white ground.",
                "origin_dataset": ["LCS-558K", "VQAv2", "OK-VQA"][i % 3],
                "origin_split": '{"split": "train"}',
                "idx": str(i),
                "image_path": f"images/{picture:06d}.jpg",
            }
        )
    return rows


def topic_overwrite_repo(
    rows: int | Sequence[Mapping[str, Any]],
    shards: int = 2,
    image_as: Literal["struct", "bytes"] = "struct",
    **options: Any,
) -> Repo:
    """A data set laid out as ``helehan/topic-overwrite``: a card and shards named by their length.

    ``rows`` is their number (see ``topic_overwrite_rows``) or the rows themselves. ``image_as``
    says whether the image column is a struct of bytes and path, as the card has it, or plain bytes.
    ``options`` go to ``Repo``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = topic_overwrite_rows(rows) if isinstance(rows, int) else list(rows)
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {name: pa.string() for name in COLUMNS}
    types["image"] = struct_type if image_as == "struct" else pa.binary()
    size = -(-len(rows) // shards)
    card = "---\nlicense: cc-by-nc-4.0\n---\n# Topic-level overwriting\n"
    files = {"README.md": card.encode(), ".gitattributes": b"*.parquet filter=lfs\n"}
    for shard in range(shards):
        part = [dict(row) for row in rows[shard * size : (shard + 1) * size]]
        if image_as == "struct":
            for row in part:
                row["image"] = {"bytes": row["image"], "path": row["image_path"]}
        table = pa.Table.from_pylist(part, schema=pa.schema(list(types.items())))
        stream = io.BytesIO()
        pq.write_table(table, stream)
        files[f"TPO-Dataset_{shard:03d}-{len(part)}.parquet"] = stream.getvalue()
    options = {"type": "dataset", "licence": "cc-by-nc-4.0", **options}
    return Repo(options.pop("name", "helehan/topic-overwrite"), files, **options)


POPE_COLUMNS = ("id", "question_id", "question", "answer", "image_source", "image", "category")
POPE_CARD = """---
configs:
- config_name: Full
  data_files:
  - split: adversarial
    path: Full/adversarial-*
  - split: popular
    path: Full/popular-*
  - split: random
    path: Full/random-*
---
"""


def pope_rows(category: str, images: int = 3) -> list[dict[str, Any]]:
    """POPE's questions of one setting: six of each image in a row, a yes and a no in turn."""
    from PIL import Image

    rows = []
    for i in range(6 * images):
        stream = io.BytesIO()
        Image.new("RGB", (64 + 8 * (i // 6), 48), (40 * (i // 6), 90, 150)).save(stream, "JPEG")
        rows.append(
            {
                "id": str(i),
                "question_id": str(i + 1),
                "question": f"Is there a {category} object {i % 6} in the image?",
                "answer": ("yes", "no")[i % 2],
                "image_source": f"COCO_val2014_{i // 6:012d}",
                "image": {"bytes": stream.getvalue(), "path": None},
                "category": category,
            }
        )
    return rows


def pope_repo(images: int = 3, **options: Any) -> Repo:
    """A data set laid out as ``lmms-lab/POPE``: a card that names splits, and a shard for each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {name: pa.string() for name in POPE_COLUMNS} | {"image": struct_type}
    features = {name: {"dtype": "string", "_type": "Value"} for name in POPE_COLUMNS}
    features["image"] = {"_type": "Image"}
    schema = pa.schema(
        list(types.items()), {"huggingface": json.dumps({"info": {"features": features}})}
    )
    files = {"README.md": POPE_CARD.encode()}
    for category in ("adversarial", "popular", "random"):
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(pope_rows(category, images), schema=schema), stream)
        files[f"Full/{category}-00000-of-00001.parquet"] = stream.getvalue()
    options = {"name": "lmms-lab/POPE", "type": "dataset", "licence": None, **options}
    return Repo(options.pop("name"), files, **options)


def preset_repos(p: Params, model: Path, rows: int | Sequence[Mapping[str, Any]]) -> list[Repo]:
    """What a preset of the 4B model fetches, at the commits that it pins: ``rows`` laid out as
    topic-overwrite, the model in a folder, and POPE.
    """
    pope = (TASKS / "pope" / "_pope_yaml").read_text()
    pinned = re.search(r"revision: (\w{40})", pope)
    assert pinned
    assert isinstance(p.data.source, HubSource)
    assert isinstance(p.model.source, HubSource)
    return [
        topic_overwrite_repo(
            rows, shards=3, name=p.data.source.repo, commit=p.data.source.revision
        ),
        Repo(p.model.source.repo, model, commit=p.model.source.revision),
        pope_repo(commit=pinned[1]),
    ]


def model_files(weights: int = 64, shards: int = 1) -> dict[str, bytes]:
    """The files of a model repository, complete as far as fetching looks at them; each safetensors
    holds ``weights`` bytes besides the few tensors that are looked for.

    To load a model, give ``Repo`` the folder of a real one.
    """
    config = json.loads((DEMO / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 1, "hidden_size": 2}
    config["vision_config"] |= {"depth": 1}
    tokenizer = (DEMO / "tokenizer.json").read_bytes()
    model = json.loads(tokenizer)["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    added = {
        str(token["id"]): {"content": token["content"], "special": True}
        for token in json.loads(tokenizer)["added_tokens"]
    }
    files = {
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": added}).encode(),
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges]).encode(),
        "chat_template.jinja": b"{{ messages }}",
        "preprocessor_config.json": b"{}",
        "video_preprocessor_config.json": b"{}",
    }
    names = ["model.safetensors"]
    tensors = [TENSORS]
    if shards > 1:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        tensors += [{} for _ in range(shards - 1)]
        where = {f"w{i}": name for i, name in enumerate(names)} | dict.fromkeys(TENSORS, names[0])
        index = {"metadata": {}, "weight_map": where}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    for i, (name, looked_for) in enumerate(zip(names, tensors, strict=True)):
        files[name] = safetensors_bytes(f"w{i}", weights, looked_for)
    return files


DEMO = Path(__file__).parent.parent / "demo" / "model"
TENSORS = {
    "model.language_model.embed_tokens.weight": [369, 2],
    "model.language_model.layers.0.mlp.weight": [1],
    "model.visual.blocks.0.mlp.weight": [1],
    "model.visual.patch_embed.proj.weight": [1],
}


def safetensors_bytes(tensor: str, size: int, ones: Mapping[str, list[int]] | None = None) -> bytes:
    """A safetensors file with one tensor of ``size`` bytes (dtype U8), different for each name, and
    others of ones (dtype F32), by their shapes.
    """
    entries = {tensor: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    end = size
    for name, shape in (ones or {}).items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    pattern = hashlib.sha256(tensor.encode()).digest()
    content = (pattern * (size // 32 + 1))[:size] + struct.pack("<f", 1.0) * ((end - size) // 4)
    return struct.pack("<Q", len(header)) + header + content


# --------------------------------------------------------------------------------------------------
# The server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        path = address.path
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._lfs_batch(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/uploads/(\w+)", path):
            self.server.uploaded[match[1]] = body  # type: ignore[attr-defined]
            self._send(200, b"", {})
        elif match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(.*))?", path):
            self._api(match[1], match[2], match[3] or "", query, body)
        elif match := re.fullmatch(r"/storage/(model|dataset)/([^/]+/[^/]+)/(\w+)/(.+)", path):
            self._file(match[1], match[2], match[3], unquote(match[4]), redirected=True)
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "dataset" if match[1] else "model"
            self._file(kind, match[2], unquote(match[3]), unquote(match[4]))
        else:
            self._error(404, "EntryNotFound", "Not here")

    def _find(self, kind: str, name: str, request: Request, files: bool) -> Repo | None:
        """The repository, unless it is refused: the refusal is then sent, as the Hub words it."""
        repo: Repo | None = self.server.repos.get((kind, name))  # type: ignore[attr-defined]
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is None:
            # Without a token the Hub does not tell "there is none" from "not for you".
            self._error(404 if given else 401, "RepoNotFound", "Repository not found")
            return None
        repo.requests.append(request)
        if repo.stall:
            threading.Event().wait(repo.stall)
        if repo.busy:
            repo.busy -= 1
            self._error(429, None, "Too many requests", {"Retry-After": str(repo.retry_after)})
        elif repo.status:
            self._error(repo.status, None, f"Status {repo.status}")
        elif given and given != repo.token and not request.redirected:
            self._error(401, None, "Invalid credentials in Authorization header")
        elif repo.private and not given:
            self._error(401, "RepoNotFound", "Repository not found")
        elif repo.gated and files and not given and not request.redirected:
            self._error(401, "GatedRepo", f"Access to {kind} {name} is restricted")
        else:
            return repo
        return None

    def _request(self, file: str | None = None, redirected: bool = False) -> Request:
        headers = {key.lower(): value for key, value in self.headers.items()}
        return Request(self.command, self.path, headers, file, redirected)

    def _api(
        self, kind: str, name: str, rest: str, query: dict[str, list[str]], body: bytes
    ) -> None:
        repo = self._find(kind, name, self._request(), files=False)
        if repo is None:
            return
        what, _, rest = rest.partition("/")
        if what in ("preupload", "commit", "tag") and self.command == "POST":
            self._write(repo, what, body)
            return
        revision, _, folder = rest.partition("/")
        found = repo.snapshots().get(unquote(revision) or "main")
        if what not in ("", "revision", "tree", "paths-info"):
            self._error(404, None, "Not here")
        elif found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        elif what == "tree":
            self._tree(found[1], unquote(folder), query)
        elif what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                wanted = json.loads(body)["paths"]
            self._json([_entry(path, found[1][path]) for path in wanted if path in found[1]])
        else:
            commit, files = found
            siblings = [_sibling(path, files[path], "blobs" in query) for path in sorted(files)]
            card = {"license": repo.licence} if repo.licence else {}
            self._json(
                {
                    "_id": "0",
                    "id": name,
                    "sha": commit,
                    "private": repo.private,
                    "gated": "auto" if repo.gated else False,
                    "tags": [f"license:{repo.licence}"] if repo.licence else [],
                    "cardData": card,
                    "siblings": siblings,
                }
            )

    def _create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not given or given != self.server.writer:  # type: ignore[attr-defined]
            self._error(401, None, "Invalid username or password.")
        elif ("model", name) in self.server.repos:  # type: ignore[attr-defined]
            url = f"http://{self.headers['Host']}/{name}"
            told = {"error": "You already created this model repo", "url": url}
            self._send(409, json.dumps(told).encode(), {})
        else:
            repo = Repo(name, {}, private=asked.get("visibility") == "private", token=given)
            self.server.repos["model", name] = repo  # type: ignore[attr-defined]
            self._json({"url": f"http://{self.headers['Host']}/{name}"})

    def _lfs_batch(self, objects: list[dict[str, Any]]) -> None:
        place = f"http://{self.headers['Host']}/uploads/"
        self._json(
            {
                "transfer": "basic",
                "objects": [
                    {**each, "actions": {"upload": {"href": place + each["oid"], "header": {}}}}
                    for each in objects
                ],
            }
        )

    def _write(self, repo: Repo, what: str, body: bytes) -> None:
        if what == "tag":
            repo.tags = {**repo.tags, json.loads(body)["tag"]: repo.files}
            self._json({})
        elif what == "preupload":
            modes = {
                one["path"]: any(fnmatch.fnmatch(one["path"], pattern) for pattern in LFS)
                for one in json.loads(body)["files"]
            }
            files = [
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                for path, large in modes.items()
            ]
            self._json({"files": files})
        else:
            content = dict(_contents(repo.files))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    content[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    uploaded = self.server.uploaded  # type: ignore[attr-defined]
                    content[value["path"]] = uploaded[value["oid"]]
            repo.files = content  # type: ignore[assignment]
            commit, _ = repo.snapshots()["main"]
            page = f"http://{self.headers['Host']}/{repo.name}/commit/{commit}"
            self._json({"success": True, "commitOid": commit, "commitUrl": page})

    def _tree(self, files: Mapping[str, Content], folder: str, query: dict[str, list[str]]) -> None:
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(files):
            if not path.startswith(prefix):
                continue
            below = path.removeprefix(prefix).split("/")
            for depth in range(1, len(below)):
                name = prefix + "/".join(below[:depth])
                if recursive or depth == 1:
                    entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if recursive or len(below) == 1:
                entries[path] = _entry(path, files[path])
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE_SIZE < len(entries):
            base = f"http://{self.headers['Host']}{urlsplit(self.path).path}"
            query_ = f"recursive={recursive}&cursor={start + PAGE_SIZE}"
            headers["Link"] = f'<{base}?{query_}>; rel="next"'
        self._json(list(entries.values())[start : start + PAGE_SIZE], headers)

    def _file(
        self, kind: str, name: str, revision: str, path: str, redirected: bool = False
    ) -> None:
        large = any(fnmatch.fnmatch(path, pattern) for pattern in LFS)
        served = redirected or not large  # else this request only leads to the storage
        request = self._request(path if served else None, redirected)
        repo = self._find(kind, name, request, files=True)
        if repo is None:
            return
        found = repo.snapshots().get(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit, files = found
        if path not in files or path in repo.gone:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if large:
            headers["ETag"] = f'"{_sha256(content)}"'
            if not redirected:
                headers["X-Linked-Etag"] = headers["ETag"]
                headers["X-Linked-Size"] = str(len(content))
                place = f"/storage/{kind}/{name}/{commit}/{quote(path)}?X-Signature=secret"
                headers["Location"] = self.server.storage + place  # type: ignore[attr-defined]
                self._send(302, b"", headers)
                return
        if path in repo.wrong and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if path in repo.short:
            content = content[:-1]
        status, start = 200, 0
        changed = self.headers.get("If-Range") not in (None, headers["ETag"])
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and not changed:
            start, status = int(match[1]), 206
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Accept-Ranges"] = "bytes"
        body = memoryview(content)[start:]  # a slice of bytes or of a map would be a copy
        broken = repo.hang if path in repo.hang else repo.cut
        cut = None
        if self.command == "GET" and path in broken:
            cut = broken.pop(path) - start
        if cut is not None and repo.reset:
            linger = struct.pack("ii", 1, 0)  # on, 0 seconds: closing sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if repo.rate and self.command == "GET":
            self._send_slowly(status, body, headers, repo.rate)
            return
        self._send(status, body, headers, "application/octet-stream", cut, broken is repo.hang)

    def _send_slowly(
        self, status: int, body: memoryview, headers: Mapping[str, str], rate: float
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        start, step = time.monotonic(), 2**20
        with suppress(OSError):  # the client may leave at any time
            for sent in range(0, len(body), step):
                self.wfile.write(body[sent : sent + step])
                time.sleep(max(0, start + (sent + step) / rate - time.monotonic()))

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), headers or {})

    def _error(
        self, status: int, code: str | None, message: str, more: Mapping[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), {**headers, **(more or {})})

    def _send(
        self,
        status: int,
        body: bytes | memoryview,
        headers: Mapping[str, str],
        kind: str = "application/json",
        cut: int | None = None,
        hang: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):  # the client may leave at any time
                self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True
        if cut is not None and self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER):
            with suppress(OSError):
                self.connection.close()
        elif cut is not None and hang:
            self.connection.settimeout(60)
            with suppress(OSError):
                self.rfile.read(1)  # returns when the client has left


def _address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def _contents(files: Files) -> Mapping[str, Content]:
    if isinstance(files, Path):
        return {
            path.relative_to(files).as_posix(): _mapped(path)
            for path in sorted(files.rglob("*"))
            if path.is_file() and path.name != "SOURCE.json"
        }
    return dict(files)


@lru_cache(maxsize=512)  # once, so that its digests are known by it
def _mapped(path: Path) -> Content:
    with path.open("rb") as stream:
        if not path.stat().st_size:
            return b""
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _commit(name: str, files: Mapping[str, Content]) -> str:
    listing = "".join(f"{path} {_blob_id(files[path])}\n" for path in sorted(files))
    return hashlib.sha1(f"{name}\n{listing}".encode()).hexdigest()


@lru_cache(maxsize=512)  # large files are asked about often
def _sha256(content: Content) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=512)
def _blob_id(content: Content) -> str:
    digest = hashlib.sha1(b"blob %d\0" % len(content))
    digest.update(content)
    return digest.hexdigest()


def _lfs(path: str, content: Content) -> str | None:
    if any(fnmatch.fnmatch(path, pattern) for pattern in LFS):
        return _sha256(content)
    return None


def _entry(path: str, content: Content) -> dict[str, Any]:
    """A file as ``/tree`` describes it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if sha256 := _lfs(path, content):
        return entry | {"lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
    return entry


def _sibling(path: str, content: Content, described: bool) -> dict[str, Any]:
    """A file as repository information lists it; with ``?blobs=true`` its size and digests."""
    if not described:
        return {"rfilename": path}
    sibling = {"rfilename": path, "size": len(content), "blobId": _blob_id(content)}
    if sha256 := _lfs(path, content):
        return sibling | {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130}}
    return sibling
