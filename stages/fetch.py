"""fetch: brings a data set or the base model of ``params.yaml`` here, as upstream published it.

In: an entry of ``data.sources`` or ``model.source``, of one of the kinds in
``stages.sources.kinds``. Out: a folder with upstream's files and ``SOURCE.json`` (commit, licence,
each file's sha256).

One item for each source and one for the model, so that a change of one fetches no other. The
folder persists between runs: what is there and right is not fetched again.
"""

from pathlib import Path

from stages.core import command
from stages.core.errors import UserError, did_you_mean
from stages.core.text import readable
from stages.params import params
from stages.sources.kinds import KINDS
from stages.sources.source import Source
from stages.tracking import failures


def main(out: Path, data: str = "") -> None:
    """Fetch the entry ``data`` of ``data.sources``, or without one the base model, into ``out``."""
    p = params.load()
    if not data:
        print(summary("base model", fetch_model(p.model.source, p.model.trust, out)))
    elif asked := p.data.sources.get(data):
        try:
            print(summary(data, KINDS[asked.kind].fetch_data(asked, out)))
        except UserError as error:
            raise UserError(f"data.sources.{data}: {error}") from None
    else:
        raise UserError(f"data.sources has no {data}{did_you_mean(data, p.data.sources)}")


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
    command.run(failures.reported(main))
