"""The families of models that the pipeline tunes. A new one is an entry of ``known.yaml``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.errors import UserError
from stages.families.family import Family

_TABLE = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))
FAMILIES = tuple(Family(name, **entry) for name, entry in _TABLE.items())


def model_types() -> tuple[str, ...]:
    """Every ``model_type`` that is known."""
    return tuple(kind for family in FAMILIES for kind in family.model_types)


def published() -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Dimensions of models by repository."""
    return {name: size for family in FAMILIES for name, size in family.published.items()}


def of_type(model_type: object, *, name: str) -> Family:
    """The family of a ``model_type``; ``name`` says in a message whose it is.

    Raises:
        UserError: there is none.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    *names, last = (family.name for family in FAMILIES)
    raise UserError(
        f"{name}: config.json says model_type {model_type}, but this pipeline tunes "
        f"{', '.join(names)} and {last} models; set model.source to one, such as "
        f"{FAMILIES[0].example}"
    )


def of_model(folder: Path) -> Family:
    """The family of the model in ``folder``, by its ``config.json``.

    Raises:
        UserError: the file is missing or broken, or the family is not known.
    """
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is missing or names no model_type; `dvc repro -f fetch-model` gets it again"
        ) from None
    return of_type(model_type, name=str(folder))
