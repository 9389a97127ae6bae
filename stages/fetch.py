"""fetch: brings the data set or the base model of ``params.yaml`` here, as upstream published it.

In: ``data.source`` or ``model.source``, of one of the kinds in ``stages.sources.kinds``.
Out: a folder with upstream's files and ``SOURCE.json`` (commit, licence, each file's sha256).

Two items, so that a change of the model does not fetch the data again. The folder persists between
runs: what is there and right is not fetched again, and an interrupted download goes on where it
stopped.
"""

from pathlib import Path

from stages.core import command
from stages.core.errors import UserError
from stages.core.text import readable
from stages.params import params
from stages.sources.kinds import KINDS
from stages.sources.manifest import Source


def main(item: str, out: Path) -> None:
    """Fetch ``item``, which is ``data`` or ``model``, into ``out``."""
    p = params.load()
    if item == "data":
        fetched = KINDS[p.data.source.kind].fetch_data(p.data.source, out)
    elif item == "model":
        fetched = fetch_model(p.model.source, p.model.trust, out)
    else:
        raise UserError(f"--item {item}: write data or model")
    print(summary(item, fetched))


def fetch_model(source: params.ModelSource, trust: params.Trust, out: Path) -> Source:
    """Weights are safetensors, unless a parameter allows more."""
    fetch = KINDS[source.kind].fetch_model
    assert fetch is not None  # else params refuses it as a source of models
    return fetch(source, out, allow_pickle=trust.pickle, allow_code=trust.remote_code)


def summary(item: str, source: Source) -> str:
    """One line: what was fetched, its size, commit and licence."""
    parts = [f"{len(source.files):,} files, {readable(source.size)}"]
    if source.commit:
        parts.append(f"{source.repo} at {source.commit}")
    parts.append(f"licence {source.licence or 'unknown'}")
    return f"{item}: {', '.join(parts)}"


if __name__ == "__main__":
    command.run(main)
