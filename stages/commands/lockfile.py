"""``dvc.lock`` as data: what each stage ran with, read and made."""

from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.errors import UserError
from stages.params.params import PARAMS_FILE

LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class Content:
    """A file or folder by its content: DVC's md5 (of a folder with ``.dir``), size in bytes, and
    the number of files of a folder."""

    md5: str
    size: int
    files: int | None = None


@dataclass(frozen=True)
class Ran:
    """A stage as it ran: its command, what it read, the parameters that it declares, by dotted key,
    and what it wrote."""

    cmd: str
    deps: Mapping[str, Content]
    params: Mapping[str, Any]
    outs: Mapping[str, Content]

    def had(self, parameters: Mapping[str, Any]) -> bool:
        """Whether it ran with the same values as these (nested sections of params.yaml)."""
        return all(_at(parameters, key) == value for key, value in self.params.items())


def read(path: Path = LOCK) -> dict[str, Ran]:
    """Stages by name, each after those whose outputs it reads.

    Raises:
        UserError: it is missing or not what DVC writes.
    """
    try:
        document = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        stages = {
            str(name): Ran(
                str(stage["cmd"]),
                _contents(stage.get("deps", [])),
                dict(stage.get("params", {}).get(str(PARAMS_FILE), {})),
                _contents(stage.get("outs", [])),
            )
            for name, stage in document["stages"].items()
        }
        return {name: stages[name] for name in TopologicalSorter(_before(stages)).static_order()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` writes it") from None
    except (OSError, UnicodeDecodeError, YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} can't be read as DVC's lock file ({type(error).__name__}); "
            "`git checkout dvc.lock` brings back the committed one"
        ) from None


def outputs(stages: Mapping[str, Ran]) -> dict[str, Content]:
    return {path: content for ran in stages.values() for path, content in ran.outs.items()}


def _before(stages: Mapping[str, Ran]) -> dict[str, list[str]]:
    return {
        name: [
            other
            for other, made in stages.items()
            if other != name
            and any(Path(dep).is_relative_to(out) for dep in ran.deps for out in made.outs)
        ]
        for name, ran in stages.items()
    }


def _contents(entries: list[dict[str, Any]]) -> dict[str, Content]:
    return {
        str(entry["path"]): Content(str(entry["md5"]), int(entry["size"]), entry.get("nfiles"))
        for entry in entries
    }


def _at(parameters: Mapping[str, Any], key: str) -> Any:
    value: Any = parameters
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
