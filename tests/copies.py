"""Local sources as fetch copies them, for tests that need no other parameters."""

from pathlib import Path

from stages.sources import local
from stages.sources.manifest import Source


def copied_data(path: Path, out: Path) -> Source:
    return local.fetch_data(local.LocalData(kind="path", path=path, licence=None), out)


def copied_model(path: Path, out: Path) -> Source:
    source = local.LocalSource(kind="path", path=path, licence=None)
    return local.fetch_model(source, out, allow_pickle=False, allow_code=False)
