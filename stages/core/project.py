"""Where the project is, and whether the user forced the stage that runs."""

import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

FORCE = re.compile(r"--force|-[a-z]*f[a-z]*")  # one-letter options may be joined: dvc repro -sf


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
    """Whether the user forced the stage that runs, with ``dvc repro -f`` or ``dvc exp run -f``.

    DVC does not tell a stage how it was called, and its records can't tell either: it deletes a
    stage's outputs before it runs, so a forced stage looks like one whose outputs were lost, as all
    are in a fresh clone. So the command line of the DVC that started this process is read. Of an
    experiment from the queue it does not hold the option: that one runs as if it was not forced.
    """
    if "DVC_STAGE" not in os.environ:
        return False
    import psutil  # type: ignore[import-untyped]

    for process in psutil.Process().parents():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "dvc" in (Path(word).name for word in words[:3]):
                return any(FORCE.fullmatch(word) for word in words)
    return False
