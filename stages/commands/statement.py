"""The certificate: an in-toto statement that these results came from those sources.

The predicate is SLSA's provenance (https://slsa.dev/spec/v1.0/provenance): what was run
(``dvc repro``, its stages and parameters) on what (data and base model at their revisions, code,
requirements, the commit), by content. The subjects are what training, evaluation and report made.
It follows from dvc.lock, the files it names and the history alone, so whoever has the same makes
the same bytes, and checking a certificate is making it again. SHA-256 throughout; a folder of
inputs has in-toto's ``dirHash`` (Go's h1), since it may hold 20,000 images.
"""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.commands import lockfile
from stages.commands.lockfile import Content, Ran
from stages.core.errors import UserError
from stages.sources.kinds import KINDS
from stages.sources.source import FETCHED as MANIFEST
from stages.tracking.tags import git

CERTIFICATE = Path("reports/certificate.json")
PRODUCTS = ("train", "evaluate", "report")  # stages whose outputs are what is certified
SOURCES = ("dvc.lock", "dvc.yaml", "params.yaml", "requirements.txt")
ABSENT = "missing"

Json = dict[str, Any]


def make(root: Path = Path()) -> Json:
    """The statement of what lies in ``root``. A file that is not there has the digest ``missing``.

    Raises:
        UserError: dvc.lock is missing, or lacks a stage of ``PRODUCTS``.
    """
    stages = lockfile.read(root / lockfile.LOCK)
    if lacking := [name for name in PRODUCTS if name not in stages]:
        raise UserError(f"dvc.lock has no stage {lacking[0]}; `dvc repro` runs it")
    products = {out for name in PRODUCTS for out in stages[name].outs}
    inputs = {out: c for out, c in lockfile.outputs(stages).items() if out not in products}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [described(root, path) for out in sorted(products) for path in files(root, out)],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://dvc.org/doc/user-guide/project-structure/dvcyaml-files",
                "externalParameters": YAML(typ="safe").load(
                    (root / "params.yaml").read_text(encoding="utf-8")
                ),
                "internalParameters": {name: ran.cmd for name, ran in stages.items()},
                "resolvedDependencies": [
                    commit_of(root),
                    *(described(root, path) for path in sources(root, stages)),
                    *(folder(root, path, content) for path, content in sorted(inputs.items())),
                ],
            },
            "runDetails": {"builder": {"id": "https://dvc.org/doc/command-reference/repro"}},
        },
    }


def write(path: Path, statement: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(statement, indent=1, ensure_ascii=False, sort_keys=False)
    path.write_text(text + "\n", encoding="utf-8")


def require_current(root: Path = Path()) -> None:
    """Raise ``UserError`` if what lies in ``root`` is not what dvc.lock says."""
    words = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    try:
        changed = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"`dvc status` failed: {' '.join(done.stderr.split())[-300:]}") from None
    stages = [name for name in changed if not name.startswith("demo/")]
    if stages:
        raise UserError(
            f"dvc.lock is out of date: {', '.join(stages)} changed since; `dvc repro` first"
        )


def differences(stored: Json, now: Json, root: Path = Path()) -> list[str]:
    """What of a stored statement is not so now, a line each, files by their names."""
    found = []
    for title, place in (("subject", ["subject"]), ("material", DEPENDENCIES)):
        before, after = (_by_name(_at(statement, place)) for statement in (stored, now))
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                found.append(f"{name}: {_change(before.get(name), after.get(name), title)}")
                found += [f"  {line}" for line in culprits(root, name) if name in after]
    rest = [json.loads(json.dumps(statement)) for statement in (stored, now)]
    for statement in rest:
        for place in (["subject"], DEPENDENCIES):
            _at(statement, place[:-1]).pop(place[-1], None)
    found += _apart(*rest)
    return found


DEPENDENCIES = ["predicate", "buildDefinition", "resolvedDependencies"]


def read(path: Path) -> Json:
    """A stored statement.

    Raises:
        UserError: it is missing, or it is none.
    """
    try:
        statement = json.loads(path.read_text(encoding="utf-8"))
        for place in (["subject"], DEPENDENCIES):
            _by_name(_at(statement, place))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `make verify` makes it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: it holds no in-toto statement") from None
    return dict(statement)


# what a statement is made of


def described(root: Path, path: str) -> Json:
    return {"name": path, "digest": {"sha256": sha256(root / path)}}


def folder(root: Path, path: str, content: Content) -> Json:
    """A file or folder of inputs, with where it was published if it was fetched."""
    place = root / path
    if not place.is_dir():
        found = described(root, path)
    else:
        found = {"name": path, "digest": {"dirHash": dir_hash(place)}}
    found["annotations"] = {"md5": content.md5, "bytes": content.size}
    manifest = place / MANIFEST
    if manifest.is_file():
        try:
            source = json.loads(manifest.read_text(encoding="utf-8"))
            if uri := published(source["kind"], source["repo"], source["commit"], path):
                found["uri"] = uri
            found["annotations"] |= {
                key: source[key] for key in ("kind", "repo", "commit", "licence") if source[key]
            }
        except (ValueError, KeyError, TypeError):
            found["annotations"]["kind"] = f"{MANIFEST} is damaged"
    return found


def published(kind: str, repo: str | None, commit: str | None, path: str) -> str | None:
    """The address of what was fetched into ``path``."""
    address = KINDS[kind].address
    if not (address and repo and commit):
        return None
    return address(repo, commit, path.startswith("data/"))


def commit_of(root: Path) -> Json:
    """The last commit that changed a source. Later ones (of this certificate, of a document) don't
    count, so it stays what it is when the certificate itself is committed."""
    commit = git(root, "log", "-1", "--format=%H", "--", *SOURCES, "stages")
    return {"name": "sources", "digest": {"gitCommit": commit or ABSENT}}


def sources(root: Path, stages: Mapping[str, Ran]) -> list[str]:
    """Tracked files that stages depend on, and the pipeline's own."""
    made = lockfile.outputs(stages)
    deps = {dep for ran in stages.values() for dep in ran.deps}
    named = sorted(d for d in deps if not any(Path(d).is_relative_to(out) for out in made))
    tracked = git(root, "ls-files", "--", *named).splitlines() if named else []
    return sorted({*SOURCES, *tracked, *(name for name in named if (root / name).is_file())})


def files(root: Path, path: str) -> Iterator[str]:
    """The files of an output, or its own name."""
    place = root / path
    if not place.is_dir():
        yield path
        return
    for each in sorted(p for p in place.rglob("*") if p.is_file()):
        yield each.relative_to(root).as_posix()


def sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        return ABSENT


def dir_hash(place: Path) -> str:
    """Go's h1 (golang.org/x/mod/sumdb/dirhash): a hash of the list of hashes and names."""
    names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    lines = "".join(f"{sha256(place / name)}  {name}\n" for name in names)
    return "h1:" + base64.b64encode(hashlib.sha256(lines.encode()).digest()).decode()


# what differs


def culprits(root: Path, path: str, most: int = 5) -> list[str]:
    """Files of a folder that are not what dvc.lock says, by DVC's own list of it in the cache;
    nothing where the cache has none."""
    try:
        md5 = lockfile.outputs(lockfile.read(root / lockfile.LOCK))[path].md5
        listing = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        known = {one["relpath"]: one["md5"] for one in json.loads(listing.read_text("utf-8"))}
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return []
    here = {
        p.relative_to(root / path).as_posix(): p for p in (root / path).rglob("*") if p.is_file()
    }
    off = [name for name in here if name not in known]
    off += [
        name
        for name, digest in known.items()
        if name not in here or hashlib.md5(here[name].read_bytes()).hexdigest() != digest
    ]
    return [f"{path}/{name}" for name in sorted(off)[:most]]


def _change(before: Json | None, after: Json | None, title: str) -> str:
    if before is None:
        return f"the certificate has no such {title}"
    if after is None or ABSENT in after["digest"].values():
        return "it is missing"
    if before["digest"] != after["digest"]:
        return "other content"
    return "other words about it, " + ", ".join(_apart(before, after))


def _by_name(entries: list[Json]) -> dict[str, Json]:
    return {str(entry["name"]): {"digest": {}, **entry} for entry in entries}


def _at(statement: Json, place: list[str]) -> Any:
    for key in place:
        statement = statement[key]
    return statement


def _apart(before: Any, after: Any, at: str = "") -> list[str]:
    """Where two JSON values differ: dotted keys, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in sorted(before.keys() | after.keys())
            for line in _apart(before.get(key), after.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if before == after else [f"{at} is {after!r}, in the certificate {before!r}"]
