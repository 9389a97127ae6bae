"""``dvc.lock`` as data: what each stage ran with, read and made."""

from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.errors import UserError
from stages.params.params import PARAMS_FILE

LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class Ran:
    """A stage as it ran: what it read, the parameters that it declares, by dotted key, and what it
    wrote, with DVC's md5 (of a folder with ``.dir``)."""

    deps: tuple[str, ...]
    params: Mapping[str, Any]
    outs: Mapping[str, str]

    def had(self, parameters: Mapping[str, Any]) -> bool:
        """Whether it ran with the same values as these (nested sections of params.yaml)."""
        for key, value in self.params.items():
            section: Any = parameters
            for part in key.split("."):
                section = section.get(part) if isinstance(section, Mapping) else None
            if section != value:
                return False
        return True


def read(path: Path = LOCK) -> dict[str, Ran]:
    """Stages by name, each after those whose outputs it reads.

    Raises:
        UserError: it is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; `dvc repro` writes it")
    stages = {
        name: Ran(
            tuple(dep["path"] for dep in stage.get("deps", [])),
            stage.get("params", {}).get(str(PARAMS_FILE), {}),
            {out["path"]: out["md5"] for out in stage.get("outs", [])},
        )
        for name, stage in YAML(typ="safe").load(path.read_text(encoding="utf-8"))["stages"].items()
    }
    before = {
        name: [
            other
            for other, made in stages.items()
            if other != name
            and any(Path(dep).is_relative_to(out) for dep in ran.deps for out in made.outs)
        ]
        for name, ran in stages.items()
    }
    return {name: stages[name] for name in TopologicalSorter(before).static_order()}


def outputs(stages: Mapping[str, Ran]) -> dict[str, str]:
    """Path to md5 of all outputs."""
    return {path: md5 for ran in stages.values() for path, md5 in ran.outs.items()}
