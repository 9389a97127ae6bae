"""The pipeline. Each module here is a DVC stage, which ``dvc.yaml`` runs as
``python -m stages.<stage>``. What stages share lies in folders by concern, in an order that
``tests/test_pipeline.py`` holds, and ``commands`` has what people run beside the pipeline, as
``python -m stages <command>``."""

import sys
from importlib.util import find_spec

if find_spec("llamafactory") is None:
    raise SystemExit(
        f"error: {sys.executable} lacks the project's packages: use make, or first activate "
        "the environment (`. .venv/bin/activate`) that `make setup` creates"
    )
