"""Fetch a data set or the base model of ``params.yaml``, as upstream published it.

In: an entry of ``data.sources`` or ``model.source``, of one of the kinds in
``stages.sources.kinds``. Out: a folder with upstream's files and ``SOURCE.json`` (commit, licence,
each file's sha256).

One item for each source and one for the model, so that a change of one fetches no other. The
folder persists between runs: what is there and right is not fetched again.
"""

from pathlib import Path

from stages.core import command
from stages.core.errors import UserError, did_you_mean, readable
from stages.params import machine, params
from stages.sources.kinds import KINDS, of


def main(item: str, out: Path) -> None:
    """Fetch ``item``, a key of the parameters (``data.sources.<name>``, ``model.source``), into
    ``out``."""
    p = params.load()
    machine.require(p)
    if item == "model.source":
        fetch, trust = KINDS[p.model.source.kind].fetch_model, p.model.trust
        assert fetch is not None  # else params refuses it as a source of models
        allowed = {"allow_pickle": trust.pickle, "allow_code": trust.remote_code}
        fetched = fetch(p.model.source, out, **allowed)
    else:
        name = item.removeprefix("data.sources.")
        if name not in p.data.sources:
            raise UserError(f"params.yaml has no {item}{did_you_mean(name, p.data.sources)}")
        asked = p.data.sources[name]
        with of(name):
            fetched = KINDS[asked.kind].fetch_data(asked, out)
    commit = f"{fetched.repo} at {fetched.commit}, " if fetched.commit else ""
    size = readable(sum(file.size for file in fetched.files))
    print(
        f"{item}: {len(fetched.files):,} files, {size}, {commit}"
        f"licence {fetched.licence or 'unknown'}"
    )


if __name__ == "__main__":
    command.run(main)
