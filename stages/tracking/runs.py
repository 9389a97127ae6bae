"""The experiment's MLflow run: opened by train, completed by report, never in their way.

MLflow mirrors what ``reports/`` and ``dvc.lock`` hold. A server that is down, slow or full costs a
message, and ``make log`` logs later what the workspace holds. One experiment is one run, named
after ``DVC_EXP_NAME`` and found again by two tags: ``fingerprint`` names the training, ``results``
what was measured. ``Live`` makes the run, or takes the one that a crash left, and passes points of
curves on to it. ``complete_run`` adds the results and the files that lead a clone back to them
(docs/guide.md). The same results are one run, other results of the same training another one.

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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML

from stages.core.command import project_root
from stages.core.console import show
from stages.evaluation import catalogue
from stages.evaluation.metrics import headline
from stages.params.params import PARAMS_FILE
from stages.tracking import tags
from stages.tracking.tags import experiment_name, redacted

EXPERIMENT = "preference-tuning"
DESCRIPTION = "mlflow.note.content"
NEWEST = ["attributes.start_time DESC"]
PROBE_SECONDS, FLUSH_SECONDS, RETRY_SECONDS, CLOSE_SECONDS = 4.0, 2.0, 60.0, 90.0

QUIET, REFUSED = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml")).values()


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

    A thread does everything that concerns MLflow, since its import and a new database take 20 s.
    While MLflow fails, the thread tries again, more and more seldom, after one message. The run
    ends as FINISHED, or as FAILED or KILLED with the reason in its description.
    """

    def __init__(self, fingerprint: str, name: str | None = None) -> None:
        self._fingerprint, self._name = fingerprint, name or experiment_name()
        self._points: queue.SimpleQueue[tuple[str, float, int, int]] = queue.SimpleQueue()
        self._stop, self._status, self._why = threading.Event(), "FINISHED", ""
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        for key, value in values.items():
            self._points.put((_key(f"{split}/{key}"), float(value), now, step))

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if isinstance(error, Exception):
            self._status = "FAILED"
            lines = redacted(str(error) or type(error).__name__)[:4000].splitlines()
            self._why = "\n".join(f"    {line}" for line in lines)  # Markdown leaves it as it is
        elif error is not None:
            self._status, self._why = "KILLED", "Interrupted; the same command continues this run."
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)  # what was not passed on by then is in the CSVs

    def _pass_on(self) -> None:
        client, run_id, waiting = None, "", []
        pause, warned, last = 0.0, False, False
        while not last:
            last = self._stop.wait(pause)
            while not self._points.empty():
                waiting.append(self._points.get())
            try:
                if client is None:
                    client, experiment = connect()
                from mlflow.entities import Metric

                if not run_id:
                    run = _run((client, experiment), self._fingerprint, self._name)
                    run_id = run.info.run_id
                    client.update_run(run_id, status="RUNNING")
                    _tag(client, run_id, tags.provenance() | {DESCRIPTION: ""})
                client.log_batch(run_id, [Metric(*point) for point in waiting])
                waiting.clear()
                if last:
                    client.set_tag(run_id, DESCRIPTION, self._why)
                    client.set_terminated(run_id, self._status)
                pause, warned = FLUSH_SECONDS, False
            except Exception as error:  # whatever a tracker raises, the training continues
                if not warned:
                    show(
                        f"MLflow: no live curves, {reason(error)}. The training continues without "
                        "them, and the last stage logs what is missing."
                    )
                client, warned = None, True
                pause = min(RETRY_SECONDS, 2 * pause + FLUSH_SECONDS)


def complete_run(results: Path, curves: Path, adapter: Path, files: Sequence[Path]) -> None:
    """``log_outcome`` in a stage, which MLflow can't fail: one message says what was logged, or why
    it was not, and how to log it later.
    """
    try:
        show(log_outcome(results, curves, adapter, files))
    except Exception as error:  # whatever a tracker raises, the results are there
        name = os.environ.get("DVC_EXP_NAME", "")
        copied = Path().resolve() != project_root()  # whose files DVC deletes
        show(
            f"MLflow: the run was not logged, {reason(error)}. Nothing is lost: "
            + (f"`dvc exp apply {name}` and " if copied else "")
            + f"`make log{f' NAME={name}' * bool(name)}` logs it later."
        )


def log_outcome(
    results: Path, curves: Path, adapter: Path, files: Sequence[Path], *, name: str | None = None
) -> str:
    """Add the results to the run of their training, finish it, and say where it is.

    ``results`` holds metrics.json, ``curves`` a table for each split, ``adapter`` the fingerprint
    of its training. ``files`` (or folders) go to MLflow under the paths that they have here, so
    that a clone can get them back, and from elsewhere into reports/. So do the outputs below
    reports/ that dvc.lock names, and params.yaml and dvc.lock themselves.

    That is the run that has these results already, so that logging twice changes nothing; else the
    one that ``Live`` made under this name (default: ``experiment_name``) or that was trained under
    another one, if it has no results yet; else a new one. Raises whatever MLflow does, and the
    same call then completes the run.
    """
    made = json.loads((adapter / "fingerprint.json").read_text(encoding="utf-8"))
    measured = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    parameters = {
        _key(key): redacted(value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in tags.parameters(Path()).items()
    }
    points = list(_points(curves))
    content = json.dumps([parameters, measured, points], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    known = tags.provenance() | {"results": digest}
    name = name or experiment_name()

    client, experiment = connect()
    run = _run((client, experiment), made["fingerprint"], name, digest)
    run_id, began = run.info.run_id, run.info.start_time
    if run.data.tags.get("results") != digest:
        known["experiment"] = name
        client.update_run(run_id, name=name)
    client.update_run(run_id, status="RUNNING")
    _tag(client, run_id, known)

    from mlflow.entities import Metric, Param

    # With one time for all of them, points that are logged again are the same points.
    metrics = [Metric(key, value, began, 0) for key, value in _named(measured).items()]
    there: dict[str, set[int]] = {}
    for key, step, value in points:
        if key not in there:
            there[key] = {point.step for point in client.get_metric_history(run_id, key)}
        if step not in there[key]:
            metrics.append(Metric(key, value, began, step))
    client.log_batch(run_id, metrics, [Param(*each) for each in parameters.items()])
    _log_files(client, run_id, files)
    told = (
        f"**Win rate {catalogue.with_interval(measured, 'win_rate')}** on held-out pairs",
        f"Changed: `{known.get('changed', 'nothing')}`",
        "The way back: docs/guide.md, From a run back to what made it",
    )
    client.set_tag(run_id, DESCRIPTION, "\n\n".join(told))
    client.set_terminated(run_id)
    page = f"{tracking_uri().rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    shown = client.get_run(run_id).info.run_name
    return f"MLflow: logged as {shown} ({page if page[:4] == 'http' else '`make ui` shows it'})"


def _log_files(client: Any, run_id: str, files: Sequence[Path]) -> None:
    made_here = [path for path in map(Path, tags.outputs(Path())) if path.parts[0] == "reports"]
    for path in {*made_here, *files}:
        place = Path("reports", path.name) if path.is_absolute() else path
        if path.is_dir():
            client.log_artifacts(run_id, str(path), place.as_posix())
        elif path.is_file():
            client.log_artifact(run_id, str(path), place.parent.as_posix())
    for path in (PARAMS_FILE, Path("dvc.lock")):
        if path.is_file():
            client.log_text(run_id, redacted(path.read_text(encoding="utf-8")), path.name)


def _named(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The figures that DVC shows, by its names and first; then all of them below ``evaluation/``,
    where MLflow folds them away; lm-eval's tasks have a prefix of their own.
    """
    known = {key: float(value) for key, value in metrics.items() if value is not None}
    rest = {k if k.startswith("lm_eval/") else f"evaluation/{k}": v for k, v in known.items()}
    return {_key(key): value for key, value in (headline(known) | rest).items()}


def _run(at: tuple[Any, str], fingerprint: str, name: str, results: str | None = None) -> Any:
    """The newest run of a training with these results; else one that has none yet and has this
    name, or, where there are results, whose training has ended; else a new one. ``at`` is what
    ``connect`` gives.
    """
    client, experiment = at
    runs = client.search_runs([experiment], f"tags.fingerprint = '{fingerprint}'", order_by=NEWEST)
    without = [run for run in runs if "results" not in run.data.tags]
    found = [run for run in runs if results and run.data.tags.get("results") == results]
    found += [run for run in without if run.data.tags.get("experiment") == name]
    found += [run for run in without if results and run.info.status == "FINISHED"]
    made = {"fingerprint": fingerprint, "experiment": name}
    return found[0] if found else client.create_run(experiment, run_name=name, tags=made)


def connect() -> tuple[Any, str]:
    """A client of the tracking server and the id of the experiment; database and experiment are
    made if need be.

    Raises ``ConnectionError`` within seconds where no server answers, ``LookupError`` where the
    experiment was deleted.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        _probe(uri)
    file = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # 10 s on two cores
    from mlflow.exceptions import MlflowException

    logging.getLogger("alembic").setLevel(logging.WARNING)  # 60 lines where a database is made
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or EXPERIMENT
    # Two processes that make one database at once break it.
    with FileLock(f"{file}.lock") if file else nullcontext():
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = (project_root() / "mlartifacts").as_uri() if file else None  # a server decides
            try:
                client.create_experiment(experiment, artifact_location=place)
            except MlflowException:
                if client.get_experiment_by_name(experiment) is None:
                    raise  # else another process made it at the same time
            found = client.get_experiment_by_name(experiment)
    if found.lifecycle_stage == "deleted":
        raise LookupError(
            f"its experiment {experiment} was deleted: `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}` brings it back, or name another one in "
            "MLFLOW_EXPERIMENT_NAME"
        )
    return client, str(found.experiment_id)


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


def _tag(client: Any, run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(_key(key), value) for key, value in values.items()])


def reason(error: Exception) -> str:
    """The first line of what went wrong, without secrets."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if refused := re.search(r"failed with error code (40[13])\b", lines[0]):
        return REFUSED[refused[1]]
    return redacted(lines[0])[:300].rstrip(".")
