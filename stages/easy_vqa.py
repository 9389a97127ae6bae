"""easy-VQA as preference pairs: a true sentence, and the same sentence with one topic overwritten.

easy-VQA (github.com/vzhou842/easy-VQA, MIT) shows one coloured shape an image and asks what it is.
Each of its train images becomes one pair: one of its own questions (or a request for a
description), ``chosen`` the true answer in a full sentence, ``rejected`` the same sentence with one
topic overwritten by what it is easily mistaken for, as topic-overwrite does. Mistakes run both ways
(red for brown as often as brown for red), so that no rule about words, lengths or yes and no,
applied without looking at the image, prefers ``chosen`` in more than about half of the pairs. Its
test images stay outside: their questions only grade generated answers.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError
from stages.pairs import Question, Record

ORIGIN = "easy-vqa"
SHAPES = ("circle", "rectangle", "triangle")
# Each colour and the one it is mistaken for. Pairs run both ways: red for brown, and brown for red.
MISTAKEN = {
    "black": "gray",
    "gray": "black",
    "red": "brown",
    "brown": "red",
    "yellow": "green",
    "green": "yellow",
    "blue": "teal",
    "teal": "blue",
}
COLOURS = tuple(MISTAKEN)
DESCRIBE = ("Describe the image.", "What does the image show?", "What is in the image?")


@dataclass(frozen=True)
class Scene:
    """What an image shows; a topic that its questions do not reveal is ``None``."""

    colour: str | None
    shape: str | None


def records(raw: Path) -> Iterator[Record]:
    """One preference pair for each train image, in the order of the images' numbers.

    An image whose questions reveal too little for a pair is a row without text, so that it is
    counted among those left out.

    Raises:
        UserError: a file of the data set is missing or is not what it should be.
    """
    asked = _by_image(raw / "train" / "questions.json")
    for number in sorted(asked):
        scene = scene_of(asked[number])
        drawn = Draw(f"train/{number}")
        pair = _pair(scene, [text for text, _ in asked[number]], drawn)
        kind, question, chosen, rejected = pair or ("", None, None, None)
        yield Record(
            where=f"train image {number}",
            image=_image(raw / "train" / "images" / f"{number}.png"),
            question=question,
            chosen=chosen,
            rejected=rejected,
            origin=ORIGIN,
            kind=kind,
            note="" if pair else "its questions reveal too little for a pair",
        )


def questions(raw: Path) -> Iterator[Question]:
    """The data set's own test questions with their one-word answers, in its order."""
    rows = _rows(raw / "test" / "questions.json")
    images: dict[int, bytes] = {}
    for i, (text, answer, number) in enumerate(rows):
        if number not in images:
            images[number] = _image(raw / "test" / "images" / f"{number}.png")
        yield Question(f"test question {i}", images[number], text, answer, kind_of(text))


def kind_of(question: str) -> str:
    """``colour``, ``shape``, ``presence`` or ``description``, by the question's words."""
    if question in DESCRIBE:
        return "description"
    if "color" in question:
        return "colour"
    return "shape" if question.startswith("what") else "presence"


def is_correct(kind: str, truth: str, answer: str) -> bool:
    """Whether a generated sentence gives the true one-word answer, strictly.

    Colour and shape: the topics of that kind in the answer are the true one and no other. Presence:
    the first word is the true yes or no.
    """
    words = re.findall(r"[a-z]+", answer.lower())
    if kind == "presence":
        return words[:1] == [truth]
    topics = {"colour": COLOURS, "shape": SHAPES}[kind]
    return {word for word in words if word in topics} == {truth}


def sentence(question: str, scene: Scene) -> str:
    """The full-sentence answer to a question about a scene: true of it, if it is the image's scene."""
    kind = kind_of(question)
    if kind == "description":
        return f"The image shows a {scene.colour} {scene.shape}."
    if kind == "colour":
        return f"The color of the shape is {scene.colour}."
    if kind == "shape":
        return f"The shape in the image is a {scene.shape}."
    topic = asked_topic(question)
    present = topic in (scene.colour, scene.shape)
    agrees = "Yes" if present != is_negated(question) else "No"
    noun = f"{topic} shape" if topic in COLOURS else topic
    return f"{agrees}, there is {'a' if present else 'no'} {noun}."


def asked_topic(question: str) -> str:
    """The colour or shape whose presence a question asks about."""
    words = re.findall(r"[a-z]+", question)
    return next((w for w in words if w in COLOURS), None) or next(w for w in words if w in SHAPES)


def is_negated(question: str) -> bool:
    """Whether yes means absent ("is there not a red shape?")."""
    return " not " in question or question.startswith("is no ")


def scene_of(asked: Sequence[tuple[str, str]]) -> Scene:
    """What the questions and answers about an image reveal of it."""
    found: dict[str, str] = {}
    for question, answer in asked:
        kind = kind_of(question)
        if kind in ("colour", "shape"):
            found[kind] = answer
        elif (answer == "yes") != is_negated(question):
            topic = asked_topic(question)
            found["colour" if topic in COLOURS else "shape"] = topic
    return Scene(found.get("colour"), found.get("shape"))


class Draw:
    """Numbers and choices that follow from a name by hashing, so that no random state is involved."""

    def __init__(self, name: str) -> None:
        self.name = name

    def number(self, purpose: str) -> int:
        digest = hashlib.blake2b(f"{self.name}/{purpose}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    def choice(self, purpose: str, options: Sequence[str]) -> str:
        return options[self.number(purpose) % len(options)]

    def shuffled(self, purpose: str, options: Sequence[str]) -> list[str]:
        return sorted(options, key=lambda option: self.number(f"{purpose}/{option}"))


def _pair(scene: Scene, texts: Sequence[str], drawn: Draw) -> tuple[str, str, str, str] | None:
    """Kind, question, chosen and rejected for an image, or ``None`` if it is asked too little."""
    for kind in drawn.shuffled("kind", ("colour", "shape", "presence", "description")):
        question = _question(kind, scene, texts, drawn)
        if question is not None:
            true, false = (
                sentence(question, scene),
                sentence(question, _other(question, scene, drawn)),
            )
            return kind, question, true, false
    return None


def _question(kind: str, scene: Scene, texts: Sequence[str], drawn: Draw) -> str | None:
    if kind == "description":
        known = scene.colour is not None and scene.shape is not None
        return drawn.choice("question", DESCRIBE) if known else None
    options = sorted({text for text in texts if kind_of(text) == kind})
    if kind == "presence":  # the data set asks mostly for what is absent; here half and half
        present = [o for o in options if asked_topic(o) in (scene.colour, scene.shape)]
        absent = [o for o in options if o not in present]
        options = (present, absent)[drawn.number("present") % 2] if present and absent else []
    return drawn.choice("question", options) if options else None


def _other(question: str, scene: Scene, drawn: Draw) -> Scene:
    """A scene that differs in the one topic that the question is about."""
    kind = kind_of(question)
    if kind == "presence":
        topic = asked_topic(question)
        if topic in (scene.colour, scene.shape):
            return Scene(None, None)
        return Scene(topic, None) if topic in COLOURS else Scene(None, topic)
    if kind == "description":
        kind = drawn.choice("topic", ("colour", "shape"))
    if kind == "colour":
        return Scene(MISTAKEN[str(scene.colour)], scene.shape)
    return Scene(scene.colour, drawn.choice("shape", [s for s in SHAPES if s != scene.shape]))


def _by_image(path: Path) -> dict[int, list[tuple[str, str]]]:
    asked: dict[int, list[tuple[str, str]]] = {}
    for text, answer, number in _rows(path):
        asked.setdefault(number, []).append((text, answer))
    return asked


def _rows(path: Path) -> list[tuple[str, str, int]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [(str(text), str(answer), int(number)) for text, answer, number in rows]
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; `dvc repro -f fetch@data` copies easy-VQA anew"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not easy-VQA's list of [question, answer, image] ({error}); "
            "`dvc repro -f fetch@data` copies it anew"
        ) from None


def _image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; `dvc repro -f fetch@data` copies easy-VQA anew"
        ) from None
