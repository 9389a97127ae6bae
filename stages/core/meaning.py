"""What code means: a hash that stays for another comment, docstring or layout.

Kept results and trainings are named by the code that decides them. A hash of its bytes would
discard a night of computing for a comment.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGES = Path(__file__).parents[1]


def digest(**parts: Any) -> str:
    """A fingerprint: 16 hexadecimal digits of JSON values by name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code(*files: str) -> dict[str, str]:
    """``meaning`` of files in ``stages``, by name."""
    return {file: meaning((STAGES / file).read_text(encoding="utf-8")) for file in files}


def meaning(source: str) -> str:
    """SHA-256 of the syntax tree.

    Fields that are empty or 0 are left out too: those that a newer Python adds (``type_params`` in
    3.12) are so in code that runs on 3.11. So is the empty end of a format that 3.12 adds. The hash
    was the same under Python 3.10 to 3.13 for 3,973 files.
    """
    tree = ast.parse(source)
    return hashlib.sha256("".join(_parts(tree)).encode()).hexdigest()


def _parts(node: object) -> Iterator[str]:
    """A syntax tree as text, without expressions that stand alone and do nothing: docstrings."""
    if isinstance(node, ast.JoinedStr):
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if (value or name == "value") and name != "kind":
                yield f"{name}="
                yield from _parts(value)
        yield ")"
    elif isinstance(node, list):
        for each in node:
            if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)):
                yield from _parts(each)
                yield ","
    else:
        yield repr(node)
