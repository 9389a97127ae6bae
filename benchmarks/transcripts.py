"""Writes what docs/transcripts.md shows: the commands of every day, run on the demo.

    python -m benchmarks.transcripts    # about ten minutes on two cores

In: this checkout with its edits. Everything runs in a clone in a temporary folder, from the
beginning; nothing here changes but the document. ``settled`` replaces what differs between two
runs. tests/test_documents.py runs the blocks that ``HELD`` names again and compares.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.tables import rewrite
from tests.repository import ROOT, call, environment

DOCUMENT = Path("docs/transcripts.md")
ASKED = "data/pairs/images/0c29d6f70a2462f2bfd3d34f7c025cc5.jpg"
BLOCKS: dict[str, Sequence[str]] = {
    "repro": ["make repro"],
    "ask": [f"make ask IMAGE={ASKED} QUESTION='does the image not contain a yellow shape?'"],
    "exp-run": ["dvc exp run --name beta-0.2 -S train.beta=0.2"],
    "exps": ["make exps"],
    "compare": ["python -m stages compare --before HEAD --after beta-0.2"],
}
HELD = ("ask",)  # the others train, or compare what was trained; their commands have tests


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = cloned(Path(folder).resolve())
        for name in BLOCKS:
            rewrite(DOCUMENT, name, f"```text\n{transcript(BLOCKS[name], clone)}```\n")
            if name == "repro":  # what it made may have other bits than another machine committed
                call("git", "commit", "-q", "--allow-empty", "-am", "Results", folder=clone)
            print(name, flush=True)


def cloned(place: Path) -> Path:
    """A clone of what is here, edits included and committed, with this environment."""
    clone = place / "pipeline"
    call("git", "clone", "-q", str(ROOT), str(clone), folder=place)
    for name in filter(None, call("git", "ls-files", "-z", folder=ROOT).split("\0")):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
    call("git", "checkout", "-q", "-B", "main", folder=clone)
    call("git", "add", "-A", folder=clone)
    call("git", "commit", "-q", "--allow-empty", "-m", "As it is here", folder=clone)
    venv = clone / ".venv"
    venv.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    shutil.copyfile(clone / "requirements.txt", venv / "installed.txt")
    found = re.search(r"(?m)^UV := (.+)$", (clone / "Makefile").read_text(encoding="utf-8"))
    assert found
    (venv / "made-in.txt").write_text(f"{clone} uv {found[1]}\n", encoding="utf-8")
    return clone


def with_outputs(clone: Path) -> bool:
    """Whether DVC's cache here has the demo's outputs; if so, they are in the clone now."""
    cache = call("dvc", "cache", "dir", folder=ROOT).strip()
    call("dvc", "cache", "dir", "--local", cache, folder=clone)
    lock = (clone / "dvc.lock").read_text(encoding="utf-8")
    found = re.search(r"path: models/adapter\n\s+hash: md5\n\s+md5: (\S+)", lock)
    if not (found and Path(cache, "files", "md5", found[1][:2], found[1][2:]).exists()):
        return False
    call("dvc", "checkout", "-q", folder=clone)
    return True


def transcript(lines: Iterable[str], clone: Path) -> str:
    """Each line after a ``$``, and below it all that it printed, ``settled``."""
    script = "".join(f"printf '$ %s\\n' {shlex.quote(line)}\n{line}\n" for line in lines)
    env = environment(COLUMNS="120", HF_HUB_DISABLE_PROGRESS_BARS="1")
    env.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False, timeout=1800,
    )  # fmt: skip
    return settled(done.stdout, clone)


SETTLED = (
    (r"(?m)^.*\d+%\|.*\n", ""),  # bars
    (r"(?m)^> python -m .*\n", ""),  # a stage's command, as dvc.yaml has it
    (  # packages' own notes
        r"(?m)^(\[transformers\]|Failed to load CPU gemm|WARNING:|"
        r"\d{4}[-/].* (INFO|WARNING)\b).*\n",
        "",
    ),
    (r"\b[0-9a-f]{40}\b|\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7,12}\b", "COMMIT"),
    (r"[ \t]+\n", "\n"),
)


def settled(text: str, clone: Path) -> str:
    """A transcript without what differs between two runs, as docs/transcripts.md lists it."""
    text = text.replace(str(clone), "WORK")
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


if __name__ == "__main__":
    main()
