"""How long each stage and command takes to start, and what importing LLaMA-Factory is made of.

    python -m benchmarks.startup

A start is a fresh process that imports the module; its seconds are those of the processor, which a
quiet machine takes by the clock. What LLaMA-Factory is made of is told by ``python -X importtime``,
which itself slows imports down. Run it twice: the first run compiles what was never imported. Where
PYTHONDONTWRITEBYTECODE is set, every import compiles again, and takes three times as long.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LLAMA_FACTORY = {
    "torch": "import torch",
    "and transformers' processors": "import torch; from transformers import Qwen3VLProcessor",
    "llamafactory.hparams alone": "import llamafactory.hparams",
    "llamafactory.data alone": "import llamafactory.data",
    "all that stages import": "import llamafactory.data, llamafactory.hparams, llamafactory.model",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    modules = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))
    codes = {name: f"import stages.{name}" for name in modules} | LLAMA_FACTORY
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(repeats):
        for name, code in codes.items():
            times[name].append(seconds(code))
    for name, taken in times.items():
        print(f"{name}: {statistics.median(taken):.2f} s")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", LLAMA_FACTORY["all that stages import"]],
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    packages: Counter[str] = Counter()
    for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\w+)", done.stderr):
        packages[name] += int(own)
    print("by package: " + ", ".join(f"{n} {t / 1e6:.1f} s" for n, t in packages.most_common(12)))


def seconds(code: str) -> float:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LLAMAFACTORY_VERBOSITY": "ERROR"}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, code
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
