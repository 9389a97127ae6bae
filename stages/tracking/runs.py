"""The experiment's MLflow run: opened by train, completed by evaluate, never in their way.

MLflow mirrors what ``reports/`` and ``dvc.lock`` hold. A tracking server that is down, slow or
full costs a message: what could not be logged waits in ``reports/mlflow_pending/``, and

    python -m stages.tracking.runs

logs it later. One experiment is one run, named after ``DVC_EXP_NAME``, and found again by a tag,
the fingerprint of its training that the caller gives:

- ``open_run`` makes the run, or takes up the one that a crash or an interruption left;
- ``live`` lets the training process write curves to it while it runs;
- ``complete_run`` adds everything else. A completed run is never changed by another result: it gets
  a run of its own, with the curves read from the CSV. Doing it twice changes nothing;
- ``attach`` adds files to a completed run: the report, which is written from its results.

Environment: ``MLFLOW_TRACKING_URI`` (default: ``mlflow.db`` at the project's root),
``MLFLOW_EXPERIMENT_NAME``, ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``.
"""

import csv
import hashlib
import json
import logging
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from stages.core.errors import UserError
from stages.core.project import project_root

EXPERIMENT = "preference-tuning"
PENDING = Path("reports", "mlflow_pending")
PROBE_SECONDS = 4.0
FLUSH_SECONDS = 2.0

# MLflow's own limits (mlflow.utils.validation): a longer value is refused with the whole batch.
_PARAMETER_CHARACTERS = 6000
_TAG_CHARACTERS = 5000
_PARAMETERS_A_BATCH = 100
_METRICS_A_BATCH = 1000
_DIGEST_CHARACTERS = 36

_TRAINING, _TRAINED, _COMPLETE = "training", "trained", "complete"  # values of the tag "state"


@dataclass(frozen=True)
class Dataset:
    """A data set that went into a run: ``digest`` as ``dvc.lock`` has it, ``source`` in words."""

    name: str
    digest: str
    source: str


@dataclass(frozen=True)
class RunRecord:
    """What a run is completed with.

    ``parameters`` may be nested; ``metrics`` is flat, with ``None`` left out. ``curves`` is a
    folder with one CSV a split (``train.csv``), or one CSV with a column ``split``: the column
    ``step``, then one a metric. Column ``loss`` of split ``train`` becomes the MLflow metric
    ``train/loss``; an empty cell is no point, and ``epoch`` is left out. ``artifacts`` are files
    or folders.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    curves: Path | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: tuple[Path, ...] = ()
    datasets: tuple[Dataset, ...] = ()


def dataset(path: Path) -> Dataset:
    """A file of the formatted data set as MLflow shows it, by the md5 that DVC knows it by."""
    return Dataset(path.stem, hashlib.md5(path.read_bytes()).hexdigest(), str(path))


# where things are


def tracking_uri(root: Path = Path()) -> str:
    """``MLFLOW_TRACKING_URI``, without a name and password, or ``mlflow.db`` in the project.

    A relative SQLite path is taken from the project's root, so that experiments share one database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{project_root(root) / uri.removeprefix('sqlite:///')}"
    return _without_credentials(uri)


def experiment_name(root: Path = Path()) -> str:
    """The name of the run: DVC's experiment, or ``workspace-<short commit>`` outside of one."""
    name = os.environ.get("DVC_EXP_NAME", "").strip()
    return name or f"workspace-{_git(root, 'rev-parse', '--short', 'HEAD') or 'uncommitted'}"


def provenance(root: Path = Path()) -> dict[str, str]:
    """Tags that say what a result came from; what is unknown is left out.

    ``git.commit``, ``git.branch``, ``git.state`` (clean, or which tracked files differ, outputs
    of the pipeline aside), ``dvc.experiment``, ``dvc.baseline``, ``dvc.md5.<path>`` of every
    output in ``dvc.lock`` below data/ and models/, and ``data.*`` and ``model.*`` (kind, repo,
    commit, licence) from the SOURCE.json files.
    """
    outputs = _outputs(root)
    changed = [
        path
        for path in _changed(root)
        if path != "dvc.lock" and not any(f"{path}/".startswith(f"{out}/") for out in outputs)
    ]
    state = "dirty: " + ", ".join(changed) if changed else "clean"
    commit = _git(root, "rev-parse", "HEAD")
    found = {
        "git.commit": commit,
        "git.branch": _git(root, "branch", "--show-current"),
        "git.state": state if commit else "",
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
    }
    for path, digest in outputs.items():
        if path.startswith(("data/", "models/")):
            found[f"dvc.md5.{path}"] = digest
    for name, folder in (("data", "data/raw"), ("model", "models/base")):
        source = root / folder / "SOURCE.json"
        if source.is_file():
            described = json.loads(source.read_text(encoding="utf-8"))
            for key in ("kind", "repo", "commit", "licence"):
                found[f"{name}.{key}"] = str(described.get(key) or "")
    return {key: redacted(value, root) for key, value in found.items() if value}


def redacted(text: str, root: Path = Path()) -> str:
    """``text`` without what must not be shown: credentials in URLs, tokens that stand in
    environment variables, the path of the project (``.``) and of the home folder (``~``).
    """
    text = re.sub(r"(\b[\w+.-]+://)[^/\s@]+@", r"\1", text)
    secret = re.compile(
        "TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE
    )
    for name, value in os.environ.items():
        if len(value) >= 6 and secret.search(name) and not Path(value).exists():
            text = text.replace(value, "***")
    for path, shown in ((root.resolve(), "."), (project_root(root), "."), (Path.home(), "~")):
        if len(path.parts) > 1:
            text = re.sub(re.escape(str(path)) + r"(?![\w.-])", shown, text)
    return text


# the run


def open_run(fingerprint: str, name: str | None = None, root: Path = Path()) -> str | None:
    """The id of the run to train into, or ``None``, with a message, where MLflow can't be reached.

    ``fingerprint`` identifies the training (lowercase letters and digits), ``name`` the experiment
    (default: ``experiment_name``). A run of both that was never completed is taken up again; else a
    new one is made.
    """
    name = name or experiment_name(root)
    _check(fingerprint)
    try:
        client = _client(root)
        experiment = _experiment(client, root)
        for run in _runs(client, experiment, fingerprint):
            if run.data.tags.get("experiment") == name and "record" not in run.data.tags:
                client.update_run(run.info.run_id, status="RUNNING")
                client.set_tag(run.info.run_id, "state", _TRAINING)
                return str(run.info.run_id)
        return _new_run(client, experiment, fingerprint, name, _TRAINING)
    except Exception as error:  # whatever a tracker raises, training goes on
        _say(
            f"MLflow: no live curves, {_reason(error, root)}. Training goes on without it, and its "
            "curves are logged when the run is completed."
        )
        return None


@contextmanager
def live(
    run_id: str | Callable[[], str | None] | None,
    names: Mapping[str, str] | None = None,
    root: Path = Path(),
) -> Iterator[dict[str, str]]:
    """The environment in which a ``report_to: mlflow`` subprocess writes its curves to the run.

        with tracking.live(run_id) as environment:
            subprocess.run([...], env={**os.environ, **environment})

    transformers' MLflowCallback ends its run synchronously when training ends, before the adapter
    is saved: a server that has died by then raises there and loses the training, after minutes of
    retries. So the subprocess talks to a relay in this process, on localhost, which always
    answers at once, and passes the metrics on as well as it can. Parameters are not passed on
    (the callback's dump of all of them holds absolute paths). The callback's ``loss`` becomes
    ``train/loss`` and its ``eval_loss`` becomes ``validation/loss``; ``names`` says which of its
    names are passed on and what each is called after the slash (default: all, unchanged).

    ``run_id`` may be a function that opens the run (``partial(open_run, fingerprint)``): it is
    called in the relay's thread, so that the 20 s of MLflow's import and of a new database pass
    while the subprocess starts. Without a run (``None``) the environment is good too, and the
    metrics go nowhere. On leaving, the run is tagged as trained, or marked as failed or killed
    where an exception passes through.
    """
    relay = _Relay(run_id, names, root)
    try:
        yield relay.environment()
    except BaseException as error:
        relay.close()
        relay.mark("FAILED" if isinstance(error, Exception) else "KILLED", None)
        raise
    relay.close()
    relay.mark(None, _TRAINED)


def complete_run(fingerprint: str, record: RunRecord, root: Path = Path()) -> None:
    """Add ``record`` to the run of this training and finish it; never raises because of MLflow.

    Takes the run that ``open_run`` made under this name, else one that was trained under another
    name and never completed, else makes one. Points of the curves that the run lacks are added
    from the CSV. The same record twice leaves one run. If MLflow fails, the record and copies of
    its files are kept in ``reports/mlflow_pending/`` of the project, for ``python -m
    stages.tracking.runs``.

    Raises ``FileNotFoundError`` for a curve file or artifact that is not there, ``ValueError``
    for a metric that is not a number.
    """
    _check(fingerprint)
    for path in (*record.artifacts, *([record.curves] if record.curves else [])):
        if not path.exists():
            raise FileNotFoundError(path)
    for key, value in record.metrics.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"metric {key} is not a number: {value!r}")
    record = _fit_to_show(record, root)
    try:
        where = _log(fingerprint, record, root)
    except Exception as error:  # whatever a tracker raises, the results stand
        kept = _keep(fingerprint, record, root)
        _say(
            f"MLflow: the run was not logged, {_reason(error, root)}. Nothing is lost: it is in "
            f"{PENDING / kept.name}, and `python -m stages.tracking.runs` logs it later."
        )
        return
    _say(f"MLflow: logged as {record.name} ({where})")


def attach(
    fingerprint: str, artifacts: tuple[Path, ...], name: str | None = None, root: Path = Path()
) -> None:
    """Add files and folders to the run that ``complete_run`` completed under this name (default:
    ``experiment_name``), or to its record where that still waits; never raises because of MLflow.
    """
    name = name or experiment_name(root)
    _check(fingerprint)
    for file in sorted((project_root(root) / PENDING).glob("*/record.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if (kept["fingerprint"], kept["name"]) == (fingerprint, name):
            for path in artifacts:
                place = file.parent / "artifacts" / path.name
                shutil.rmtree(place, ignore_errors=True)
                _copy(path, place)
            names = [*kept["artifacts"], *(path.name for path in artifacts)]
            kept["artifacts"] = list(dict.fromkeys(names))
            _replace(file, kept)
            return
    try:
        client = _client(root)
        runs = _runs(client, _experiment(client, root), fingerprint)
        own = [run for run in runs if run.data.tags.get("experiment") == name]
        complete = [run for run in own if run.data.tags.get("state") == _COMPLETE]
        if not complete:
            raise LookupError(f"it has no completed run {name}; `dvc repro -f evaluate` makes it")
        _log_artifacts(client, complete[0].info.run_id, artifacts)
    except Exception as error:  # whatever a tracker raises, the files are there
        lacking = ", ".join(path.name for path in artifacts)
        _say(f"MLflow: {lacking} could not be added to the run, {_reason(error, root)}.")


def main() -> None:
    """Log what waits in ``reports/mlflow_pending/``."""
    root = Path()
    waiting = sorted((project_root(root) / PENDING).glob("*/record.json"))
    if not waiting:
        print("MLflow: nothing waits to be logged")
    for file in waiting:
        folder = PENDING / file.parent.name
        fingerprint, record = _kept(file)
        try:
            where = _log(fingerprint, record, root)
        except Exception as error:
            raise UserError(
                f"MLflow: {folder} could not be logged, {_reason(error, root)}; "
                "it is still there: start the server or set MLFLOW_TRACKING_URI, and run this again"
            ) from error
        shutil.rmtree(file.parent)
        print(f"MLflow: logged as {record.name} ({where})")


# logging


def _log(fingerprint: str, record: RunRecord, root: Path) -> str:
    """Everything of ``record``; every step may be repeated. The state is set last."""
    client = _client(root)
    experiment = _experiment(client, root)
    digest = _digest(fingerprint, record)
    run_id = _run_for(client, experiment, fingerprint, record.name, digest)

    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, Metric, Param, RunTag

    parameters = [
        Param(_key(key), _short(value, _PARAMETER_CHARACTERS))
        for key, value in _flat(record.parameters).items()
    ]
    for start in range(0, len(parameters), _PARAMETERS_A_BATCH):
        client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_A_BATCH])
    tags = [RunTag(_key(key), _short(value, _TAG_CHARACTERS)) for key, value in record.tags.items()]
    for start in range(0, len(tags), _PARAMETERS_A_BATCH):
        client.log_batch(run_id, tags=tags[start : start + _PARAMETERS_A_BATCH])
    inputs = [
        DatasetInput(
            Entity(
                name=d.name,
                digest=d.digest[:_DIGEST_CHARACTERS],
                source_type="dvc",
                source=json.dumps({"source": d.source}),
            )
        )
        for d in record.datasets
    ]
    if inputs:
        client.log_inputs(run_id, inputs)

    now = int(time.time() * 1000)
    present = client.get_run(run_id).data.metrics
    points = [
        Metric(_key(key), value, now, 0)
        for key, value in record.metrics.items()
        if value is not None and not _same(present.get(_key(key)), value)
    ]
    if record.curves:
        known: dict[str, set[int]] = {}
        for key, step, value in _curves(record.curves):
            if key not in known:
                known[key] = {m.step for m in client.get_metric_history(run_id, key)}
            if step not in known[key]:
                known[key].add(step)
                points.append(Metric(key, value, now, step))
    for start in range(0, len(points), _METRICS_A_BATCH):
        client.log_batch(run_id, metrics=points[start : start + _METRICS_A_BATCH])

    _log_artifacts(client, run_id, record.artifacts)
    client.set_tag(run_id, "state", _COMPLETE)
    client.update_run(run_id, name=record.name)
    client.set_terminated(run_id)
    uri = tracking_uri(root)
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return "`make ui` shows it"


def _log_artifacts(client: Any, run_id: str, paths: tuple[Path, ...]) -> None:
    for path in paths:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            client.log_artifact(run_id, str(path))


def _run_for(client: Any, experiment: str, fingerprint: str, name: str, digest: str) -> str:
    """The run to complete, tagged with the record's digest first, so that a repetition finds it."""
    runs = _runs(client, experiment, fingerprint)
    open_runs = [run for run in runs if "record" not in run.data.tags]
    same = [
        run
        for run in runs
        if run.data.tags.get("record") == digest and run.data.tags.get("experiment") == name
    ]
    own = [run for run in open_runs if run.data.tags.get("experiment") == name]
    others = [run for run in open_runs if run.data.tags.get("state") == _TRAINED]
    found = [*same, *own, *others]
    run_id = (
        str(found[0].info.run_id)
        if found
        else _new_run(client, experiment, fingerprint, name, _TRAINED)
    )
    client.set_tag(run_id, "record", digest)
    client.set_tag(run_id, "experiment", name)
    return run_id


def _new_run(client: Any, experiment: str, fingerprint: str, name: str, state: str) -> str:
    tags = {"fingerprint": fingerprint, "experiment": name, "state": state}
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def _runs(client: Any, experiment: str, fingerprint: str) -> list[Any]:
    """The runs of a fingerprint, newest first."""
    query = f"tags.fingerprint = '{fingerprint}'"
    found = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])
    return list(found)


def _experiment(client: Any, root: Path) -> str:
    """The MLflow experiment's id. In the default database artifacts go beside it;
    a server decides itself."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    place = None
    if tracking_uri(root).startswith("sqlite:"):
        place = (project_root(root) / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except Exception:
        found = client.get_experiment_by_name(name)  # another experiment made it just now
        if not found:
            raise
        return str(found.experiment_id)


def _client(root: Path) -> Any:
    """A client of the tracking server; ``ConnectionError`` within seconds where none answers."""
    uri = tracking_uri(root)
    _probe(uri)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    given = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "").strip())
    if given.username and given.scheme in (
        "http",
        "https",
    ):  # MLflow prints the address it is given
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(given.username))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(given.password or ""))
    from mlflow import MlflowClient  # 10 s on two cores

    for name in ("mlflow", "alembic"):  # 60 lines of migrations when a database is made
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


# MLflow retries for four minutes by default, and reports its use to its makers.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def _probe(uri: str) -> None:
    """Raise ``ConnectionError`` if nothing answers at an HTTP address in time."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS):
            pass
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"{uri} does not answer ({reason})") from None


# live curves

_ANY_RUN = "0" * 32  # what the subprocess calls the run; the relay knows which one it is


class _Relay:
    """An MLflow server in miniature for one run: takes metrics at once, passes them on in a
    thread.
    """

    def __init__(
        self,
        run_id: str | Callable[[], str | None] | None,
        names: Mapping[str, str] | None,
        root: Path,
    ) -> None:
        self._open = run_id if callable(run_id) else lambda: run_id
        self._run_id: str | None = None
        self._names, self._root = names, root
        self._points: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._waiting: list[dict[str, Any]] = []
        self._stop, self._warned = threading.Event(), False
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def do_PATCH(self) -> None:
                self._answer()

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with suppress(ValueError):  # an answer matters more than a point: the CSV has it
                    relay.take(self.path, json.loads(body or b"{}"))
                answer = json.dumps(relay.answer(self.path)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._threads = [
            threading.Thread(target=self._server.serve_forever, daemon=True),
            threading.Thread(target=self._pass_on_until_stopped, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def environment(self) -> dict[str, str]:
        """For the subprocess: the relay's address, and no way around it."""
        bypass = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"]
        proxy = ",".join(host for host in bypass if host)
        return {
            **_QUIET,
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self._server.server_port}",
            "MLFLOW_RUN_ID": _ANY_RUN,
            "MLFLOW_EXPERIMENT_NAME": "",  # given, the callback asks the server to make it
            "MLFLOW_MAX_LOG_PARAMS": "0",
            "HF_MLFLOW_LOG_ARTIFACTS": "false",
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
            "NO_PROXY": proxy,
            "no_proxy": proxy,
        }

    def answer(self, path: str) -> dict[str, Any]:
        """What the callback's client reads: the run wherever one is asked for."""
        if "/runs/get" in path or "/runs/update" in path:
            info = {
                "run_id": _ANY_RUN,
                "run_uuid": _ANY_RUN,
                "run_name": "live",
                "experiment_id": "0",
                "user_id": "",
                "status": "RUNNING",
                "start_time": 0,
                "artifact_uri": "",
                "lifecycle_stage": "active",
            }
            return {"run": {"info": info, "data": {}}, "run_info": info}
        return {}

    def take(self, path: str, body: dict[str, Any]) -> None:
        for metric in body.get("metrics", []) if "/runs/log-batch" in path else []:
            self._points.put(metric)

    def close(self) -> None:
        """Pass on what is left, once; what then remains is in the CSV."""
        self._stop.set()
        self._threads[1].join(timeout=90)
        self._server.shutdown()
        self._server.server_close()

    def mark(self, status: str | None, state: str | None) -> None:
        if self._run_id is None or self._warned:
            return
        try:
            client = _client(self._root)
            if state:
                client.set_tag(self._run_id, "state", state)
            if status:
                client.set_terminated(self._run_id, status)
        except Exception as error:
            self._warn(error)

    def _pass_on_until_stopped(self) -> None:
        self._run_id = self._open()
        client, pause = None, FLUSH_SECONDS
        while True:
            last = self._stop.wait(pause)
            while not self._points.empty():
                self._waiting.append(self._points.get())
            if self._run_id is None:
                self._waiting.clear()
            try:
                while self._waiting:
                    client = client or _client(self._root)
                    batch = self._waiting[:_METRICS_A_BATCH]
                    metrics = [metric for point in batch if (metric := self._metric(point))]
                    client.log_batch(self._run_id, metrics=metrics)
                    del self._waiting[: len(batch)]
                pause, self._warned = FLUSH_SECONDS, False
            except Exception as error:
                self._warn(error)
                client, pause = None, min(60.0, 2 * pause)
            if last:
                return

    def _metric(self, point: dict[str, Any]) -> Any:
        """The callback's point under our name; ``None`` for what is not passed on."""
        from mlflow.entities import Metric

        key = str(point["key"])
        split = "validation" if key.startswith("eval_") else "train"
        name = key.removeprefix("eval_")
        if key == "epoch" or key.startswith("train_"):  # the latter is the summary at the end
            return None
        if self._names is not None:
            if name not in self._names:
                return None
            name = self._names[name]
        value, time_, step = float(point["value"]), int(point["timestamp"]), int(point["step"])
        return Metric(_key(f"{split}/{name}"), value, time_, step)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _say(
                f"MLflow: live curves pause, {_reason(error, self._root)}. Training goes on; "
                "what is missing is logged when the run is completed."
            )


# pieces


def _curves(path: Path) -> Iterator[tuple[str, int, float]]:
    """(metric, step, value) of every cell of the curves that holds a finite number."""
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                split = file.stem if path.is_dir() else row.pop("split")
                step = int(float(row.pop("step")))
                for column, cell in row.items():
                    if column != "epoch" and cell and math.isfinite(float(cell)):
                        yield _key(f"{split}/{column}"), step, float(cell)


def _fit_to_show(record: RunRecord, root: Path) -> RunRecord:
    """The record with flat parameters, numbers for metrics, and every text ``redacted``."""
    return replace(
        record,
        metrics={key: float(value) for key, value in record.metrics.items() if value is not None},
        parameters={key: redacted(value, root) for key, value in _flat(record.parameters).items()},
        tags={key: redacted(value, root) for key, value in record.tags.items()},
        datasets=tuple(replace(d, source=redacted(d.source, root)) for d in record.datasets),
    )


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as one level, keys joined by dots, lists and absent values as JSON."""
    found: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            found[f"{prefix}{key}"] = value
        else:
            found[f"{prefix}{key}"] = json.dumps(value, default=str)
    return found


def _key(key: str) -> str:
    """A name that MLflow accepts: what it refuses becomes an underscore, at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:250]


def _short(value: str, limit: int) -> str:
    if len(value) <= limit:
        return value
    note = f"... ({len(value)} characters)"
    return value[: limit - len(note)] + note


def _same(one: float | None, other: float) -> bool:
    return one is not None and (one == other or (math.isnan(one) and math.isnan(other)))


def _digest(fingerprint: str, record: RunRecord) -> str:
    """What makes two records the same result: all but tags and artifacts, which may change with
    the day.
    """
    known = [fingerprint, record.name, _flat(record.parameters), dict(record.metrics)]
    content = json.dumps(known, sort_keys=True).encode()
    for key, step, value in _curves(record.curves) if record.curves else ():
        content += f"{key} {step} {value!r}\n".encode()
    return hashlib.sha256(content).hexdigest()[:32]


def _keep(fingerprint: str, record: RunRecord, root: Path) -> Path:
    """A folder with the record and copies of its files: the next experiment overwrites reports/."""
    folder = project_root(root) / PENDING
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    place = folder / _digest(fingerprint, record)
    shutil.rmtree(place, ignore_errors=True)
    for path in record.artifacts:
        _copy(path, place / "artifacts" / path.name)
    if record.curves:
        _copy(record.curves, place / "curves" / record.curves.name)
    kept = {
        "fingerprint": fingerprint,
        "name": record.name,
        "parameters": _flat(record.parameters),
        "metrics": dict(record.metrics),
        "tags": dict(record.tags),
        "artifacts": [path.name for path in record.artifacts],
        "datasets": [asdict(d) for d in record.datasets],
        "curves": record.curves.name if record.curves else None,
    }
    place.mkdir(exist_ok=True)
    _replace(place / "record.json", kept)
    return place


def _replace(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is complete or not there: ``main`` looks for it."""
    temporary = file.with_suffix(".json.part")
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    temporary.replace(file)


def _kept(file: Path) -> tuple[str, RunRecord]:
    kept, place = json.loads(file.read_text(encoding="utf-8")), file.parent
    record = RunRecord(
        name=kept["name"],
        parameters=kept["parameters"],
        metrics=kept["metrics"],
        tags=kept["tags"],
        artifacts=tuple(place / "artifacts" / name for name in kept["artifacts"]),
        datasets=tuple(Dataset(**entry) for entry in kept["datasets"]),
    )
    curves = place / "curves" / kept["curves"] if kept["curves"] else None
    return kept["fingerprint"], replace(record, curves=curves)


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copy2(path, to)


def _outputs(root: Path) -> dict[str, str]:
    """Path to md5 of every output in ``dvc.lock``; none if there is no such file yet."""
    lock = root / "dvc.lock"
    if not lock.is_file():
        return {}
    from ruamel.yaml import YAML

    stages = (YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    return {
        out["path"]: str(out.get("md5", ""))
        for stage in stages.values()
        for out in stage.get("outs", [])
    }


def _changed(root: Path) -> list[str]:
    """Tracked files that differ from the last commit, relative to ``root``.

    Compared through an index made for this: in DVC's temporary copies the repository's own may hold
    the times and sizes of files as DVC changed them, and a changed params.yaml then looks clean.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder, "index"))
        _git(root, "read-tree", "HEAD", index=index)
        names = _git(root, "diff", "--name-only", "--relative", "-z", index=index)
    return sorted(name for name in names.split("\0") if name)


def _git(root: Path, *arguments: str, index: str | None = None) -> str:
    """What git prints, or nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env={**os.environ, **({"GIT_INDEX_FILE": index} if index else {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _check(fingerprint: str) -> None:
    if not re.fullmatch("[0-9a-z]+", fingerprint):  # it goes into a query as it is
        raise ValueError(f"a fingerprint is lowercase letters and digits, not {fingerprint!r}")


def _reason(error: Exception, root: Path) -> str:
    """The first line of what went wrong, fit to be shown."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _short(redacted(lines[0], root).rstrip("."), 300)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from stages.core import command

    command.run(main)
