"""Log the results in the working folder as a run in MLflow, and show the runs.

    make log                     # after a run whose tracking server was away
    make log NAME=brave-cat      # an experiment of the queue, after `dvc exp apply brave-cat`
    make ui                      # the runs table, with the figures that people compare by

In: parameters, and what the pipeline left in ``reports/`` and ``models/adapter``. Out: the
experiment's run. What was logged before is found again, and stays one run.

MLflow's table shows no figure and no parameter until columns are picked from hundreds, and MLflow
3.17 has one way to open columns: its "share" button keeps a view as JSON in a tag of the
experiment, which the pages complete by their defaults. ``make ui`` writes such a tag, of
``catalogue.HEADLINE`` and the parameters that differ.
"""

import json
import socket
from collections.abc import Iterable
from typing import Any

from stages.commands import ADAPTER, CARD, CURVES, PAGE, RESULTS, require, stale
from stages.core import command
from stages.core.errors import UserError
from stages.evaluation.catalogue import HEADLINE
from stages.tracking import runs

VIEW = "headline"
FIRST = 3  # figures before the parameters: two of validation and the win rate


def main(name: str = "", ui_port: int = 0) -> None:
    try:
        print(shown(ui_port) if ui_port else logged(name))
    except UserError:
        raise
    except Exception as error:  # MLflow's have no class in common
        raise UserError(f"MLflow: {runs.reason(error)}; fix that and run this again") from error


def logged(name: str) -> str:
    """Log the results here under the name of their experiment, and say where they are."""
    require(ADAPTER, RESULTS, CURVES, PAGE, CARD)
    if changed := stale():
        raise UserError(
            "dvc.lock is not current, so these are results of something else: "
            f"{', '.join(changed)} would run again (`dvc repro`)"
        )
    return runs.log_outcome(RESULTS, CURVES, ADAPTER, (PAGE, CARD), name=name)


def shown(port: int) -> str:
    """The address of the runs table, on the server or on a port of this machine."""
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
    client, experiment = runs.connect()
    names = columns(client.search_runs([experiment], max_results=1000))
    widths = {name: 80 for name in names if name.startswith("metrics")}
    state = {"selectedColumns": names, "columnOrder": names, "columnWidths": widths}
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", json.dumps(state))
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs?viewStateShareKey={VIEW}"


def columns(found: Iterable[Any]) -> list[str]:
    """What settings are chosen by, the parameters of training that differ between runs, then the
    other headline figures: so much fits one screen."""
    values: dict[str, set[str]] = {}
    for run in found:
        for key, value in run.data.params.items():
            values.setdefault(key, set()).add(value)
    differ = [key for key in sorted(values) if key.startswith("train.") and len(values[key]) > 1]
    figures = [f"metrics.`{key}`" for key in HEADLINE]
    return [
        *figures[:FIRST],
        *(f"params.`{key}`" for key in differ),
        *(*figures[FIRST:], "tags.`changed`", "attributes.`Source`"),
    ]


if __name__ == "__main__":
    command.run(main)
