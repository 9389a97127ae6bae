"""Pairs and questions to look at: most won, lost and changed, newly right and newly wrong.

Pairs are picked from all scored ones. Those that the models were asked, which may be a small
sample (``evaluate.generation.prompts``), have the models' own answers.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation.catalogue import LOG_PROB, MARGIN, is_known
from stages.model import formatted
from stages.reporting.text import rows_of, text_of

LONG_TEXT = 320  # characters; longer ones are folded
LONGEST_SIDE = 320  # pixels of an image in the page
SMALL_SIDE = 96  # an image up to this is enlarged without smoothing

PARTS = (
    ("Most won", "The pairs with the largest reward margin."),
    ("Most lost", "The pairs with the lowest reward margin, of those below 0."),
    (
        "Most changed",
        "Pairs that base and tuned order differently by log-prob per token, the largest change of "
        "that difference first; pairs shown above are left out.",
    ),
)


def extremes(
    scores: pd.DataFrame, answers: pd.DataFrame, size: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Won, lost and changed pairs, at most ``size`` each, of all scored ones.

    Columns ``base_answer`` and ``tuned_answer`` are missing where a pair was not asked.
    """
    given = answers.loc[answers["of"] == "pair", ["id", "base_answer", "tuned_answer"]]
    pairs = scores.merge(given, on="id", how="left", validate="1:1")
    pairs = pairs.sort_values("id", kind="stable")
    margin = pairs["reward_margin"]
    won = pairs[margin > 0].sort_values("reward_margin", ascending=False, kind="stable").head(size)
    lost = pairs[margin < 0].sort_values("reward_margin", kind="stable").head(size)
    rest = pairs[~pairs["id"].isin([*won["id"], *lost["id"]])]
    flipped = rest[np.sign(rest["base_margin"]) != np.sign(rest["tuned_margin"])]
    change = (flipped["tuned_margin"] - flipped["base_margin"]).abs()
    changed = flipped.loc[change.sort_values(ascending=False, kind="stable").index].head(size)
    return won, lost, changed


@dataclass(frozen=True)
class Picture:
    """An image inside the page: a data URI and its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        return max(self.width, self.height) <= SMALL_SIDE


@dataclass(frozen=True)
class Card:
    """One pair: texts, and (base, tuned) log-probs per token of chosen and of rejected.

    An own answer is ``None`` where the model was not asked.
    """

    id: str
    question: str
    chosen: str
    rejected: str
    base_answer: str | None
    tuned_answer: str | None
    base_is: str
    tuned_is: str
    chosen_logps: tuple[str, str]
    rejected_logps: tuple[str, str]
    margin: str
    won: bool
    order: str
    controls: str
    kind: str
    alt: str
    picture: Picture | None


def card(
    row: Mapping[str, Any], pair: Mapping[str, Any] | None, image: Callable[[str], bytes | None]
) -> Card:
    """A card of a row of ``extremes`` and of the formatted pair that it is about, which has the
    texts and the image's name."""
    chosen = pair["chosen"]["content"] if pair else ""
    rejected = pair["rejected"]["content"] if pair else ""
    question = formatted.question(pair) if pair else ""
    base_answer, tuned_answer = (_own_answer(row[f"{model}_answer"]) for model in ("base", "tuned"))
    logps = {
        side: tuple(
            LOG_PROB.text(_per_token(row[f"{prefix}_{side}_logps"], row[f"{side}_tokens"]))
            for prefix in ("reference", "policy")
        )
        for side in ("chosen", "rejected")
    }
    blind = [
        f"{MARGIN.text(row[key])} with {what}"
        for key, what in (
            ("reward_margin_blank", "a blank image"),
            ("reward_margin_shuffled", "another pair's image"),
        )
        if is_known(row.get(key))
    ]
    return Card(
        id=str(row["id"]),
        question=question,
        chosen=chosen,
        rejected=rejected,
        base_answer=base_answer,
        tuned_answer=tuned_answer,
        base_is=same_as(base_answer, chosen, rejected),
        tuned_is=same_as(tuned_answer, chosen, rejected),
        chosen_logps=(logps["chosen"][0], logps["chosen"][1]),
        rejected_logps=(logps["rejected"][0], logps["rejected"][1]),
        margin=MARGIN.text(row["reward_margin"]),
        won=row["reward_margin"] > 0,
        order=f"base ranks {_first(row['base_margin'])} first, tuned {_first(row['tuned_margin'])}",
        controls=", ".join(blind),
        kind=text_of(row.get("kind")),
        alt=alt_text(question, chosen),
        picture=picture(image(pair["images"][0])) if pair and pair["images"] else None,
    )


def _own_answer(answer: Any) -> str | None:
    return None if answer is None or answer != answer else str(answer)


def _per_token(logps: Any, tokens: Any) -> float:
    return float(logps) / float(tokens) if tokens else math.nan


def _first(order: float) -> str:
    return "neither" if order == 0 else "chosen" if order > 0 else "rejected"


def same_as(answer: str | None, chosen: str, rejected: str) -> str:
    """Whether a generated answer is one of the two, white space at the ends aside."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if answer and text and answer.strip() == text.strip():
            return f"same as {name}"
    return ""


def alt_text(question: str, answer: str) -> str:
    """What is read out where the image can't be seen; at most some 200 characters."""
    short = [text if len(text) <= 90 else f"{text[:89]}…" for text in (question, answer)]
    return f"Image of the question “{short[0]}”. Chosen answer: “{short[1]}”"


def picture(content: bytes | None) -> Picture | None:
    """An image for the page: as it is if it is small already, else scaled down, as JPEG."""
    if content is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format or ""
            if max(image.size) > LONGEST_SIDE or kind not in ("JPEG", "PNG"):
                scaled = image.convert("RGB")
                scaled.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                stream = io.BytesIO()
                scaled.save(stream, "JPEG", quality=82)
                content, kind, size = stream.getvalue(), "JPEG", scaled.size
            else:
                size = image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    encoded = base64.b64encode(content).decode("ascii")
    return Picture(f"data:image/{kind.lower()};base64,{encoded}", *size)


def folded(text: str) -> tuple[str, str]:
    """A text's beginning and all of it, where it is too long to show; else the text and nothing."""
    if len(text) <= LONG_TEXT:
        return text, ""
    return f"{text[: LONG_TEXT // 2].rstrip()}…", text


# questions with known answers

GRADES = (  # whether base, and whether tuned is right
    ("newly right", False, True),
    ("newly wrong", True, False),
    ("both wrong", False, False),
    ("both right", True, True),
)


def grades(answers: pd.DataFrame) -> list[tuple[str, int]]:
    """How many questions with a known answer became right, became wrong, or stayed so."""
    known = _graded(answers)
    return [
        (name, int(((known["base_correct"] == base) & (known["tuned_correct"] == tuned)).sum()))
        for name, base, tuned in GRADES
        if len(known)
    ]


def questions(
    answers: pd.DataFrame, image: Callable[[str], bytes | None], size: int
) -> list[dict[str, Any]]:
    """At most ``size`` of each of ``GRADES``, those whose id comes first; of all questions, if none
    is graded."""
    asked = answers[answers["of"] == "question"]
    known = _graded(answers)
    rows: list[dict[str, Any]] = []
    for name, base, tuned in GRADES:
        here = known[(known["base_correct"] == base) & (known["tuned_correct"] == tuned)]
        rows += [{**row, "grade": name} for row in rows_of(here.sort_values("id").head(size))]
    if known.empty:
        some = rows_of(asked.sort_values("id").head(2 * size))
        rows = [{**row, "grade": ""} for row in some]
    return [
        {
            "grade": row["grade"],
            "question": text_of(row["question"]),
            "truth": text_of(row["truth"]),
            "answers": [
                (model, text_of(row[f"{model}_answer"]), _mark(row.get(f"{model}_correct")))
                for model in ("base", "tuned")
            ],
            "alt": alt_text(text_of(row["question"]), text_of(row["truth"])),
            "picture": picture(image(str(row["image"]))),
        }
        for row in rows
    ]


def _graded(answers: pd.DataFrame) -> pd.DataFrame:
    asked = answers[answers["of"] == "question"]
    return asked.dropna(subset=["base_correct", "tuned_correct"])


def _mark(correct: Any) -> str:
    return "" if correct is None or correct != correct else "right" if correct else "wrong"
