"""Tasks of lm-eval: published benchmarks, answered by a loaded model.

The model that is already loaded goes through lm-eval's own ``HFMultimodalLM``, with the model's own
chat template and the image size of the ``format`` section. A task is one of lm-eval's, or a YAML
file in the project's ``tasks`` folder.

Results are lm-eval's own output without what differs from run to run (times, paths, environment):
``results.json`` and ``samples/<task>.jsonl``, the same bytes each time.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.answers import published
from stages.answers.published import is_number
from stages.core import hub_errors
from stages.core.errors import UserError, did_you_mean
from stages.core.meaning import code
from stages.model import formatted
from stages.model.checkpoint import Checkpoint, digest
from stages.model.scoring import Policy
from stages.params.params import Params

KEY = "evaluate.lm_eval"  # where params.yaml names the tasks
# Of lm-eval's own results.
SECTIONS = (
    *("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better"),
    "n-samples",
)
# What the project's own tasks import.
OF_TASKS = (
    *("answers/grading.py", "answers/published.py", "sources/topics.py"),
    *("model/formatted.py", "pairs/pairs.py"),
)


@dataclass(frozen=True)
class Results:
    """What lm-eval found, as it is written: plain JSON values only.

    ``document``: ``results.json``, empty where no task was asked for. ``samples``: for each task a
    row a document, in order: ``doc_id``, ``target``, ``arguments`` (the texts that the model was
    given), ``images`` (hashes of their pixels), ``resps``, ``filtered_resps``, ``filter``,
    ``metrics`` (name to value).
    """

    document: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Figures:
    """One task's figures, or those of a group of tasks.

    ``metrics``: name to figure. ``values``: for each metric that is a mean, or a ratio of sums, the
    value of every document, shape (documents,); their mean is the figure. ``clusters``:
    (documents,) labels, the same for documents that show the same images. ``higher_is_better``:
    None where neither is. ``parts``: the tasks of a group, or the task itself.
    """

    metrics: dict[str, float]
    values: dict[str, tuple[float, ...]]
    clusters: tuple[str, ...]
    higher_is_better: dict[str, bool | None]
    parts: tuple[str, ...]

    @property
    def documents(self) -> int:
        return len(self.clusters)


# names


def check(names: Iterable[str], folder: Path) -> None:
    """Refuse names that are no tasks, before anything is loaded.

    Fast where all are the project's own, in ``folder``; lm-eval's index takes 10 s to build.

    Raises:
        UserError: a name that neither the folder nor lm-eval knows, or a task that is asked for
            twice, by its own name and as a part of a group.
    """
    names = list(names)
    members = _local(folder)
    if not all(leaf in members for name in names for leaf in _leaves(name, members)):
        members = _indexed(_manager(folder, defaults=True))
    asked_by: dict[str, str] = {}
    for name in names:
        if name not in members:
            raise UserError(
                f"{KEY}: neither {folder} nor lm-eval has a task '{name}'"
                + did_you_mean(name, members)
            )
        for leaf in _leaves(name, members):
            if leaf in asked_by:
                raise UserError(
                    f"{KEY}: '{asked_by[leaf]}' and '{name}' both hold the task {leaf}; keep one"
                )
            asked_by[leaf] = name


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a name stands for: itself, or those of a group, in order."""
    parts = members.get(name, ())
    return [leaf for part in parts for leaf in _leaves(part, members)] if parts else [name]


def _local(folder: Path) -> dict[str, tuple[str, ...]]:
    """Names in the project's folder with their members; read without lm-eval, which takes 6 s."""
    return {
        str(config.get("group") or config["task"]): (
            _members(config["task"]) if "group" in config else ()
        )
        for _, config in _configured(folder)
    }


def _configured(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of the folder that describe a task or a group, with what they say."""
    from ruamel.yaml import YAML

    for path in sorted(folder.rglob("*.yaml")):
        config = YAML().load(path.read_text(encoding="utf-8"))
        if "task" in config:
            yield path, config


def _asking_own_questions(folder: Path) -> frozenset[str]:
    """The project's tasks whose documents are the data set's own, as the format stage wrote them:
    their ``metadata`` say so.
    """
    from ruamel.yaml import YAML

    configs = (YAML().load(path.read_text(encoding="utf-8")) for path in folder.rglob("*.yaml"))
    return frozenset(str(c["task"]) for c in configs if c.get("metadata", {}).get("own_questions"))


def _indexed(manager: Any) -> dict[str, tuple[str, ...]]:
    """The same for all names that lm-eval's manager knows."""
    return {
        name: tuple(sorted(entry.tags))
        if entry.kind.name == "TAG"
        else _members(entry.cfg["task"])
        if entry.kind.name == "GROUP"
        else ()
        for name, entry in manager.task_index.items()
    }


def _members(listed: Any) -> tuple[str, ...]:
    items = listed if isinstance(listed, list) else [listed]
    return tuple(
        str(item.get("group") or item.get("task")) if isinstance(item, Mapping) else str(item)
        for item in items
    )


def _manager(folder: Path, *, defaults: bool, metadata: dict[str, str] | None = None) -> Any:
    with _quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(folder), include_defaults=defaults, metadata=metadata)


# running


def run(checkpoint: Checkpoint, folder: Path, formatted_data: Path, images: Path) -> Results:
    """Let a model answer the tasks of ``evaluate.lm_eval``, greedily or as each task says.

    Each task or group is kept by itself, so that another one in the parameters is answered alone.
    It has its number of documents, the first ones, or None for all; in a group the number is for
    each of its tasks. A task that asks the data set's own questions is skipped where it has none.

    Args:
        folder: the project's own tasks.
        formatted_data: the format stage's folder, for tasks that ask the data set's own questions.
        images: the folder that its image names are relative to.

    Raises:
        UserError: a data set can't be had, or lm-eval can't run such a task.
    """
    members = _local(folder)
    asked = checkpoint.p.evaluate.lm_eval
    ours = {name: all(leaf in members for leaf in _leaves(name, members)) for name in asked}
    questions = formatted.read(formatted_data, "questions") if any(ours.values()) else []

    @cache
    def manager() -> Any:
        return _manager(
            folder,
            defaults=not all(ours.values()),
            metadata={"formatted_data": str(formatted_data), "images": str(images)},
        )

    document: dict[str, Any] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    without_questions = _asking_own_questions(folder) if not questions else frozenset()
    for name, documents in asked.items():
        if without_questions & set(_leaves(name, members)):
            print(
                f"{KEY}.{name} is skipped: it asks the data set's own questions with known "
                "answers, and this data set has none"
            )
            continue
        content = checkpoint.kept(
            "lm-eval",
            partial(_answered, checkpoint, name, documents, manager),
            label=f"lm-eval {name}",
            task=name,
            documents=documents,
            code=code("answers/lm_eval.py"),
            version=version("lm_eval"),
            own=_decides(folder, _leaves(name, members), formatted_data) if ours[name] else None,
        )
        found = json.loads(content)
        for section, values in found["document"].items():
            if isinstance(values, dict):
                document.setdefault(section, {}).update(values)
            else:
                document[section] = values
        samples |= found["samples"]
    return Results(document, samples)


def _decides(folder: Path, tasks: Sequence[str], formatted_data: Path) -> dict[str, Any]:
    """What decides the results of tasks of the project's own: the files next to theirs, graders
    included, and no other task's.
    """
    homes = {path.parent for path, config in _configured(folder) if config["task"] in tasks}
    files = sorted(
        path
        for home in homes
        for path in home.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    )
    return {
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
        "questions": digest(rows=formatted.read(formatted_data, "questions")),
        "code": code(*OF_TASKS),
    }


def _answered(
    checkpoint: Checkpoint, name: str, documents: int | None, manager: Callable[[], Any]
) -> bytes:
    """``document`` and ``samples`` of ``Results`` as JSON, from lm-eval's own output."""
    with _quiet():
        asked = _load(name, manager())
        model = _model(checkpoint.policy, checkpoint.p)
        found = _evaluated(model, manager(), asked, name, documents)
    document = {section: found.get(section, {}) for section in SECTIONS}
    for section in ("results", "groups"):
        document[section] = {each: _figures(of) for each, of in document[section].items()}
    samples = {task: _rows(rows) for task, rows in found["samples"].items()}
    tasks = asked["tasks"]
    document["configs"] = {task: _config(made) for task, made in tasks.items()}
    document["datasets"] = {task: _data_set(made, samples[task]) for task, made in tasks.items()}
    document["limits"] = {name: documents}
    document["lm_eval_version"] = version("lm_eval")
    return _json({"document": document, "samples": samples})


def _model(policy: Policy, p: Params) -> Any:
    """lm-eval's wrapper of a loaded model; its processor comes from the base model's folder.

    Tokens are those that training sees. Where an image is not square its sides can be rounded to
    other multiples of the patch, since LLaMA-Factory resizes images before the processor does.
    """
    from lm_eval.models.hf_vlms import HFMultimodalLM

    # A task's documents have an image of the largest size, a question and an answer.
    document = p.format.image_max_pixels // 28**2 + 256
    return HFMultimodalLM(
        pretrained=policy.model,
        batch_size=max(1, p.scoring.batch_tokens // document),
        min_pixels=p.format.image_min_pixels,
        max_pixels=p.format.image_max_pixels,
        trust_remote_code=p.model.trust.remote_code,
    )


def _load(name: str, manager: Any) -> dict[str, Any]:
    """What a name stands for, with its data: ``tasks`` and ``groups`` by name.

    Raises:
        UserError: the data set can't be had, or the task would run code that a model wrote.
    """
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        loaded: dict[str, Any] = manager.load([name])
    except (OSError, ValueError, httpx.HTTPError, DatasetsError) as error:
        entries = [manager.task_index.get(leaf) for leaf in _leaves(name, _indexed(manager))]
        repos = sorted({str(entry.cfg.get("dataset_path")) for entry in entries if entry})
        raise UserError(f"{KEY}.{name}: {_why(error, repos)}") from None
    for task, made in loaded["tasks"].items():
        if getattr(made, "UNSAFE_CODE", False):
            raise UserError(
                f"{KEY}.{name}: {task} runs code that the model wrote, which this project does "
                f"not; remove it from {KEY}"
            )
    return loaded


def _why(error: Exception, repos: Sequence[str]) -> str:
    """Why a task's data sets can't be had, and what to do."""
    from huggingface_hub import constants

    what = f"the data set {' and '.join(repos)}"
    why = hub_errors.explain(
        error, what, page=f"{constants.ENDPOINT}/datasets/{''.join(repos[:1])}"
    )
    why = why or f"{what} can't be loaded ({type(error).__name__}); fix that"
    if "no such revision" in why:
        why += " (dataset_kwargs in the task's YAML file names it)"
    return f"{why}, or remove the task from {KEY}"


def _evaluated(
    model: Any, manager: Any, asked: Mapping[str, Any], name: str, documents: int | None
) -> dict[str, Any]:
    """lm-eval's own results of a task or group, with samples.

    Raises:
        UserError: a task scores the log-probs of given answers to an image, which lm-eval can't.
    """
    from lm_eval import evaluator

    group = asked["groups"].get(name)
    # Samples carry images, and lm-eval would encode each as PNG to hash it: half an hour for POPE.
    hashes, evaluator.LMEVAL_HASHMM = evaluator.LMEVAL_HASHMM, False
    try:
        found: dict[str, Any] = evaluator.simple_evaluate(
            model=model,
            tasks=[group] if group else list(asked["tasks"].values()),
            task_manager=manager,
            limit=documents,
            apply_chat_template=True,
            bootstrap_iters=0,
            log_samples=True,
        )
    except NotImplementedError:
        raise UserError(
            f"{KEY}: {name} compares log-probs of given answers to an image, which lm-eval can't "
            "do; choose tasks whose answers are generated"
        ) from None
    finally:
        evaluator.LMEVAL_HASHMM = hashes
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's warnings are about ways to call it that were chosen here on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# plain values


def _rows(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's samples of a task without the documents, whose images can't be written."""
    known: dict[int, str] = {}  # several documents may share an image

    def hashed(image: Any) -> str:
        if id(image) not in known:
            known[id(image)] = _pixels(image)
        return known[id(image)]

    return [
        {
            "doc_id": sample["doc_id"],
            "target": sample["target"],
            "arguments": [
                [part for part in request if isinstance(part, str)]
                for request in sample["arguments"]
            ],
            "images": [
                hashed(image)
                for request in sample["arguments"][:1]
                for part in request
                if isinstance(part, dict)
                for image in part.get("visual", ())
            ],
            "resps": sample["resps"],
            "filtered_resps": sample["filtered_resps"],
            "filter": sample["filter"],
            "metrics": {metric: sample[metric] for metric in sample["metrics"]},
        }
        for sample in samples
    ]


def _pixels(image: Any) -> str:
    content = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    content.update(image.tobytes())
    return content.hexdigest()


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures without standard errors, which are not computed here ("N/A")."""
    return {key: value for key, value in found.items() if "_stderr," not in key}


def _config(task: Any) -> dict[str, Any]:
    """A task's configuration, functions by name, without the paths that were passed to it."""
    config: dict[str, Any] = task.config.to_dict(keep_callable=True)
    passed = ("config_source", "formatted_data", "images")
    metadata = config.get("metadata") or {}
    config["metadata"] = {key: metadata[key] for key in metadata if key not in passed}
    return config


def _data_set(task: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which documents were answered: where they come from, and a hash of what was shown."""
    shown = hashlib.blake2b(digest_size=16)
    pinned = (task.config.dataset_kwargs or {}).get("revision")
    for row in rows:
        shown.update(_json([row[key] for key in ("doc_id", "target", "arguments", "images")]))
    # datasets keeps what it built from a Hub repository in a folder named by the commit.
    files = getattr(task.task_docs, "cache_files", [])
    commits = {match[0] for file in files if (match := _COMMIT.search(file["filename"]))}
    return {
        "path": task.config.dataset_path,
        "name": task.config.dataset_name,
        "split": task.config.test_split or task.config.validation_split,
        "commit": commits.pop() if len(commits) == 1 else pinned,
        "shown": shown.hexdigest(),
    }


_COMMIT = re.compile(r"\b[0-9a-f]{40}(?=[/\\])")


def _json(value: Any) -> bytes:
    """Deterministic JSON; numbers that JSON has no word for become null, functions their names."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(key): plain(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [plain(each) for each in item]
        if isinstance(item, set | frozenset):
            return sorted(plain(each) for each in item)
        if hasattr(item, "item") and not hasattr(item, "__len__"):
            return plain(item.item())  # a NumPy scalar
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if item is None or isinstance(item, bool | int | float | str):
            return item
        return getattr(item, "__name__", type(item).__name__)

    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode()


def write(results: Results, folder: Path) -> None:
    """Write ``results.json`` and ``samples/<task>.jsonl``, the same bytes each time."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for old in (folder / "samples").glob("*.jsonl"):
        old.unlink()
    document = json.dumps(results.document, sort_keys=True, ensure_ascii=False, indent=1)
    (folder / "results.json").write_text(document + "\n", encoding="utf-8")
    for task, rows in results.samples.items():
        lines = b"".join(_json(row) + b"\n" for row in rows)
        (folder / "samples" / f"{task}.jsonl").write_bytes(lines)


def read(folder: Path) -> Results:
    """Read what ``write`` wrote.

    Raises:
        UserError: the files are missing or broken.
    """
    path = folder / "results.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        samples = {}
        for task in sorted(document.get("datasets", {})):
            path = folder / "samples" / f"{task}.jsonl"
            samples[task] = [json.loads(line) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; `dvc repro` of the stage that writes {folder} makes it"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        raise UserError(
            f"{path} is not what lm-eval's results look like; `dvc repro -f` of the stage that "
            f"writes {folder} makes it again"
        ) from None
    return Results(document, samples)


# figures


def figures(results: Results) -> dict[str, Figures]:
    """The figures of every task and of every group that has its own, by name."""
    document = results.document
    groups: dict[str, Any] = document.get("group_subtasks", {})
    found = {}
    for name, told in document.get("results", {}).items():
        metrics, values = {}, {}
        parts = tuple(_leaves(name, groups))
        rows = [row for task in parts for row in results.samples.get(task, [])]
        filters = {row["filter"] for row in rows}
        for key, figure in told.items():
            metric, comma, kept_by = key.partition(",")
            if not comma or not is_number(figure):
                continue
            label = metric if kept_by == "none" else f"{metric}_{kept_by}"
            metrics[label] = float(figure)
            each = [row["metrics"].get(metric) for row in rows if row["filter"] == kept_by]
            numbers = published.linear(each)
            # Only where documents' values average to the figure is their mean what it reports.
            if numbers and math.isclose(
                sum(numbers) / len(numbers), figure, rel_tol=1e-9, abs_tol=1e-12
            ):
                values[label] = numbers
        if metrics:
            first = min(filters, default=None)
            found[name] = Figures(
                metrics,
                values,
                tuple(
                    " ".join(row["images"]) or f"{task} {row['doc_id']}"
                    for task in parts
                    for row in results.samples.get(task, [])
                    if row["filter"] == first
                ),
                document.get("higher_is_better", {}).get(name, {}),
                parts,
            )
    return found
