"""The stage format at the size of topic-overwrite, in processes of its own, beside ones that only
import what it imports.

    python -m benchmarks.format

The pairs are made up, of words in random order; the tokenizer is the demo's.
"""

import argparse
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
PRESET = ROOT / "params" / "qwen3-vl-4b.yaml"
IMPORTS = "import llamafactory.data, llamafactory.hparams, llamafactory.model"
WORDS = "a the cat dog street red small sits stands near behind two people under sky with"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21_376)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    table = made_up(options.pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(table, folder)
        times: dict[str, list[float]] = {}
        for turn in range(options.repeats):
            times.setdefault("import", []).append(run(["-c", IMPORTS], folder))
            times.setdefault("stage", []).append(run(stage_command(turn), folder))
    for what, seconds in times.items():
        each = ", ".join(f"{one:.1f}" for one in seconds)
        print(f"{what}: {statistics.median(seconds):.1f} s; each {each}")


def made_up(count: int) -> pd.DataFrame:
    drawn = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(drawn.choices(WORDS.split(), k=drawn.randint(least, most)))

    rows: list[dict[str, Any]] = []
    for number in range(count):
        group = hashlib.sha256(str(number).encode()).hexdigest()[:32]
        texts = {"question": words(5, 15), "chosen": words(20, 90), "rejected": words(20, 90)}
        size = {"widths": [drawn.choice((500, 640))], "heights": [drawn.choice((375, 427, 480))]}
        labels = {"images": [f"{group}.jpg"], "origin": "made-up", "kind": "", "group": group}
        labels |= {"system": "", "history": []}
        split = drawn.choices(("train", "validation", "test"), (8, 1, 1))[0]
        rows.append({"id": str(number), "split": split, **size, **texts, **labels})
    return pd.DataFrame(rows)


def write(table: pd.DataFrame, folder: Path) -> None:
    (folder / "pairs").mkdir()
    table.to_parquet(folder / "pairs" / "pairs.parquet")
    questions = pd.DataFrame(columns=["id", "image", "question", "answer", "kind"])
    questions.to_parquet(folder / "pairs" / "questions.parquet")
    (folder / "params.yaml").write_bytes(PRESET.read_bytes())


def stage_command(turn: int) -> list[str]:
    options = {
        "pairs": "pairs",
        "model": ROOT / "demo" / "model",
        "out": f"formatted{turn}",
        "report": f"report{turn}.json",
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["-m", "stages.format", *given]


def run(command: list[str], folder: Path) -> float:
    """Seconds."""
    start = time.monotonic()
    subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=None if "VERBOSE" in os.environ else subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - start


if __name__ == "__main__":
    main()
