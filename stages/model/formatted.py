"""The formatted data set: ShareGPT preference rows as LLaMA-Factory reads them, and reading them
back.

A row is ``{"id", "group", "origin", "kind", "messages", "chosen", "rejected", "images"}``;
LLaMA-Factory uses the last four and ignores the others, which the evaluation slices by. Messages
are a system prompt, if there is one, earlier turns, and last the question. Image names are relative
to ``media_dir``, so nothing needs remapping when the project moves.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stages.pairs.pairs import IMAGE_PLACEHOLDER, SPLITS

# Those of llamafactory/extras/constants.py.
PLACEHOLDERS = (IMAGE_PLACEHOLDER, "<video>", "<audio>")
SYSTEM = "system"  # the role of a system prompt

Row = TypeVar("Row", bound=Mapping[str, Any])


def dataset_info(*, system_prompts: bool) -> dict[str, Any]:
    """``dataset_info.json``: one entry for each split, in LLaMA-Factory's format, which looks for
    system prompts among the messages only if the entry names their role."""
    columns = {name: name for name in ("messages", "chosen", "rejected", "images")}
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    } | ({"system_tag": SYSTEM} if system_prompts else {})
    return {
        split: {
            "file_name": f"{split}.json",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": columns,
            "tags": tags,
        }
        for split in SPLITS
    }


def prompt(
    question: str,
    images: Sequence[str],
    *,
    system: str = "",
    history: Sequence[tuple[str, str]] = (),
    clean: Callable[[str], str] = str,
) -> dict[str, Any]:
    """The part of a row that a model is asked.

    Images come before the first question, except where the data set says in its own text where they
    belong: by as many ``<image>`` as there are images. Any other ``<image>`` is text.

    Args:
        images: their names.
        clean: what is done to each text that reaches the model (``neutralised``).
    """
    asked = [user for user, _ in history] + [question]
    places = _places(asked, len(images))
    if places is None:
        places = [[clean(text)] for text in asked]
        places[0] = [*[""] * len(images), *places[0]]
    else:
        places = [[clean(part) for part in parts] for parts in places]
    said = [IMAGE_PLACEHOLDER.join(parts) for parts in places]
    messages = [{"role": SYSTEM, "content": clean(system)}] if system else []
    for user, (_, assistant) in zip(said, history, strict=False):
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": clean(assistant)})
    return {
        "messages": [*messages, {"role": "user", "content": said[-1]}],
        "images": list(images),
    }


def _places(asked: Sequence[str], images: int) -> list[list[str]] | None:
    """What users say, cut where images belong; None where the texts don't say it."""
    parts = [text.split(IMAGE_PLACEHOLDER) for text in asked]
    if not images or sum(len(each) - 1 for each in parts) != images:
        return None
    # A line break between an image and the text is the data set's layout, not the question.
    return [[each[0], *(part.lstrip("\n") for part in each[1:])] for each in parts]


def system(row: Mapping[str, Any]) -> str:
    """The system prompt of a row, or nothing."""
    first = row["messages"][0]
    return str(first["content"]) if first["role"] == SYSTEM else ""


def turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row after its system prompt."""
    return list(row["messages"][1:] if system(row) else row["messages"])


def question(row: Mapping[str, Any]) -> str:
    """What a row asks last, without the places of images before or after it."""
    text = str(row["messages"][-1]["content"])
    while text.startswith(IMAGE_PLACEHOLDER):
        text = text.removeprefix(IMAGE_PLACEHOLDER)
    return text.removesuffix(IMAGE_PLACEHOLDER)


def neutralised(text: str, markers: Iterable[str]) -> str:
    """``text`` with every marker broken by a space after its first character.

    Markers are the tokenizer's added tokens and LLaMA-Factory's placeholders. Left whole inside a
    question or an answer they would end the turn, or ask for an image that isn't there. Qwen's
    tokenizer composes characters first (NFC), so a marker that only shows then is broken too. A
    marker of one character, or of spaces, cannot be broken, and stays (``fetch`` refuses a model
    that has such a token).
    """
    pattern = _pattern(frozenset(markers))
    while pattern:
        if pattern.search(text):
            text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        elif pattern.search(composed := unicodedata.normalize("NFC", text)):
            text = composed
        else:
            break
    return text


@functools.cache
def _pattern(markers: frozenset[str]) -> re.Pattern[str] | None:
    # Without the spaces around a marker, each space that is added ends a match for good.
    breakable = {marker.strip() for marker in markers if len(marker.strip()) > 1}
    longest_first = sorted(breakable, key=lambda marker: (-len(marker), marker))
    return re.compile("|".join(map(re.escape, longest_first))) if breakable else None


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of ``<folder>/<name>.json``, as the format stage wrote them."""
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return rows


def sample(rows: Sequence[Row], size: int) -> list[Row]:
    """At most ``size`` rows, always the same ones: those whose hashed ``id`` comes first.

    No random state is involved, and a larger sample contains every smaller one.
    """
    return sorted(rows, key=lambda row: hashlib.blake2b(str(row["id"]).encode()).digest())[:size]
