"""Write ``params.yaml`` as a preset says: ``make use PRESET=qwen3-vl-4b``.

A preset in ``params/`` is a whole file, or begins with ``base: <another preset>`` and holds what
differs from that one. What is written is whole, with the comments of the base; an overlay's comment
takes the place of the base's.
"""

import io
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from stages.core import command
from stages.core.errors import UserError, did_you_mean
from stages.params.params import PARAMS_FILE, checked

FOLDER = Path("params")
# Sections whose keys depend on each other: an overlay's takes the place of the base's as it is.
REPLACED_WHOLE = ("data.source", "model.source", "evaluate.lm_eval")


def main(preset: str = "", force: str = "") -> None:
    presets = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    if preset not in presets:
        raise UserError(
            f"which preset? make use PRESET=name, with one of: {', '.join(presets)}"
            + did_you_mean(preset, presets)
        )
    if not force and has_edits() and PARAMS_FILE.read_text() not in map(whole, presets.values()):
        raise UserError(
            f"{PARAMS_FILE} has edits that are neither committed nor a preset; FORCE=1 "
            "discards them"
        )
    text = whole(presets[preset])
    checked(YAML(typ="safe", pure=True).load(text), str(presets[preset]))
    PARAMS_FILE.write_text(text, encoding="utf-8")
    print(f"params.yaml is now the preset {preset}.")


def has_edits() -> bool:
    """Whether ``params.yaml`` is there and is not as it was committed."""
    words = ("git", "status", "--porcelain", "--", str(PARAMS_FILE))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return PARAMS_FILE.exists() and bool(done.stdout + done.stderr)


def whole(path: Path) -> str:
    """The text of a preset, which for an overlay is that of its base with the changes."""
    first, _, overlay = path.read_text(encoding="utf-8").partition("\n")
    if not first.startswith("base: "):
        return path.read_text(encoding="utf-8")
    base = path.with_name(f"{first.removeprefix('base: ')}.yaml")
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 1000, True
    yaml.representer.add_representer(type(None), _written_null)
    top, changes = _parted(overlay)
    merged = yaml.load(_parted(whole(base))[1])
    merge(merged, yaml.load(changes))
    text = io.StringIO()
    yaml.dump(merged, text)
    origin = f"# This file is params/{base.name} with the changes of params/{path.name}.\n\n"
    return top + origin + text.getvalue()


def _written_null(representer: Any, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _parted(text: str) -> tuple[str, str]:
    """The lines of comment at the top of a preset, and the rest."""
    lines = text.splitlines(keepends=True)
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "".join(lines[:count]), "".join(lines[count:])


def merge(base: CommentedMap, changes: CommentedMap, place: str = "") -> None:
    """Put ``changes`` into ``base``, a new key behind the one that it follows in ``changes``."""
    previous = None
    for key, value in changes.items():
        sections = isinstance(value, CommentedMap) and isinstance(base.get(key), CommentedMap)
        if sections and place + key not in REPLACED_WHOLE:
            merge(base[key], value, f"{place}{key}.")
        elif key in base:
            base[key] = value
        else:
            base.insert(list(base).index(previous) + 1 if previous else len(base), key, value)
        if key in changes.ca.items:
            base.ca.items[key] = changes.ca.items[key]
        previous = key


if __name__ == "__main__":
    command.run(main)
