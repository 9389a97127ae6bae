"""Greedy answers of the demo's model with transformers' growing key-value cache and a static one.

    python -m benchmarks.cache

After ``make repro``. Both take turns on 400 of the data set's questions; the answers must be equal.
"""

import os
import statistics
import time
from pathlib import Path

from stages.model import formatted, scoring
from stages.params import params

KINDS = {"growing": None, "static": "static"}


def main() -> None:
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    p = params.load()
    policy = scoring.load(Path("models/base"), p)
    asked = formatted.read(Path("data/formatted"), "questions")[:400]
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    answers = {}
    for turn in range(4):
        for name, cache in KINDS.items():
            started = time.perf_counter()
            answers[name] = scoring.answer(
                policy,
                asked,
                Path("data/pairs/images"),
                max_new_tokens=p.evaluate.generation.max_new_tokens,
                batch_tokens=p.scoring.batch_tokens,
                label=name,
                cache_implementation=cache,
            )
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    assert answers["growing"] == answers["static"]
    for name, taken in times.items():
        each = ", ".join(f"{seconds:.2f}" for seconds in taken)
        print(f"{name}: {statistics.median(taken):.2f} s; each {each}")


if __name__ == "__main__":
    main()
