"""Back: the workspace as the last commit has it, parameters and results included.

    make back

In: Git's last commit, and DVC's cache. Edits that are not committed are lost, as ``git restore``
does it. Refused where the cache lacks an output of the commit: on a machine that rounds otherwise,
nobody could bring back what lies here.
"""

import subprocess
import sys

from stages.core import command
from stages.core.errors import UserError
from stages.core.text import listed

KEEP = "git commit -am 'Results of this machine'"


def main() -> None:
    if missing := lacking():
        raise UserError(
            f"the cache lacks {listed(missing, 5, longest=200)} of the last commit, so what is "
            f"here would be lost; `{KEEP}` keeps it, and `dvc fetch --all-branches` gets what was "
            "pushed of the commit's"
        )
    for words in (["git", "restore", "."], [sys.executable, "-m", "dvc", "checkout"]):
        if subprocess.run(words, check=False).returncode:
            raise UserError(f"`{' '.join(words[-2:])}` failed for the reason above")


def lacking() -> list[str]:
    """The outputs of the last commit that the cache does not hold whole."""
    from dvc.repo import Repo

    with Repo() as repo, repo.switch("HEAD"):
        outs = [out for out in repo.index.outs if out.use_cache and out.hash_info]
        return sorted(str(out) for out in outs if out.changed_cache())


if __name__ == "__main__":
    command.run(main)
