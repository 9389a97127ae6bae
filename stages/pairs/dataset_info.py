"""LLaMA-Factory's ``dataset_info.json``: which tables of a folder hold preferences, and how."""

import contextlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.errors import UserError, did_you_mean
from stages.core.text import listed
from stages.pairs.files import Folder
from stages.pairs.layouts import Layout

NAME = "dataset_info.json"
_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def described(
    root: Path, infos: Sequence[str], tables: Collection[str], datasets: Sequence[str] | None
) -> dict[str, Layout]:
    """The layouts of the tables that a ``dataset_info.json`` describes as preferences.

    ``infos`` are such files below ``root``. ``datasets`` are the entries that are wanted; None: all
    that hold preferences.

    Raises:
        UserError: an entry that is wanted is missing, or its file.
    """
    found: dict[str, Layout] = {}
    known: dict[str, tuple[str, dict[str, Any]]] = {}  # by the name of the entry
    for info in infos:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            entries = json.loads((root / info).read_text(encoding="utf-8"))
            of_files = (name for name, entry in entries.items() if "file_name" in entry)
            known |= {name: (info, entries[name]) for name in of_files}
    folder = Folder(root)
    for name in known if datasets is None else datasets:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{NAME} in {root} has no entry {name!r} with a file_name{hint}")
        info, entry = known[name]
        given = {**(entry.get("columns") or {}), **(entry.get("tags") or {})}
        if datasets is None and not (entry.get("ranking") or {"chosen", "rejected"} <= {*given}):
            continue
        beside, place = os.path.dirname(info), str(entry["file_name"])
        path = folder.find(place, beside)
        inside = os.path.join(beside, place, "")
        file = path.relative_to(root).as_posix() if isinstance(path, Path) else None
        there = [table for table in tables if table == file or table.startswith(inside)]
        if not there:
            raise UserError(
                f"{root / info} describes {name!r} by the file {place!r:.100}, and the tables are "
                f"{listed(tables, 5)}; add it, or name other entries in `datasets`"
            )
        found |= dict.fromkeys(there, _layout(name, given, entry.get("formatting", "alpaca")))
    return found


def _layout(name: str, given: Mapping[str, str], formatting: str) -> Layout:
    """By the names of columns and tags that an entry gives, and LLaMA-Factory's own for others."""
    alpaca = formatting == "alpaca"
    prompt = ("prompt", "instruction") if alpaca else ("messages", "conversations")
    return Layout(
        f"{name} of {NAME}",
        prompt=given.get(*prompt),
        more=given.get("query", "input") if alpaca else "",
        chosen=given.get("chosen", "chosen"),
        rejected=given.get("rejected", "rejected"),
        image=given.get("images", "images"),
        system=given.get("system", "system"),
        history=given.get("history", ""),
        role=(given.get("role_tag", "from"),),
        content=(given.get("content_tag", "value"),),
        roles={given.get(f"{role}_tag", tag).lower(): role for role, tag in _ROLES.items()},
        dataset=name,
    )
