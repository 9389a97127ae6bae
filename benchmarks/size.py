"""How large the project is, against ceilings that may only fall.

    python -m benchmarks.size

A change that takes away lowers a ceiling here; one that needs a higher one takes away elsewhere.
"""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.contracts import ROOT, STAGES, imported, source_of

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md")


@dataclass(frozen=True)
class Measure:
    """What is counted, how, and the most that is allowed."""

    name: str
    count: Callable[[], int]
    ceiling: int


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def files(*patterns: str) -> list[Path]:
    """Files below the project that Git knows or would take, by patterns of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in set(listed.stdout.splitlines()) if (path := ROOT / name).is_file()]


def modules() -> list[str]:
    """Dotted names of all modules below ``stages``, without packages."""
    found = (path.relative_to(ROOT).with_suffix("") for path in files("stages/*.py"))
    return sorted(".".join(path.parts) for path in found if path.name != "__init__")


def words() -> int:
    return sum(len(path.read_text(encoding="utf-8").split()) for path in files(*DOCUMENTS))


def imported_by_the_pipeline() -> int:
    """Lines of every module that some stage imports, late imports and plumbing included."""
    waiting, found = {stage.module for stage in STAGES if stage.file == "dvc.yaml"}, set[str]()
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= imported(name) - found
    return lines(source_of(name) for name in found)


def circles() -> int:
    """0, or 1 where modules import each other in a circle, late imports included."""
    known = modules()
    graph = {name: imported(name) & set(known) - {name} for name in known}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        print("a circle:", " → ".join(error.args[1]))
        return 1
    return 0


def doubled_names() -> int:
    named = Counter(module.rpartition(".")[2] for module in modules())
    return sum(number > 1 for number in named.values())


MEASURES = (
    Measure("lines of Python in `stages/`", lambda: lines(files("stages/*.py")), 14_500),
    Measure("modules in `stages/`", lambda: len(files("stages/*.py")), 88),
    Measure("lines of tests", lambda: lines(files("tests/*.py")), 18_000),
    Measure("words in README, docs, CONTRIBUTING, CHANGELOG, SECURITY", words, 16_000),
    Measure("lines that `fetch` to `report` import", imported_by_the_pipeline, 11_000),
    Measure("lines of `params/`", lambda: lines(files("params/*.yaml")), 330),
    Measure("circles of imports", circles, 0),
    Measure("module names used twice below `stages/`", doubled_names, 0),
)


def table() -> str:
    """The ceilings as a Markdown table, for CONTRIBUTING."""
    rows = [f"| {each.name} | {each.ceiling:,} |" for each in MEASURES]
    return "\n".join(["| measure | at most |", "|---|---|", *rows]) + "\n"


def main() -> None:
    over = False
    for each in MEASURES:
        found = each.count()
        over |= found > each.ceiling
        mark = "  ABOVE" if found > each.ceiling else ""
        print(f"{found:>8,} of {each.ceiling:>6,}  {each.name}{mark}")
    raise SystemExit(over)


if __name__ == "__main__":
    main()
