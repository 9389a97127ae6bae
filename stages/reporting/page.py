"""The page: one experiment as a single HTML file that opens offline.

It holds no script and asks for nothing: styles, charts and images are inside, and its
Content-Security-Policy forbids the rest. The words follow from the numbers by the rules of
``reporting.verdicts``. No time, device, commit or path of a machine is on it.
"""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation import catalogue, paired
from stages.evaluation.catalogue import (
    BOTH,
    ENOUGH_IMAGES,
    FIGURE,
    LOG_PROB,
    MARGIN,
    METRICS,
    Metric,
    is_known,
)
from stages.model import formatted
from stages.pairs.pairs import SPLITS
from stages.pairs.refusals import advice
from stages.params.losses import LOSSES
from stages.reporting import card, verdicts
from stages.reporting.inputs import Inputs
from stages.reporting.markup import filled, rows_of, text_of, without_absolute_paths

TEMPLATE = Path(__file__).with_suffix(".html")
CARDS = 6  # of each part of the gallery
QUESTIONS = 3  # of each of GRADES
AUDITED = 20  # rows of the audit of pairs
LONG_TEXT = 320  # characters; longer ones are folded
LONGEST_SIDE = 320  # pixels of an image in the page
SMALL_SIDE = 96  # an image up to this is enlarged without smoothing


def render(inputs: Inputs) -> str:
    """The page. The same inputs give the same bytes."""
    from huggingface_hub.utils import yaml_dump

    p, values = inputs.p, inputs.metrics
    confidence = p.evaluate.confidence
    loss, bits = LOSSES[p.train.loss], p.model.quantization_bit
    return filled(
        TEMPLATE,
        inputs=inputs,
        level=f"{100 * confidence:g}%",
        title=verdicts.title(values),
        headline=catalogue.in_words(values),
        concerns=verdicts.concerns(values, inputs.slices, confidence),
        rules=verdicts,
        judged=verdicts.judged(verdicts.family(values, inputs.slices), confidence),
        tiles=tiles(values),
        terms=card.terms_of(each.repo for each in inputs.data),
        both_models=catalogue.of_both_models(values),
        others=others(values),
        controls=catalogue.controls(values),
        tasks=list(paired.read_tasks(values)),
        FIGURE=FIGURE,
        slices=rows_of(inputs.slices),
        enough_images=ENOUGH_IMAGES,
        gallery=gallery(inputs),
        asked=questions(inputs.answers, inputs.image, QUESTIONS),
        grades=grades(inputs.answers),
        longest=LONG_TEXT,
        funnel=funnel(inputs.preprocess, inputs.format),
        splits=SPLITS,
        per_image=inputs.preprocess["rows_kept"] / max(1, inputs.preprocess["unique_images"]),
        per_question=inputs.format["pairs_kept"] / max(1, inputs.questions),
        questions=inputs.questions,
        origins=inputs.preprocess["pairs_by_origin"],
        audit=rows_of(inputs.audit)[:AUDITED],
        method=loss.words,
        no_reference="" if loss.reference else card.NO_REFERENCE,
        once_merged=card.other_once_merged(bits) if bits else "",
        parameters=without_absolute_paths(yaml_dump(p.model_dump(mode="json"))),
    )


def tiles(values: Mapping[str, Any]) -> list[tuple[Metric, str]]:
    """At most four for the first screen: win rate, accuracy, right answers, then what chosen and
    the margin did; each with a note."""
    notes = {"win_rate": "50% if nothing was learnt"}
    for both in (catalogue.ACCURACY, catalogue.CORRECT):
        notes[both.tuned] = f"base {catalogue.shown(both.base, values.get(both.base))}"
    notes["chosen_logps_change"] = "change in nats; below 0 is a loss"
    notes["reward_margin"] = "mean; above 0 is a win"
    return [(METRICS[key], note) for key, note in notes.items() if is_known(values.get(key))][:4]


def others(values: Mapping[str, Any]) -> list[Metric]:
    """Every metric that is neither of both models nor a control, nor counts a control's rows."""
    shown = {key for both in BOTH for key in (both.base, both.tuned, both.change)}
    shown |= {metric.rows for metric in METRICS.values() if metric.alarm} - {"pairs"}
    return [
        metric
        for key, metric in METRICS.items()
        if key in values and key not in shown and not metric.alarm
    ]


def funnel(preprocess: Mapping[str, Any], formatted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From the rows of the source to the pairs that were used: what stayed, what went and why."""
    exceeds = "prompt and answer exceed format.cutoff_len"
    rows = [{"text": "Rows in the source", "count": preprocess["rows_in"]}]
    for report, step, kept in (
        (preprocess, "preprocess", "rows_kept"),
        (formatted, "format", "pairs_kept"),
    ):
        for reason, count in report["left_out"].items():
            if count:
                detail = advice(reason) if step == "preprocess" else exceeds
                about = {"text": reason.replace("_", " "), "detail": detail}
                rows.append(about | {"count": count, "left_out": True})
        rows.append({"text": f"Pairs after {step}", "count": report[kept]})
    return [{"left_out": False, "detail": ""} | row for row in rows]


# pairs and questions to look at


def gallery(inputs: Inputs) -> list[list[dict[str, Any]]]:
    """Cards of the pairs won, lost and changed. Those pairs that the models were asked, which may
    be a small sample (``evaluate.generation.prompts``), have the models' own answers.
    """
    by_id = {str(pair["id"]): pair for pair in inputs.test_pairs}
    return [
        [pair_card(row, by_id[row["id"]], inputs.image) for row in rows_of(rows)]
        for rows in extremes(inputs.scores, inputs.answers, CARDS)
    ]


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


def pair_card(
    row: Mapping[str, Any], pair: Mapping[str, Any], image: Callable[[str], bytes | None]
) -> dict[str, Any]:
    """A card of a row of ``extremes`` and of the formatted pair that it is about: ``answers`` with
    (base, tuned) log-probs per token, ``own`` answers, ``None`` where a model was not asked.
    """
    given = {model: row[f"{model}_answer"] for model in ("base", "tuned")}
    return {
        "id": row["id"],
        "question": formatted.question(pair),
        "answers": [
            (
                side,
                pair[side]["content"],
                [
                    LOG_PROB.text(row[f"{model}_{side}_logps"] / row[f"{side}_tokens"])
                    for model in ("reference", "policy")
                ],
            )
            for side in ("chosen", "rejected")
        ],
        "own": [(of, text if isinstance(text, str) else None) for of, text in given.items()],
        "margin": MARGIN.text(row["reward_margin"]),
        "won": row["reward_margin"] > 0,
        "kind": text_of(row.get("kind")),
        "picture": picture(image(pair["images"][0])) if pair["images"] else None,
    }


def picture(content: bytes | None) -> dict[str, Any] | None:
    """An image for the page, as a data URI with its size in pixels: as it is if it is small
    already, else scaled down, as JPEG. ``None`` where it is missing or broken."""
    if content is None:
        return None
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, size = image.format or "", image.size
            if max(size) > LONGEST_SIDE or kind not in ("JPEG", "PNG"):
                scaled = image.convert("RGB")
                scaled.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                stream = io.BytesIO()
                scaled.save(stream, "JPEG", quality=82)
                content, kind, size = stream.getvalue(), "JPEG", scaled.size
    except (OSError, Image.DecompressionBombError):
        return None
    encoded = base64.b64encode(content).decode("ascii")
    uri = f"data:image/{kind.lower()};base64,{encoded}"
    return {"uri": uri, "width": size[0], "height": size[1], "small": max(size) <= SMALL_SIDE}


# questions with known answers

GRADES = (  # whether base, and whether tuned is right
    ("newly right", False, True),
    ("newly wrong", True, False),
    ("both wrong", False, False),
    ("both right", True, True),
)


def grades(answers: pd.DataFrame) -> list[tuple[str, int]]:
    """How many questions with a known answer became right, became wrong, or stayed so."""
    return [(name, len(rows)) for name, rows in _graded(answers)]


def questions(
    answers: pd.DataFrame, image: Callable[[str], bytes | None], size: int
) -> list[dict[str, Any]]:
    """At most ``size`` of each of ``GRADES``, those whose id comes first."""
    return [
        {
            "grade": grade,
            "question": row["question"],
            "truth": row["truth"],
            "answers": [
                (row[f"{model}_answer"], row[f"{model}_correct"]) for model in ("base", "tuned")
            ],
            "picture": picture(image(str(row["image"]))),
        }
        for grade, rows in _graded(answers)
        for row in rows_of(rows.sort_values("id").head(size))
    ]


def _graded(answers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The questions by grade."""
    asked = answers[answers["of"] == "question"]
    return [
        (name, asked[(asked["base_correct"] == base) & (asked["tuned_correct"] == tuned)])
        for name, base, tuned in GRADES
    ]
