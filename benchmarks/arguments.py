"""Writes ``stages/parameters/arguments.json``: what ``llamafactory-cli train`` accepts.

    python -m benchmarks.arguments

Run it after a change of LLaMA-Factory or transformers in the requirements. The names and types come
from the dataclasses that LLaMA-Factory parses its YAML into, as JSON schemas; a test compares the
file with the installed versions.
"""

import dataclasses
import json
import types
import typing
from enum import Enum
from importlib.metadata import version
from typing import Any

from stages.parameters.arguments import FILE

_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    dict: "object",
}


def document() -> dict[str, Any]:
    """The content of the file, from the installed packages; importing them takes 20 s or more."""
    from llamafactory.hparams import parser

    arguments = {}
    for arguments_class in parser._TRAIN_ARGS:
        hints = typing.get_type_hints(arguments_class)
        for field in dataclasses.fields(arguments_class):
            if field.init:
                arguments[field.name] = schema(hints[field.name]) or {}
    return {
        "versions": {name: version(name) for name in ("llamafactory", "transformers")},
        "arguments": dict(sorted(arguments.items())),
    }


def schema(hint: Any) -> dict[str, Any] | None:
    """The JSON schema of a type; ``None``: anything goes, since YAML can't hold such an object.

    ``SchedulerType | str`` means the scheduler's names: transformers says ``str`` because a string
    becomes the enumeration, and fails on any other only when the training starts.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if origin is list:
        return {"type": "array", "items": schema(inner[0]) or {}}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(inner[1]) or {}}
    if origin in (typing.Union, types.UnionType):
        enumerated = any(isinstance(each, type) and issubclass(each, Enum) for each in inner)
        options = [schema(each) for each in inner if not (enumerated and each is str)]
        if None in options:
            return None
        return options[0] if len(options) == 1 else {"anyOf": options}
    return None


def main() -> None:
    content = document()
    head = json.dumps({"versions": content["versions"]}, indent=1).removesuffix("\n}")
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content["arguments"].items()
    )
    FILE.write_text(f'{head},\n "arguments": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
