"""Tokens, keys and passwords, planted where people have them, are in nothing that is written."""

import base64
import json
import os
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_mlflow_is_given_no_secret(tmp_path, monkeypatch, capfd):
    """With one in everything that goes into a run: parameters, dvc.lock, tags, an address."""
    for name, value in {**PLANTED, **runs.QUIET, "MLFLOW_TRACKING_USERNAME": "me"}.items():
        monkeypatch.setenv(name, value)
    tracked, untracked = tmp_path / "tracked", tmp_path / "untracked"
    (tracked / "reports" / "curves").mkdir(parents=True)
    monkeypatch.chdir(tracked)
    address = "https://me:PlantedServerPassword@host/x.json"
    noted = {"hub_token": PLANTED["HF_TOKEN"], "note": PLANTED["AWS_SECRET_ACCESS_KEY"]}
    parameters = {"data": {"source": {"path": address}}, "train": noted}
    described = {"kind": "sharegpt", "repo": address, "commit": PLANTED["HF_TOKEN"]}
    for name, values in {
        "params.yaml": parameters,
        "dvc.lock": {"stages": {"train": {"params": {"params.yaml": parameters}}}},
        "data/raw/SOURCE.json": described,
        "reports/metrics.json": {"win_rate": 0.9},
        "adapter/fingerprint.json": {"fingerprint": "0123456789abcdef"},
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps(values))
    outcome: Any = (Path("reports"), Path("reports/curves"), Path("adapter"), [])
    runs.complete_run(*outcome)
    with monkeypatch.context() as away:
        server = "http://me:PlantedServerPassword@127.0.0.1:9/mlflow"
        away.setenv("MLFLOW_TRACKING_URI", server)
        runs.complete_run(*outcome)
    untracked.mkdir()
    for name in ("params.yaml", "dvc.lock", "data"):
        Path(name).rename(untracked / name)  # where the secrets were planted
    said = capfd.readouterr()
    assert "MLflow: logged as workspace-" in said.err
    assert "MLflow: the run was not logged" in said.err
    assert (tracked / "mlflow.db").stat().st_size > 100_000
    assert "***" in next((tracked / "mlartifacts").rglob("params.yaml")).read_text()
    assert leaks(tracked, *said) == []
