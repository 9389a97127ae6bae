"""Where the pipeline keeps what the commands after it use, as ``dvc.yaml`` says."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path

from ruamel.yaml import YAML

from stages.commands import revisions
from stages.core.errors import UserError

PIPELINE = Path("dvc.yaml")
STAGE = "report"  # its command names all of them


@dataclass(frozen=True)
class Places:
    """Paths from the project's root, by the options of the stage ``report``."""

    raw: Path
    formatted_data: Path
    images: Path
    model: Path
    adapter: Path
    curves: Path
    results: Path
    details: Path
    page: Path
    card: Path


def read() -> Places:
    """The places of the pipeline in this folder.

    Raises:
        UserError: there is no pipeline here, or its report stage lacks an option.
    """
    try:
        stages = YAML(typ="safe").load(PIPELINE.read_text(encoding="utf-8"))["stages"]
        given = revisions.options(stages[STAGE]["cmd"])
        return Places(
            **{each.name: Path(given[each.name.replace("_", "-")]) for each in fields(Places)}
        )
    except FileNotFoundError:
        raise UserError(f"there is no {PIPELINE} here; run from the project's root") from None
    except KeyError as error:
        raise UserError(
            f"{PIPELINE} has no {error} for the stage {STAGE}; restore it with "
            f"`git checkout {PIPELINE}`"
        ) from None


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
