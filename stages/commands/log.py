"""Log: what the working folder holds, as a run in MLflow.

    make log                     # after a run whose tracking server was away
    make log NAME=brave-cat      # an experiment of the queue, after `dvc exp apply brave-cat`

In: parameters, and what the pipeline left in ``reports/`` and ``models/adapter``. Out: the
experiment's run. What was logged before is found again, and stays one run.
"""

from stages.commands import ADAPTER, CARD, CURVES, PAGE, RESULTS, require, stale
from stages.core import command
from stages.core.errors import UserError
from stages.tracking import runs


def main(name: str = "") -> None:
    require(ADAPTER, RESULTS, CURVES, PAGE, CARD)
    if changed := stale():
        raise UserError(
            "dvc.lock is not current, so these are results of something else: "
            f"{', '.join(changed)} would run again (`dvc repro`)"
        )
    try:
        print(runs.log_outcome(RESULTS, CURVES, ADAPTER, (PAGE, CARD), name=name))
    except Exception as error:  # MLflow's have no class in common
        raise UserError(f"MLflow: {runs.reason(error)}; mend that and run this again") from error


if __name__ == "__main__":
    command.run(main)
