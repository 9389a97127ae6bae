"""Tasks of lm-eval: published benchmarks, answered by a loaded model.

The model that is already loaded goes through lm-eval's own ``HFMultimodalLM``, with the model's own
chat template and the image size of the ``format`` section. It runs any task: one of lm-eval's, or a
folder in ``tasks/published``, where a new one goes (CONTRIBUTING.md).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from stages.answers.task_results import Results, leaves, to_json
from stages.core.errors import UserError, did_you_mean, of_the_hub
from stages.core.meaning import code, digest
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.model.scoring import Policy
from stages.params.params import Params

KEY = "evaluate.lm_eval"  # where params.yaml names the tasks
# Before a chat template, some of which open a thought: tasks let no answer be as long.
WITHOUT_THOUGHT = "{%- set enable_thinking = false -%}"
KIND = "lm-eval"  # of a piece that is kept
# Of lm-eval's own results.
SECTIONS = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better")
_COMMIT = re.compile(r"\b[0-9a-f]{40}(?=[/\\])")
# What the project's own tasks import.
OF_TASKS = (*("answers/grading.py", "sources/topics.py", "model/formatted.py", "pairs/pairs.py"),)


def run(checkpoint: Checkpoint, folder: Path, formatted_data: Path, images: Path) -> Results:
    """Let a model answer the tasks of ``evaluate.lm_eval``, greedily or as each task says.

    Each task or group is kept by itself, so that another one in the parameters is answered alone,
    and with several GPUs each is answered on one of them.
    It has its number of documents, the first ones, or None for all; in a group the number is for
    each of its tasks. A task that asks the data set's own questions is skipped where it has none.

    Args:
        folder: the project's own tasks.
        formatted_data: the format stage's folder, for tasks that ask the data set's own questions.
        images: the folder that its image names are relative to.

    Raises:
        UserError: a name is no task's or is asked for twice, a data set can't be loaded, or lm-eval
            can't run such a task.
    """
    asked = checkpoint.p.evaluate.lm_eval
    document: dict[str, Any] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    if not asked:
        return Results(document, samples)
    shown = {"formatted_data": str(formatted_data), "images": str(images)}
    manager = _manager(asked, folder, **shown)
    questions = formatted.read(formatted_data, "questions")
    pieces: dict[Path, tuple[str, dict[str, Any]]] = {}
    for name, tasks in _tasks(asked, manager, folder).items():
        entries = [manager.task_index.get(task) for task in tasks]
        own = [e for e in entries if e and Path(e.yaml_path).is_relative_to(folder)]
        if not questions and any(e.cfg.get("metadata", {}).get("own_questions") for e in own):
            print(
                f"{KEY}.{name} is skipped: it asks the data set's own questions with known "
                "answers, and this data set has none"
            )
            continue
        decides = {
            "task": name,
            "documents": asked[name],
            "code": code("answers/lm_eval.py", "answers/task_results.py"),
            "version": version("lm_eval"),
            "own": _decides(folder, {e.yaml_path.parent for e in own}, questions) if own else None,
        }
        pieces[checkpoint.place(KIND, **decides)] = name, decides
    checkpoint.side_by_side(partial(_kept, checkpoint, folder, shown), pieces, "lm-eval")
    for name, decides in pieces.values():
        found = json.loads(_kept(checkpoint, folder, shown, (name, decides), manager))
        for section, values in found["document"].items():
            if isinstance(values, dict):
                document.setdefault(section, {}).update(values)
            else:
                document[section] = values
        samples |= found["samples"]
    return Results(document, samples)


def _kept(
    checkpoint: Checkpoint,
    folder: Path,
    shown: Mapping[str, str],
    task: tuple[str, dict[str, Any]],
    manager: Any = None,
) -> bytes:
    """``_answered``, or what an earlier run kept, of a task and all that decides it."""
    name, decides = task

    def answered() -> bytes:
        return _answered(checkpoint, name, manager or _manager([name], folder, **shown))

    return checkpoint.kept(KIND, answered, label=f"lm-eval {name}", **decides)


# names


def _manager(names: Iterable[str], folder: Path, **metadata: str) -> Any:
    """lm-eval's index of the project's tasks, and of its own if a name is none of the project's:
    building that takes 10 s."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    members = _members(own)
    if all(leaf in members for name in names for leaf in leaves(name, members)):
        return own
    return TaskManager(include_path=str(folder), metadata=metadata)


def _tasks(names: Iterable[str], manager: Any, folder: Path) -> dict[str, list[str]]:
    """The tasks that each name stands for.

    Raises:
        UserError: a name that neither the folder nor lm-eval knows, or a task that is asked for
            twice, by its own name and as a part of a group.
    """
    members = _members(manager)
    found: dict[str, list[str]] = {}
    for name in names:
        if name not in members:
            raise UserError(
                f"{KEY}: neither {folder} nor lm-eval has a task '{name}'"
                + did_you_mean(name, members)
            )
        found[name] = leaves(name, members)
        for other, tasks in found.items():
            if other != name and (twice := set(tasks) & set(found[name])):
                raise UserError(
                    f"{KEY}: '{other}' and '{name}' both hold the task {min(twice)}; keep one"
                )
    return found


def _members(manager: Any) -> dict[str, list[str]]:
    """All names that a manager knows, with what a group or a tag holds."""
    found: dict[str, list[str]] = {}
    for name, entry in manager.task_index.items():
        held = {"GROUP": (entry.cfg or {}).get("task", []), "TAG": sorted(entry.tags)}
        parts = held.get(entry.kind.name, [])
        found[name] = [
            str(part.get("group") or part.get("task")) if isinstance(part, Mapping) else str(part)
            for part in (parts if isinstance(parts, list) else [parts])
        ]
    return found


def _decides(folder: Path, homes: Iterable[Path], questions: Any) -> dict[str, Any]:
    """What decides the results of tasks of the project's own: the files next to theirs, graders
    included, and those that the folders above share, but no other task's.
    """
    files = {path for home in homes for path in home.rglob("*") if path.suffix != ".pyc"}
    shared = {above for home in homes for above in home.parents if above.is_relative_to(folder)}
    files |= {path for above in shared for path in above.glob("*.py")}
    return {
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(files)
            if path.is_file()
        },
        "questions": digest(rows=questions),
        "code": code(*OF_TASKS),
    }


# running


def _answered(checkpoint: Checkpoint, name: str, manager: Any) -> bytes:
    """``document`` and ``samples`` of ``Results`` as JSON, from lm-eval's own output."""
    documents = checkpoint.p.evaluate.lm_eval[name]
    asked = _load(name, manager)
    found = _evaluated(_model(checkpoint.policy, checkpoint.p), manager, asked, name, documents)
    document = {section: found.get(section, {}) for section in (*SECTIONS, "n-samples")}
    for section in ("results", "groups"):
        document[section] = {
            # Standard errors are not computed here ("N/A").
            each: {key: value for key, value in of.items() if "_stderr," not in key}
            for each, of in document[section].items()
        }
    samples = {task: _rows(rows) for task, rows in found["samples"].items()}
    tasks = asked["tasks"]
    document["configs"] = {task: _config(made) for task, made in tasks.items()}
    document["datasets"] = {task: _data_set(made, samples[task]) for task, made in tasks.items()}
    document["limits"] = {name: documents}
    document["lm_eval_version"] = version("lm_eval")
    return to_json({"document": document, "samples": samples})


def _model(policy: Policy, p: Params) -> Any:
    """lm-eval's wrapper of a loaded model; its processor comes from the base model's folder.

    Tokens are those that training sees. Where an image is not square its sides can be rounded to
    other multiples of the patch, since LLaMA-Factory resizes images before the processor does.
    """
    from lm_eval.models.hf_vlms import HFMultimodalLM

    # A task's documents have an image of the largest size, a question and an answer.
    document = p.format.image_max_pixels // 28**2 + 256
    model = HFMultimodalLM(
        pretrained=policy.model,
        batch_size=max(1, p.scoring.batch_tokens // document),
        min_pixels=p.format.image_min_pixels,
        max_pixels=p.format.image_max_pixels,
        trust_remote_code=p.model.trust.remote_code,
    )
    if p.model.template.endswith("_nothink"):
        model.processor.chat_template = WITHOUT_THOUGHT + model.processor.chat_template
    return model


def _load(name: str, manager: Any) -> dict[str, Any]:
    """What a name stands for, with its data: ``tasks`` and ``groups`` by name.

    Raises:
        UserError: the data set can't be loaded.
    """
    import httpx
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants

    try:
        loaded: dict[str, Any] = manager.load([name])
        return loaded
    except (OSError, ValueError, httpx.HTTPError, DatasetsError) as error:
        entries = [manager.task_index.get(task) for task in leaves(name, _members(manager))]
        repos = sorted({str(entry.cfg.get("dataset_path")) for entry in entries if entry})
        what = f"the data set {' and '.join(repos)}"
        page = f"{constants.ENDPOINT}/datasets/{''.join(repos[:1])}"
        why = of_the_hub(error, what, page=page)
        why = why or f"{what} can't be loaded ({type(error).__name__}); fix that"
        if "no such revision" in why:
            why += " (dataset_kwargs in the task's YAML file names it)"
        raise UserError(f"{KEY}.{name}: {why}, or remove the task from {KEY}") from None


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
    evaluator.LMEVAL_HASHMM = False
    try:
        with mock.patch.dict(os.environ):
            os.environ.pop("LOCAL_RANK", None)  # else lm-eval gives results to the first alone
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
    return found


# plain values


def _rows(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm-eval's samples of a task without the documents, whose images can't be written."""
    kept = ("doc_id", "target", "resps", "filtered_resps", "filter")
    return [
        {key: sample[key] for key in kept}
        | {
            "arguments": [
                [part for part in request if isinstance(part, str)]
                for request in sample["arguments"]
            ],
            "images": [
                _hashed(image)
                for part in sample["arguments"][0]
                if isinstance(part, dict)
                for image in part.get("visual", ())
            ],
            "metrics": {metric: sample[metric] for metric in sample["metrics"]},
        }
        for sample in samples
    ]


def _hashed(image: Any) -> str:
    content = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    content.update(image.tobytes())
    return content.hexdigest()


def _config(task: Any) -> dict[str, Any]:
    """A task's configuration, functions by name, without the paths that were passed to it."""
    config: dict[str, Any] = task.config.to_dict(keep_callable=True)
    passed = ("config_source", "formatted_data", "images")
    kept = {k: value for k, value in (config["metadata"] or {}).items() if k not in passed}
    return config | {"metadata": kept}


def _data_set(task: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which documents were answered: where they come from, and a hash of what was shown."""
    shown = hashlib.blake2b(digest_size=16)
    for row in rows:
        shown.update(to_json([row[key] for key in ("doc_id", "target", "arguments", "images")]))
    # datasets keeps what it built from a Hub repository in a folder named by the commit.
    files = getattr(task.task_docs, "cache_files", [])
    commits = {each for file in files for each in _COMMIT.findall(file["filename"])}
    pinned = (task.config.dataset_kwargs or {}).get("revision")
    return {
        "path": task.config.dataset_path,
        "name": task.config.dataset_name,
        "split": task.config.test_split or task.config.validation_split,
        "commit": commits.pop() if len(commits) == 1 else pinned,
        "shown": shown.hexdigest(),
    }
