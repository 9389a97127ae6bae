"""easy-VQA's topics and language: what can be asked about a scene, and answered in full sentences.

Imports nothing of the project: ``demo`` makes its base model from this, and is pinned to it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

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


def kind_of(question: str) -> str:
    """``colour``, ``shape``, ``presence`` or ``description``, by the question's words."""
    if question in DESCRIBE:
        return "description"
    if "color" in question:
        return "colour"
    return "shape" if question.startswith("what") else "presence"


def sentence(question: str, scene: Scene) -> str:
    """The full-sentence answer to a question about a scene, true of it."""
    kind = kind_of(question)
    if kind == "description":
        return f"The image shows a {scene.colour} {scene.shape}."
    if kind == "colour":
        return f"The color of the shape is {scene.colour}."
    if kind == "shape":
        return f"The shape in the image is a {scene.shape}."
    colour = asked_topic(question) in COLOURS
    return f"The shape is {scene.colour if colour else f'a {scene.shape}'}."


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
