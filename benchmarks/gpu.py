"""All that only a GPU can tell, part by part, in the order in which it matters.

    benchmarks/gpu.sh
    benchmarks/gpu.sh --size tiny --device-name cpu --dtype float32 --patience 5

A part is a command of its own with its own time limit, so one that hangs, or that fills the memory,
costs no other. What it prints goes to ``--out`` as it comes. The second line rehearses the script
without a GPU, with five times the time.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from stages.core import command

# On a card: image tokens of a pair, and pairs of a forward pass.
IMAGE_TOKENS, BATCHES = ("576", "256", "1024"), ("8", "32")


@dataclass(frozen=True)
class Part:
    """What is asked, the seconds that it may take, and the words after ``python -m``."""

    asks: str
    limit: int
    words: tuple[str, ...]


def parts(size: str, device_name: str, dtype: str, model: str) -> list[Part]:
    """``model``: the folder where the first part that needs them leaves the random weights."""
    tiny = size == "tiny"
    seen, batches = (("4",), ("1",)) if tiny else (IMAGE_TOKENS, BATCHES)
    repeats, answer, pairs, most = ("1", "8", "4", "256") if tiny else ("3", "120", "64", "16384")
    what = ("--size", size, "--device-name", device_name, "--dtype", dtype, "--model", model)
    on = (*what, "--repeats", repeats, "--answer-tokens", answer)
    step = ("benchmarks.train", *on, "--image-tokens")
    gpu = ("train.gpus=1", "train.bf16=true") if device_name == "cuda" else ()
    demo = (f"scoring.device={device_name}", f"scoring.dtype={dtype}", *gpu)
    attend = ("benchmarks.attention", *on, "--image-tokens", seen[-1], "--batch-size", batches[0])
    score = ("benchmarks.score", *on, "--pairs", pairs, "--image-tokens", seen[0])
    generate = ("benchmarks.throughput", *on, "--pairs", pairs, "--batch-tokens", most)
    return [
        Part("Is anything wrong in silence?", 80, ("pytest", "-m", "doctor", "tests")),
        Part("The demo", 150, ("benchmarks.pipeline", *demo)),
        *(Part(f"A step at {n} image tokens", 65, (*step, n)) for n in seen),
        *(Part(f"{n} pairs a forward", 60, (*step, seen[0], "--batch-size", n)) for n in batches),
        Part("Scoring", 60, score),
        Part("Generation", 60, generate),
        Part("Ways to attend", 55, attend),
    ]


def main(
    size: str = "4b",
    device_name: str = "cuda",
    dtype: str = "bfloat16",
    patience: float = 1.0,
    out: Path = Path("gpu-results.md"),
) -> None:
    with tempfile.TemporaryDirectory() as model:
        failed = [
            part.asks
            for part in parts(size, device_name, dtype, model)
            if not answered(part, out, patience)
        ]
    print(f"{out} has what was measured; failed: {', '.join(failed) or 'nothing'}")
    raise SystemExit(len(failed))


def answered(part: Part, out: Path, patience: float = 1.0) -> bool:
    """Run a part; write what it printed, or the end of its errors, and whether it ended well."""
    limit = patience * part.limit
    print(f"{part.asks} ({limit:.0f} s at most)", flush=True)
    quiet = os.environ | {"LLAMAFACTORY_VERBOSITY": "WARN"}
    start, log = time.monotonic(), out.with_suffix(".log")
    with out.open("a", encoding="utf-8") as file, log.open("wb") as errors:
        print(f"\n## {part.asks}\n\n```\npython -m {' '.join(part.words)}", file=file, flush=True)
        with subprocess.Popen(
            [sys.executable, "-m", *part.words],
            stdout=file,
            stderr=errors,
            env=quiet,
            process_group=0,
        ) as process:
            try:
                code: int | str = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = "its time limit"
                os.killpg(process.pid, signal.SIGKILL)
        if code:
            file.write(log.read_text(encoding="utf-8", errors="replace")[-2000:])
        print(f"```\n\nEnded by {code}, {time.monotonic() - start:.0f} s.", file=file)
    return code == 0


if __name__ == "__main__":
    command.run(main)
