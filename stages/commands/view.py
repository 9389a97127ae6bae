"""View: the address at which MLflow's runs table opens with the figures that people compare by.

In: the tracking store, and ``catalogue.HEADLINE``. Out: a shared view of the experiment, and its
address. Without one the table shows no figure and no parameter until columns are picked from
hundreds. MLflow 3.17 has no other way to open columns: its "share" button keeps a view as JSON in a
tag of the experiment, which the pages complete by their defaults, and this writes such a tag.
"""

import json
import socket
from collections.abc import Iterable
from typing import Any

from stages.core import command
from stages.core.errors import UserError
from stages.evaluation.catalogue import HEADLINE
from stages.tracking import runs

NAME = "headline"


def main(port: int = 5000) -> None:
    uri = runs.tracking_uri()
    if not uri.startswith("http"):
        uri = f"http://127.0.0.1:{port}"
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            raise UserError(
                f"port {port} of this machine can't be used ({error.strerror}); `make ui "
                f"PORT={port + 1}` takes another one"
            ) from None
    try:
        client, experiment = runs.connect()
        names = columns(client.search_runs([experiment], max_results=1000))
        widths = {name: 80 for name in names if name.startswith("metrics")}
        state = {"selectedColumns": names, "columnOrder": names, "columnWidths": widths}
        client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{NAME}", json.dumps(state))
    except Exception as error:  # MLflow's have no class in common
        raise UserError(f"MLflow: {runs.reason(error)}") from error
    print(f"{uri.rstrip('/')}/#/experiments/{experiment}/runs?viewStateShareKey={NAME}")


def columns(found: Iterable[Any]) -> list[str]:
    """The headline figures, the parameters of training that differ between runs, and two more."""
    values: dict[str, set[str]] = {}
    for run in found:
        for key, value in run.data.params.items():
            values.setdefault(key, set()).add(value)
    differ = [key for key in sorted(values) if key.startswith("train.") and len(values[key]) > 1]
    return [
        *(f"metrics.`{key}`" for key in HEADLINE),
        *(f"params.`{key}`" for key in differ),
        *("tags.`changed`", "attributes.`Source`"),
    ]


if __name__ == "__main__":
    command.run(main)
