"""Sync: log the runs that MLflow could not take when they ended.

In: ``reports/mlflow_pending/``, where each of them waits. Out: MLflow; what was logged is removed.
"""

from stages.core import command
from stages.core.errors import UserError
from stages.tracking import runs


def main() -> None:
    waiting = runs.pending()
    if not waiting:
        print("MLflow: nothing waits to be logged")
    for folder in waiting:
        try:
            print(runs.log_record(folder))
        except Exception as error:
            raise UserError(
                f"MLflow: {runs.PENDING / folder.name} could not be logged, "
                f"{runs.reason(error)}; it is still there: mend that, or name another server in "
                "MLFLOW_TRACKING_URI, and run this again"
            ) from error


if __name__ == "__main__":
    command.run(main)
