"""Log: what the working folder holds, as a run in MLflow.

    make log                     # after a run whose tracking server was away
    make log NAME=brave-cat      # an experiment of the queue, after `dvc exp apply brave-cat`

In: parameters, and what the pipeline left in ``reports/`` and ``models/adapter``. Out: the
experiment's run. What was logged before is found again, and stays one run.
"""

from stages.commands import outputs
from stages.core import command
from stages.core.errors import UserError
from stages.tracking import runs


def main(name: str = "") -> None:
    at = outputs.read()
    outputs.require(at.adapter, at.results, at.curves, at.page, at.card)
    if stale := outputs.stale():
        raise UserError(
            f"dvc.lock is not current, so these are results of something else: {', '.join(stale)} "
            "would run again (`dvc repro`)"
        )
    outcome = runs.Outcome(at.results, at.curves, at.adapter, files=(at.page, at.card))
    try:
        print(runs.log_outcome(outcome, name))
    except Exception as error:  # MLflow's have no class in common
        raise UserError(f"MLflow: {runs.reason(error)}; mend that and run this again") from error


if __name__ == "__main__":
    command.run(main)
