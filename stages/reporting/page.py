"""The page: one experiment as a single HTML file that opens offline.

It holds no script and asks for nothing: styles, charts and images are inside, and its
Content-Security-Policy forbids the rest. The words follow from the numbers by the rules of
``reporting.verdicts``. No time, device, commit or path of a machine is on it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.evaluation import catalogue, paired
from stages.evaluation.catalogue import BOTH, ENOUGH_IMAGES, FIGURE, METRICS, Metric, is_known
from stages.pairs.pairs import SPLITS
from stages.pairs.refusals import advice
from stages.params.losses import LOSSES
from stages.reporting import card, gallery, verdicts
from stages.reporting.inputs import Inputs
from stages.reporting.markup import filled, rows_of, without_absolute_paths

TEMPLATE = Path(__file__).with_suffix(".html")
CARDS = 6  # of each part of the gallery
QUESTIONS = 3  # of each of gallery.GRADES
AUDITED = 20  # rows of the audit of pairs


def render(inputs: Inputs) -> str:
    """The page. The same inputs give the same bytes."""
    from huggingface_hub.utils import yaml_dump

    p, values = inputs.p, dict(inputs.metrics)
    confidence = p.evaluate.confidence
    extremes = gallery.extremes(inputs.scores, inputs.answers, CARDS)
    by_id = {str(pair["id"]): pair for pair in inputs.test_pairs}
    loss, bits = LOSSES[p.train.loss], p.model.quantization_bit
    return filled(
        TEMPLATE,
        p=p,
        m=values,
        model=inputs.model,
        data=list(inputs.data),
        level=f"{100 * confidence:g}%",
        title=verdicts.title(values),
        headline=catalogue.in_words(values),
        concerns=verdicts.concerns(values, inputs.slices, confidence),
        rules=verdicts.RULES,
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
        scores=len(inputs.scores),
        gallery=[
            (
                *part,
                [gallery.card(row, by_id.get(row["id"]), inputs.image) for row in rows_of(rows)],
            )
            for part, rows in zip(gallery.PARTS, extremes, strict=True)
        ],
        asked=gallery.questions(inputs.answers, inputs.image, QUESTIONS),
        grades=gallery.grades(inputs.answers),
        text=gallery.folded,
        funnel=funnel(inputs.preprocess, inputs.format),
        splits=split_rows(inputs.preprocess, inputs.format),
        per_image=inputs.preprocess["rows_kept"] / max(1, inputs.preprocess["unique_images"]),
        per_question=inputs.format["pairs_kept"] / max(1, inputs.questions),
        questions=inputs.questions,
        origins=inputs.preprocess["pairs_by_origin"],
        audit=rows_of(inputs.audit)[:AUDITED],
        audited=len(inputs.audit),
        method=loss.words,
        no_reference="" if loss.reference else card.NO_REFERENCE,
        once_merged=card.other_once_merged(bits) if bits else "",
        train=p.train.passed_through,
        first_batch=inputs.first_batch,
        adapter_parameters=inputs.adapter_parameters,
        parameters=without_absolute_paths(yaml_dump(p.model_dump(mode="json"))),
    )


def tiles(values: Mapping[str, Any]) -> list[tuple[Metric, str]]:
    """At most four for the first screen: win rate, accuracy, right answers, then what chosen and
    the margin did; each with a note."""
    notes = {
        "win_rate": "50% if nothing was learnt",
        **{
            both.tuned: f"base {catalogue.shown(both.base, values.get(both.base))}"
            for both in (catalogue.ACCURACY, catalogue.CORRECT)
        },
        "chosen_logps_change": "change in nats; below 0 is a loss",
        "reward_margin": "mean; above 0 is a win",
    }
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


def split_rows(preprocess: Mapping[str, Any], formatted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs and images of each split; pairs as format kept them."""
    pairs, images = formatted["kept_by_split"], preprocess["images_by_split"]
    return [
        {"split": split, "pairs": pairs.get(split, 0), "images": images.get(split, 0)}
        for split in SPLITS
    ]
