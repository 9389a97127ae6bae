"""What page and card are made from: parameters, and the files that the stages wrote."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.errors import readable
from stages.params.params import Params

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Origin:
    """Where data or a model came from, by its ``SOURCE.json``.

    ``name`` is a repository, a package or a folder, and no place on this machine. ``parameters``
    are counted where it is a model.
    """

    name: str
    kind: str
    repo: str | None
    commit: str | None
    licence: str | None
    files: Sequence[Mapping[str, Any]] = ()
    parameters: int | None = None

    @property
    def link(self) -> str | None:
        """Where it is published, if the Hub is the place."""
        if self.kind != "hub" or not self.commit:
            return None
        is_model = self.parameters is not None
        return f"{HUB}/{'' if is_model else 'datasets/'}{self.repo}/tree/{self.commit}"

    @property
    def size(self) -> str:
        return readable(sum(file["size"] for file in self.files))

    @property
    def weights(self) -> Mapping[str, Any] | None:
        """The first weights file by name, whose digest pins a model that has no commit."""
        found = [file for file in self.files if file["path"].endswith(".safetensors")]
        return min(found, key=lambda file: str(file["path"]), default=None)


@dataclass(frozen=True)
class Inputs:
    """All that is shown, as the stages wrote it.

    ``image`` gives the bytes of an image by its name, or ``None``. ``configuration`` is the text of
    llamafactory.yaml, ``first_batch`` what the trainer on shared prompts found there
    (``tuning/trainer.py``), ``questions`` how many different ones all pairs ask.
    """

    p: Params
    metrics: Mapping[str, Any]
    scores: pd.DataFrame
    answers: pd.DataFrame
    slices: pd.DataFrame
    audit: pd.DataFrame
    preprocess: Mapping[str, Any]
    format: Mapping[str, Any]
    first_batch: Mapping[str, Any]
    test_pairs: Sequence[Mapping[str, Any]]
    questions: int
    image: Callable[[str], bytes | None]
    data: Sequence[Origin]
    model: Origin
    configuration: str
    adapter: Mapping[str, Any]
    adapter_parameters: int | None


def origin(folder: Path, name: str) -> Origin:
    """Where a fetched folder came from; ``name`` is that of a source without a repository."""
    found = parsed(folder / "SOURCE.json")
    about = {key: found[key] for key in ("kind", "repo", "commit", "licence", "files")}
    return Origin(found["repo"] or name, **about, parameters=parameter_count(folder))


def folder_name(source: Any) -> str:
    """The folder of a local model as the project knows it; of one outside, only its name: the way
    there is a machine's own."""
    path = Path(getattr(source, "path", "a local model"))
    outside = path.is_absolute() or ".." in path.parts or str(path).startswith("~")
    return path.name if outside else path.as_posix()


def parameter_count(folder: Path) -> int | None:
    """Numbers in a folder's safetensors files, from their headers alone; ``None`` if none."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as weights:
            total += sum(math.prod(weights.get_slice(k).get_shape()) for k in weights.keys())  # noqa: SIM118
    return total or None


def parsed(path: Path) -> dict[str, Any]:
    """A JSON file that a stage wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
