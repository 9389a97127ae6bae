"""Local sources as fetch copies them, for tests that need no other parameters."""

from pathlib import Path
from typing import Any

from stages.sources import local
from stages.sources.source import Source


def copied_data(path: Path | list[Path], out: Path, **keys: Any) -> Source:
    given = [str(each) for each in path] if isinstance(path, list) else str(path)
    values = {"kind": "path", "path": given, "licence": None, **keys}
    return local.fetch_data(local.PathData.model_validate(values), out)


def copied_model(path: Path, out: Path) -> Source:
    asked = local.PathModel(kind="path", path=path, licence=None)
    return local.fetch_model(asked, out, allow_pickle=False, allow_code=False)
