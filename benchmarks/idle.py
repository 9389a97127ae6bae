"""What ``dvc status`` and ``dvc repro`` take when there is nothing to do, by the number of images.

    python -m benchmarks.idle
    python -m benchmarks.idle --images 200000

In a fresh clone of the committed work, ``data/pairs/images`` holds that many small files named by
their content and every other output one small file; ``dvc commit`` records them, so that no stage
runs. The first status after that is not timed: it fills DVC's own notes.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=21376)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name, "clone")
        subprocess.run(["git", "clone", "-q", str(Path.cwd()), str(clone)], check=True)
        pretend(clone, options.images)
        started = time.perf_counter()
        dvc(clone, "commit", "-f", "-q")
        print(f"{options.images:,} images: dvc commit {time.perf_counter() - started:.1f} s")
        said = dvc(clone, "status")
        assert "up to date" in said, said
        for command in ("status", "repro"):
            taken = []
            for _ in range(options.repeats):
                started = time.perf_counter()
                dvc(clone, command)
                taken.append(time.perf_counter() - started)
            each = ", ".join(f"{seconds:.1f}" for seconds in taken)
            print(f"dvc {command}: {statistics.median(taken):.1f} s; each {each}")


def pretend(clone: Path, images: int) -> None:
    """Write something for every output of every stage, ``images`` files among it."""
    for relative in outputs(clone):
        path = clone / relative
        if not path.exists():
            made = path if path.suffix else path / "made-up.txt"
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(relative)
    folder = clone / "data" / "pairs" / "images"
    folder.mkdir()
    for number in range(images):
        content = f"image {number}".encode()
        name = hashlib.blake2b(content, digest_size=16).hexdigest()
        (folder / f"{name}.jpg").write_bytes(content)


def outputs(clone: Path) -> list[str]:
    """The paths that the stages of dvc.yaml write."""
    stages = YAML(typ="safe").load(clone / "dvc.yaml")["stages"]
    found = []
    for stage in stages.values():
        if "foreach" in stage:
            found += [item["out"] for item in stage["foreach"].values()]
        else:
            listed = [*stage["outs"], *stage.get("metrics", [])]
            found += [next(iter(out)) if isinstance(out, dict) else out for out in listed]
    return found


def dvc(clone: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["dvc", *arguments],
        cwd=clone,
        env=os.environ | {"DVC_NO_ANALYTICS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


if __name__ == "__main__":
    main()
