"""Sources: where data sets and base models come from, and the folder that a fetched one becomes.

Three kinds. ``hub``: a repository on the Hugging Face Hub at one commit. ``path``: a local file or
folder. ``easy-vqa``: the data set that the PyPI package of that name ships. Each ends as a folder
that holds what upstream published, plus ``SOURCE.json``, which is written last: where it stands,
the folder is complete.
"""

import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.utils import tqdm

from stages.core.errors import UserError
from stages.sources import hub

MANIFEST = "SOURCE.json"
PARTIAL = ".partial"  # unfinished downloads, named by digest: never resumed into other content

TABLES = frozenset({".parquet", ".json", ".jsonl"})
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# Formats that can run code when loaded. Names decide, because nothing is loaded to find out.
PICKLES = frozenset(
    {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".keras"}
    | {".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
)
CODE = frozenset(
    {".bat", ".dll", ".dylib", ".exe", ".jar", ".ps1", ".py", ".pyc", ".pyd", ".sh", ".so"}
)

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # all that a base model needs
MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses a longer header too


@dataclass(frozen=True)
class File:
    """One fetched file: path relative to the folder (POSIX), size in bytes, sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """What ``SOURCE.json`` says. Unknown facts are ``None``; no time, host or absolute path."""

    kind: str
    repo: str | None
    revision: str | None  # as asked: a branch, a tag or a commit
    commit: str | None  # what that was, or a package's version
    licence: str | None
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


# --------------------------------------------------------------------------------------------------
# The three kinds


def fetch_hub(
    repo: str,
    revision: str,
    files: Sequence[str],
    out: Path,
    *,
    repo_type: hub.RepoType,
    allow_pickle: bool = False,
    allow_code: bool = False,
    endpoint: str | None = None,
) -> Source:
    """Bring the files of a Hub repository that match any pattern of ``files`` into ``out``.

    ``revision`` is a branch, a tag or a commit; it is resolved once and everything is taken at that
    commit. Patterns are the Hub's own (``fnmatch`` over the whole path). Files that are right
    already, in ``out`` or in the Hugging Face cache, are not downloaded again, and a partial file
    is resumed. ``HF_ENDPOINT`` (unless ``endpoint`` is given), ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and
    ``HF_HUB_DOWNLOAD_TIMEOUT`` hold.

    Raises:
        UserError: no access, no such repository, revision or file, no network, wrong content, no
            room, or a model that later stages can't use.
    """
    repository = hub.look_up(repo, revision, repo_type, endpoint)
    wanted = _select(repository, files, allow_pickle=allow_pickle, allow_code=allow_code)
    names = [file.path for file in wanted]
    if repo_type == "model":
        there = [file.path for file in repository.files]
        _check_weights_exist(repo, names, there, allow_pickle)
    elif not any(_suffix(name) in TABLES for name in names):
        raise UserError(
            f"{repo}: none of the files that match {', '.join(files)} is a parquet, JSON or JSONL "
            "table; name some in data.source.files"
        )
    _begin(out)
    # Weights last: a model that can't be used is refused before gigabytes of them have arrived.
    wanted.sort(key=lambda file: (_is_weights(file.path), file.path))
    missing = [file for file in wanted if not hub.is_right(out / file.path, file)]
    arrived = sum(hub.size_of(out / PARTIAL / file.digest) for file in missing)
    _check_room(out, sum(file.size for file in missing) - arrived, what=repo)
    with tqdm(total=sum(file.size for file in wanted), unit="B", unit_scale=True, desc=repo) as bar:
        for file in wanted:
            if repo_type == "model" and _is_weights(file.path):
                check_model(out, names, name=repo, allow_pickle=allow_pickle)
            if file in missing:
                hub.download(repository, file, out / PARTIAL / file.digest, bar)
                _place(out, file.path, (out / PARTIAL / file.digest).replace)
            else:
                bar.update(file.size)
    if repo_type == "model":
        check_weights(out, names, name=repo)
    described = tuple(
        File(file.path, file.size, file.digest if file.lfs else hub.sha256_of(out / file.path))
        for file in wanted
    )
    return _finish(
        out, Source("hub", repo, revision, repository.commit, repository.licence, described)
    )


def _select(
    repository: hub.Repository, patterns: Sequence[str], *, allow_pickle: bool, allow_code: bool
) -> list[hub.Announced]:
    """The files that match a pattern and may be fetched."""
    name, files = repository.name, repository.files
    matching = [file for file in files if file.path != MANIFEST and _matches(file.path, patterns)]
    if not matching:
        there = ", ".join(file.path for file in files[:5]) or "nothing"
        raise UserError(
            f"{name}: no file matches {', '.join(patterns)}; the repository holds {there}"
            + (f" and {len(files) - 5} more (see {repository.page})" if len(files) > 5 else "")
        )
    for file in matching:
        _refuse_outside(file.path, name)
    safe = [
        file
        for file in matching
        if _permitted(file.path, allow_pickle=allow_pickle, allow_code=allow_code)
    ]
    left_out = sorted({file.path for file in matching} - {file.path for file in safe})
    if left_out:
        print(f"{name}: left out, because they can run code when loaded: {', '.join(left_out)}")
    return safe


def copy_data(path: Path, out: Path, licence: str | None = None) -> Source:
    """Copy a local table, or a local folder's tables, and the images beside them, into ``out``.

    Of a folder: all parquet, JSON and JSONL files, and all images if there is JSON. Of a single
    JSON or JSONL file: the images that it names, by paths relative to it, inside its folder.
    Relative paths stay as they are. Hidden files, pickles and code are not copied.

    Raises:
        UserError: nothing there, nothing usable there, or a link that leads out of the folder.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(
            f"data.source.path: {path} does not exist; name a parquet, JSON or JSONL file, or a "
            "folder"
        )
    if path.is_dir():
        _refuse_nested(path, out)
        root, found = path, _walk(path)
        tables = [name for name in found if _suffix(name) in TABLES]
        with_images = any(_suffix(name) != ".parquet" for name in tables)
        images = [name for name in found if with_images and _suffix(name) in IMAGES]
    else:
        root = path.parent
        tables = [path.name] if _suffix(path.name) in TABLES else []
        images = _images_named_in(path) if _suffix(path.name) in TABLES - {".parquet"} else []
    if not tables:
        packed = _suffix(path.name) in {".zip", ".tar", ".gz", ".tgz", ".7z"}
        raise UserError(
            f"data.source.path: {path} is not and does not hold a parquet, JSON or JSONL file"
            + ("; unpack the archive first" if packed else "")
        )
    return _copy_all(root, tables + images, out, kind="path", licence=licence)


def copy_model(
    path: Path,
    out: Path,
    *,
    files: Sequence[str] = MODEL_FILES,
    allow_pickle: bool = False,
    allow_code: bool = False,
    licence: str | None = None,
) -> Source:
    """Copy a local model folder's own files (no subfolders) that match ``files`` into ``out``.

    Raises:
        UserError: not a folder, or not a model that later stages can use (see ``check_model``).
    """
    path = path.expanduser()
    if not path.is_dir():
        raise UserError(
            f"model.source.path: {path} is not a folder; name the folder that holds config.json"
        )
    _refuse_nested(path, out)
    found = [name for name in _walk(path) if "/" not in name]
    patterns = [
        *files,
        *(("*.bin", "*.pt", "*.pth") if allow_pickle else ()),
        *(("*.py",) if allow_code else ()),
    ]
    names = [
        name
        for name in found
        if _matches(name, patterns)
        and _permitted(name, allow_pickle=allow_pickle, allow_code=allow_code)
    ]
    check_model(path, names, name=str(path), allow_pickle=allow_pickle)
    _check_weights_exist(str(path), names, found, allow_pickle)
    check_weights(path, names, name=str(path))
    return _copy_all(path, names, out, kind="path", licence=licence)


def copy_easy_vqa(out: Path) -> Source:
    """Copy easy-VQA as its installed package ships it: images, questions and answers, unchanged.

    4,000 train and 1,000 test images of 64x64 pixels with 48,248 questions (Zhou, 2019, MIT).

    Raises:
        UserError: the package ``easy-vqa`` is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")  # looked up, not imported: only its data count
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package easy-vqa is not installed; run `pip install -r requirements.txt`"
        )
    root = Path(next(iter(spec.submodule_search_locations))) / "data"
    names = [
        name
        for name in _walk(root)
        if name == "answers.txt" or name.endswith(("/questions.json", ".png"))
    ]
    version = importlib.metadata.version("easy-vqa")
    return _copy_all(
        root, names, out, kind="easy-vqa", repo="easy-vqa", commit=version, licence="MIT"
    )


# --------------------------------------------------------------------------------------------------
# What later stages need of a base model


def check_model(
    folder: Path, names: Sequence[str], *, name: str, allow_pickle: bool = False
) -> None:
    """Refuse a model that later stages could not load; ``names`` are its files, weights included.

    It needs the config.json of a Qwen3-VL conditional generation model, a tokenizer, an image
    processor, and, where there is an index, each of its shards. Weights are looked for by name
    only: in ``folder`` they may not be there yet.

    Raises:
        UserError: naming what is missing, or what the model is instead.
    """
    there = set(names)
    if "config.json" not in there:
        adapter = "adapter_config.json" in there
        raise UserError(
            f"{name}: there is no config.json"
            + (" (it is a LoRA adapter)" if adapter else "")
            + "; name a base model's folder or repository"
        )
    config = _json_object(folder / "config.json", name)
    kind, named = config.get("model_type"), config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "no architecture"
    if kind not in MODEL_TYPES or not architecture.endswith("ForConditionalGeneration"):
        raise UserError(
            f"{name}: config.json describes {architecture} (model_type {kind}), but this pipeline "
            "tunes Qwen3-VL models; set model.source to one, such as Qwen/Qwen3-VL-4B-Instruct"
        )
    vocabulary = "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there
    if not vocabulary or "tokenizer_config.json" not in there:
        raise UserError(
            f"{name}: the tokenizer is missing (tokenizer_config.json with tokenizer.json, or with "
            "vocab.json and merges.txt); add it, or widen model.source.files"
        )
    if "preprocessor_config.json" not in there and not (
        "processor_config.json" in there  # where transformers 5 saves it
        and "image_processor" in _json_object(folder / "processor_config.json", name)
    ):
        raise UserError(
            f"{name}: the image processor is missing (preprocessor_config.json, or "
            "processor_config.json with an image_processor); add it, or widen model.source.files"
        )
    index = "model.safetensors.index.json"
    pickled = allow_pickle and not any(_suffix(path) == ".safetensors" for path in names)
    if index in there and not pickled:
        shards = _json_object(folder / index, name).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{name}: {index} has no weight_map; get it again")
        if absent := sorted(set(map(str, shards.values())) - there):
            raise UserError(
                f"{name}: {index} names {absent[0]}, which is not there; fetch all shards "
                '("*.safetensors" in model.source.files)'
            )


def check_weights(folder: Path, names: Iterable[str], *, name: str) -> None:
    """Refuse a safetensors file that is truncated or something else.

    The file's header says where its last tensor ends (https://huggingface.co/docs/safetensors).

    Raises:
        UserError: naming the file.
    """
    for path in (folder / path for path in names if _suffix(path) == ".safetensors"):
        size = hub.size_of(path)
        _refuse_lfs_pointer(path, f"{name}: {path.name}")
        with path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            try:
                if length > min(size - 8, MAX_HEADER):
                    raise ValueError(length)
                header = json.loads(stream.read(length))
                ends = [header[key]["data_offsets"][1] for key in header if key != "__metadata__"]
            except (ValueError, KeyError, TypeError, IndexError):
                raise UserError(
                    f"{name}: {path.name} is not a whole safetensors file; get it again"
                ) from None
        described = 8 + length + max(ends, default=0)
        if described != size:
            raise UserError(
                f"{name}: {path.name} has {size:,} bytes but its header describes {described:,}; "
                "get it again"
            )


def _check_weights_exist(
    name: str, wanted: Sequence[str], there: Sequence[str], allow_pickle: bool
) -> None:
    """Refuse, by names alone, a model without usable weights."""
    suffixes = {_suffix(path) for path in wanted}
    if ".safetensors" in suffixes or (allow_pickle and suffixes & PICKLES):
        return
    if any(path.endswith(".safetensors") for path in there):
        raise UserError(
            f'{name}: model.source.files leaves out the weights; add "*.safetensors" to it'
        )
    pickled = [path for path in there if _suffix(path) in PICKLES]
    if pickled:
        raise UserError(
            f"{name}: the weights exist only as {pickled[0]}, a pickle, which can run any code "
            "when loaded. Use a revision that has safetensors (the Hub's conversion bot offers "
            "one as refs/pr/N), or set model.trust.pickle: true if you trust its author"
        )
    raise UserError(f"{name}: there are no safetensors weights in it; is it a base model?")


# --------------------------------------------------------------------------------------------------
# Local files


def _refuse_nested(source: Path, out: Path) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"{source} holds {out}, the folder to be filled from it; name a folder beside it"
        )


def _walk(root: Path) -> list[str]:
    """Relative POSIX paths of the visible files under ``root``, sorted; no link may lead out.

    The one exception is a folder of the Hugging Face cache, whose files are links to its ``blobs``.
    """
    real = root.resolve()
    homes = [real]
    if real.parent.name == "snapshots":
        homes += [real.parents[1] / "blobs", real.parents[2] / "blobs"]
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            if (Path(folder) / name).is_symlink():
                raise UserError(
                    f"{Path(folder) / name} is a link to a folder, and only what lies inside "
                    f"{root} is copied; put the folder itself there"
                )
        for name in files:
            path = Path(folder) / name
            if name.startswith(".") or not path.is_file():
                continue
            if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
                raise UserError(
                    f"{path} is a link that leads out of {root}; put the file itself there"
                )
            found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _images_named_in(table: Path) -> list[str]:
    """Images in its folder that a JSON or JSONL table names anywhere, by paths relative to it.

    A name that leads elsewhere, or to nothing, is not copied: preprocess counts that row as one
    without an image.
    """
    root = table.parent.resolve()
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix.lower() == ".json":
            values = [json.loads(text)]
        else:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{table} is not UTF-8 text; save it as UTF-8") from None
    except ValueError as error:
        raise UserError(f"{table} is not valid JSON ({error})") from None
    found = set()
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, str) and len(value) < 1024 and "\0" not in value:
            path = PurePosixPath(value)
            if path.suffix.lower() not in IMAGES or path.is_absolute() or ".." in path.parts:
                continue
            real = (root / path).resolve()
            if real.is_relative_to(root) and real.is_file():
                found.add(path.as_posix())
    return sorted(found)


def _copy_all(
    root: Path,
    names: Iterable[str],
    out: Path,
    *,
    kind: str,
    repo: str | None = None,
    commit: str | None = None,
    licence: str | None = None,
) -> Source:
    """Copy the named files of ``root`` into ``out``, leaving alone those that are there already."""
    names = sorted(set(names) - {MANIFEST})
    _begin(out)
    try:
        files = []
        for name in names:
            _refuse_lfs_pointer(root / name, str(root / name))
            files.append(File(name, hub.size_of(root / name), hub.sha256_of(root / name)))
        missing = [file for file in files if not _is_there(out / file.path, file)]
        _check_room(out, sum(file.size for file in missing), what=str(root))
        quiet = len(missing) < 100
        for file in tqdm(missing, desc=f"copying {kind}", unit="file", disable=quiet):
            _place(out, file.path, partial(shutil.copyfile, root / file.path))
    except OSError as error:
        raise UserError(f"{error.filename or root} can't be copied ({error.strerror})") from None
    return _finish(out, Source(kind, repo, None, commit, licence, tuple(files)))


def _is_there(path: Path, file: File) -> bool:
    return path.is_file() and hub.size_of(path) == file.size and hub.sha256_of(path) == file.sha256


# --------------------------------------------------------------------------------------------------
# The folder that a source becomes


def read(folder: Path) -> Source:
    """The ``SOURCE.json`` of a fetched folder.

    Raises:
        UserError: there is none, so the folder is incomplete or not a fetched one.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = tuple(File(**file) for file in values.pop("files"))
        return Source(**values, files=files)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / MANIFEST} is missing or damaged; fetch the source again"
        ) from None


def _begin(out: Path) -> None:
    """Make ``out`` ready to be filled; a folder with other content is refused, not cleared."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; the source is fetched into a folder of that name")
    ours = (out / MANIFEST).exists() or (out / PARTIAL).exists()
    if out.exists() and any(out.iterdir()) and not ours:
        raise UserError(
            f"{out} holds files that fetch did not put there; move them away or delete the folder"
        )
    try:
        (out / PARTIAL).mkdir(parents=True, exist_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)  # from here on the folder is incomplete
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror})") from None


def _place(out: Path, name: str, bring: Callable[[Path], object]) -> None:
    """Let ``bring`` write a file under a temporary name, then put it at ``out/name`` in one step.

    Never writes into an existing file: with DVC's link types it may be the cache's own.
    """
    target = out / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = out / PARTIAL / "placing"
    bring(temporary)
    os.replace(temporary, target)


def _finish(out: Path, source: Source) -> Source:
    """Clear ``out`` of what the source does not have, and write ``SOURCE.json``."""
    shutil.rmtree(out / PARTIAL)
    keep = {file.path for file in source.files}
    for folder, subfolders, files in os.walk(out, topdown=False):
        for name in files:
            path = Path(folder) / name
            if path.relative_to(out).as_posix() not in keep:
                path.unlink()
        for name in subfolders:
            path = Path(folder) / name
            if path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
    values = {
        "kind": source.kind,
        "repo": source.repo,
        "revision": source.revision,
        "commit": source.commit,
        "licence": source.licence,
    }
    head = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(
        "  " + json.dumps({"path": f.path, "size": f.size, "sha256": f.sha256}, ensure_ascii=False)
        for f in sorted(source.files, key=lambda file: file.path)
    )
    (out / MANIFEST).write_text(f'{head},\n "files": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return source


def _check_room(out: Path, needed: int, *, what: str) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{what} needs {readable(needed)} on the disk of {out} (a cached copy would need as "
            f"much again), but {readable(free)} are free; make room first"
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # As huggingface_hub's allow_patterns: "*" also crosses "/", and "folder/" means all of it.
    return any(fnmatch.fnmatchcase(name, f"{p}*" if p.endswith("/") else p) for p in patterns)


def _permitted(name: str, *, allow_pickle: bool, allow_code: bool) -> bool:
    suffix = _suffix(name)
    return (allow_pickle or suffix not in PICKLES) and (allow_code or suffix not in CODE)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_weights(name: str) -> bool:
    return _suffix(name) in PICKLES | {".safetensors"}


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


def _refuse_lfs_pointer(path: Path, name: str) -> None:
    if hub.size_of(path) < 1024 and path.read_bytes().startswith(
        b"version https://git-lfs.github.com/spec/"
    ):
        raise UserError(
            f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "repository"
        )


def _json_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name}: {path.name} is not a JSON object; copy or download it again")
    return value


def readable(count: int) -> str:
    """``8876543210`` as ``8.9 GB``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
