"""A tracking server as a team runs it: ``mlflow server`` with MLflow's own accounts.

One server for all tests, which need what ``make extras`` installs.
"""

import base64
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.tracking import runs
from tests import test_runs
from tests.repository import free_port
from tests.test_runs import (
    CURVES,
    FILES,
    FINGERPRINT,
    complete,
    curves,
    logged,
    outcome,
)

pytestmark = pytest.mark.slow
pytest.importorskip("flask_wtf", reason="Flask-WTF is not installed: make extras")

_own_environment, project = test_runs._own_environment, test_runs.project
ADMIN, ANN, BOB = "the-admins-own-1", "the-password-of-ann", "the-password-of-bob"
SECRETS = (ADMIN, ANN, BOB, "not-the-password")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The address and the folder of a server in which ann and bob have accounts."""
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
        yield address, folder


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
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team[0])

    def log_in(name, password):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    return log_in


def leaked(team, project, said):
    """Passwords that were printed, or that the project, the database or the server keeps."""
    kept = [
        file.read_bytes() for at in (project, team[1]) for file in at.rglob("*.*") if file.is_file()
    ]
    return [secret for secret in SECRETS if secret.encode() in b"".join([*kept, said.encode()])]


def run_of(name):
    (run,) = (run for run in logged() if run.info.run_name == name)
    return run


def test_two_who_come_at_once_make_one_experiment_and_the_server_keeps_the_page(
    team, project, log_in
):
    log_in("ann", ANN)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: runs.connect()[1], range(2))
    assert first == second
    complete("ann-1", "a" * 16)
    run = run_of("ann-1")
    assert test_runs.files(run) == FILES
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    kept = f"{run.info.run_id}/artifacts/reports/report.html"
    assert [file.read_text() for file in (team[1] / "files").rglob(kept)] == ["<p>report</p>"]


def test_who_is_refused_is_told_once_and_logs_later(team, project, log_in, capfd):
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
    tell(team[0], "3.0/mlflow/users/permissions/grant", username="bob", **grant)
    runs.log_outcome(*bobs, name="calm-dog")
    assert run_of("calm-dog").info.status == "FINISHED"
    assert leaked(team, project, said + "".join(capfd.readouterr())) == []
