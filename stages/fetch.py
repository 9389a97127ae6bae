"""fetch: brings the data set or the base model of ``params.yaml`` here, as upstream published it.

In: ``data.source`` or ``model.source``: a Hub repository at a revision, a local path, or easy-VQA.
Out: a folder with upstream's files and ``SOURCE.json`` (commit, licence, each file's sha256).

Two items, so that a change of the model does not fetch the data again. The folder persists between
runs: what is there and right is not fetched again, and an interrupted download goes on where it
stopped.
"""

from pathlib import Path

from stages.core import command
from stages.core.errors import UserError
from stages.parameters import params
from stages.sources import fetching


def main(item: str, out: Path) -> None:
    """Fetch ``item``, which is ``data`` or ``model``, into ``out``."""
    p = params.load()
    if item == "data":
        source = fetch_data(p.data.source, out)
    elif item == "model":
        source = fetch_model(p.model.source, p.model.trust, out)
    else:
        raise UserError(f"--item {item}: there is no such item; write data or model")
    print(summary(item, source))


def fetch_data(source: params.DataSource, out: Path) -> fetching.Source:
    """Data are tables and images: pickles and code are never fetched with them."""
    if source.kind == "easy-vqa":
        return fetching.copy_easy_vqa(out)
    if source.kind == "path":
        return fetching.copy_data(source.path, out, source.licence)
    return fetching.fetch_hub(source.repo, source.revision, source.files, out, repo_type="dataset")


def fetch_model(source: params.ModelSource, trust: params.Trust, out: Path) -> fetching.Source:
    """Weights are safetensors, unless a parameter allows more."""
    if source.kind == "path":
        return fetching.copy_model(
            source.path,
            out,
            allow_pickle=trust.pickle,
            allow_code=trust.remote_code,
            licence=source.licence,
        )
    return fetching.fetch_hub(
        source.repo,
        source.revision,
        source.files,
        out,
        repo_type="model",
        allow_pickle=trust.pickle,
        allow_code=trust.remote_code,
    )


def summary(item: str, source: fetching.Source) -> str:
    """One line: what was fetched, its size, commit and licence."""
    parts = [f"{len(source.files):,} files, {fetching.readable(source.size)}"]
    if source.commit:
        parts.append(f"{source.repo} at {source.commit}")
    parts.append(f"licence {source.licence or 'unknown'}")
    return f"{item}: {', '.join(parts)}"


if __name__ == "__main__":
    command.run(main)
