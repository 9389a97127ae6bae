"""Writes the table of results in README.md from reports/metrics.json.

python -m benchmarks.readme_table
"""

import json
from collections.abc import Mapping
from pathlib import Path

from stages.core import command

MARKERS = ("<!-- results -->\n", "<!-- /results -->")


def main(metrics: Path = Path("reports/metrics.json"), readme: Path = Path("README.md")) -> None:
    written = table(json.loads(metrics.read_text(encoding="utf-8")))
    text = readme.read_text(encoding="utf-8")
    old = between_markers(text)
    readme.write_text(text.replace(MARKERS[0] + old, MARKERS[0] + written, 1), encoding="utf-8")
    print(written, end="")


def between_markers(text: str) -> str:
    """What stands between the markers: the table, as it is now."""
    return text.partition(MARKERS[0])[2].partition(MARKERS[1])[0]


def table(metrics: Mapping[str, float]) -> str:
    """The headline figures as a Markdown table; shares in per cent, with their intervals."""
    lines = [
        "| held-out measure | base | tuned |",
        "|---|---|---|",
        f"| **win rate** of tuned over base, {metrics['pairs']:,} pairs, {metrics['images']:,} "
        f"images | 50%, by definition | **{share(metrics, 'win_rate')}** |",
        f"| preference accuracy, the same pairs | {share(metrics, 'base_accuracy')} "
        f"| {share(metrics, 'tuned_accuracy')} |",
    ]
    if "questions" in metrics:
        lines.append(
            f"| right answers, {metrics['questions']:,} of the data set's own test questions "
            f"| {share(metrics, 'base_correct')} | {share(metrics, 'tuned_correct')} |"
        )
    if "win_rate_blank" in metrics:
        lines.append(
            f"| control: win rate with a grey image in place of the real one, "
            f"{metrics['control_pairs']:,} pairs | | {share(metrics, 'win_rate_blank')} |"
        )
    return "\n".join(lines) + "\n"


def share(metrics: Mapping[str, float], key: str) -> str:
    """``"91.2% [89.5, 92.8]"``; no brackets where there is no interval."""
    text = f"{100 * metrics[key]:.1f}%"
    if f"{key}_low" not in metrics:
        return text
    return f"{text} [{100 * metrics[f'{key}_low']:.1f}, {100 * metrics[f'{key}_high']:.1f}]"


if __name__ == "__main__":
    command.run(main)
