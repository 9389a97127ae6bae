"""LLaMA-Factory's ``dataset_info.json``: which tables of a folder hold preferences, and how."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from stages.core.errors import UserError, did_you_mean
from stages.core.text import listed
from stages.pairs.files import Folder
from stages.pairs.layouts import Layout

NAME = "dataset_info.json"
# LLaMA-Factory's names of columns and tags, where an entry gives no others.
_SHAREGPT = {
    **{name: name for name in ("system", "images", "chosen", "rejected")},
    **{"messages": "conversations", "role_tag": "from", "content_tag": "value"},
    **{"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"},
}
_ALPACA = {
    **{name: name for name in ("system", "images", "chosen", "rejected", "history")},
    **{"prompt": "instruction", "query": "input"},
}


def described(
    root: Path, info: str, tables: Collection[str], datasets: Sequence[str] | None
) -> dict[str, Layout]:
    """The layouts of the tables that a ``dataset_info.json`` describes as preferences.

    ``datasets`` are the entries that are wanted; None: all that hold preferences.

    Raises:
        UserError: an entry that is wanted is missing, or its file.
    """
    try:
        entries = json.loads((root / info).read_text(encoding="utf-8"))
        known = {name: entry for name, entry in entries.items() if "file_name" in entry}
    except (OSError, ValueError, TypeError, AttributeError):  # the datasets library's, perhaps
        known = {}
    found: dict[str, Layout] = {}
    folder = Folder(root)
    for name in known if datasets is None else datasets:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{root / info} has no entry {name!r} with a file_name{hint}")
        entry = known[name]
        given = {**(entry.get("columns") or {}), **(entry.get("tags") or {})}
        if datasets is None and not (entry.get("ranking") or {"chosen", "rejected"} <= {*given}):
            continue
        place = str(entry["file_name"])
        inside = str(Path(info).parent / place)
        there = [table for table in tables if table.startswith(f"{inside}/")]
        path = folder.find(place, str(Path(info).parent))
        if isinstance(path, Path) and path.relative_to(root).as_posix() in tables:
            there = [path.relative_to(root).as_posix()]
        if not there:
            raise UserError(
                f"{root / info} describes {name!r} by the file {place!r:.100}, and the tables are "
                f"{listed(tables, 5)}; add it, or name other entries in `datasets`"
            )
        plain = entry.get("formatting", "alpaca") != "sharegpt"
        layout = _alpaca(name, given) if plain else _sharegpt(name, given)
        found |= dict.fromkeys(there, layout)
    return found


def _sharegpt(name: str, given: dict[str, str]) -> Layout:
    as_given = _SHAREGPT | given
    return Layout(
        f"{name} of {NAME}",
        prompt=as_given["messages"],
        chosen=as_given["chosen"],
        rejected=as_given["rejected"],
        image=as_given["images"],
        system=as_given["system"],
        role=(as_given["role_tag"],),
        content=(as_given["content_tag"],),
        roles={as_given[f"{role}_tag"].lower(): role for role in ("user", "assistant", "system")},
        dataset=name,
    )


def _alpaca(name: str, given: dict[str, str]) -> Layout:
    as_given = _ALPACA | given
    return Layout(
        f"{name} of {NAME}",
        prompt=as_given["prompt"],
        more=as_given["query"],
        chosen=as_given["chosen"],
        rejected=as_given["rejected"],
        image=as_given["images"],
        system=as_given["system"],
        history=as_given["history"],
        dataset=name,
    )
