"""Local sources as fetch copies them, for tests that need no other parameters."""

from pathlib import Path
from typing import Any

from stages.sources import local
from stages.sources.source import Source


def copied_data(path: Path, out: Path, **keys: Any) -> Source:
    values = {"kind": "path", "path": str(path), "licence": None, **keys}
    return local.fetch_data(local.PathData.model_validate(values), out)


def copied_model(path: Path, out: Path) -> Source:
    asked = local.PathModel(kind="path", path=path, licence=None)
    return local.fetch_model(asked, out, allow_pickle=False, allow_code=False)
