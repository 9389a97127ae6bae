"""The formatted data set: ShareGPT preference rows as LLaMA-Factory reads them, and reading them
back.

A row is ``{"id", "group", "origin", "kind", "messages", "chosen", "rejected", "images"}``;
LLaMA-Factory uses the last four and ignores the others, which the evaluation slices by. Image names
are relative to ``media_dir``, so nothing needs remapping when the project moves.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stages.core.errors import UserError
from stages.dataset.pairs import SPLITS

IMAGE_PLACEHOLDER = "<image>"  # llamafactory/extras/constants.py; so are <video> and <audio>
PLACEHOLDERS = (IMAGE_PLACEHOLDER, "<video>", "<audio>")

Row = TypeVar("Row", bound=Mapping[str, Any])


def dataset_info() -> dict[str, Any]:
    """``dataset_info.json``: one entry for each split, in LLaMA-Factory's format."""
    columns = {name: name for name in ("messages", "chosen", "rejected", "images")}
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    }
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


def prompt(question: str, image: str) -> dict[str, Any]:
    """The part of a row that a model is asked: the image, then the question."""
    return {
        "messages": [{"role": "user", "content": IMAGE_PLACEHOLDER + question}],
        "images": [image],
    }


def question(row: Mapping[str, Any]) -> str:
    """The question of a row, without the image's place before it: what ``prompt`` was given."""
    return str(row["messages"][0]["content"]).removeprefix(IMAGE_PLACEHOLDER)


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


def found(text: str, markers: Iterable[str]) -> set[str]:
    """The markers that ``neutralised`` breaks in a text, those inside of others included."""
    composed = unicodedata.normalize("NFC", text)
    return {marker for marker in markers if marker in text or marker in composed}


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of ``<folder>/<name>.json``, as the format stage wrote them.

    Raises:
        UserError: the file is missing or is no list of rows.
    """
    path = folder / f"{name}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro format` makes it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); `dvc repro -f format` makes it again"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list of rows; `dvc repro -f format` makes it again")
    return rows


def sample(rows: Sequence[Row], size: int) -> list[Row]:
    """At most ``size`` rows, always the same ones: those whose hashed ``id`` comes first.

    No random state is involved, and a larger sample contains every smaller one.
    """
    return sorted(rows, key=lambda row: hashlib.blake2b(str(row["id"]).encode()).digest())[:size]
