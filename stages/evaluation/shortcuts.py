"""What of the pairs could be learned, or lost, without looking: an audit of the data.

Judges that read the answers alone, pairs that contradict each other, and images that nearly equal
one of another split. All of it follows from the pairs; no model is asked. Texts and images are
those that training sees.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.evaluation.statistics import Floats, outcomes

FIRST_WORDS = 3
# Of copies that were scaled to half their size or saved again as JPEG of quality 30: at most 3 bits
# and 9 levels. Photographs of different things are some 30 bits apart; drawings on a plain ground
# may have no bit between them, so their colours are compared too.
MOST_BITS, MOST_LEVELS = 4, 16
_CELLS = 4_000_000  # of a block of comparisons
SIDES = ("chosen", "rejected")
LISTED = ("finding", "split", "one", "other_split", "other")

Pair = Mapping[str, Any]


# judges that read the answers alone


def judges(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, Floats]:
    """Outcomes (n,) on the test pairs of judges that learned from the training pairs which answer
    is chosen: 1 where a judge prefers chosen, ½ where it can't tell, else 0.

    ``first_words``: from an answer's first words, ``bag_of_words``: from which words it has. Each
    is a logistic regression on the difference of the two answers' features. Source: Gururangan et
    al. 2018 (arXiv 1803.02324).
    """
    judged = {"first_words": first_words, "bag_of_words": words}
    return {name: _learned(train, test, features) for name, features in judged.items()}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def first_words(text: str) -> list[str]:
    """The first word, the first two, …, each as one feature."""
    said = words(text)[:FIRST_WORDS]
    return [" ".join(said[: i + 1]) for i in range(len(said))]


def _learned(train: Sequence[Pair], test: Sequence[Pair], features: Any) -> Floats:
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = CountVectorizer(analyzer=features, binary=True, dtype=np.float64)
    answers = [_said(pair, side) for pair in train for side in SIDES]
    if not any(map(features, answers)):
        return np.full(len(test), 0.5)
    vectorizer.fit(answers)

    def difference(pairs: Sequence[Pair]) -> Any:
        chosen, rejected = (
            vectorizer.transform([_said(pair, side) for pair in pairs]) for side in SIDES
        )
        return chosen - rejected

    # Either answer may come first, so each pair is learned both ways round, without an intercept.
    known = difference(train)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(vstack([known, -known]), np.repeat([1, 0], len(train)))
    return outcomes(np.round(model.decision_function(difference(test)), 6))


def _said(pair: Pair, side: str) -> str:
    return str(pair[side]["content"])


# contradictions and copies


def in_common(pair: Pair) -> float:
    """How much the answers of a pair share, 0 to 1: 1 less their edit distance over words, as a
    share of the longer one. Rewritten answers share much, plain samples little.
    """
    one, other = (np.array(words(_said(pair, side))) for side in SIDES)
    places = np.arange(len(other) + 1)
    edits = places  # from the words of one that were read to so many of the other
    for read, word in enumerate(one, start=1):
        kept = np.minimum(edits[1:] + 1, edits[:-1] + (other != word))
        edits = np.minimum.accumulate(np.append(read, kept) - places) + places
    return 1 - float(edits[-1]) / max(len(one), len(other), 1)


def seen_texts(train: Iterable[Pair], test: Iterable[Pair]) -> list[bool]:
    """Whether a test pair's prompt and both answers are word for word those of a training pair: its
    image is held out, its text is not."""

    def text(pair: Pair) -> str:
        return json.dumps([pair["messages"], *(_said(pair, side) for side in SIDES)])

    known = set(map(text, train))
    return [text(pair) in known for pair in test]


def contradictions(pairs: Iterable[Pair]) -> list[tuple[str, str]]:
    """Ids of pairs of the same images and prompt that prefer opposite answers: what one chose the
    other rejected, and the reverse. Letter case and spaces don't count.
    """
    seen: dict[tuple[str, str, str], list[str]] = {}
    found = []
    for pair in pairs:
        prompt = json.dumps([pair["images"], pair["messages"]], ensure_ascii=False)
        prompt, chosen, rejected = (
            " ".join(text.casefold().split())
            for text in (prompt, *(_said(pair, side) for side in SIDES))
        )
        found += [(other, str(pair["id"])) for other in seen.get((prompt, rejected, chosen), [])]
        seen.setdefault((prompt, chosen, rejected), []).append(str(pair["id"]))
    return found


def looks(image: Path) -> tuple[int, NDArray[np.int16]]:
    """What an image looks like from afar: its difference hash, 64 bits (is each of 8 by 8 cells
    brighter than the one to its left?), and the colours of as many, shape (192,), 0 to 255.
    """
    from PIL import Image

    with Image.open(image) as opened:
        opened.draft("RGB", (72, 72))  # a JPEG is decoded at an eighth of its size or so
        small = opened.convert("RGB")
    grey = small.convert("L").resize((9, 8), Image.Resampling.BOX)
    bits = np.diff(np.asarray(grey, dtype=np.int16), axis=1) > 0
    colours = np.asarray(small.resize((8, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), colours.ravel()


def near_duplicates(images: Mapping[str, str], folder: Path) -> list[tuple[str, str]]:
    """Names of images of different splits that look the same, by ``looks``.

    ``images``: names in ``folder``, and the split of each.
    """
    names = sorted(images)
    if not names:
        return []
    seen = [looks(folder / name) for name in names]
    hashes = np.array([one for one, _ in seen], dtype=np.uint64)
    colours = np.stack([other for _, other in seen])
    splits = np.array([images[name] for name in names])
    found = []
    step = max(1, _CELLS // len(names))
    for start in range(0, len(names), step):
        rows = slice(start, start + step)
        near = np.bitwise_count(hashes[rows, None] ^ hashes[None]) <= MOST_BITS
        near &= splits[rows, None] != splits[None]
        for i, j in np.argwhere(near) + np.array([start, 0]):
            if i < j and np.abs(colours[i] - colours[j]).max() <= MOST_LEVELS:
                found.append((names[i], names[j]))
    return found


def listed(
    by_split: Mapping[str, Sequence[Pair]], folder: Path
) -> tuple[pd.DataFrame, dict[str, int]]:
    """All contradictory pairs and near-duplicate images, a row each (columns ``LISTED``), and how
    many pairs and test images there are of either, of how many.
    """
    pairs = [(split, pair) for split, those in by_split.items() for pair in those]
    of_pair = {str(pair["id"]): split for split, pair in pairs}
    of_image = {str(name): split for split, pair in pairs for name in pair["images"]}
    swapped = contradictions(pair for _, pair in pairs)
    alike = near_duplicates(of_image, folder)
    rows = [("contradictory pairs", of_pair[a], a, of_pair[b], b) for a, b in swapped]
    rows += [("near-duplicate images", of_image[a], a, of_image[b], b) for a, b in alike]
    tested = {name for couple in alike for name in couple if of_image[name] == "test"}
    return pd.DataFrame(rows, columns=list(LISTED)), {
        "audited_pairs": len(of_pair),
        "contradictory_pairs": len({one for couple in swapped for one in couple}),
        "audited_images": sum(split == "test" for split in of_image.values()),
        "near_duplicate_images": len(tested),
    }
