"""Restore: from an MLflow run back to the code, parameters, data and adapter that made it.

    python -m stages restore 3f2a…          # the id of a run, as MLflow shows it
    python -m stages restore brave-cat      # or the newest run of an experiment

In: the run's artifacts, this clone, DVC's cache and its remote. Out: the working tree as it was
when the run was made, with a line for each output and its hash. ``dvc repro`` then has at most the
report to write. Files with edits are never overwritten. It prints how to go back.
"""

import tempfile
from pathlib import Path

from stages.core import command
from stages.tracking import runs, way_back


def main(run: str, /) -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = runs.download(run, way_back.FOLDER, Path(folder))
        for line in way_back.restore(name, Path(folder, way_back.FOLDER)):
            print(line)


if __name__ == "__main__":
    command.run(main)
