"""The pipeline. Each module here is a verb: a DVC stage (fetch, preprocess, format, reference,
baseline, train, evaluate, report) or a command, run as ``python -m stages.<verb>``. The nouns that
they share lie in folders by concern; ``tests/test_pipeline.py`` holds which may import which."""

import sys
from importlib.util import find_spec

if find_spec("llamafactory") is None:
    raise SystemExit(
        f"error: {sys.executable} lacks the project's packages: use make, or first activate "
        "the environment (`. .venv/bin/activate`) that `make setup` creates"
    )
