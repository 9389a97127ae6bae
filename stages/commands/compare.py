"""Compare: two experiments side by side, pair by pair, with intervals of the differences.

    python -m stages compare --before main --after cold-beta
    python -m stages compare --before HEAD --after workspace --out comparison.md
    python -m stages compare --seeds main warm-1    # over all seeds of the two settings

In: two revisions. Each is a commit, branch, tag or the name of a DVC experiment, or ``workspace``
for the files as they are here. Out: the comparison on standard output, and as Markdown in ``--out``
(default: nowhere). Nothing is run and nothing is checked out. With ``--seeds`` a revision names its
setting: every experiment whose parameters differ from its own in ``train.seed`` alone belongs to
it. One name gives mean and spread, two are compared.

Why not ``dvc metrics diff``: two win rates with an interval each do not say whether they differ.
Both models are measured on the same pairs, so the difference is taken pair by pair, what both find
hard cancels, and its interval is the one to read.
"""

import os
from pathlib import Path

from stages.commands import comparison, revisions
from stages.commands.seeds import over_seeds
from stages.core import command
from stages.core.errors import UserError


def main(
    before: str = "", after: str = "", out: Path = Path(os.devnull), seeds: tuple[str, ...] = ()
) -> None:
    if bool(before and after) == bool(seeds) or bool(before) != bool(after) or len(seeds) > 2:
        raise UserError("give --before and --after, or --seeds with one or two revisions")
    if seeds:
        text = over_seeds([revisions.seeds_of(name) for name in seeds])
    else:
        both = revisions.load(before), revisions.load(after)
        text = comparison.render(comparison.compare(*both))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    command.run(main)
