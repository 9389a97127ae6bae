"""The experiment's MLflow run: opened by train, completed by evaluate, never in their way.

MLflow mirrors what ``reports/`` and ``dvc.lock`` hold. A server that is down, slow or full costs a
message: what could not be logged waits in ``reports/mlflow_pending/`` for ``make sync``. One
experiment is one run, named after ``DVC_EXP_NAME``, and found again by a tag, the fingerprint of
its training. ``Live`` makes it, or takes up the one that a crash left, and passes points of curves
on to it; ``complete_run`` adds the results, and what leads back to what made them (``way_back``);
``attach`` adds files that are written from those. A completed run is never changed by another
result, which gets a run of its own. Runs that differ in their seed alone get a parent run with
their mean.

Environment: ``MLFLOW_TRACKING_URI`` (default: ``mlflow.db`` at the project's root),
``MLFLOW_EXPERIMENT_NAME``, ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``;
``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`` (default: where there is an NVIDIA GPU).
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
import statistics
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

from stages.core.errors import UserError
from stages.core.project import project_root
from stages.evaluation import catalogue
from stages.evaluation.metrics import headline
from stages.params.params import flattened
from stages.tracking import way_back
from stages.tracking.tags import SEED, experiment_name, provenance, redacted

EXPERIMENT = "preference-tuning"
PENDING, RECORD = Path("reports", "mlflow_pending"), "record.json"
DESCRIPTION, PARENT = "mlflow.note.content", "mlflow.parentRunId"
PROBE_SECONDS, FLUSH_SECONDS, RETRY_SECONDS, CLOSE_SECONDS = 4.0, 2.0, 60.0, 90.0

# Where MLflow's own message is a request's path and a server's page.
REFUSED = {
    "401": "the server does not know this user and password: set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD",
    "403": "this user may not write to the server's experiment: whoever made it, or the server's "
    "admin, has to grant EDIT",
}

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
    and more seldom, after one message. The run ends as trained, or as failed or killed, with why in
    its description.
    """

    def __init__(self, fingerprint: str, name: str | None = None) -> None:
        self._fingerprint, self._name = fingerprint, name or experiment_name()
        self._points: queue.SimpleQueue[tuple[str, float, int, int]] = queue.SimpleQueue()
        self._stop, self._end, self._why = threading.Event(), "trained", ""
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        for key, value in values.items():
            self._points.put((_key(f"{split}/{key}"), float(value), now, step))

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None:
            self._end = "FAILED" if isinstance(error, Exception) else "KILLED"
            self._why = _why(error)
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)  # what is not passed on by then is in the CSVs

    def _pass_on(self) -> None:
        client, run_id, waiting, monitor = None, "", [], None
        pause, warned, last = 0.0, False, False
        while not last:
            last = self._stop.wait(pause)
            while not self._points.empty():
                waiting.append(self._points.get())
            try:
                if client is None:
                    client, _ = at = connect()
                from mlflow.entities import Metric, RunTag

                if not run_id:
                    begun = {"experiment": self._name, "record": None}
                    run = _run(at, self._fingerprint, self._name, begun, new="training")
                    run_id = run.info.run_id
                    client.update_run(run_id, status="RUNNING")
                    known = provenance() | {"state": "training", DESCRIPTION: ""}
                    tags = [RunTag(_key(key), value) for key, value in known.items()]
                    client.log_batch(run_id, tags=tags)
                    monitor = _monitor(run_id)
                client.log_batch(run_id, [Metric(*point) for point in waiting])
                waiting.clear()
                if last and monitor is not None:
                    monitor.finish()
                if last and self._end == "trained":
                    client.set_tag(run_id, "state", self._end)
                elif last:
                    client.set_tag(run_id, DESCRIPTION, self._why)
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


def fail(error: BaseException, stage: str, adapter: Path | None) -> None:
    """Say in the run of this experiment that ``stage`` failed, and why: FAILED, or KILLED.

    With an ``adapter`` it is the run of its training, if that was not completed yet. Without, it is
    the experiment's last run that was not completed, else one that is made, and that ``Live`` takes
    up when the experiment is run again. Raises whatever MLflow does.
    """
    name = experiment_name()
    client, experiment = at = connect()
    if adapter is not None:
        made = json.loads((adapter / "fingerprint.json").read_text(encoding="utf-8"))
        begun = {"experiment": name, "record": None}
        run = _run(at, made["fingerprint"], name, begun)
    elif unfinished := _states(at, name, "training", "trained", "failed"):
        run = unfinished[0]
    else:
        tags = provenance() | {"experiment": name, "state": "failed"}
        tags = {_key(key): value for key, value in tags.items()}
        run = client.create_run(experiment, run_name=name, tags=tags)
    client.set_tag(run.info.run_id, DESCRIPTION, f"`{stage}`\n\n{_why(error)}")
    status = "FAILED" if isinstance(error, Exception) else "KILLED"
    client.set_terminated(run.info.run_id, status)


def _states(at: tuple[Any, str], name: str, *states: str) -> list[Any]:
    """The runs of an experiment by this name in one of these states, newest first."""
    client, experiment = at
    query, order = f"tags.experiment = '{name}'", ["attributes.start_time DESC"]
    runs = client.search_runs([experiment], query, order_by=order)
    return [run for run in runs if run.data.tags.get("state") in states]


def _why(error: BaseException) -> str:
    """Markdown: a message as it was printed, or what an interruption means."""
    if not isinstance(error, Exception):
        return "Interrupted; the same command continues this run."
    lines = redacted(str(error) or type(error).__name__)[:4000].splitlines()
    return "\n".join(f"    {line}" for line in lines)


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
        "metrics": _named({key: float(v) for key, v in metrics.items() if v is not None}),
    }
    content = json.dumps([kept, list(_points(curves))], sort_keys=True)
    folder = project_root() / PENDING / hashlib.sha256(content.encode()).hexdigest()[:32]
    shutil.rmtree(folder, ignore_errors=True)
    _copy(curves.iterdir(), folder / "curves")
    _copy(artifacts, folder / "artifacts")
    # What follows may change with the day, and makes no other result.
    kept["tags"] = {_key(key): value for key, value in provenance().items()}
    way_back.write(folder / "artifacts" / way_back.FOLDER)
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
    The way back is written again: by now ``dvc.lock`` holds the evaluation.
    """
    name = name or experiment_name()
    for folder in pending():
        kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if (kept["fingerprint"], kept["name"]) == (fingerprint, name):
            _copy(artifacts, folder / "artifacts")
            way_back.write(folder / "artifacts" / way_back.FOLDER)
            return
    try:
        client, _ = at = connect()
        run = _run(at, fingerprint, name, {"experiment": name, "state": "complete"})
        with tempfile.TemporaryDirectory() as place:
            _copy(artifacts, Path(place))
            way_back.write(Path(place, way_back.FOLDER))  # by now dvc.lock has this result
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
    client, experiment = at = connect()
    run = _run(at, fingerprint, name, same, begun, another, new="trained")
    run_id, began = run.info.run_id, run.info.start_time
    client.set_tag(run_id, "record", folder.name)  # first, so that a repetition finds it
    client.set_tag(run_id, "experiment", name)

    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

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
        source, split = json.dumps({"source": file}), Path(file).stem
        used = DatasetInput(
            Dataset(split, md5, "dvc", source), [InputTag("mlflow.data.context", split)]
        )
        client.log_inputs(run_id, [used])
    client.log_artifacts(run_id, str(folder / "artifacts"))
    client.set_tag(run_id, DESCRIPTION, _description(kept, run_id))
    client.set_tag(run_id, "state", "complete")
    client.update_run(run_id, name=name)
    client.set_terminated(run_id)
    _group(at, kept["tags"].get("setting", ""))
    shutil.rmtree(folder)
    page = f"{tracking_uri().rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return f"MLflow: logged as {name} ({page if page[:4] == 'http' else '`make ui` shows it'})"


def download(name: str, folder: str, target: Path) -> str:
    """Copy a folder of the artifacts of a run, given by its id or its name (the newest completed
    one), into ``target``; the run's name.

    Raises:
        UserError: there is no such run, or MLflow does not answer.
    """
    try:
        client, experiment = connect(make=False)
        query = f"attributes.run_id = '{name}'"
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            query = f"tags.experiment = '{name}' and tags.state = 'complete'"
        runs = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])
        if runs and any(file.path == folder for file in client.list_artifacts(runs[0].info.run_id)):
            client.download_artifacts(runs[0].info.run_id, folder, str(target))
    except Exception as error:
        raise UserError(
            f"MLflow: {reason(error)}; start the server, or set MLFLOW_TRACKING_URI to where the "
            "run was logged"
        ) from error
    if not runs:
        raise UserError(
            f"MLflow at {redacted(tracking_uri())} has no run {name}; give the id that it shows, "
            "or the name of an experiment that was completed, or set MLFLOW_TRACKING_URI to where "
            "it was logged"
        )
    return str(runs[0].info.run_name)


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures that DVC shows, by its names and first; then all of them below ``evaluation/``,
    where MLflow folds them away; lm-eval's tasks have a prefix of their own.
    """
    rest = {k if k.startswith("lm_eval/") else f"evaluation/{k}": v for k, v in metrics.items()}
    return {_key(key): value for key, value in (headline(metrics) | rest).items()}


def _description(kept: Mapping[str, Any], run_id: str) -> str:
    """What a run says of itself, in Markdown: its headline, what was changed, the way back."""
    measured = {k.removeprefix("evaluation/"): v for k, v in kept["metrics"].items()}
    lines = [
        f"**Win rate {catalogue.with_interval(measured, 'win_rate')}** on held-out pairs"
        if "win_rate" in measured
        else "No win rate",
        f"Changed: `{changed}`" if (changed := kept["tags"].get("changed")) else "",
        f"Back to what made it, in a clone: `python -m stages restore {run_id}`",
    ]
    return "\n\n".join(filter(None, lines))


def _group(at: tuple[Any, str], setting: str) -> None:
    """Give the completed runs that differ in ``train.seed`` alone one parent run, with the mean of
    their headline figures, its standard deviation over seeds (``seeds/<figure>_sd``) and count.
    """
    client, experiment = at
    if not setting:
        return
    newest = ["attributes.start_time DESC"]
    query = f"tags.setting = '{setting}' and tags.state = 'complete'"
    by_seed: dict[str, Any] = {}
    for run in client.search_runs([experiment], query, order_by=newest):
        by_seed.setdefault(run.data.params.get(SEED, ""), run)
    by_seed.pop("", None)
    if len(by_seed) < 2:
        return
    from mlflow.entities import Metric, Param

    name = by_seed[min(by_seed)].data.tags.get("changed", "") or "unchanged parameters"
    name = ", ".join(part for part in name.split(", ") if not part.startswith(f"{SEED}="))
    oldest = ["attributes.start_time ASC"]  # of two made at once, both processes take one
    query = f"tags.seeds_of = '{setting}'"
    found = client.search_runs([experiment], query, order_by=oldest)
    parent = found[0] if found else client.create_run(experiment, tags={"seeds_of": setting})
    parent_id, now = parent.info.run_id, int(time.time() * 1000)
    client.update_run(
        parent_id, name=f"{len(by_seed)} seeds of {name or 'unchanged parameters'}"[:250]
    )
    values: dict[str, list[float]] = {}
    for run in by_seed.values():
        client.set_tag(run.info.run_id, PARENT, parent_id)
        for key in catalogue.HEADLINE:
            if key in run.data.metrics:
                values.setdefault(key, []).append(run.data.metrics[key])
    metrics = [Metric("seeds/count", len(by_seed), now, 0)]
    for key, each in values.items():
        metrics.append(Metric(key, round(statistics.fmean(each), 4), now, 0))
        if len(each) > 1:
            metrics.append(Metric(f"seeds/{key}_sd", round(statistics.stdev(each), 4), now, 0))
    params = next(iter(by_seed.values())).data.params
    shared = [Param(key, value) for key, value in params.items() if key != SEED]
    client.log_batch(parent_id, metrics, [] if found else shared)
    client.set_terminated(parent_id)


def _monitor(run_id: str) -> Any:
    """MLflow's own monitor of GPU, memory, disk and network, started; None where it is not wanted:
    by default it is where there is an NVIDIA GPU."""
    wanted = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").strip().lower()
    if wanted in ("false", "0") or not (wanted or shutil.which("nvidia-smi")):
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri())
    monitor.start()
    return monitor


def _run(
    at: tuple[Any, str],
    fingerprint: str,
    name: str,
    *wanted: Mapping[str, str | None],
    new: str | None = None,
) -> Any:
    """The newest run of a fingerprint with the tags that are wanted first, or second, and so on;
    else one that is made, in the state ``new``. ``at`` is what ``connect`` gives.
    """
    client, experiment = at
    query, order = f"tags.fingerprint = '{fingerprint}'", ["attributes.start_time DESC"]
    runs = client.search_runs([experiment], query, order_by=order)
    for pattern in wanted:
        for run in runs:
            if all(run.data.tags.get(key) == value for key, value in pattern.items()):
                return run
    if new is None:
        others = {run.info.run_name for run in runs if run.data.tags.get("state") == "complete"}
        only = f", only {', '.join(sorted(others))} of this training" if others else ""
        raise LookupError(f"it has no completed run {name}{only}; `dvc repro -f evaluate` makes it")
    made = {"fingerprint": fingerprint, "experiment": name, "state": new}
    if failed := _states(at, name, "failed"):  # in a stage before the training; now it goes on
        for tag in made.items():
            client.set_tag(failed[0].info.run_id, *tag)
        return failed[0]
    return client.create_run(experiment, run_name=name, tags=made)


def connect(*, make: bool = True) -> tuple[Any, str]:
    """A client of the tracking server and the id of the experiment; with ``make``, database and
    experiment are made if need be.

    Raises ``ConnectionError`` within seconds where no server answers, ``LookupError`` where there
    is no database or experiment and none is to be made.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        _probe(uri)
    file = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None
    if file and not make and not Path(file.partition("?")[0]).is_file():
        raise LookupError(f"there is no {file}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "").strip())
    if given.username and uri.startswith("http"):  # MLflow prints the address that it is given
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(given.username))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(given.password or ""))
    from mlflow import MlflowClient  # 10 s on two cores
    from mlflow.exceptions import MlflowException

    logging.getLogger("alembic").setLevel(logging.WARNING)  # 60 lines where a database is made
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or EXPERIMENT
    # Two processes that make one database at once break it.
    with FileLock(f"{file}.lock") if file else nullcontext():
        client = MlflowClient(tracking_uri=uri)
        if found := client.get_experiment_by_name(experiment):
            return client, str(found.experiment_id)
        if not make:
            raise LookupError(f"{redacted(uri)} has no experiment {experiment}")
        place = (project_root() / "mlartifacts").as_uri() if file else None  # a server decides
        try:
            return client, str(client.create_experiment(experiment, artifact_location=place))
        except MlflowException:  # another process may have made it since
            if found := client.get_experiment_by_name(experiment):
                return client, str(found.experiment_id)
            raise


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
        if path.is_dir():  # not by ``copytree``, whose error does not say that the disk is full
            _copy(path.iterdir(), folder / path.name)
        else:
            shutil.copy2(path, folder)


def reason(error: Exception) -> str:
    """The first line of what went wrong, fit to be shown."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if refused := re.search(r"failed with error code (40[13])\b", lines[0]):
        return REFUSED[refused[1]]
    return redacted(lines[0])[:300].rstrip(".")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
