"""Writes the tables that follow from the metrics: README's of the results, docs' of the keys.

python -m benchmarks.readme_table
"""

import json
from collections.abc import Mapping
from pathlib import Path

from stages.core import command
from stages.evaluation.catalogue import ACCURACY, CORRECT, METRICS, Metric, shown, with_interval


def main(
    metrics: Path = Path("reports/results/metrics.json"),
    readme: Path = Path("README.md"),
    docs: Path = Path("docs/evaluation.md"),
) -> None:
    results = table(json.loads(metrics.read_text(encoding="utf-8")))
    for document, name, written in ((readme, "results", results), (docs, "metrics", keys())):
        text = document.read_text(encoding="utf-8")
        start, end = markers(name)
        old = start + between_markers(text, name) + end
        document.write_text(text.replace(old, start + written + end, 1), encoding="utf-8")
    print(results, end="")


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
            f"**win rate** of tuned over base, {pairs} pairs, {images} images",
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
    """The catalogue as a Markdown table."""

    def row(metric: Metric) -> str:
        return (
            f"| `{metric.key}` | {metric.meaning} | {metric.unit.name} "
            f"| {'yes' if metric.interval else ''} | {metric.better or ''} | {metric.needs} |"
        )

    head = "| key | meaning | unit | interval | better | there with |\n|---|---|---|---|---|---|"
    return "\n".join([head, *map(row, METRICS.values())]) + "\n"


if __name__ == "__main__":
    command.run(main)
