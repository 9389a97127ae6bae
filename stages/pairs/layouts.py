"""Row layouts: which columns hold what in the files that people have, and one row as a record.

``choose`` finds the layout of a table by the names of its columns, ``record`` reads one row by it.
The columns that params.yaml names rule where all of them are there; else one of the ``known``
layouts in ``layouts.yaml`` does. What tools write beside these that changes the pair is ``unread``
there: a row that says any of it is left out. All other columns, such as ids and scores, change
nothing.
"""

import ast
import contextlib
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.core.errors import listed, shown
from stages.pairs.formats import Row, Unreadable
from stages.pairs.pairs import IMAGE_PLACEHOLDER, Record

MOST_CHARACTERS = 2**20  # of a question or an answer: ten times what any model here can read

_TABLES = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))
KNOWN = _TABLES["known"]
ROLES = _TABLES["roles"]
UNREAD = {re.compile(names, re.IGNORECASE): what for names, what in _TABLES["unread"].items()}
OWN = "the columns of its entry"  # the layout that params.yaml describes
_IMAGES = ("image", "images", "image_path", "img_path", "img")
_PARTS = ("image", "question", "chosen", "rejected")  # that params.yaml names columns for
_IMAGE_MARKS, _OTHER_MARKS, _NAMED = (
    re.compile("|".join(_TABLES["marks"][kind]), re.IGNORECASE)
    for kind in ("image", "other", "named")
)
_NOTHING = {"", "none", "null", "nan", "[]", "{}", "false"}  # ways to say nothing
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")  # of an assistant's turn

Turns = list[tuple[str, str]]  # (role, text); role is system, user or assistant


class Odd(Exception):
    """A row that can't be read by its layout; the message says which field and why.

    ``reason`` is the one of ``refusals.REASONS`` under which the row is left out.
    """

    def __init__(self, message: str, reason: str = "missing_field") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Layout:
    """The column that plays each part; empty where none does.

    ``name`` says what it is, for people. ``more`` follows the prompt; ``role`` and ``content`` are
    keys of a message, ``roles`` the words for who speaks. ``dataset`` is the origin of rows that
    name none. ``needs_image``: a row without one is no pair of text alone. ``unread`` are columns
    as in ``unread`` that have other names here.
    """

    name: str
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""
    image: str = ""
    more: str = ""
    system: str = ""
    origin: str = ""
    kind: str = ""
    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    dataset: str = ""
    needs_image: bool = False
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> set[str]:
        """All columns that it reads."""
        parts = (self.prompt, self.chosen, self.rejected, self.image, self.more, self.system)
        return {*parts, self.origin, self.kind} - {""}


def choose(names: Collection[str], columns: Mapping[str, str | None]) -> Layout | None:
    """The layout of a table with these columns, or None; ``columns`` is what params.yaml names.

    A column that was renamed there and is not in the table is a mistake to report, not a reason to
    read others, so then there is none.
    """
    wanted = {part: columns.get(part) or "" for part in _PARTS}
    found = None
    if {*wanted.values()} - {""} <= {*names}:
        prompt, chosen, rejected = (wanted[part] for part in ("question", "chosen", "rejected"))
        own = bool(wanted["image"])
        found = Layout(OWN, prompt, chosen, rejected, wanted["image"], needs_image=own)
    elif all(name in {*names, part, ""} for part, name in wanted.items()):
        image = next((name for name in (wanted["image"], *_IMAGES) if name in names), "")
        for name, prompts, chosen, rejected in KNOWN:
            asked = next((each for each in prompts if each in names or not each), None)
            plain = asked == "question" and chosen == "chosen"
            if asked is not None and {chosen, rejected} - {""} <= {*names}:
                found = Layout(name, asked, chosen, rejected, image, needs_image=plain)
                break
    if found is None or (found.needs_image and not found.image):
        return None
    return replace(
        found,
        more="input" if found.prompt == "instruction" and "input" in names else "",
        system=next((name for name in ("system", "system_prompt") if name in names), ""),
        origin=columns.get("origin") or "",
        kind=columns.get("kind") or "",
    )


# Columns with other names


def missing(
    names: Sequence[str], columns: Mapping[str, str | None], first: Sequence[Row]
) -> str | None:
    """What a table without a known layout lacks, and what to set; None: nothing.

    ``first`` are its first rows, whose values tell text from numbers and images.
    """
    lacking = {part: name for part, name in columns.items() if name and name not in names}
    if not lacking:
        return None
    values: dict[str, Any] = {}
    for row in reversed([row for row in first if isinstance(row, Mapping)]):
        values |= {name: value for name, value in row.items() if value is not None}
    some = [f"{_quoted(name)} ({shown(values.get(name), 30)})" for name in names[:20]]
    some += [f"and {len(names) - 20:,} more"] * (len(names) > 20)
    text = f"has no column {', '.join(_quoted(name) for name in lacking.values())}; it has "
    text += f"{', '.join(some)}; name the right ones under `columns`"
    if nullable := [part for part in lacking if part in ("image", "origin", "kind")]:
        text += f", or write null for {' and '.join(nullable)}"
    return text


def _quoted(name: str) -> str:
    """A column's name, in quotes where blanks or nothing at all would not be seen."""
    return shown(name, 40) if name.split() == [name] else repr(name[:40])


# One row


def record(
    row: Row, layout: Layout, where: str, split: str, encoded: Callable[[Any], bytes | str]
) -> Record:
    """One row by its layout.

    Args:
        encoded: gives the image that a cell means, or why there is none.

    Raises:
        Odd: a value is not what its column should hold, or the row says what is not read.
    """
    if isinstance(row, Unreadable):
        raise Odd(row.why)
    for name in row.keys() - layout.columns:
        _refuse_unread(name, row[name], layout.unread.get(name))
    asked, inside = _said(row, layout.prompt, layout, "user")
    if more := _text(row.get(layout.more), layout.more):
        asked = [*asked[:-1], ("user", f"{asked[-1][1]}\n{more}" if asked else more)]
    better, images = _said(row, layout.chosen, layout, "assistant")
    better = better if layout.chosen else asked
    if better and asked[-1:] == better[-1:]:  # the prompt's column holds the chosen answer as well
        asked = asked[:-1]
    inside = inside or images
    worse, others = _said(row, layout.rejected, layout, "assistant")
    for name, own in ((layout.chosen, images), (layout.rejected, others)):
        if own and own != inside:
            raise Odd(f"{name} has images of its own, which are not read", "not_read")
    chosen, before = _answer(better, layout.chosen or layout.prompt)
    rejected, other = _answer(worse, layout.rejected)
    before = before or other
    if other and other != before:
        raise Odd("chosen and rejected differ before their last turn")
    if asked and before and asked != before:  # the prompt twice: alone, and in the conversations
        users = [turn for turn in before if turn[0] == "user"]
        if len(asked) > 1 or asked[0] not in (users[:1] + users[-1:]):
            raise Odd(f"{layout.prompt} is not what chosen and rejected answer")
    system, history, question = _conversation(before or asked, layout.prompt or layout.chosen)
    apart = _text(row.get(layout.system), layout.system)
    if system and apart and system != apart:
        raise Odd(f"{layout.system} is not the system prompt of its messages", "not_read")
    system = apart or system
    held = _structure(row.get(layout.image))
    if isinstance(held, Unreadable):
        raise Odd(f"{layout.image} {held.why}")
    if held is None:
        held = inside
    cells = held if isinstance(held, list) else [held]
    if _IMAGE_MARKS.search(system):
        raise Odd("its system prompt marks the place of an image", "other_media")
    texts, cells = _marked([*(user for user, _ in history), question or ""], cells or inside)
    found = [encoded(cell) for cell in cells]
    notes = [each for each in found if isinstance(each, str)]
    if not found and layout.needs_image and not isinstance(row.get(layout.image), list):
        notes = ["no image"]
    return Record(
        where=where,
        images=None if notes else tuple(each for each in found if isinstance(each, bytes)),
        question=question and texts[-1],
        chosen=chosen,
        rejected=rejected,
        origin=_label(row.get(layout.origin)) or layout.dataset,
        kind=_label(row.get(layout.kind)),
        note=next(iter(notes), ""),
        system=system,
        history=tuple(zip(texts[:-1], (said for _, said in history), strict=True)),
        split=split,
        ended=any(turns and turns[-1][1].rstrip().endswith(_ENDS) for turns in (better, worse)),
    )


@functools.lru_cache(1000)
def unread(name: str) -> str:
    """What a column, a key or a part of this name says that is not read; else empty."""
    return next((what for names, what in UNREAD.items() if names.fullmatch(name)), "")


def _refuse_unread(name: str, value: object, what: str | None = None) -> None:
    """Raise ``Odd`` where a value that is not read says something that changes the pair."""
    if not (what := what or unread(name)):
        return
    if isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            _refuse_unread(name, each, what)
    elif str(value).strip().lower() not in _NOTHING:
        raise Odd(f"it holds {what} ({name}), which is not read", "not_read")


def _text(value: object, name: str) -> str | None:
    if isinstance(value, Unreadable):
        raise Odd(f"{name} {value.why}")
    if not isinstance(value, str | None):
        raise Odd(f"{name} holds {type(value).__name__}, not text")
    if value is not None and len(value) > MOST_CHARACTERS:
        raise Odd(f"{name} has {len(value):,} characters; at most {MOST_CHARACTERS:,} are read")
    return value


def _label(value: object) -> str:
    """Origin and kind may be anything; they only name a slice."""
    if value is None or isinstance(value, Unreadable):
        return ""
    return value[:200] if isinstance(value, str) else shown(value, 200)


def _structure(value: object) -> Any:
    """The list or object that a text spells, as JSON or as Python prints it; else the value."""
    if isinstance(value, str) and value[:1] in ("[", "{") and len(value) <= MOST_CHARACTERS:
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value)
    return value


def _said(
    row: Mapping[str, Any], name: str, layout: Layout, speaker: str
) -> tuple[Turns, list[Any]]:
    """The turns in a column, ``<image>`` where each of their images is, and these images.

    Text is a turn of ``speaker``; else it is one message or a list of them, perhaps spelt as text.
    """
    value = row.get(name)
    spelt = _structure(value)
    messages = [spelt] if isinstance(spelt, Mapping) else spelt
    if not isinstance(messages, list) or (
        isinstance(value, str)
        and not all(isinstance(one, dict) and one.keys() & {*layout.role} for one in messages)
    ):
        text = _text(value, name)
        return [] if text is None else [(speaker, text)], []
    turns: Turns = []
    images: list[Any] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise Odd(f"{name} holds {type(message).__name__} where a message should be")
        for key in message.keys() - {*layout.role, *layout.content}:
            _refuse_unread(key, message[key])
        said = next((message[key] for key in layout.role if message.get(key)), None)
        role = layout.roles.get(str(said).lower())
        if role is None:
            raise Odd(f"{name} has a message from {shown(said, 40)!r}, not system, user, assistant")
        content = next((message[key] for key in layout.content if key in message), None)
        parts = content if isinstance(content, list) else [content]
        seen = len(images)
        texts = [_part(part, name, images) for part in parts]
        if role == "assistant" and len(images) > seen:
            raise Odd(f"{name} has an answer with an image", "other_media")
        turns.append((role, "".join(texts)))
    return turns, images


def _part(part: object, name: str, images: list[Any]) -> str:
    """The text of a content, or of one part of it, as TRL and OpenAI write them."""
    kind = part.get("type") if isinstance(part, Mapping) else ""
    if isinstance(part, Mapping) and kind in ("image", "image_url"):
        image = part.get("image") or part.get("image_url") or part.get("url")
        if image is None and (part.get("path") or part.get("bytes")):
            image = {"path": part.get("path"), "bytes": part.get("bytes")}
        image = image["url"] if isinstance(image, Mapping) and "url" in image else image
        images.extend([] if image is None else [image])
        return IMAGE_PLACEHOLDER
    if isinstance(part, Mapping) and kind != "text":
        reason = "not_read" if unread(str(kind)) else "missing_field"
        raise Odd(f"{name} has a part of type {shown(kind, 40)!r}, not text or image", reason)
    text = _text(part.get("text") if isinstance(part, Mapping) else part, name)
    if text is None:
        raise Odd(f"{name} has a message without text")
    return text


def _answer(turns: Turns, name: str) -> tuple[str | None, Turns]:
    """The answer that ends a conversation, and what was said before it."""
    if not turns:
        return None, []
    if turns[-1][0] != "assistant" or [role for role, _ in turns[-2:]].count("assistant") > 1:
        raise Odd(f"{name} does not end with one answer of an assistant")
    answer = turns[-1][1]
    while answer.rstrip().endswith(_ENDS):
        answer = answer.rstrip().removesuffix("|>").rpartition("<|")[0].rstrip()
    return answer, turns[:-1]


def _conversation(turns: Turns, name: str) -> tuple[str, tuple[tuple[str, str], ...], str | None]:
    """System prompt, earlier turns and the question, which the last turn has to be."""
    system = turns[0][1] if turns and turns[0][0] == "system" else ""
    turns = turns[1:] if turns and turns[0][0] == "system" else turns
    if not turns:
        return system, (), None
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        found = listed((role for role, _ in turns), 6)
        raise Odd(f"{name} has turns of {found}; it must go user, assistant, …, user")
    texts = [text for _, text in turns]
    return system, tuple(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1]


def _marked(texts: list[str], cells: list[Any]) -> tuple[list[str], list[Any]]:
    """The texts with every mark of an image spelt ``<image>``, and the images, in which those are
    that the texts name: ``<img>a.png</img>``.

    Raises:
        Odd: there are marks, and not as many as images.
    """
    found = [mark for text in texts for mark in _IMAGE_MARKS.finditer(text)]
    others = sum(len(_OTHER_MARKS.findall(text)) for text in texts)
    if others:
        raise Odd(f"its texts mark a video or a sound {others} times", "other_media")
    cells = cells or [mark["name"] for mark in found if mark["name"]]
    if not cells and any(map(_NAMED.search, texts)):
        raise Odd("its texts name an image as Markdown or HTML, which is not read", "other_media")
    if found and len(found) != len(cells):
        numbers = f"its texts mark {len(found)} images, and it brings {len(cells)}"
        raise Odd(numbers, "other_media")
    order = [int(mark["n"] or mark["m"] or 0) for mark in found]
    if order != sorted(order):
        raise Odd("its texts mark its images in another order than it brings them", "other_media")
    return [_IMAGE_MARKS.sub(IMAGE_PLACEHOLDER, text) for text in texts], cells
