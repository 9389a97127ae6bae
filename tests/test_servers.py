"""A tracking server as a team runs it: ``mlflow server`` with MLflow's own accounts.

One server for all tests, which need what ``make extras`` installs.
"""

import base64
import json
import urllib.request

import pytest

from stages.tracking import runs
from tests import test_runs
from tests.repository import free_port
from tests.test_runs import (
    CURVES,
    FINGERPRINT,
    complete,
    curves,
    logged,
    outcome,
)

pytestmark = [pytest.mark.slow, pytest.mark.rehearsal]
pytest.importorskip("flask_wtf", reason="Flask-WTF is not installed: make extras")

_own_environment, project = test_runs._own_environment, test_runs.project
ADMIN, ANN, BOB = "the-admins-own-1", "the-password-of-ann", "the-password-of-bob"


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The address of a server in which ann and bob have accounts."""
    folder, port = tmp_path_factory.mktemp("team"), free_port()
    accounts = f"default_permission = READ\ndatabase_uri = sqlite:///{folder}/accounts.db\n"
    accounts += "auth_cache_ttl_seconds = 60\n"  # else each request costs a third of a second
    (folder / "accounts.ini").write_text(f"[mlflow]\n{accounts}")
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "accounts.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs the forms of this test",
    }
    address, files = f"http://127.0.0.1:{port}", folder / "files"
    with test_runs.server(
        f"sqlite:///{folder}/runs.db", port, files, "--app-name", "basic-auth", **settings
    ):
        for name, password in (("ann", ANN), ("bob", BOB)):
            tell(address, "2.0/mlflow/users/create", username=name, password=password)
        yield address


def tell(address, what, **values):
    """Post what only MLflow's admin may ask for."""
    request = urllib.request.Request(
        f"{address}/api/{what}",
        json.dumps(values).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(f'admin:{ADMIN}'.encode()).decode()}",
        },
    )
    urllib.request.urlopen(request).close()


@pytest.fixture
def log_in(team, project, monkeypatch):
    """``log_in(name, password)`` as this process, in an empty project."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team)

    def log_in(name, password):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    return log_in


def run_of(name):
    (run,) = (run for run in logged() if run.info.run_name == name)
    return run


def test_who_is_refused_is_told_once_and_logs_later(team, log_in, capfd):
    log_in("ann", "not-the-password")
    with runs.Live(FINGERPRINT, "brave-cat") as live:
        live.log(1, "train", {"loss": 0.69})
    runs.complete_run(*outcome())
    said = "".join(capfd.readouterr())
    assert said.count("set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") == 2
    assert len(said.splitlines()) == 2  # of the curves, and of the run
    log_in("ann", ANN)
    complete("brave-cat")
    assert curves(run_of("brave-cat")) == CURVES
    _, experiment = runs.connect()  # whoever makes it may write to it, and nobody else
    log_in("bob", BOB)
    bobs = outcome(metrics={"win_rate": 0.5})
    runs.complete_run(*bobs)
    said += capfd.readouterr().err
    assert "has to grant EDIT" in said
    grant = {"resource_type": "experiment", "resource_id": experiment, "permission": "EDIT"}
    tell(team, "3.0/mlflow/users/permissions/grant", username="bob", **grant)
    runs.log_outcome(*bobs, name="calm-dog")
    assert run_of("calm-dog").info.status == "FINISHED"
    said += "".join(capfd.readouterr())
    assert not any(secret in said for secret in (ADMIN, ANN, BOB, "not-the-password"))
