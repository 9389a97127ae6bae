"""The view of MLflow's runs that opens with the figures people compare by.

MLflow's table shows no figure and no parameter until columns are picked from hundreds. Its "share"
button keeps a view as JSON in a tag of the experiment, and an address opens it; this writes such a
tag, in the format of MLflow 3.17's pages (looked at in Chromium).
"""

import json
from typing import Any

from stages.evaluation.catalogue import HEADLINE
from stages.tracking import runs

BARS = ("win_rate", "tuned_acc", "correct", "chosen_logps")
CURVES = ("train/loss", "train/reward_margin", "validation/reward_accuracy")
SECTIONS = {"Headline": BARS, "Training": CURVES}


def keep(name: str = "headline") -> str:
    """Keep the view under that name; the path of the address that opens it.

    Columns are the headline figures and every parameter of the training that differs between runs;
    charts are bars of the figures and curves of the training, before all others.
    """
    client, experiment = runs.connect()
    values: dict[str, set[str]] = {}
    for run in client.search_runs([experiment], "tags.state = 'complete'", max_results=1000):
        for key, value in run.data.params.items():
            if key.startswith("train."):
                values.setdefault(key, set()).add(value)
    varied = [key for key, found in sorted(values.items()) if len(found) > 1]
    columns = [
        *(f"metrics.`{key}`" for key in HEADLINE),
        *(f"params.`{key}`" for key in varied),
        *("tags.`changed`", "attributes.`Source`", "attributes.`Dataset`"),
    ]
    state = {
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {f"metrics.`{key}`": 80 for key in HEADLINE},
        "compareRunCharts": [
            chart(key, section) for section, keys in SECTIONS.items() for key in keys
        ],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True} for name in SECTIONS
        ],
        "isAccordionReordered": True,  # else sections are sorted by name
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
    }
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{name}", json.dumps(state))
    return f"#/experiments/{experiment}/runs?viewStateShareKey={name}"


def chart(key: str, section: str) -> dict[str, Any]:
    """A bar for each run, or a line for each run's curve."""
    card: dict[str, Any] = {
        "type": "BAR",
        "uuid": key,
        "metricKey": key,
        "metricSectionId": section,
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
    }
    if key in CURVES:
        card |= {
            "type": "LINE",
            "selectedMetricKeys": [key],
            "xAxisKey": "step",
            "scaleType": "linear",
            "xAxisScaleType": "linear",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
            "range": {},
        }
    return card
