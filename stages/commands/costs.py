"""Costs: what each stage took when it ran in this clone, as a table.

In: ``reports/diary/``, which each stage writes when it runs, and ``dvc.yaml`` for the order. Out:
the table on standard output. A stage that came from DVC's cache has no diary.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tabulate import tabulate

from stages.core import command

PIPELINE = Path("dvc.yaml")
COLUMNS = {
    "seconds": "time",
    "device": "device",
    "peak_memory_gb": "peak memory",
    "gpu_peak_memory_gb": "peak GPU memory",
    "pairs_per_second": "pairs/s",
    "at": "ended (UTC)",
}


def main(diary: Path = command.DIARY) -> None:
    print(table(stage_names(PIPELINE), entries(diary)))


def table(names: Sequence[str], diary: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a stage, in the pipeline's order."""
    rows = [
        [name, *(shown(column, diary[name].get(column)) for column in COLUMNS)]
        if name in diary
        else [name, "from the cache"]
        for name in [*names, *(name for name in diary if name not in names)]
    ]
    return tabulate(rows, ["stage", *COLUMNS.values()], disable_numparse=True)


def shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "seconds":
        return duration(value)
    if column.endswith("_gb"):
        return f"{value:.1f} GB"
    if column == "pairs_per_second":
        return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
    return str(value)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def stage_names(pipeline: Path) -> list[str]:
    """Stages of a dvc.yaml in its order; ``fetch@data`` for an item of a ``foreach``."""
    stages = YAML(typ="safe").load(pipeline.read_text(encoding="utf-8"))["stages"]
    return [
        name if "foreach" not in stage else f"{name}@{item}"
        for name, stage in stages.items()
        for item in stage.get("foreach", [None])
    ]


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the stages that ran here wrote of themselves, by stage."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {entry["stage"]: entry for entry in found}


if __name__ == "__main__":
    command.run(main)
