"""Kind ``easy-vqa``: the data set that the PyPI package of that name ships, made into preference
pairs: a true sentence, and the same sentence with one topic overwritten.

easy-VQA (github.com/vzhou842/easy-VQA, MIT) shows one coloured shape an image and asks what it is.
Each of its train images becomes one pair: one of its own questions (or a request for a
description), ``chosen`` the true answer in a full sentence, ``rejected`` the same sentence with one
topic overwritten by what it is easily mistaken for, as topic-overwrite does. Mistakes run both ways
(red for brown as often as brown for red), so that no rule about words, lengths or yes and no,
applied without looking at the image, prefers ``chosen`` in more than about half of the pairs. Its
test images stay outside: their questions only grade generated answers.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from stages.pairs.files import walk
from stages.pairs.pairs import Question, Record
from stages.sources.local import copy_all
from stages.sources.source import Kind, Source, SourceSection
from stages.sources.topics import (
    COLOURS,
    DESCRIBE,
    MISTAKEN,
    SHAPES,
    Scene,
    asked_topic,
    kind_of,
    scene_of,
    sentence,
)


class EasyVqaSource(SourceSection):
    """The easy-VQA data set, as its PyPI package ships it."""

    kind: Literal["easy-vqa"]


def fetch_data(_: EasyVqaSource, out: Path) -> Source:
    """Copy easy-VQA as its installed package ships it: images, questions and answers, unchanged.

    4,000 train and 1,000 test images of 64x64 pixels with 48,248 questions (Zhou, 2019, MIT).
    """
    package = importlib.metadata.distribution("easy-vqa")
    root = Path(str(package.locate_file("easy_vqa/data")))
    files = {
        name: root / name
        for name in walk(root)
        if name == "answers.txt" or name.endswith(("/questions.json", ".png"))
    }
    known = {"kind": "easy-vqa", "repo": "easy-vqa", "commit": package.version, "licence": "MIT"}
    return copy_all(files, out, **known)


def records(raw: Path) -> Iterator[Record]:
    """One preference pair for each train image, in the order of the images' numbers.

    An image whose questions reveal too little for a pair is a row without text, so that it is
    counted among those left out.
    """
    asked: dict[int, list[tuple[str, str]]] = {}
    for text, answer, number in _rows(raw / "train" / "questions.json"):
        asked.setdefault(number, []).append((text, answer))
    for number in sorted(asked):
        scene = scene_of(asked[number])
        pair = _pair(scene, [text for text, _ in asked[number]], f"train/{number}")
        kind, question, chosen, rejected = pair or ("", None, None, None)
        yield Record(
            where=f"train image {number}",
            images=((raw / "train" / "images" / f"{number}.png").read_bytes(),),
            question=question,
            chosen=chosen,
            rejected=rejected,
            kind=kind,
            note="" if pair else "its questions reveal too little for a pair",
        )


def questions(raw: Path) -> Iterator[Question]:
    """The data set's own test questions with their one-word answers, in its order."""
    for i, (text, answer, number) in enumerate(_rows(raw / "test" / "questions.json")):
        image = (raw / "test" / "images" / f"{number}.png").read_bytes()
        yield Question(f"test question {i}", (image,), text, answer, kind_of(text))


def drawn(name: str) -> int:
    """A number that follows from a name by hashing; no random state is involved."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def choice(name: str, options: Sequence[str]) -> str:
    return options[drawn(name) % len(options)]


def _pair(scene: Scene, texts: Sequence[str], name: str) -> tuple[str, str, str, str] | None:
    """Kind, question, chosen and rejected for an image, or ``None`` if it is asked too little."""
    kinds = ("colour", "shape", "presence", "description")
    for kind in sorted(kinds, key=lambda kind: drawn(f"{name}/kind/{kind}")):
        question = _question(kind, scene, texts, name)
        if question is not None:
            other = _other(question, scene, name)
            return kind, question, sentence(question, scene), sentence(question, other)
    return None


def _question(kind: str, scene: Scene, texts: Sequence[str], name: str) -> str | None:
    if kind == "description":
        known = scene.colour is not None and scene.shape is not None
        return choice(f"{name}/question", DESCRIBE) if known else None
    options = sorted({text for text in texts if kind_of(text) == kind})
    if kind == "presence":  # the data set asks mostly for what is absent; here half and half
        present = [o for o in options if asked_topic(o) in (scene.colour, scene.shape)]
        absent = [o for o in options if asked_topic(o) in _mistakable(scene)]
        options = (present, absent)[drawn(f"{name}/present") % 2] if present and absent else []
    return choice(f"{name}/question", options) if options else None


def _other(question: str, scene: Scene, name: str) -> Scene:
    """A scene that differs in the one topic that the question is about."""
    kind = kind_of(question)
    if kind == "description":
        kind = choice(f"{name}/topic", ("colour", "shape"))
    if kind == "presence":
        asked = asked_topic(question)
        if asked not in (scene.colour, scene.shape):  # what is absent is claimed to be there
            colour = asked in COLOURS
            return Scene(asked, scene.shape) if colour else Scene(scene.colour, asked)
        kind = "colour" if asked in COLOURS else "shape"
    if kind == "colour":
        return Scene(MISTAKEN[str(scene.colour)], scene.shape)
    return Scene(scene.colour, choice(f"{name}/shape", [s for s in SHAPES if s != scene.shape]))


def _mistakable(scene: Scene) -> set[str]:
    """Topics that the scene's own are mistaken for."""
    colours = {MISTAKEN[scene.colour]} if scene.colour else set()
    return colours | ({*SHAPES} - {scene.shape} if scene.shape else set())


def _rows(path: Path) -> list[tuple[str, str, int]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [(str(text), str(answer), int(number)) for text, answer, number in rows]


KIND = Kind(
    section=EasyVqaSource,
    fetch_data=fetch_data,
    read=lambda raw: (records(raw), questions(raw)),
)
