"""easy-VQA as preference pairs: true, balanced, and the same every time."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from stages.answers import grading
from stages.pairs.pairs import Record
from stages.sources import easyvqa
from stages.sources.topics import COLOURS, SHAPES, Scene


@pytest.fixture(scope="module")
def raw() -> Path:
    """The published files, as the package has them and the fetch stage copies them."""
    spec = importlib.util.find_spec("easy_vqa")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"


@pytest.fixture(scope="module")
def pairs(raw: Path) -> list[Record]:
    return [r for r in easyvqa.records(raw) if r.chosen is not None]


@pytest.fixture(scope="module")
def scenes(raw: Path) -> dict[str, Scene]:
    """What each train image shows by the data set's own answers, found another way than the
    module does: by the one colour and the one shape that no answer rules out.
    """
    found: dict[int, tuple[set[str], set[str]]] = {}
    for text, answer, number in json.loads((raw / "train" / "questions.json").read_text()):
        colours, shapes = found.setdefault(number, (set(COLOURS), set(SHAPES)))
        words = set(re.findall(r"[a-z]+", text))
        if answer in COLOURS:
            colours &= {answer}
            shapes &= (words & set(SHAPES)) or set(SHAPES)
        elif answer in SHAPES:
            shapes &= {answer}
            colours &= (words & set(COLOURS)) or set(COLOURS)
        else:
            there = (answer == "yes") != bool(words & {"not", "no"})
            for topics_left in (colours, shapes):
                named = words & topics_left
                if named and there:
                    topics_left &= named
                elif named:
                    topics_left -= named
    return {
        f"train image {number}": Scene(
            next(iter(colours)) if len(colours) == 1 else None,
            next(iter(shapes)) if len(shapes) == 1 else None,
        )
        for number, (colours, shapes) in found.items()
    }


def words(text: str | None) -> set[str]:
    return set(re.findall(r"[a-z]+", str(text).lower()))


def test_nearly_every_train_image_becomes_one_pair(raw: Path, pairs: list[Record]):
    assert len({p.where for p in pairs}) == len(pairs)
    assert 3900 < len(pairs) <= 4000
    assert set(Counter(p.kind for p in pairs)) == {"colour", "shape", "presence", "description"}
    assert min(Counter(p.kind for p in pairs).values()) > 700


def test_chosen_names_only_what_the_image_shows(pairs: list[Record], scenes: dict[str, Scene]):
    for pair in pairs:
        scene = scenes[pair.where]
        for topic in words(pair.chosen) & {*COLOURS, *SHAPES}:
            assert topic in (scene.colour, scene.shape), pair


def test_presence_answers_agree_with_the_data_set(raw: Path, pairs: list[Record]):
    published = {
        (f"train image {number}", text): answer
        for text, answer, number in json.loads((raw / "train" / "questions.json").read_text())
    }
    checked = [p for p in pairs if p.kind == "presence"]
    for pair in checked:
        truth = published[pair.where, str(pair.question)]
        assert grading.is_correct(str(pair.question), truth, str(pair.chosen)), pair
        assert not grading.is_correct(str(pair.question), truth, str(pair.rejected)), pair
    assert len(checked) > 700


def test_rejected_differs_in_one_topic_and_in_nothing_else(pairs: list[Record]):
    for pair in pairs:
        chosen, rejected = str(pair.chosen).split(), str(pair.rejected).split()
        assert len(chosen) == len(rejected)
        different = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
        assert len(different) == 1, pair


def test_a_rule_that_only_reads_the_two_answers_wins_about_half(pairs: list[Record]):
    # The best such rule knows, for each unordered pair of answers, which one is more often chosen.
    # It is learned on even images and judged on odd ones.
    seen: Counter[tuple[str, str]] = Counter()
    half = [[p for p in pairs if int(p.where.split()[-1]) % 2 == side] for side in (0, 1)]
    for pair in half[0]:
        seen[str(pair.chosen), str(pair.rejected)] += 1
    margins = [
        seen[str(p.chosen), str(p.rejected)] - seen[str(p.rejected), str(p.chosen)] for p in half[1]
    ]
    wins = sum(m > 0 for m in margins) + sum(m == 0 for m in margins) / 2
    assert 0.44 < wins / len(margins) < 0.56


def test_the_test_questions_are_the_published_ones(raw: Path):
    published = json.loads((raw / "test" / "questions.json").read_text())
    found = list(easyvqa.questions(raw))
    assert [(q.question, q.answer) for q in found] == [(t, a) for t, a, _ in published]
    assert {q.kind for q in found} == {"colour", "shape", "presence"}
