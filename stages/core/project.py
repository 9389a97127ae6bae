"""Where the project is, and whether the user forced the stage that runs."""

import os
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

    DVC does not tell a stage how it was called, but its record of the stage says whether there was
    a reason to run. Asked only where something finished could be taken up instead (2 s). The
    command ``dvc status`` can't be used: a stage that runs is locked.
    """
    name = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    if not name:
        return False
    from dvc.repo import Repo

    with Repo() as repo:
        stage = repo.stage.load_one(name=name)
        entries = (*stage.deps, *stage.outs)
        return not (stage.changed_stage() or any(entry.workspace_status() for entry in entries))
