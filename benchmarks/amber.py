"""What AMBER's second look changes: its own script's figures of published answers, and the task's.

    git clone https://github.com/junyangwang0410/AMBER
    git clone https://github.com/RachalHys/CV-AGLA-Captioning
    python -m benchmarks.amber --lists AMBER --answers CV-AGLA-Captioning

AMBER's script looks a second time at a word that is on no list of the image: spaCy's vectors
(``en_core_web_lg``) may say that it is near to one that is. The task ``amber_generative`` does not,
and it has no tagger. AMBER publishes no answers of models. The second repository has answers of
five to all 1,004 photographs, and what that script, vectors and tagger included, printed for each.
So both differences together are measured here, without the vectors.
"""

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

from tabulate import tabulate

from stages.answers import published
from stages.core import command
from stages.core.errors import UserError

LISTS = "534babf6bbfcce2e735c26289dedfb21cef3c939"
TASK = Path("tasks/published/amber/amber.py")
# What answered, its commit, answers and printed figures; by the commits' own words.
SETS = (
    ("InstructBLIP + AGLA", "98e5b9d", "amber_eval.json", "result.txt"),
    ("InstructBLIP + small AGLA", "fd159a7", "amber_eval_small.json", "result_small.txt"),
    ("LLaVA-1.5 + small AGLA", "3cc84f4", "amber_eval_llava.json", "result_llava.txt"),
    ("LLaVA-1.5", "a5b56f4", "amber_eval_llava.json", "result_llava.txt"),
    ("LLaVA-1.5 + SAM", "c48d016", "amber_eval_sam.json", "result_sam.txt"),
)
METRICS = ("chair", "cover", "hal", "cog")


def shown(clone: Path, commit: str, path: str) -> str:
    """A file of a clone at a commit.

    Raises:
        UserError: the clone does not have it.
    """
    asked = ["git", "-C", str(clone), "show", f"{commit}:{path}"]
    done = subprocess.run(asked, capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"{clone} has no {path} at {commit}; clone it with all of its history")
    return done.stdout.decode()


def printed(text: str) -> list[float]:
    """CHAIR, Cover, Hal and Cog in %, as AMBER's script prints them."""
    return [float(n) for n in re.findall(r"^(?:CHAIR|Cover|Hal|Cog):\s*([\d.]+)", text, re.M)]


def by_the_task(
    task: dict[str, Any], annotations: dict[int, dict[str, Any]], answers: list[dict[str, Any]]
) -> list[float]:
    """The same four of the task ``amber_generative``, in %."""
    rows = [task["described"](annotations[each["id"]], [each["response"]]) for each in answers]
    parts = [[(row[m], 1) if m == "hal" else row[m] for row in rows] for m in METRICS]
    return [100 * published.ratio(part) for part in parts]


def main(lists: Path, answers: Path) -> None:
    def pinned(url: str, sha256: str) -> Path:
        return lists / "data" / url.rpartition("/")[2]

    published.pinned = pinned  # the clone's files in place of downloaded ones
    task = runpy.run_path(str(TASK))
    annotated = json.loads(shown(lists, LISTS, "data/annotations.json"))
    annotations = {each["id"]: each for each in annotated if each["type"] == "generative"}
    rows = []
    for name, commit, said, figures in SETS:
        given = json.loads(shown(answers, commit, f"AMBER/{said}"))
        theirs = printed(shown(answers, commit, f"AMBER/{figures}"))
        ours = by_the_task(task, annotations, given)
        both = zip(ours, theirs, strict=True)
        rows.append([name, *(f"{a:.1f} / {b:.1f} ({a - b:+.1f})" for a, b in both)])
    print("the task / AMBER's script with its second look (difference), %")
    print(tabulate(rows, ["answers of", *METRICS], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    command.run(main)
