"""The experiment's MLflow run: opened by train, completed by evaluate, never in their way.

MLflow mirrors what ``reports/`` and ``dvc.lock`` hold. A server that is down, slow or full costs a
message: what could not be logged waits in ``reports/mlflow_pending/`` for ``make sync``. One
experiment is one run, named after ``DVC_EXP_NAME``, and found again by a tag, the fingerprint of
its training. ``Live`` makes it, or takes up the one that a crash left, and passes points of curves
on to it; ``complete_run`` adds the results; ``attach`` adds files that are written from those. A
completed run is never changed by another result, which gets a run of its own.

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
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from stages.core.project import project_root
from stages.parameters.params import flattened
from stages.tracking.tags import experiment_name, provenance, redacted

EXPERIMENT = "preference-tuning"
PENDING, RECORD = Path("reports", "mlflow_pending"), "record.json"
PROBE_SECONDS, FLUSH_SECONDS, RETRY_SECONDS, CLOSE_SECONDS = 4.0, 2.0, 60.0, 90.0

# MLflow retries for four minutes by default, and reports its use to its makers.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, without a name and password, or ``mlflow.db`` in the project.

    A relative SQLite path is taken from the project's root, so that experiments share one database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{project_root() / uri.removeprefix('sqlite:///')}"
    return re.sub(r"^(https?://)[^/]*@", r"\1", uri)


class Live:
    """Passes points of curves on to the run of a training while it runs; never raises or waits.

        with runs.Live(fingerprint) as live:
            live.log(10, "train", {"loss": 0.69})  # step 10 of the curve train/loss

    A run of this fingerprint and name (default: ``experiment_name``) that was never completed is
    taken up; else one is made. All of MLflow is met in a thread: the 20 s of its import and of a
    new database pass while the training starts, and while it fails, the thread tries again, more
    and more seldom, after one message. The run ends as trained, or as failed or killed.
    """

    def __init__(self, fingerprint: str, name: str | None = None) -> None:
        self._fingerprint, self._name = fingerprint, name or experiment_name()
        self._points: queue.SimpleQueue[tuple[str, float, int, int]] = queue.SimpleQueue()
        self._stop, self._end = threading.Event(), "trained"
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        for key, value in values.items():
            self._points.put((_key(f"{split}/{key}"), float(value), now, step))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self._end = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)  # what is not passed on by then is in the CSVs

    def _pass_on(self) -> None:
        client, run_id, waiting = None, "", []
        pause, warned, last = 0.0, False, False
        while not last:
            last = self._stop.wait(pause)
            while not self._points.empty():
                waiting.append(self._points.get())
            try:
                if client is None:
                    client, _ = at = _connect()
                if not run_id:
                    begun = {"experiment": self._name, "record": None}
                    run = _run(at, self._fingerprint, self._name, begun, new="training")
                    run_id = run.info.run_id
                    client.update_run(run_id, status="RUNNING")
                    client.set_tag(run_id, "state", "training")
                from mlflow.entities import Metric

                client.log_batch(run_id, [Metric(*point) for point in waiting])
                waiting.clear()
                if last and self._end == "trained":
                    client.set_tag(run_id, "state", self._end)
                elif last:
                    client.set_terminated(run_id, self._end)
                pause, warned = FLUSH_SECONDS, False
            except Exception as error:  # whatever a tracker raises, training goes on
                if not warned:
                    _say(
                        f"MLflow: no live curves, {reason(error)}. Training goes on without it, "
                        "and what is missing is logged when the run is completed."
                    )
                client, warned = None, True
                pause = min(RETRY_SECONDS, 2 * pause + FLUSH_SECONDS)


def complete_run(
    fingerprint: str,
    *,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    curves: Path,
    artifacts: Iterable[Path],
    datasets: Iterable[Path],
    name: str | None = None,
) -> None:
    """Add the results to the run of this training and finish it; never raises because of MLflow.

    Takes the run that ``Live`` made under this name, else one that was trained under another name
    and never completed, else makes one. The same results twice leave one run. Points that it lacks
    are added from ``curves``: column ``loss`` of ``train.csv`` is ``train/loss``. ``artifacts`` are
    files or folders; of ``datasets`` MLflow is told the md5. All of it waits in a folder, as
    copies, since the next experiment changes the files, until it is logged.

    Raises ``FileNotFoundError`` for a file that is not there, ``ValueError`` for a metric that is
    not a number.
    """
    kept = {
        "fingerprint": fingerprint,
        "name": name or experiment_name(),
        "parameters": {
            _key(key): redacted(value if isinstance(value, str) else json.dumps(value))
            for key, value in flattened(parameters).items()
        },
        "metrics": {_key(key): float(v) for key, v in metrics.items() if v is not None},
    }
    content = json.dumps([kept, list(_points(curves))], sort_keys=True)
    folder = project_root() / PENDING / hashlib.sha256(content.encode()).hexdigest()[:32]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(curves, folder / "curves")
    _copy(artifacts, folder / "artifacts")
    # What follows may change with the day, and makes no other result.
    kept["tags"] = {_key(key): value for key, value in provenance().items()}
    kept["datasets"] = {redacted(str(p)): hashlib.md5(p.read_bytes()).hexdigest() for p in datasets}
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(kept, indent=2), encoding="utf-8")
    part.replace(folder / RECORD)  # ``pending`` finds complete ones only
    try:
        _say(log_record(folder))
    except Exception as error:  # whatever a tracker raises, the results are there
        _say(
            f"MLflow: the run was not logged, {reason(error)}. Nothing is lost: it is in "
            f"{PENDING / folder.name}, and `make sync` logs it later."
        )


def attach(fingerprint: str, artifacts: Sequence[Path], name: str | None = None) -> None:
    """Add files and folders to the run that ``complete_run`` completed under this name (default:
    ``experiment_name``), or to its record where that still waits; never raises because of MLflow.
    """
    name = name or experiment_name()
    for folder in pending():
        kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if (kept["fingerprint"], kept["name"]) == (fingerprint, name):
            _copy(artifacts, folder / "artifacts")
            return
    try:
        client, _ = at = _connect()
        run = _run(at, fingerprint, name, {"experiment": name, "state": "complete"})
        with tempfile.TemporaryDirectory() as place:
            _copy(artifacts, Path(place))
            client.log_artifacts(run.info.run_id, place)
    except Exception as error:  # whatever a tracker raises, the files are there
        lacking = ", ".join(path.name for path in artifacts)
        _say(f"MLflow: {lacking} could not be added to the run, {reason(error)}.")


def pending() -> list[Path]:
    """Folders of the records that could not be logged yet."""
    return sorted(file.parent for file in (project_root() / PENDING).glob(f"*/{RECORD}"))


def log_record(folder: Path) -> str:
    """Log such a record, remove its folder, and say where it is; raises whatever MLflow does.

    Every step may be repeated, and the run is complete only after the last.
    """
    kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    fingerprint, name = kept["fingerprint"], kept["name"]
    same, begun = {"experiment": name, "record": folder.name}, {"experiment": name, "record": None}
    another = {"state": "trained", "record": None}
    client, experiment = at = _connect()
    run = _run(at, fingerprint, name, same, begun, another, new="trained")
    run_id, began = run.info.run_id, run.info.start_time
    client.set_tag(run_id, "record", folder.name)  # first, so that a repetition finds it
    client.set_tag(run_id, "experiment", name)

    from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag

    # With one time for all of them, points that are logged again are the same points.
    metrics = [Metric(key, value, began, 0) for key, value in kept["metrics"].items()]
    known: dict[str, set[int]] = {}
    for key, step, value in _points(folder / "curves"):
        if key not in known:
            known[key] = {point.step for point in client.get_metric_history(run_id, key)}
        if step not in known[key]:
            metrics.append(Metric(key, value, began, step))
    params = [Param(*parameter) for parameter in kept["parameters"].items()]
    client.log_batch(run_id, metrics, params, [RunTag(*tag) for tag in kept["tags"].items()])
    for file, md5 in kept["datasets"].items():
        source = json.dumps({"source": file})
        client.log_inputs(run_id, [DatasetInput(Dataset(Path(file).stem, md5, "dvc", source))])
    client.log_artifacts(run_id, str(folder / "artifacts"))
    client.set_tag(run_id, "state", "complete")
    client.update_run(run_id, name=name)
    client.set_terminated(run_id)
    shutil.rmtree(folder)
    page = f"{tracking_uri().rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return f"MLflow: logged as {name} ({page if page[:4] == 'http' else '`make ui` shows it'})"


def _run(
    at: tuple[Any, str],
    fingerprint: str,
    name: str,
    *wanted: Mapping[str, str | None],
    new: str | None = None,
) -> Any:
    """The newest run of a fingerprint with the tags that are wanted first, or second, and so on;
    else one that is made, in the state ``new``. ``at`` is what ``_connect`` gives.
    """
    client, experiment = at
    query, order = f"tags.fingerprint = '{fingerprint}'", ["attributes.start_time DESC"]
    runs = client.search_runs([experiment], query, order_by=order)
    for pattern in wanted:
        for run in runs:
            if all(run.data.tags.get(key) == value for key, value in pattern.items()):
                return run
    if new is None:
        raise LookupError(f"it has no completed run {name}; `dvc repro -f evaluate` makes it")
    made = {"fingerprint": fingerprint, "experiment": name, "state": new}
    return client.create_run(experiment, run_name=name, tags=made)


def _connect() -> tuple[Any, str]:
    """A client of the tracking server and the id of the experiment, which is made if need be.

    Raises ``ConnectionError`` within seconds where no server answers.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        _probe(uri)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "").strip())
    if given.username and uri.startswith("http"):  # MLflow prints the address that it is given
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(given.username))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(given.password or ""))
    from mlflow import MlflowClient  # 10 s on two cores

    logging.getLogger("alembic").setLevel(logging.WARNING)  # 60 lines where a database is made
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or EXPERIMENT
    file = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None
    # Two processes that make one database at once break it.
    with FileLock(f"{file}.lock") if file else nullcontext():
        client = MlflowClient(tracking_uri=uri)
        if found := client.get_experiment_by_name(experiment):
            return client, str(found.experiment_id)
        place = (project_root() / "mlartifacts").as_uri() if file else None  # a server decides
        return client, str(client.create_experiment(experiment, artifact_location=place))


def _probe(uri: str) -> None:
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # an answer too
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise ConnectionError(f"{uri} does not answer ({why})") from None


def _points(curves: Path) -> Iterator[tuple[str, int, float]]:
    """(metric, step, value) of every cell of the curves that holds a finite number; no epochs."""
    for file in sorted(curves.glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                step = int(float(row.pop("step")))
                for column, cell in row.items():
                    if column != "epoch" and cell and math.isfinite(float(cell)):
                        yield _key(f"{file.stem}/{column}"), step, float(cell)


def _key(key: str) -> str:
    """A name that MLflow accepts: what it refuses becomes an underscore, at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:250]


def _copy(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, folder)


def reason(error: Exception) -> str:
    """The first line of what went wrong, fit to be shown."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(lines[0])[:300].rstrip(".")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
