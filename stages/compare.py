"""Compare: two experiments side by side, pair by pair, with intervals of the differences.

    python -m stages.compare --before main --after cold-beta
    python -m stages.compare --before HEAD --after workspace --out comparison.md

In: two revisions. Each is a commit, branch, tag or the name of a DVC experiment, or ``workspace``
for the files as they are here. Out: the comparison on standard output, and as Markdown in ``--out``
(default: nowhere). Nothing is run and nothing is checked out.

Why not ``dvc metrics diff``: two win rates with an interval each do not say whether they differ.
Both models are measured on the same pairs, so the difference is taken pair by pair, what both find
hard cancels, and its interval is the one to read.
"""

import os
from pathlib import Path

from stages.core import command
from stages.reporting import comparison
from stages.tracking import revisions


def main(before: str, after: str, out: Path = Path(os.devnull)) -> None:
    found = comparison.compare(revisions.load(before), revisions.load(after))
    text = comparison.render(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    command.run(main)
