"""What people run beside the pipeline, before a training (check, plan, use) and after it (ask,
export, serve, release …). Each module is a command by its name: to add one, write
``commands/<verb>.py`` with a ``main`` and, if make shall run it, a target in ``Makefile``. Here is
where the pipeline keeps what commands use (``dvc.yaml``, which a test holds against this).
"""

import logging
from pathlib import Path

from stages.core.errors import UserError

BASE, ADAPTER = Path("models/base"), Path("models/adapter")
FORMATTED, IMAGES = Path("data/formatted"), Path("data/pairs/images")
RESULTS, CURVES = Path("reports/results"), Path("reports/curves")
PAGE, CARD = Path("reports/report.html"), Path("reports/model_card.md")


def require(*paths: Path) -> None:
    """Raise ``UserError`` for the first path that is not there or is an empty folder."""
    for path in paths:
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            raise UserError(
                f"{path} is missing; `dvc repro` makes it, `dvc pull` gets a shared one"
            )


def stale() -> list[str]:
    """The stages that ``dvc repro`` would run again."""
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)  # the caller says what DVC warns of
    with Repo() as repo:
        return sorted(repo.status())
