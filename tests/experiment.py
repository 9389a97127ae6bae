"""A small but complete experiment, as the stages would leave it, for the report's tests."""

import io
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageDraw

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

WITH_INTERVAL = {  # estimate, and half the width of its interval
    "win_rate": (0.95, 0.03),
    "reward_margin": (0.84, 0.1),
    "chosen_logps_change": (0.46, 0.1),
    "rejected_logps_change": (-7.9, 0.2),
    "base_accuracy": (0.72, 0.05),
    "tuned_accuracy": (0.95, 0.03),
    "accuracy_change": (0.23, 0.06),
    "base_accuracy_summed": (0.71, 0.05),
    "tuned_accuracy_summed": (0.94, 0.03),
    "accuracy_change_summed": (0.23, 0.06),
    "longer_wins": (0.5, 0.1),
    "win_rate_chosen_shorter": (0.917, 0.05),
    "win_rate_equal_length": (0.99, 0.01),
    "win_rate_chosen_longer": (0.917, 0.05),
    "win_rate_without_length": (0.95, 0.03),
    "first_words_wins": (0.5, 0.1),
    "bag_of_words_wins": (0.53, 0.1),
    "win_rate_blank": (0.55, 0.1),
    "win_rate_over_blank": (0.4, 0.1),
    "win_rate_shuffled": (0.6, 0.1),
    "win_rate_over_shuffled": (0.35, 0.1),
    "base_accuracy_blank": (0.49, 0.1),
    "tuned_accuracy_blank": (0.5, 0.1),
    "base_accuracy_shuffled": (0.5, 0.1),
    "tuned_accuracy_shuffled": (0.52, 0.1),
    "base_answer_tokens": (9.4, 0.2),
    "tuned_answer_tokens": (9.6, 0.2),
    "answer_tokens_change": (0.2, 0.1),
    "base_repetition": (0.01, 0.005),
    "tuned_repetition": (0.012, 0.005),
    "repetition_change": (0.002, 0.004),
    "base_unfinished": (0.01, 0.005),
    "tuned_unfinished": (0.02, 0.005),
    "unfinished_change": (0.01, 0.02),
    "base_correct": (0.4, 0.03),
    "tuned_correct": (0.9, 0.03),
    "correct_change": (0.5, 0.05),
}
POPE = "lm_eval/pope_random/acc"
ALONE = {
    **{"pairs": 40, "images": 40, "ties": 0, "control_pairs": 20, "answers": 40, "questions": 16},
    **{"win_rate_wilson_low": 0.83, "win_rate_wilson_high": 0.99, "reward_margin_p50": 0.9},
    **{"accuracy_gained": 10, "accuracy_lost": 1, "accuracy_p_value": 3.7e-6},
    **{"independent_pairs": 40, "win_rate_detectable": 0.21, "accuracy_detectable": 0.24},
    **{"pairs_chosen_shorter": 12, "pairs_equal_length": 16, "pairs_chosen_longer": 12},
    **{"win_rate_at_equal_length": 0.96, "length_explained": 0.02},
    **{"audited_pairs": 55, "contradictory_pairs": 0},
    **{"audited_images": 40, "near_duplicate_images": 0},
    **{"same_answers": 0.4, "constant_correct": 0.35},
    **{"correct_gained": 9, "correct_lost": 1, "correct_p_value": 0.021},
    **{f"{POPE}/base": 0.8, f"{POPE}/tuned": 0.81, f"{POPE}/change": 0.01},
    **{f"{POPE}/change_low": -0.02, f"{POPE}/change_high": 0.04, f"{POPE}/p_value": 1.0},
    **{f"{POPE}/gained": 5, f"{POPE}/lost": 4, f"{POPE}/higher_is_better": 1},
}


def metrics_of(**changed: Any) -> dict[str, Any]:
    """Metrics of every group; ``None`` takes a key away. Intervals are given by hand."""
    values: dict[str, Any] = dict(ALONE)
    for key, (value, half) in WITH_INTERVAL.items():
        values |= around(key, value, half)
    return {key: value for key, value in (values | changed).items() if value is not None}


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
    rows = []
    for i, pair in enumerate(pair_rows(n)):
        base_rejected = -4.0 if i % 3 else -2.5
        chosen, rejected = -2.0 + 0.01 * i, base_rejected - 0.5 * i + 4
        rows.append(
            {
                **{key: pair[key] for key in ("id", "group", "origin", "kind")},
                "image_tokens": 16,
                "policy_chosen_logps": chosen,
                "policy_rejected_logps": rejected,
                "reference_chosen_logps": -3.0,
                "reference_rejected_logps": base_rejected,
                "chosen_tokens": 8,
                "rejected_tokens": 8 + i % 2,
                "base_margin": -3 / 8 - base_rejected / (8 + i % 2),
                "tuned_margin": chosen / 8 - rejected / (8 + i % 2),
                "reward_margin": 0.1 * ((chosen + 3) - (rejected - base_rejected)),
                "reward_margin_blank": 0.1 if i < 20 else float("nan"),
                "reward_margin_shuffled": -0.1 if i < 20 else float("nan"),
            }
        )
    return pd.DataFrame(rows)


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
    rows: list[dict[str, Any]] = [
        {"by": "origin", "slice": "easy-vqa", "pairs": 40, "images": 40, "rate": 0.95},
        {"by": "question type", "slice": "colour", "pairs": 14, "images": 14, "rate": 0.93},
        {"by": "question type", "slice": "shape", "pairs": 13, "images": 13, "rate": 1.0},
        {"by": "question type", "slice": "presence", "pairs": 4, "images": 4, "rate": None},
    ]
    return pd.DataFrame(
        [
            {
                **{key: row[key] for key in ("by", "slice", "pairs", "images")},
                "win_rate": row["rate"],
                "win_rate_low": row["rate"] and row["rate"] - 0.08,
                "win_rate_high": row["rate"] and min(1.0, row["rate"] + 0.05),
                "base_accuracy": row["rate"] and 0.7,
                "tuned_accuracy": row["rate"],
                "note": "" if row["rate"] else "too few pairs",
            }
            for row in rows
        ]
    )


def curve_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    steps = range(5, 45, 5)
    train = pd.DataFrame(
        {
            "step": steps,
            "epoch": [step / 40 for step in steps],
            "loss": [0.7 - step / 100 for step in steps],
            "reward_margin": [step / 40 for step in steps],
            "reward_accuracy": [min(1, 0.5 + step / 50) for step in steps],
            "chosen_logps": [-1 + step / 100 for step in steps],
            "rejected_logps": [-2 - step / 10 for step in steps],
            "learning_rate": [1e-3 * (1 - step / 40) for step in steps],
        }
    )
    return train, train.iloc[3::4].drop(columns="learning_rate")


def inputs_with(parameters: Mapping[str, Any] | None = None, **changed: Any) -> Inputs:
    """The demo's parameters with others by dotted name, and other inputs."""
    train, validation = curve_tables()
    complete = Inputs(
        p=params.Params.model_validate(document(**(parameters or {}))),
        metrics=metrics_of(),
        scores=score_table(),
        answers=answer_table(),
        slices=slice_table(),
        margins=pd.DataFrame({"margin": [-0.1, 0.1, 0.3, 0.5], "pairs": [2, 8, 20, 10]}),
        audit=None,
        train_curve=train,
        validation_curve=validation,
        lengths=pd.DataFrame(
            {"percentile": [0, 50, 100], "prompt": [30, 32, 36], "chosen": 8, "rejected": 9}
        ),
        preprocess={
            "rows_in": 60,
            "rows_kept": 56,
            "rows_left_out": 4,
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


def uncharted(parameters: Mapping[str, Any] | None = None, **changed: Any) -> Inputs:
    """The inputs without those that only feed charts, which take most of the time."""
    tables = ("slices", "margins", "train_curve", "validation_curve", "lengths")
    return inputs_with(parameters, **(dict.fromkeys(tables) | changed))


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
