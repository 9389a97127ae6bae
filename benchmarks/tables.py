"""Writes the tables in the documents that follow from code, dvc.yaml, presets and results.

python -m benchmarks.tables
"""

import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks import flops, size
from stages.evaluation.catalogue import (
    ACCURACY,
    BOTH,
    CORRECT,
    HEADLINE,
    METRICS,
    about,
    shown,
    with_interval,
)

README, EVALUATION, GUIDE = Path("README.md"), Path("docs/evaluation.md"), Path("docs/guide.md")
PERFORMANCE, SCALING = Path("docs/performance.md"), Path("docs/scaling.md")
LICENCES, REQUIREMENTS = Path("docs/licences.md"), Path("requirements.in")
METRICS_FILE = Path("reports/results/metrics.json")


def main() -> None:
    for (document, name), written in TABLES.items():
        rewrite(document, name, written())


def rewrite(document: Path, name: str, new: str) -> None:
    """Put ``new`` between the two markers of a document."""
    text = document.read_text(encoding="utf-8")
    start, end = markers(name)
    if start not in text:
        raise SystemExit(f"{document} has no place for '{name}'")
    old = start + between_markers(text, name) + end
    document.write_text(text.replace(old, start + new + end, 1), encoding="utf-8")


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->"


def between_markers(text: str, name: str = "results") -> str:
    """The table between two markers, as it is now."""
    start, end = markers(name)
    return text.partition(start)[2].partition(end)[0]


def table(metrics: Mapping[str, float]) -> str:
    """The headline figures as a Markdown table, with their intervals."""

    def row(words: str, base: str, tuned: str) -> str:
        return f"| {words} | {base} | {tuned} |"

    pairs, images = (shown(key, metrics[key]) for key in ("pairs", "images"))
    lines = [
        row("held-out measure", "base", "tuned"),
        "|---|---|---|",
        row(
            "**chosen-versus-rejected win rate**, by implicit reward, "
            f"{pairs} pairs, {images} images",
            "50%, by definition",
            f"**{with_interval(metrics, 'win_rate')}**",
        ),
        row(
            f"{ACCURACY.title.lower()}, the same pairs",
            with_interval(metrics, ACCURACY.base),
            with_interval(metrics, ACCURACY.tuned),
        ),
    ]
    if CORRECT.tuned in metrics:
        asked = shown("questions", metrics["questions"])
        lines.append(
            row(
                f"{CORRECT.title.lower()}, {asked} of the data set's own test questions",
                with_interval(metrics, CORRECT.base),
                with_interval(metrics, CORRECT.tuned),
            )
        )
    if "win_rate_blank" in metrics:
        again = shown("control_pairs", metrics["control_pairs"])
        words = f"control: win rate with a grey image in place of the real one, {again} pairs"
        blank = with_interval(metrics, "win_rate_blank")
        lines.append(f"| {words} | | {blank} |")
    return "\n".join(lines) + "\n"


def keys() -> str:
    """The catalogue as a Markdown table: keys of one meaning share a row, and what a run must
    have for a key to be there is a note below.
    """
    needs = list(dict.fromkeys(metric.needs for metric in METRICS.values() if metric.needs))
    together = {
        both.base: ([both.base, both.tuned, both.change], both.meaning.format(model="the model"))
        for both in BOTH
    }
    told = {name for names, _ in together.values() for name in names} - together.keys()
    rows = []
    for metric in METRICS.values():
        if metric.key in told:
            continue
        names, meaning = together.get(metric.key, ([metric.key], metric.meaning))
        way = {"higher": "↑", "lower": "↓", None: ""}[metric.better]
        unit = f"{metric.unit.name} {'±' * metric.interval}{way}".strip()
        note = f" ({needs.index(metric.needs) + 1})" if metric.needs else ""
        rows.append(f"| {' '.join(f'`{name}`' for name in names)} | {meaning}{note} | {unit} |")
    head = ["| key | meaning | unit |", "|---|---|---|"]
    notes = "; ".join(f"({place}) {need}" for place, need in enumerate(needs, start=1))
    return "\n".join([*head, *rows, "", f"Needs: {notes}."]) + "\n"


def headline() -> str:
    """DVC's metrics: the short names and what they are short for."""
    rows = []
    for short, key in HEADLINE.items():
        meaning = about(key).meaning if key in METRICS else "an end of its interval"
        rows.append(f"| `{short}` | `{key}` | {meaning} |")
    return "\n".join(["| key | short for | what it is |", "|---|---|---|", *rows]) + "\n"


def stages() -> str:
    """Stages as dvc.yaml describes them, with the parameters that they read."""
    rows = []
    for name, entry in yaml_of("dvc.yaml")["stages"].items():
        stage = entry.get("do", entry)
        knobs = [knob.removesuffix(".${key}") for knob in stage["params"]]  # of any item
        listed = ", ".join(f"`{knob}`" for knob in dict.fromkeys(knobs))
        rows.append(f"| `{name}` | {stage['desc']} | {listed} |")
    head = ["| stage | what it does | parameters it reads |", "|---|---|---|"]
    return "\n".join(head + rows) + "\n"


def presets() -> str:
    """Presets as their first lines describe them."""
    rows = []
    for path in sorted(Path("params").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        start = f"# Preset {path.stem}: "
        if not first.startswith(start):
            raise ValueError(f"{path}: begin with '{start}…'")
        rows.append(f"| [`{path.stem}`](../params/{path.name}) | {first.removeprefix(start)} |")
    return "\n".join(["| preset | what it is |", "|---|---|", *rows]) + "\n"


def yaml_of(file: str) -> Any:
    return YAML(typ="safe").load(Path(file).read_text(encoding="utf-8"))


def licences() -> str:
    """The direct requirements and the licences that their metadata name."""
    text = REQUIREMENTS.read_text(encoding="utf-8")
    names = re.findall(r"(?m)^([\w-]+)==", text)
    rows = [f"| {name} | {licence(importlib.metadata.metadata(name))} |" for name in sorted(names)]
    return "\n".join(["| package | licence |", "|---|---|", *rows, ""])


def licence(metadata: Any) -> str:
    """By the fields that packages have used over the years, the most exact first."""
    kinds = [kind.split(" :: ") for kind in metadata.get_all("Classifier") or []]
    classified = [kind[-1] for kind in kinds if kind[0] == "License" and len(kind) > 2]
    stated = str(metadata.get("License") or "").strip().partition("\n")[0]
    return str(metadata.get("License-Expression") or ", ".join(classified) or stated[:60])


TABLES: dict[tuple[Path, str], Callable[[], str]] = {
    (README, "results"): lambda: table(json.loads(METRICS_FILE.read_text(encoding="utf-8"))),
    (EVALUATION, "metrics"): keys,
    (GUIDE, "stages"): stages,
    (GUIDE, "presets"): presets,
    (GUIDE, "headline"): headline,
    (PERFORMANCE, "flops"): flops.table,
    (LICENCES, "licences"): licences,
    (Path("CONTRIBUTING.md"), "size"): size.table,
}


if __name__ == "__main__":
    main()
