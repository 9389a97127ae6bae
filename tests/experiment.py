"""A small but complete experiment, as the stages would leave it, for the report's tests."""

import io
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from stages.evaluation.catalogue import METRICS
from stages.evaluation.shortcuts import LISTED
from stages.pairs.pairs import row_id
from stages.pairs.refusals import REASONS
from stages.params import params
from stages.reporting.inputs import Inputs, Origin
from tests.conftest import document

ROOT = Path(__file__).parent.parent
COLOURS = ("red", "green", "blue", "gold", "black", "gray", "teal", "brown")

EASY_VQA = Origin("easy-vqa", "easy-vqa", "easy-vqa", "1.0", "MIT")
TOPICS = Origin(
    *("helehan/topic-overwrite", "hub", "helehan/topic-overwrite", "8" * 40, "cc-by-nc-4.0")
)
QWEN = Origin(
    *("Qwen/Qwen3-VL-4B-Instruct", "hub", "Qwen/Qwen3-VL-4B-Instruct", "e" * 40, "apache-2.0"),
    parameters=4_437_815_808,
)
DEMO = Origin(
    *("demo/model", "path", None, None, None),
    files=(
        {"path": "config.json", "size": 1_000, "sha256": "0"},
        {"path": "model.safetensors", "size": 2_906_512, "sha256": "0123456789abcdef" * 4},
    ),
    parameters=1_448_448,
)

# Estimate and half the width of its interval: of single metrics, else of all in a unit.
MEASURED = {
    "win_rate": (0.95, 0.03),
    "chosen_logps_change": (0.46, 0.1),
    "rejected_logps_change": (-7.9, 0.2),
    "base_accuracy": (0.72, 0.05),
    "tuned_accuracy": (0.95, 0.03),
    "accuracy_change": (0.23, 0.06),
    "win_rate_blank": (0.55, 0.1),
    "repetition_change": (0.002, 0.004),
    "base_unfinished": (0.01, 0.005),
    "tuned_unfinished": (0.02, 0.005),
    "unfinished_change": (0.01, 0.02),
    "base_correct": (0.4, 0.03),
    "tuned_correct": (0.9, 0.03),
}
IN_UNIT = {
    **{"count": (40, 0), "share": (0.5, 0.1), "fraction": (0.01, 0.005), "points": (0.4, 0.1)},
    **{"nats": (0.5, 0.1), "nats times beta": (0.8, 0.1), "tokens": (9.5, 0.2), "p-value": (0, 0)},
}
POPE = "lm_eval/pope_random/acc"
ALONE = {
    **{"ties": 0, "contradictory_pairs": 0, "near_duplicate_images": 0, "questions": 16},
    "seen_text_pairs": 0,
    **{f"{POPE}/base": 0.8, f"{POPE}/tuned": 0.81, f"{POPE}/change": 0.01},
    **{f"{POPE}/change_low": -0.02, f"{POPE}/change_high": 0.04, f"{POPE}/p_value": 1.0},
    **{f"{POPE}/gained": 5, f"{POPE}/lost": 4, f"{POPE}/higher_is_better": 1},
}


def metrics_of(**changed: Any) -> dict[str, Any]:
    """A value for every metric; ``None`` takes a key away."""
    values: dict[str, Any] = {}
    for key, metric in METRICS.items():
        value, half = MEASURED.get(key, IN_UNIT[metric.unit.name])
        values |= around(key, value, half) if metric.interval else {key: value}
    values |= ALONE | changed
    return {key: value for key, value in values.items() if value is not None}


def around(key: str, value: float, half: float) -> dict[str, float]:
    return {
        key: value,
        f"{key}_low": round(value - half, 6),
        f"{key}_high": round(value + half, 6),
    }


def picture_of(i: int, side: int = 64, kind: str = "JPEG") -> bytes:
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((side // 5, side // 5, side // 2, side // 2), COLOURS[i % 8])
    stream = io.BytesIO()
    image.save(stream, kind, quality=95)
    return stream.getvalue()


def pair_rows(n: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "id": row_id(f"pair {i}"),
            "group": f"{i:032x}",
            "origin": "easy-vqa",
            "kind": ("colour", "shape", None)[i % 3],
            "messages": [{"role": "user", "content": "<image>What color is the shape?"}],
            "chosen": {"role": "assistant", "content": f"The shape is {COLOURS[i % 8]}."},
            "rejected": {"role": "assistant", "content": f"The shape is {COLOURS[(i + 1) % 8]}."},
            "images": [f"{i:032x}.jpg"],
        }
        for i in range(n)
    ]


def score_table(n: int = 40) -> pd.DataFrame:
    """Margins run evenly from about -0.4 to 1.6; the base orders every third pair wrongly."""
    i = np.arange(n)
    base_rejected, chosen = np.where(i % 3, -4.0, -2.5), -2.0 + 0.01 * i
    rejected, tokens = base_rejected - 0.5 * i + 4, 8 + i % 2
    return pd.DataFrame(pair_rows(n))[["id", "group", "origin", "kind"]].assign(
        image_tokens=16,
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        reference_chosen_logps=-3.0,
        reference_rejected_logps=base_rejected,
        chosen_tokens=8,
        rejected_tokens=tokens,
        base_margin=-3 / 8 - base_rejected / tokens,
        tuned_margin=chosen / 8 - rejected / tokens,
        reward_margin=0.1 * ((chosen + 3) - (rejected - base_rejected)),
        reward_margin_blank=np.where(i < 20, 0.1, np.nan),
        reward_margin_shuffled=np.where(i < 20, -0.1, np.nan),
    )


def answer_table(n: int = 40, asked: int = 16) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [
        {
            "id": pair["id"],
            "of": "pair",
            "image": pair["images"][0],
            "kind": pair["kind"],
            "question": "What color is the shape?",
            "truth": None,
            "base_answer": pair["rejected"]["content"],
            "tuned_answer": pair["chosen"]["content"],
            "base_correct": None,
            "tuned_correct": None,
        }
        for pair in pair_rows(n)
    ]
    for i in range(asked):
        base, tuned = bool(i & 1), bool(i & 2)
        rows.append(
            {
                "id": row_id(f"question {i}"),
                "of": "question",
                "image": f"{i:032x}.jpg",
                "kind": "colour",
                "question": "what is the color of the shape?",
                "truth": COLOURS[i % 8],
                "base_answer": f"The shape is {COLOURS[i % 8] if base else 'pink'}.",
                "tuned_answer": f"The shape is {COLOURS[i % 8] if tuned else 'pink'}.",
                "base_correct": base,
                "tuned_correct": tuned,
            }
        )
    return pd.DataFrame(rows)


def slice_table() -> pd.DataFrame:
    kinds = "question type"
    table = pd.DataFrame(
        [
            ("origin", "easy-vqa", 40, 0.95),
            (kinds, "colour", 14, 0.93),
            (kinds, "shape", 13, 1.0),
            (kinds, "presence", 4, None),
        ],
        columns=["by", "slice", "pairs", "win_rate"],
    )
    rate = table["win_rate"]
    return table.assign(
        images=table["pairs"],
        win_rate_low=rate - 0.08,
        win_rate_high=(rate + 0.05).clip(upper=1.0),
        base_accuracy=0 * rate + 0.7,
        tuned_accuracy=rate,
        note=["", "", "", "too few pairs"],
    )


def inputs_with(parameters: Mapping[str, Any] | None = None, **changed: Any) -> Inputs:
    """The demo's parameters with others by dotted name, and other inputs."""
    complete = Inputs(
        p=params.Params.model_validate(document(**(parameters or {}))),
        metrics=metrics_of(),
        scores=score_table(),
        answers=answer_table(),
        slices=slice_table(),
        audit=pd.DataFrame(columns=list(LISTED)),
        preprocess={
            "rows_in": 60,
            "rows_kept": 56,
            "rows_left_out": 4,
            "unique_images": 28,
            "pairs_by_origin": {"easy-vqa": 50, "none": 6},
            "left_out": dict.fromkeys(REASONS, 0) | {"missing_field": 3, "empty_answer": 1},
            "images_by_split": {"train": 10, "validation": 5, "test": 40},
        },
        format={
            "pairs_in": 56,
            "pairs_kept": 55,
            "left_out": {"longer_than_cutoff_len": 1},
            "kept_by_split": {"train": 10, "validation": 5, "test": 40},
        },
        first_batch={},
        test_pairs=pair_rows(),
        questions=5,
        image=lambda name: picture_of(int(name.partition(".")[0], 16)),
        data=[EASY_VQA],
        model=DEMO,
        configuration="stage: dpo\npref_beta: 0.1\n",
        adapter={
            "base_model_name_or_path": "models/base",
            "peft_type": "LORA",
            "peft_version": "0.18.1",
            "r": 8,
        },
        adapter_parameters=12_345,
    )
    return replace(complete, **changed)


class Page(HTMLParser):
    """Elements and text of a page. ``text`` has no styles; ``open`` must be empty at the end."""

    VOID = frozenset({"meta", "link", "br", "img", "wbr"})
    BLOCKS = frozenset({"td", "th", "li", "dt", "dd", "p", "h1", "h2", "h3", "caption", "summary"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in self.BLOCKS:
            self.texts.append(" ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]
