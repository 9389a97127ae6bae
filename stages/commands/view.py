"""View: the runs table of MLflow with the figures that people compare by, and its address.

In: the tracking store, and ``catalogue.HEADLINE``. Out: a shared view of the experiment, the kind
that MLflow's own "share" button keeps (a tag of the experiment), and the address that opens it.
Without one, the table shows no figure and no parameter until columns are picked from hundreds.
"""

from stages.core import command
from stages.core.errors import UserError
from stages.tracking import runs, shared_view


def main(port: int = 5000) -> None:
    try:
        path = shared_view.keep()
    except Exception as error:
        raise UserError(f"MLflow: {runs.reason(error)}") from error
    uri = runs.tracking_uri()
    site = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"
    print(f"{site}/{path}")


if __name__ == "__main__":
    command.run(main)
