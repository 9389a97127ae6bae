"""Where the project is, and whether the user forced the stage that runs."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path


def project_root(root: Path = Path()) -> Path:
    """The project that the user works in, absolute.

    ``dvc exp run --temp`` and ``--queue`` run stages in a copy below ``.dvc/tmp/exps/``, which
    DVC deletes afterwards together with whatever was written into it; the project is what holds
    that ``.dvc``.
    """
    path = root.resolve()
    parts = path.parts
    for i in range(len(parts) - 2):
        if parts[i : i + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:i])
    return path


@cache
def is_forced() -> bool:
    """Whether DVC runs this stage although nothing changed, which only ``-f`` makes it do.

    DVC does not pass its options on, but it can say whether the stage is up to date. Asked only
    where there is something finished to take up instead (3 s).
    """
    stage = os.environ.get("DVC_STAGE")
    if not stage:
        return False
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--quiet", stage],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0
