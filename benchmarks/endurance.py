"""What grows when twenty experiments run in a row, and when 21,376 images are prepared twice.

    python -m benchmarks.endurance

The experiments run a stand-in for the pipeline (three stages of no work, with real DVC, Git and
MLflow), every second one in a temporary copy (``--temp``). The images are small JPEGs, which the
real preprocess reads twice, and DVC stores and checks out each time. All of it has a temporary
folder of its own, in which whatever is left counts.
"""

import argparse
import io
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.preprocess import ROOT, SOURCE, stage_command, write_params
from tests.repository import call, environment
from tests.test_way_back import STAGES, commit_and_push, make

SHARD = 2000  # rows
COLUMNS = ("memory, MB", "open files", "files in `.dvc/tmp`", "temporary files", "processes left")


@dataclass(frozen=True)
class Held:
    """What a command held: its peak memory in MB and the most files that it had open (DVC, or the
    stage, without their children); and what is there after it: files in ``.dvc/tmp`` and in the
    temporary folder, processes.
    """

    memory: int
    open_files: int
    dvc_tmp: int
    temporary: int
    processes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=20)
    parser.add_argument("--images", type=int, default=21376)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(f"| after | {' | '.join(COLUMNS)} |\n|---|---|---|---|---|---|", flush=True)
        for what, held in experiments(Path(name), options.experiments):
            print(row(what, held), flush=True)
    with tempfile.TemporaryDirectory() as name:
        for what, held in images(Path(name), options.images):
            print(row(f"{options.images:,} images, {what}", held), flush=True)


def row(what: str, held: Held) -> str:
    return f"| {what} | {' | '.join(map(str, astuple(held)))} |"


def experiments(folder: Path, count: int, *, tracked: bool = True) -> Iterator[tuple[str, Held]]:
    """Run experiments with another ``train.beta`` each, then ``git gc`` and one more."""
    project = make(folder, f"TRACKED, KEPT = {tracked}, {str(folder / 'kept')!r}\n{STAGES}")
    temporary = folder / "temporary"
    temporary.mkdir()
    more = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    call("dvc", "repro", "--quiet", folder=project, **more)
    commit_and_push(project)
    for number in range(count + 1):
        what, words = f"experiment {number + 1}", ["dvc", "exp", "run", "--quiet"]
        if number == count:
            call("git", "gc", "--quiet", folder=project)
            what += ", after `git gc`"
        elif number % 2:
            words.append("--temp")
        yield what, watched([*words, "-S", f"train.beta=0.{100 + number}"], project, **more)


def watched(words: list[str], project: Path, **more: str) -> Held:
    """Run a command and look at it twenty times a second."""
    memory = files = 0
    log = project.parent / "log"
    with log.open("wb") as file:
        process = psutil.Popen(
            words, cwd=project, env=environment(**more), stdout=file, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            with suppress(psutil.Error):  # it ended
                memory = max(memory, process.memory_info().rss)
                files = max(files, process.num_fds())
            time.sleep(0.05)
    assert process.wait() == 0, log.read_text()
    return Held(
        memory // 2**20,
        files,
        count_files(project / ".dvc" / "tmp"),
        count_files(Path(more["TMPDIR"])),
        left_in(project.parent),
    )


def images(folder: Path, count: int) -> Iterator[tuple[str, Held]]:
    """Prepare small images twice, then let DVC store them and check them out twice."""
    temporary = folder / "temporary"
    temporary.mkdir()
    project = make(folder, "")
    write_shards(project / "raw" / SOURCE, count)
    write_params(project / "params.yaml", workers=2)
    more = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    pairs = project / "data" / "images"
    prepare = ["python", *stage_command("data/images")]
    for turn in ("", " again"):
        yield f"prepared{turn}", watched(prepare, project, **more)
        yield f"stored{turn}", watched(["dvc", "add", "data/images"], project, **more)
        shutil.rmtree(pairs)
        yield f"checked out{turn}", watched(["dvc", "checkout", "data/images"], project, **more)
        assert count_files(pairs / "images") == count


def write_shards(out: Path, count: int) -> None:
    """Tables of small JPEGs, no two alike: a comment of its own makes each file another one."""
    out.mkdir(parents=True)
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "JPEG")
    view = file.getvalue()
    for start in range(0, count, SHARD):
        numbers = range(start, min(start + SHARD, count))
        columns = {
            "image": [view[:2] + b"\xff\xfe\x00\x0a%08d" % n + view[2:] for n in numbers],
            "question": [f"What is in picture {n}?" for n in numbers],
            "chosen": ["A cat."] * len(numbers),
            "rejected": ["A dog."] * len(numbers),
            "origin_dataset": ["made-up"] * len(numbers),
        }
        pq.write_table(pa.table(columns), out / f"{start:06}.parquet")
    source = '{"kind": "path", "repo": null, "revision": null, "commit": null, "licence": null, '
    (out / "SOURCE.json").write_text(source + '"files": []}')


def count_files(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if not path.is_dir())


def left_in(folder: Path) -> int:
    """Processes that work below a folder, five seconds later."""
    end = time.monotonic() + 5
    while (found := _working_in(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _working_in(folder: Path) -> int:
    places = (process.info["cwd"] for process in psutil.process_iter(["cwd"]))
    return sum(str(place or "").startswith(str(folder)) for place in places)


if __name__ == "__main__":
    main()
