"""What lm-eval found for one model: as files, and as figures with the values behind them.

The files are lm-eval's own output without what differs from run to run (times, paths, environment):
``results.json`` and ``samples/<task>.jsonl``, the same bytes each time.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Results:
    """What lm-eval found, as it is written: plain JSON values only.

    ``document``: ``results.json``, empty where no task was asked for. ``samples``: for each task a
    row a document, in order: ``doc_id``, ``target``, ``arguments`` (the texts that the model was
    given), ``images`` (hashes of their pixels), ``resps``, ``filtered_resps``, ``filter``,
    ``metrics`` (name to value).
    """

    document: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Figures:
    """One task's figures, or those of a group of tasks.

    ``metrics``: name to figure. ``values``: for each metric that is a mean, or a ratio of sums, the
    value of every document, shape (documents,); their mean is the figure. ``clusters``:
    (documents,) labels, the same for documents that show the same images. ``higher_is_better``:
    None where neither is. ``parts``: the tasks of a group, or the task itself.
    """

    metrics: dict[str, float]
    values: dict[str, tuple[float, ...]]
    clusters: tuple[str, ...]
    higher_is_better: dict[str, bool | None]
    parts: tuple[str, ...]

    @property
    def documents(self) -> int:
        return len(self.clusters)


def leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a name stands for: itself, or those of a group, in order."""
    parts = members.get(name, ())
    return [leaf for part in parts for leaf in leaves(part, members)] if parts else [name]


# files


def to_json(value: Any) -> bytes:
    """Deterministic JSON; numbers that JSON has no word for become null, functions their names."""

    def plain(item: Any) -> Any:
        is_number_of_numpy = hasattr(item, "item") and not hasattr(item, "__len__")
        return item.item() if is_number_of_numpy else getattr(item, "__name__", type(item).__name__)

    finite = json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)
    return json.dumps(finite, sort_keys=True, ensure_ascii=False).encode()


def write(results: Results, folder: Path) -> None:
    """Write ``results.json`` and ``samples/<task>.jsonl``, the same bytes each time."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for old in (folder / "samples").glob("*.jsonl"):
        old.unlink()
    document = json.dumps(results.document, sort_keys=True, ensure_ascii=False, indent=1)
    (folder / "results.json").write_text(document + "\n", encoding="utf-8")
    for task, rows in results.samples.items():
        lines = b"".join(to_json(row) + b"\n" for row in rows)
        (folder / "samples" / f"{task}.jsonl").write_bytes(lines)


def read(folder: Path) -> Results:
    """Read what ``write`` wrote."""
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    samples = {}
    for task in sorted(document.get("datasets", {})):
        lines = (folder / "samples" / f"{task}.jsonl").read_bytes().splitlines()
        samples[task] = [json.loads(line) for line in lines]
    return Results(document, samples)


# figures


def figures(results: Results) -> dict[str, Figures]:
    """The figures of every task and of every group that has its own, by name."""
    document, found = results.document, {}
    for name, told in document.get("results", {}).items():
        parts = tuple(leaves(name, document.get("group_subtasks", {})))
        rows = [(task, row) for task in parts for row in results.samples.get(task, [])]
        metrics, values = {}, {}
        for key, figure in told.items():
            metric, comma, kept_by = key.partition(",")
            if not comma or not is_number(figure):
                continue
            label = metric if kept_by == "none" else f"{metric}_{kept_by}"
            metrics[label] = float(figure)
            numbers = linear([r["metrics"].get(metric) for _, r in rows if r["filter"] == kept_by])
            # Only where documents' values average to the figure is their mean what it reports.
            if numbers and math.isclose(
                sum(numbers) / len(numbers), figure, rel_tol=1e-9, abs_tol=1e-12
            ):
                values[label] = numbers
        if metrics:
            first = min((row["filter"] for _, row in rows), default=None)
            clusters = tuple(
                " ".join(row["images"]) or f"{task} {row['doc_id']}"
                for task, row in rows
                if row["filter"] == first
            )
            better = document.get("higher_is_better", {}).get(name, {})
            found[name] = Figures(metrics, values, clusters, better, parts)
    return found


def linear(values: Sequence[Any]) -> tuple[float, ...]:
    """The documents' values of a metric, whose mean is its figure; none where they are no numbers.

    Of a ratio of sums, R = Σn / Σd, a document that gives (n, d) has R + (n - R·d) / mean(d): its
    linear part (Cochran 1977, Sampling Techniques, 6.4), so that what holds for means, intervals
    by image included, holds for ratios of many documents.
    """
    if all(map(is_number, values)):
        return tuple(map(float, values))
    pairs = [value for value in values if isinstance(value, list) and all(map(is_number, value))]
    whole = sum(of for _, of in pairs) if {len(pair) for pair in pairs} == {2} else 0
    if not whole or len(pairs) < len(values):
        return ()
    figure, share = sum(part for part, _ in pairs) / whole, whole / len(values)
    return tuple(figure + (part - figure * of) / share for part, of in pairs)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
