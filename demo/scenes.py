"""Images in easy-VQA's style, drawn here, with questions about them and a base model's habits.

The base model never sees an image of easy-VQA, so whatever the pipeline splits off for testing is
new to it by construction.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from stages.sources import topics
from stages.sources.topics import COLOURS, DESCRIBE, MISTAKEN, SHAPES, Scene

SIDE = 64
RGB = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "teal": (0, 128, 128),
}
# easy-VQA's own wordings; {} is a colour followed by "shape", or a shape, as the data set has them.
COLOUR_QUESTIONS = (
    "what color is the shape?",
    "what is the color of the shape?",
    "what color is the {shape}?",
    "what is the color of the {shape}?",
)
SHAPE_QUESTIONS = (
    "what shape is in the image?",
    "what shape does the image contain?",
    "what shape is present?",
    "what is the {colour} shape?",
)
PRESENCE_QUESTIONS = (
    "is a {} present?",
    "is there a {}?",
    "is there a {} in the image?",
    "does the image contain a {}?",
    "is no {} present?",
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
)
# How often the base model says something else: a rarer topic is taken for a commoner one, and what
# is absent is claimed to be there. Everything else is misnamed one time in ten.
HABITS = {"gray": 0.7, "brown": 0.7, "teal": 0.7, "rectangle": 0.7, "absent": 0.7}
OTHERWISE = 0.1
COMMON_SHAPE = "circle"


def draw(generator: np.random.Generator) -> tuple[Image.Image, Scene]:
    """One shape of random colour, size and place, 64 by 64 pixels, as a JPEG has it."""
    background = tuple(int(v) for v in generator.integers(230, 256, 3))
    image = Image.new("RGB", (SIDE, SIDE), background)
    scene = Scene(
        COLOURS[generator.integers(len(COLOURS))], SHAPES[generator.integers(len(SHAPES))]
    )
    pen = ImageDraw.Draw(image)
    fill = RGB[str(scene.colour)]
    if scene.shape == "circle":
        r = int(generator.integers(4, 20))
        x, y = (int(v) for v in generator.integers(r, SIDE - r, 2))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif scene.shape == "rectangle":
        w, h = (int(v) for v in generator.integers(8, 33, 2))
        x, y = int(generator.integers(0, SIDE - w)), int(generator.integers(0, SIDE - h))
        pen.rectangle((x, y, x + w, y + h), fill=fill)
    else:
        side = int(generator.integers(8, 33))
        height = round(side * 0.866)
        x, y = int(generator.integers(0, SIDE - side)), int(generator.integers(height, SIDE))
        pen.polygon(((x, y), (x + side, y), (x + side // 2, y - height)), fill=fill)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return Image.open(buffer).convert("RGB"), scene


def ask(scene: Scene, generator: np.random.Generator) -> str:
    """A question about a scene: colour, shape, presence (half of them of what is absent) or all."""
    kind = generator.integers(5)
    if kind == 0:
        return _pick(COLOUR_QUESTIONS, generator).format(shape=scene.shape)
    if kind == 1:
        return _pick(SHAPE_QUESTIONS, generator).format(colour=scene.colour)
    if kind == 2:
        return _pick(DESCRIBE, generator)
    colour = generator.random() < 0.7
    truth, options = (scene.colour, COLOURS) if colour else (scene.shape, SHAPES)
    if generator.random() < 0.5:
        truth = _pick([o for o in options if o != truth], generator)
    return _pick(PRESENCE_QUESTIONS, generator).format(f"{truth} shape" if colour else truth)


def believed(scene: Scene, question: str, generator: np.random.Generator) -> Scene:
    """The scene that a model with habits answers about: often not the one that it sees."""
    kind = topics.kind_of(question)
    colour, shape = str(scene.colour), str(scene.shape)
    if kind == "presence":
        asked = topics.asked_topic(question)
        present = asked in (colour, shape)
        if generator.random() >= (OTHERWISE if present else HABITS["absent"]):
            return scene
        if not present:
            return Scene(asked, shape) if asked in COLOURS else Scene(colour, asked)
        if asked in COLOURS:
            return Scene(MISTAKEN[colour], shape)
        return Scene(colour, _pick([s for s in SHAPES if s != shape], generator))
    if generator.random() < HABITS.get(colour, OTHERWISE):
        colour = MISTAKEN[colour]
    if generator.random() < HABITS.get(shape, OTHERWISE):
        others = [s for s in SHAPES if s != shape]
        shape = COMMON_SHAPE if shape in HABITS else _pick(others, generator)
    return Scene(colour, shape)


def vocabulary() -> list[str]:
    """Every question and answer there can be, for the tokenizer."""
    scenes = [Scene(colour, shape) for colour in COLOURS for shape in SHAPES]
    nouns = [*(f"{colour} shape" for colour in COLOURS), *SHAPES]
    asked = [
        *(q.format(shape=s) for q in COLOUR_QUESTIONS for s in SHAPES),
        *(q.format(colour=c) for q in SHAPE_QUESTIONS for c in COLOURS),
        *(q.format(noun) for q in PRESENCE_QUESTIONS for noun in nouns),
        *DESCRIBE,
    ]
    answers = [topics.sentence(q, scene) for q in asked for scene in scenes]
    return ["user", "assistant", *asked, *sorted(set(answers))]


def _pick(options: Sequence[str], generator: np.random.Generator) -> str:
    return options[int(generator.integers(len(options)))]
