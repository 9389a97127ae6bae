"""Row layouts: which columns hold what in the files that people have, and one row's fields.

``choose`` finds the layout of a table by the names of its columns, ``fields`` reads one row by it.
Both are pure. ``data.columns`` rules where all its columns are there; else these are known:

- LLaMA-Factory ranking: ``conversations`` or ``messages``, ``chosen``, ``rejected``, ``images``;
- LLaMA-Factory Alpaca ranking: ``instruction``, ``input``, ``chosen``, ``rejected``;
- ms-swift: ``messages`` that end with the chosen answer, ``rejected_response``; or ``query`` and
  ``response`` in place of messages;
- TRL: ``prompt``, ``chosen``, ``rejected``, as text or as messages of content parts, or without
  ``prompt`` two conversations that differ in their last turn; MM-RLHF names its columns so too;
- RLHF-V: question, chosen and rejected as JSON inside ``text``;
- VLFeedback: ``prompt`` and rated ``completions``; the best becomes chosen, the worst rejected.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stages.core.text import listed, shown

MOST_CHARACTERS = 2**20  # of a question or an answer: ten times what any model here can read
_DEEPEST = 20  # lists in lists of an image cell
_IMAGES = ("image", "images", "image_path", "img_path", "img")
_USER = {"user", "human", "prompter"}
_ASSISTANT = {"assistant", "gpt", "model", "chatbot"}
# What people call the columns, for a message that proposes a mapping.
_CALLED = {
    "image": ("image", "images", "picture", "photo", "img", "image_path", "img_path", "file_name"),
    "question": ("question", "prompt", "query", "instruction", "input", "caption_prompt", "text"),
    "chosen": ("chosen", "preferred", "accepted", "winner", "better", "positive", "response_w"),
    "rejected": ("rejected", "dispreferred", "loser", "worse", "negative", "response_l"),
}


class Odd(Exception):
    """A row that can't be read by its layout; the message says which field and why."""


@dataclass(frozen=True)
class Unreadable:
    """Stands in a row for a cell, or for the row, that its file's reader could make nothing of."""

    why: str


@dataclass(frozen=True)
class Layout:
    """The column that plays each part; empty where none does.

    ``name`` says what it is, for people. In ``conversation`` layouts a row without images is a
    pair of text alone; where ``image`` is a column of ``data.columns``, it lacks its image.
    """

    name: str
    prompt: str = ""
    more: str = ""
    chosen: str = ""
    rejected: str = ""
    image: str = ""
    system: str = ""
    history: str = ""
    packed: str = ""
    completions: str = ""
    origin: str = ""
    kind: str = ""
    text_only: bool = True

    @property
    def columns(self) -> set[str]:
        """All columns that it reads."""
        parts = (self.prompt, self.more, self.chosen, self.rejected, self.image, self.system)
        others = (self.history, self.packed, self.completions, self.origin, self.kind)
        return {*parts, *others} - {""}


@dataclass(frozen=True)
class Fields:
    """What a row holds. ``images`` are cells (bytes, struct, path, …), not yet decoded; None: the
    row should have an image and has none. ``history`` is earlier (user, assistant) turns."""

    question: str | None
    chosen: str | None
    rejected: str | None
    images: tuple[Any, ...] | None
    origin: str = ""
    kind: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()


def choose(names: Collection[str], columns: Mapping[str, str | None]) -> Layout | None:
    """The layout of a table with these columns, or None; ``columns`` is ``data.columns``.

    A column that was renamed in ``data.columns`` and is not there is a mistake to report, not a
    reason to read others, so then there is none.
    """
    there = set(names)
    wanted = {name: columns.get(name) for name in _CALLED}
    labels: dict[str, Any] = {name: columns.get(name) or "" for name in ("origin", "kind")}
    if all(column in there for column in wanted.values() if column is not None):
        return Layout(
            "data.columns",
            prompt=str(wanted["question"]),
            chosen=str(wanted["chosen"]),
            rejected=str(wanted["rejected"]),
            image=wanted["image"] or "",
            text_only=wanted["image"] is None,
            **labels,
        )
    if any(column not in {*there, name} for name, column in wanted.items() if column):
        return None
    image = next((name for name in (wanted["image"], *_IMAGES) if name in there), "") or ""
    labels = {name: column if column in there else "" for name, column in labels.items()}
    found = _known(there, image)
    return found and replace(
        found,
        image=image,
        system=found.system or ("system" if "system" in there else ""),
        **labels,
    )


def _known(there: set[str], image: str) -> Layout | None:
    answers: dict[str, Any] = {"chosen": "chosen", "rejected": "rejected"}
    both = set(answers) <= there
    turns = next((name for name in ("messages", "conversations") if name in there), "")
    if turns and "rejected_response" in there:
        return Layout("ms-swift", prompt=turns, rejected="rejected_response")
    if turns and both:
        return Layout("LLaMA-Factory ranking", prompt=turns, **answers)
    if {"response", "rejected_response"} <= there:
        query = next((name for name in ("query", "question", "prompt") if name in there), "")
        history = "history" if "history" in there else ""
        answers = {"chosen": "response", "rejected": "rejected_response"}
        return Layout("ms-swift", prompt=query, history=history, **answers) if query else None
    if "instruction" in there and both:
        history, more = (name if name in there else "" for name in ("history", "input"))
        return Layout(
            "LLaMA-Factory Alpaca ranking",
            prompt="instruction",
            more=more,
            history=history,
            **answers,
        )
    if "prompt" in there and both:
        return Layout("TRL preference", prompt="prompt", **answers)
    if {"prompt", "completions"} <= there:
        return Layout("VLFeedback", prompt="prompt", completions="completions")
    if "question" in there and both and image:
        return Layout("question, chosen, rejected", prompt="question", **answers, text_only=False)
    if both and "question" not in there:
        return Layout("TRL preference, implicit prompt", **answers)
    if "text" in there and image and not both:
        return Layout("RLHF-V", packed="text", text_only=False)
    return None


def missing(names: Collection[str], columns: Mapping[str, str | None]) -> str | None:
    """What to set in ``data.columns`` for a table without a known layout; None: nothing lacks."""
    lacking = [name for name, column in columns.items() if column and column not in set(names)]
    if not lacking:
        return None
    proposed = propose(names, columns)
    others = [name for name in lacking if name not in proposed]
    text = f"has no column '{shown(columns[lacking[0]], 40)}'; it has {listed(names)}: set "
    steps = [f"data.columns.{name}: {shown(found, 40)}" for name, found in proposed.items()]
    if steps:
        text += f"{', '.join(steps)} (a guess by their names)" + (", and " if others else "")
    if others:
        text += f"data.columns.{others[0]} to the one that holds the {others[0]}"
        text += ", or to null" if others[0] in ("image", "origin", "kind") else ""
    return text


def propose(names: Collection[str], columns: Mapping[str, str | None]) -> dict[str, str]:
    """The column that each missing one of image, question, chosen and rejected may be."""
    taken = {column for column in columns.values() if column in names}
    found = {}
    for field, called in _CALLED.items():
        if columns.get(field) in {None, *names}:
            continue
        free = [name for name in names if name not in taken]
        word = next((name for name in free for c in called if name.lower() == c), None)
        word = word or next((n for n in free for c in called[:6] if c in n.lower()), None)
        if word:
            found[field] = word
            taken.add(word)
    return found


def fields(row: Mapping[str, Any], layout: Layout) -> Fields:
    """One row's fields by its layout.

    Raises:
        Odd: a value is not what its column should hold.
    """
    images: list[Any] = []
    if layout.packed:
        row = row | _object(row.get(layout.packed), layout.packed)  # type: ignore[operator]
        layout = replace(layout, prompt="question", chosen="chosen", rejected="rejected", packed="")
    if row.get("video"):
        raise Odd("it is about a video")
    chosen, rejected = row.get(layout.chosen), row.get(layout.rejected)
    if layout.completions:
        chosen, rejected = _ranked(_cell(row, layout.completions))
    turns = _turns(_cell(row, layout.prompt), layout.prompt, images) if layout.prompt else []
    if layout.prompt and not layout.chosen and not layout.completions:
        turns, chosen = _split_off_answer(turns, layout.prompt)
    if not layout.prompt:
        turns, chosen, rejected = _common(
            _turns(_cell(row, layout.chosen), layout.chosen, images),
            _turns(_cell(row, layout.rejected), layout.rejected, []),
        )
    if layout.more and (more := _text(row.get(layout.more), layout.more)):
        turns = [*turns[:-1], ("user", f"{turns[-1][1]}\n{more}" if turns else more)]
    system, history, question = _conversation(turns, layout.prompt or "chosen")
    return Fields(
        question=question,
        chosen=_answer(chosen, layout.chosen or "chosen"),
        rejected=_answer(rejected, layout.rejected or "rejected"),
        images=_images(row.get(layout.image) if layout.image else None, images, layout),
        origin=_label(row.get(layout.origin)),
        kind=_label(row.get(layout.kind)),
        system=_text(row.get(layout.system), layout.system) or system,
        history=_history(row.get(layout.history), layout.history) + history,
    )


def _cell(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if isinstance(value, Unreadable):
        raise Odd(f"{name} {value.why}")
    return value


def _text(value: object, name: str) -> str | None:
    if isinstance(value, Unreadable):
        raise Odd(f"{name} {value.why}")
    if not isinstance(value, str | None):
        raise Odd(f"{name} holds {type(value).__name__}, not text")
    if value is not None and len(value) > MOST_CHARACTERS:
        raise Odd(f"{name} has {len(value):,} characters, and {MOST_CHARACTERS:,} are the most")
    return value


def _label(value: object) -> str:
    """Origin and kind may be anything; they only name a slice."""
    if value is None or isinstance(value, Unreadable):
        return ""
    return value[:200] if isinstance(value, str) else shown(value, 200)


def _answer(value: object, name: str) -> str | None:
    """An answer: text, or one message, or a list of one message."""
    if isinstance(value, Mapping | list):
        turns = _turns([value] if isinstance(value, Mapping) else value, name, [])
        if len(turns) != 1 or turns[0][0] != "assistant":
            raise Odd(f"{name} holds {len(turns)} messages, not one of an assistant")
        return turns[0][1]
    return _text(value, name)


def _turns(value: object, name: str, images: list[Any]) -> list[tuple[str, str]]:
    """Messages as (role, text), role one of system, user and assistant; their images are added to
    ``images``, with ``<image>`` where each was."""
    if value is None:
        return []
    if isinstance(value, str):
        parsed = _json(value) if value[:2] == "[{" else None
        if not isinstance(parsed, list) or not all({"role", "from"} & {*turn} for turn in parsed):
            return [("user", _text(value, name) or "")]
        value = parsed
    if not isinstance(value, list):
        raise Odd(f"{name} holds {type(value).__name__}, neither text nor messages")
    turns = []
    for message in value:
        if not isinstance(message, Mapping):
            raise Odd(f"{name} holds {type(message).__name__} where a message should be")
        said = message.get("role") or message.get("from")
        role = str(said).lower()
        role = "user" if role in _USER else "assistant" if role in _ASSISTANT else role
        if role not in ("system", "user", "assistant"):
            raise Odd(f"{name} has a message from {shown(said, 40)!r}, not system, user, assistant")
        content = message.get("content", message.get("value"))
        text = _parts(content, name, images) if isinstance(content, list) else _text(content, name)
        if text is None:
            raise Odd(f"{name} has a message without text")
        turns.append((role, text))
    return turns


def _parts(content: list[Any], name: str, images: list[Any]) -> str:
    """The text of content parts, as TRL and OpenAI write them."""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise Odd(f"{name} has a content part that holds {type(part).__name__}")
        kind = part.get("type")
        if kind == "text":
            texts.append(_text(part.get("text"), name) or "")
        elif kind in ("image", "image_url"):
            texts.append("<image>")
            image = part.get("image") or part.get("image_url") or part.get("url")
            if image is None and (part.get("path") or part.get("bytes")):
                image = {"path": part.get("path"), "bytes": part.get("bytes")}
            if isinstance(image, Mapping) and "url" in image:
                image = image["url"]
            if image is not None:
                images.append(image)
        else:
            raise Odd(f"{name} has a content part of type {shown(kind, 40)!r}, not text or image")
    return "".join(texts)


def _conversation(
    turns: list[tuple[str, str]], name: str
) -> tuple[str, tuple[tuple[str, str], ...], str | None]:
    """System prompt, earlier turns and the question, which the last turn has to be."""
    system = turns[0][1] if turns and turns[0][0] == "system" else ""
    turns = turns[1:] if turns and turns[0][0] == "system" else turns
    if not turns:
        return system, (), None
    roles = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [role for role, _ in turns] != roles:
        found = listed((role for role, _ in turns), 6)
        raise Odd(f"{name} has turns of {found}; it must go user, assistant, …, user")
    texts = [text for _, text in turns]
    return system, tuple(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1]


def _split_off_answer(turns: list[tuple[str, str]], name: str) -> tuple[list[tuple[str, str]], str]:
    if not turns or turns[-1][0] != "assistant":
        raise Odd(f"{name} does not end with the chosen answer of an assistant")
    return turns[:-1], turns[-1][1]


def _common(
    chosen: list[tuple[str, str]], rejected: list[tuple[str, str]]
) -> tuple[list[tuple[str, str]], str, str]:
    """Two conversations that differ in their last turn."""
    prompt, better = _split_off_answer(chosen, "chosen")
    other, worse = _split_off_answer(rejected, "rejected")
    if prompt != other:
        raise Odd("chosen and rejected differ before their last turn")
    return prompt, better, worse


def _history(value: object, name: str) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Odd(f"{name} holds {type(value).__name__}, not a list of turns")
    found = []
    for turn in value:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Odd(f"{name} holds something else than pairs of question and answer")
        found.append((_text(turn[0], name) or "", _text(turn[1], name) or ""))
    return tuple(found)


def _images(value: Any, inside: list[Any], layout: Layout) -> tuple[Any, ...] | None:
    """The row's image cells, from its column or from inside its messages."""
    if isinstance(value, Unreadable):
        raise Odd(f"{layout.image} {value.why}")
    found = list(_flat(value, _DEEPEST)) if value is not None else inside
    if found or isinstance(value, list | tuple):
        return tuple(found)
    return () if layout.text_only else None


def _flat(value: Any, depth: int) -> Iterable[Any]:
    if isinstance(value, list | tuple) and depth:
        for item in value:
            yield from _flat(item, depth - 1)
    else:
        yield value


def _object(value: object, name: str) -> dict[str, Any]:
    parsed = _json(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise Odd(f"{name} holds no JSON object with question, chosen and rejected")
    return parsed


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _ranked(value: Any) -> tuple[str, str]:
    """The best and the worst of rated completions, by the sum of their ratings.

    The datasets library stores the list as a struct of lists. Of equally good ones the first is
    taken, of equally bad ones the last.
    """
    if isinstance(value, Mapping):
        columns = [list(value.get(key) or ()) for key in ("response", "annotations")]
        value = [{"response": r, "annotations": a} for r, a in zip(*columns, strict=False)]
    if not isinstance(value, list) or len(value) < 2:
        raise Odd("completions are fewer than two")
    rated = []
    for completion in value:
        if not isinstance(completion, Mapping):
            raise Odd(f"completions hold {type(completion).__name__} where one should be")
        text = _text(completion.get("response"), "completions")
        notes = completion.get("annotations")
        ratings = [_rating(note) for note in notes.values()] if isinstance(notes, Mapping) else []
        if text and ratings and None not in ratings:
            rated.append((sum(rating or 0 for rating in ratings), text))
    if len(rated) < 2 or len({score for score, _ in rated}) == 1:
        raise Odd("completions have no two ratings that differ")
    ranked = sorted(rated, key=lambda one: -one[0])
    return ranked[0][1], ranked[-1][1]


def _rating(note: object) -> float | None:
    value = note.get("Rating") if isinstance(note, Mapping) else note
    found = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,3})?)\s*", str(value)[:20])
    return float(found[1]) if found else None
