"""Tokens, keys and passwords, planted where people have them, are in nothing that is written."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.core.errors import UserError
from stages.params import params
from stages.tracking import runs
from tests.hub_server import serve, topic_overwrite_repo

ROOT = Path(__file__).parent.parent
PLANTED = {
    "HF_TOKEN": "hf_PlantedHubToken00000000000000",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYID0000",
    "AWS_SECRET_ACCESS_KEY": "PlantedS3SecretKey/000000000000000000000",
    "AWS_SESSION_TOKEN": "PlantedS3SessionToken0000",
    "MLFLOW_TRACKING_PASSWORD": "PlantedMlflowPassword",
    "MLFLOW_TRACKING_TOKEN": "PlantedMlflowToken",
}
IN_ADDRESSES = ("PlantedProxyPassword", "PlantedEndpointPassword", "PlantedServerPassword")
BASIC = "Basic " + base64.b64encode(b"me:PlantedEndpointPassword").decode()  # as httpx sends it
SECRETS = (*PLANTED.values(), *IN_ADDRESSES, BASIC.split()[1], "X-Signature=secret")


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        **PLANTED,
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1,localhost",
        "HTTPS_PROXY": "http://me:PlantedProxyPassword@127.0.0.1:9",
        **more,
    }


def leaks(folder: Path, *said: str) -> list[str]:
    """Where a secret is: in what was printed, or below ``folder`` in a file or its name."""
    found = [f"printed: {secret}" for secret in SECRETS for text in said if secret in text]
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{path}: {s}" for s in SECRETS if s.encode() in content or s in path.name]
    return found


def test_fetch_writes_and_prints_no_secret_whether_it_ends_well_or_not(tmp_path, write_params):
    """Of the Hub through an endpoint with a password; refused in every way."""
    shard = "TPO-Dataset_000-2.parquet"
    options: dict[str, dict[str, Any]] = {
        "token": {"token": PLANTED["HF_TOKEN"]},
        "password": {"token": BASIC},
        "gated": {"gated": True, "token": "another"},
        "error": {"status": 500},
        "busy": {"status": 429},
        "wrong": {"wrong": [shard], "token": BASIC},
    }
    repos = {
        name: topic_overwrite_repo(rows=2, shards=1, name=f"owner/{name}", **given)
        for name, given in options.items()
    }
    with serve(repos.values()) as url:
        children = {}
        for name, repo in repos.items():
            source = {"kind": "hub", "repo": repo.name, "revision": "main", "files": ["*.parquet"]}
            folder = tmp_path / name
            folder.mkdir()
            write_params(folder / "params.yaml", **{"data.sources": {"mine": source}})
            password = "" if name == "token" else "me:PlantedEndpointPassword@"
            endpoint = url.replace("://", f"://{password}")
            words = ("-m", "stages.fetch", "--item", "data.sources.mine", "--out", "raw")
            children[name] = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=environment(HF_ENDPOINT=endpoint, HF_HOME=str(folder / "home")),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        said = {name: child.communicate(timeout=60) for name, child in children.items()}
    failed = {name for name, child in children.items() if child.returncode}
    assert failed == {"gated", "error", "busy", "wrong"}, said
    assert not any("Traceback" in text for texts in said.values() for text in texts)
    assert leaks(tmp_path, *(text for texts in said.values() for text in texts)) == []
    assert (tmp_path / "token" / "raw" / "SOURCE.json").exists()


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_a_password_in_params_is_refused_and_not_repeated(tmp_path, write_params, scheme):
    """What is in params.yaml is in dvc.lock, on the page and in MLflow too."""
    place = f"{scheme}://me:PlantedServerPassword@host/x.json"
    source = {"kind": "path", "path": place, "licence": None}
    write_params(tmp_path / "params.yaml", **{"data.sources": {"mine": source}})
    with pytest.raises(UserError, match="is an address: `dvc import-url`") as caught:
        params.load(tmp_path / "params.yaml")
    assert not any(secret in str(caught.value) for secret in SECRETS)


def complete(folder: Path) -> None:
    """A run with a secret in everything that goes into it: parameters, tags, names of files."""
    (folder / "reports" / "curves").mkdir(parents=True)
    (folder / "reports" / "curves" / "train.csv").write_text("step,epoch,loss\n1,0.1,0.69\n")
    (folder / "reports" / "report.html").write_text("<p>report</p>")
    (folder / "train.json").write_text("[]")
    (folder / "data" / "raw" / "mine").mkdir(parents=True)
    (folder / "params.yaml").write_text("data: {sources: {mine: {}}}")
    described = {
        "kind": "hub",
        "repo": "https://me:PlantedServerPassword@host/x.json",
        "commit": PLANTED["HF_TOKEN"],
    }
    (folder / "data" / "raw" / "mine" / "SOURCE.json").write_text(json.dumps(described))
    runs.complete_run(
        "0123456789abcdef",
        parameters={
            "data": {"source": {"path": "https://me:PlantedServerPassword@host/x.json"}},
            "train": {"hub_token": PLANTED["HF_TOKEN"], "note": PLANTED["AWS_SECRET_ACCESS_KEY"]},
        },
        metrics={"win_rate": 0.9},
        curves=Path("reports/curves"),
        artifacts=[Path("reports/report.html")],
        datasets=[Path("train.json")],
        name="brave-cat",
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "DVC_")):
            monkeypatch.delenv(name)
    for name, value in {**PLANTED, **runs.QUIET, "MLFLOW_TRACKING_USERNAME": "me"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_what_waits_for_a_tracking_server_holds_no_secret(project, monkeypatch, capfd):
    address = "http://me:PlantedServerPassword@127.0.0.1:9/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    complete(project)
    shutil.rmtree(project / "data")  # the planted SOURCE.json itself
    said = capfd.readouterr()
    assert "MLflow: the run was not logged" in said.err
    assert list((project / "reports" / "mlflow_pending").iterdir())
    assert leaks(project, *said) == []


@pytest.mark.slow
def test_mlflows_database_holds_no_secret(project, capfd):
    complete(project)
    shutil.rmtree(project / "data")
    said = capfd.readouterr()
    assert "MLflow: logged as brave-cat" in said.err
    assert (project / "mlflow.db").stat().st_size > 100_000
    assert leaks(project, *said) == []
