"""Writes docs/transcripts.md's transcripts: every command of a user, on the demo in a fresh clone.

    python -m benchmarks.transcripts                  # all sessions
    python -m benchmarks.transcripts start release    # these

In: the commit and the edits of this checkout, and DVC's cache with what dvc.lock names. Each
session runs in a clone of its own in a temporary folder, with a local DVC remote, a bare Git
repository as ``origin``, and for ``publish`` the tests' server in place of the Hub. Nothing here
changes but the document. ``settled`` replaces what differs between two runs.
tests/test_transcripts.py runs the sessions that ``HELD`` names again and compares.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.tables import between_markers, rewrite
from tests.hub_server import serve
from tests.repository import ROOT, call, environment
from tests.test_runs import free_port

DOCUMENT = Path("docs/transcripts.md")
TOKEN = "hf_of_a_writer"
PYTHON_OF_ALIAS = """python - <<END
from dvc.api import DVCFileSystem
from mlflow import MlflowClient
version = MlflowClient().get_model_version_by_alias("preference-tuning", "champion")
print(version.version, version.tags["dvc.path"])
files = DVCFileSystem(rev=version.tags["git.commit"])
files.get(version.tags["dvc.path"], "champion", recursive=True)
END"""
ASKED = "data/pairs/images/0c29d6f70a2462f2bfd3d34f7c025cc5.jpg"
CURL = (
    "curl -s http://127.0.0.1:$PORT/v1/chat/completions -H 'Content-Type: application/json' "
    "-d @request.json | python -c 'import json, sys; "
    'print(json.load(sys.stdin)["choices"][0]["message"]["content"])\''
)
REQUEST = (
    'echo \'{"model": "tuned", "messages": [{"role": "user", "content": [{"type": "image_url", '
    '"image_url": {"url": "data:image/jpeg;base64,\'$(base64 < ' + ASKED + " | tr -d '\\n')'\"}}, "
    '{"type": "text", "text": "what is the color of the shape?"}]}]}\' > request.json'
)
READY = "until curl -sf http://127.0.0.1:$PORT/{} > reply; do sleep 1; done"

# A session's blocks, each a few lines of shell.
SESSIONS: dict[str, dict[str, Sequence[str]]] = {
    "start": {
        "pull": ["dvc pull | tail -n 1", "dvc status", "dvc repro | tail -n 1", "dvc push"],
        "costs": ["make costs"],
        "sync": ["make sync"],
        "check-data": ["make check-data"],
        "plan-demo": ["make plan"],
        "verify": ["make verify STAGES=format"],
        "certificate": [
            "python -m stages certificate --write yes",
            "make check-certificate",
            "printf x >> models/adapter/README.md",
            "make check-certificate",
        ],
    },
    "release": {
        "release": ["make release VERSION=v1.0.0", "git push -q origin adapter@v1.0.0"],
        "colleague": [
            "cd .. && mkdir colleague && cd colleague",
            "dvc artifacts get $URL adapter --rev v1.0.0 -o by-name",
            "dvc get $URL models/adapter --rev adapter@v1.0.0 -o by-path",
            "cmp by-name/adapter_model.safetensors by-path/adapter_model.safetensors",
            "sha256sum by-name/adapter_model.safetensors",
            "grep adapter_sha256 ../pipeline/releases/v1.0.0/release.json",
        ],
        "publish": ["make publish REPO=owner/name"],
    },
    "model": {
        "doctor": ["make doctor"],
        "ask": [f"make ask IMAGE={ASKED} QUESTION='does the image not contain a yellow shape?'"],
        "export": ["make export", "ls models/merged"],
        "serve": [
            "make serve MODELS=tuned PORT=$PORT > serve.log 2>&1 &",
            READY.format("v1/models"),
            REQUEST,
            CURL,
            "kill -INT -- -$! && wait",
        ],
    },
    "chat": {
        "chat": [
            "make chat PORT=$PORT > chat.log 2>&1 &",
            READY.format(""),
            "grep -c gradio reply",
            "kill -INT -- -$! && wait",
        ],
    },
    "experiment": {
        "exp-run": ["dvc exp run -n beta-02 -S train.beta=0.2 2>&1 | grep -i 'stage\\|experiment'"],
        "exps": ["make exps"],
        "compare": ["python -m stages compare --before HEAD --after beta-02"],
        "exp-push": [
            "dvc exp push -q origin beta-02",
            "git clone -q $URL ../colleague && cd ../colleague",
            "dvc exp pull -q origin beta-02",
            "dvc exp apply -q beta-02 && git status --short",
        ],
        "restore": ["git stash -q", "python -m stages restore beta-02"],
        "alias": [
            "dvc repro -q report && git commit -qam 'Beta 0.2' && dvc push -q",
            "make release VERSION=v1.0.0 | grep MLflow",
            PYTHON_OF_ALIAS,
            "cmp champion/adapter_model.safetensors models/adapter/adapter_model.safetensors",
        ],
    },
    "seeds": {
        "sweep": ["make sweep SET='train.beta=0.05 train.num_train_epochs=0.1' NAME=short"],
        "seeds": ["make seeds N=2 SET=train.num_train_epochs=0.1 NAME=luck"],
        "compare-seeds": ["python -m stages compare --seeds luck-num_train_epochs-0.1-seed-1"],
    },
}
HELD = ("start", "release", "model")  # the others train, for minutes; their commands have tests


def main() -> None:
    names = sys.argv[1:] or list(SESSIONS)
    for session in names:
        took = []
        for name, text, seconds, size in run(session):
            rewrite(DOCUMENT, name, f"```\n{text}```\n")
            took.append(f"| {session}: {name} | {seconds:.0f} s | {size:z.1f} MB |\n")
            print(f"{session}: {name}: {seconds:.0f} s", flush=True)
        old = between_markers(DOCUMENT.read_text(encoding="utf-8"), "costs of sessions")
        kept = [row + "\n" for row in old.splitlines() if not row.startswith(f"| {session}: ")]
        rewrite(DOCUMENT, "costs of sessions", "".join(kept + took))


def run(session: str) -> Iterator[tuple[str, str, float, float]]:
    """Of each block: its name, its transcript, seconds, and by how many MB the disk filled."""
    with tempfile.TemporaryDirectory() as folder, serve([], writer=TOKEN, made={}) as hub:
        place = Path(folder).resolve()
        clone = cloned(place)
        if session != "start":
            call("dvc", "pull", "-q", folder=clone)
        variables = {
            "URL": str(place / "origin.git"),
            "PORT": str(free_port()),
            "HF_ENDPOINT": hub,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(place / "home"),
        }
        for name, lines in SESSIONS[session].items():
            before, began = size_of(place), time.monotonic()
            text = transcript(lines, clone, variables)
            took = time.monotonic() - began
            yield name, settled(text, place, variables), took, size_of(place) - before


def cloned(place: Path) -> Path:
    """A clone of what is here, edits included, with the outputs in a DVC remote."""
    source, clone = place / "source", place / "pipeline"
    git = ("git", "-c", "advice.detachedHead=false")
    call(*git, "clone", "-q", str(ROOT), str(source), folder=place)
    for name in filter(None, call(*git, "ls-files", "-z", folder=ROOT).split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    cache = Path(call("dvc", "cache", "dir", folder=ROOT).strip())
    shutil.copytree(cache / "files", place / "storage" / "files")
    call(*git, "checkout", "-q", "-B", "main", folder=source)
    remote = ("dvc", "remote", "add", "-q", "-d", "team", str(place / "storage"))
    call(*remote, folder=source)
    call(*git, "add", "-A", folder=source)
    call(*git, "commit", "-q", "-m", "Where data and models are kept", folder=source)
    call(*git, "clone", "-q", "--bare", str(source), "origin.git", folder=place)
    call(*git, "clone", "-q", "origin.git", str(clone), folder=place)
    shutil.rmtree(source)
    venv, installed = clone / ".venv", Path(sys.prefix)
    venv.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (venv / name).symlink_to(installed / name)
    shutil.copyfile(clone / "requirements.txt", venv / "installed.txt")
    found = re.search(r"(?m)^UV := (.+)$", (clone / "Makefile").read_text(encoding="utf-8"))
    assert found
    (venv / "made-in.txt").write_text(f"{clone} uv {found[1]}\n", encoding="utf-8")
    return clone


def cached() -> bool:
    """Whether DVC's cache has the adapter that dvc.lock names, and so the other outputs."""
    lock = (ROOT / "dvc.lock").read_text(encoding="utf-8")
    found = re.search(r"path: models/adapter\n\s+hash: md5\n\s+md5: (\S+)", lock)
    cache = Path(call("dvc", "cache", "dir", folder=ROOT).strip())
    return bool(found and (cache / "files" / "md5" / found[1][:2] / found[1][2:]).exists())


def transcript(lines: Sequence[str], folder: Path, variables: Mapping[str, str]) -> str:
    """Each line after a ``$``, and below it all that it printed."""
    script = "set -m\n" + "".join(
        f"printf '$ %s\\n' {shlex.quote(line)}\n{line}\n"
        + ("" if line.endswith("&") else 's=$?; [ $s = 0 ] || echo "(exit status $s)"\n')
        for line in lines
    )
    settings = {"COLUMNS": "120", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    env = environment(**settings, **variables)
    env.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False, timeout=1200,
    )  # fmt: skip
    return done.stdout


SETTLED = (
    (r"(?m)^(\n.*\d+%\|.*\n|.*\d+%\|.*\n)+", ""),  # progress bars
    (  # packages' own notes
        r"(?m)^(\[transformers\]|Failed to load CPU gemm|WARNING:|"
        r"\d{4}[-/].* (INFO|WARNING)\b).*\n",
        "",
    ),
    (r"\b[0-9a-f]{40}\b|\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7,12}\b", "COMMIT"),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?", "DATE"),
    (r"\b(\d+ h )?\d+ min( \d\d s)?\b|\b\d+(\.\d+)? s\b", "TIME"),
    (r"[\d.]+ [GMT]B are free", "… are free"),
    (r"[ \t]+\n", "\n"),
)


def settled(text: str, place: Path, variables: Mapping[str, str]) -> str:
    """A transcript without what differs between two runs, as docs/transcripts.md lists it."""
    text = text.replace(variables["HF_ENDPOINT"], "https://huggingface.co")
    text = text.replace(str(place), "WORK").replace(variables["PORT"], "$PORT")
    for pattern, instead in SETTLED:
        text = re.sub(pattern, instead, text)
    return text


def same(one: str, other: str) -> bool:
    """Equal but for spaces and rules of tables, and for the rounding of decimals (2%, or 0.02)."""
    words, figures = zip(*map(_apart, (one, other)), strict=True)
    close = (abs(a - b) <= max(0.02, 0.02 * abs(a)) for a, b in zip(*figures, strict=False))
    return words[0] == words[1] and all(close)


def _apart(text: str) -> tuple[list[str], list[float]]:
    decimal = r"-?\d+\.\d+"
    words = re.sub(decimal, "#", re.sub(r"-{3,}", "", text)).split()
    return words, [float(found) for found in re.findall(decimal, text)]


def size_of(folder: Path) -> float:
    """MB of the files in a folder; links are not followed."""
    files = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in files) / 1e6


if __name__ == "__main__":
    main()
