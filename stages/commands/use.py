"""Write ``params.yaml`` as a preset says: ``make use PRESET=qwen3-vl-4b``.

A preset in ``params/`` is a whole file, or names its ``base`` and holds what differs from it. What
is written is whole, with the comments of both; a preset's takes the place of its base's.
"""

import io
import subprocess
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from stages.core import command
from stages.core.errors import UserError
from stages.params.params import PARAMS_FILE

# Sections whose keys depend on each other: a preset's takes the place of its base's as it is.
REPLACED_WHOLE = ("data.sources", "model.source", "evaluate.lm_eval")


def main(preset: str = "", force: str = "") -> None:
    presets = {path.stem: whole(path) for path in sorted(Path("params").glob("*.yaml"))}
    if preset not in presets:
        raise UserError(f"which preset? make use PRESET=name, with one of: {', '.join(presets)}")
    if PARAMS_FILE.exists() and PARAMS_FILE.read_text() not in presets.values() and not force:
        words = ("git", "status", "--porcelain", "--", str(PARAMS_FILE))
        if subprocess.run(words, capture_output=True, check=False).stdout:
            raise UserError(f"{PARAMS_FILE} has uncommitted edits; FORCE=1 discards them")
    PARAMS_FILE.write_text(presets[preset], encoding="utf-8")
    print(f"params.yaml is now the preset {preset}.")


def whole(path: Path) -> str:
    """The text of a preset, merged with its base if it names one."""
    text, yaml, merged = path.read_text(encoding="utf-8"), YAML(), io.StringIO()
    yaml.width, yaml.preserve_quotes = 1000, True
    yaml.representer.add_representer(
        type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    changes = yaml.load(text)
    if not (base := changes.pop("base", None)):
        return text
    document = yaml.load(whole(path.with_name(f"{base}.yaml")))
    document.ca.comment = None  # what the base says of itself
    merge(document, changes)
    yaml.dump(document, merged)
    header = [line for line in text.splitlines() if line.startswith("#")]
    header.append(f"# This file is params/{base}.yaml with the changes of params/{path.name}.")
    return "\n".join([*header, "", merged.getvalue()])


def merge(base: CommentedMap, changes: CommentedMap, place: str = "") -> None:
    """Put ``changes`` into ``base``, a new key behind the one that it follows in ``changes``."""
    previous = None
    for key, value in changes.items():
        if key not in base:
            base.insert(list(base).index(previous) + 1 if previous else len(base), key, value)
        elif isinstance(value, CommentedMap) and place + key not in REPLACED_WHOLE:
            merge(base[key], value, f"{place}{key}.")
        else:
            base[key] = value
        if key in changes.ca.items:
            base.ca.items[key] = changes.ca.items[key]
        previous = key


if __name__ == "__main__":
    command.run(main)
