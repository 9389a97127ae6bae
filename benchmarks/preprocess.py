"""Preprocess against the loop that a notebook has: decode, convert, save at quality 85.

    python -m benchmarks.preprocess

Both take turns on the same Parquet shards of made-up photographs (640x480, about 43 kB), each time
in a fresh process and into a fresh folder. Nothing is deleted before the end: for minutes after
many files were deleted, ext4 makes new ones up to ten times as slowly. Printed are the medians,
their ratio, and the peak memory of the stage's largest process.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "topic-overwrite"  # the name of the preset's source
SHARD = 2000  # rows
VIEWS = 500  # encoded; making each image takes longer than the whole benchmark
WIDTH, HEIGHT = 640, 480

LOOP = """
import io, sys
from pathlib import Path
import pyarrow.parquet as pq
from PIL import Image
out = Path(sys.argv[2])
out.mkdir()
number = 0
for shard in sorted(Path(sys.argv[1]).glob("*.parquet")):
    for row in pq.read_table(shard).to_pylist():
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        image.save(out / f"{number}.jpg", quality=85)
        number += 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without-loop", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # By another process: what one holds when it starts a child counts as the child's peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            size = other.submit(write_shards, folder / "raw" / SOURCE, options.images).result()
        write_params(folder / "params.yaml", options.workers)
        print(f"{options.images} photographs, {size / options.images / 1000:.1f} kB on average")
        loop, stage, memory = [], [], 0.0
        for turn in range(options.repeats):
            if not options.without_loop:
                loop.append(run(["-c", LOOP, f"raw/{SOURCE}", f"loop{turn}"], folder)[0])
            seconds, peak = run(stage_command(f"pairs{turn}"), folder)
            stage.append(seconds)
            memory = max(memory, peak)
    median = statistics.median(stage)
    if loop:
        print(f"loop: {statistics.median(loop):.1f} s; each {shown(loop)}")
        print(f"ratio of the medians: {statistics.median(loop) / median:.1f}")
    print(f"stage: {median:.1f} s; each {shown(stage)}; peak memory {memory:.2f} GB")


def write_shards(out: Path, count: int) -> int:
    """Shards of ``count`` rows in all; gives the bytes of their images."""
    out.mkdir(parents=True)
    total = 0
    found = photographs()
    for start in range(0, count, SHARD):
        images = [next(found) for _ in range(start, min(start + SHARD, count))]
        total += sum(map(len, images))
        texts = {
            "question": [f"What is in picture {start + i}?" for i in range(len(images))],
            "chosen": ["A cat."] * len(images),
            "rejected": ["A dog."] * len(images),
            "origin_dataset": ["made-up"] * len(images),
        }
        pq.write_table(pa.table({"image": images} | texts), out / f"{start:06}.parquet")
    source = {"kind": "path", "repo": None, "revision": None, "commit": None, "licence": None}
    (out / "SOURCE.json").write_text(json.dumps(source | {"files": []}))
    return total


def photographs() -> Iterator[bytes]:
    """JPEGs of views of one large picture with detail at every scale, as a landscape has."""
    random = np.random.default_rng(0)
    shape = (2 * HEIGHT, 2 * WIDTH)
    picture = np.full((*shape, 3), 128, np.float32)
    for lines, strength in ((4, 60), (16, 40), (64, 24), (240, 14), (960, 7)):
        for channel in range(3):
            noise = random.normal(size=(lines, lines * 4 // 3)).astype(np.float32)
            scaled = Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC)
            picture[..., channel] += strength * np.asarray(scaled)
    landscape = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    views = []
    for _ in range(VIEWS):
        x, y = (int(random.integers(side)) for side in (WIDTH, HEIGHT))
        file = io.BytesIO()
        landscape.crop((x, y, x + WIDTH, y + HEIGHT)).save(file, "JPEG", quality=65)
        views.append(file.getvalue())
    for number in itertools.count():  # a comment of its own makes each file another one
        view = views[number % VIEWS]
        yield view[:2] + b"\xff\xfe\x00\x0a%08d" % number + view[2:]


def write_params(path: Path, workers: int) -> None:
    text = (ROOT / "params" / "qwen3-vl-4b.yaml").read_text(encoding="utf-8")
    lines = [
        f"  workers: {workers}" if line.startswith("  workers:") else line
        for line in text.splitlines()
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def stage_command(out: str) -> list[str]:
    return ["-m", "stages.preprocess", "--raw", "raw", "--out", out, "--report", f"{out}.json"]


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds, and the peak memory of the process itself (GB)."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=None if "VERBOSE" in os.environ else subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "set VERBOSE to see why"
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 2**30


def shown(seconds: list[float]) -> str:
    return ", ".join(f"{taken:.1f}" for taken in seconds)


if __name__ == "__main__":
    main()
