"""The page: one experiment as a single HTML file that opens offline.

It holds no script and asks for nothing: styles, charts and images are inside, and its
Content-Security-Policy forbids the rest. The words follow from the numbers by the rules of
``reporting.verdicts``, which the page prints too. The page follows from what the stages wrote and
from nothing else: no time, device, commit or path of a machine.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML

from stages.core.errors import UserError
from stages.evaluation import catalogue
from stages.evaluation.catalogue import COUNT, DASH, ENOUGH_IMAGES, is_known
from stages.pairs.pairs import SPLITS
from stages.pairs.refusals import REASONS
from stages.params import params
from stages.params.losses import LOSSES
from stages.reporting import card, figures, gallery, tables, verdicts
from stages.reporting.text import capitalized, rows_of, without_absolute_paths
from stages.sources import source as fetched
from stages.sources.kinds import KINDS

TEMPLATE = "page.html"
_INTERVAL = re.compile(r"(\[[^\s\]]+,) ([^\s\]]+\])")  # which a line must not break
CARDS = 6  # of each part of the gallery
QUESTIONS = 3  # of each of gallery.GRADES
AUDITED = 20  # rows of the audit of pairs


@dataclass(frozen=True)
class Origin:
    """Where data or a model came from; ``name`` is a repository, a path or a package."""

    kind: str
    name: str
    commit: str | None = None
    licence: str | None = None
    parameters: int | None = None
    digest: str | None = None  # SHA-256 of the first weights file, where there is one

    @property
    def link(self) -> str | None:
        address = KINDS[self.kind].address
        is_model = self.parameters is not None
        return address(self.name, self.commit, not is_model) if address and self.commit else None


@dataclass(frozen=True)
class Inputs:
    """All that the page shows, as the stages wrote it. Tables that are not there are ``None``.

    ``image`` gives the bytes of an image by its name, or ``None``. ``training`` is
    llamafactory.yaml, ``parameters`` all of params.yaml, ``first_batch`` what the trainer on shared
    prompts found there (``tuning/trainer.py``).
    """

    metrics: Mapping[str, Any]
    scores: pd.DataFrame
    answers: pd.DataFrame
    slices: pd.DataFrame | None
    margins: pd.DataFrame | None
    train_curve: pd.DataFrame | None
    validation_curve: pd.DataFrame | None
    lengths: pd.DataFrame | None
    preprocess: Mapping[str, Any]
    format: Mapping[str, Any]
    test_pairs: Sequence[Mapping[str, Any]]
    image: Callable[[str], bytes | None]
    data: Sequence[Origin]
    model: Origin
    training: Mapping[str, Any]
    confidence: float
    adapter_parameters: int | None = None
    first_batch: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    audit: pd.DataFrame | None = None


def render(inputs: Inputs) -> str:
    """The page. The same inputs give the same bytes."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": COUNT.text,
        "unbroken": lambda text: _INTERVAL.sub("\\1\N{NO-BREAK SPACE}\\2", text),
    }
    won, lost, changed = gallery.extremes(inputs.scores, inputs.answers, CARDS)
    by_id = {str(pair["id"]): pair for pair in inputs.test_pairs}
    values = dict(inputs.metrics)
    return environment.get_template(TEMPLATE).render(
        inputs=inputs,
        m=values,
        level=f"{100 * inputs.confidence:g}%",
        title=verdicts.TITLES[verdicts.verdict(values, "win_rate")],
        headline=verdicts.headline(values),
        concerns=verdicts.concerns(values, inputs.slices),
        rules=verdicts.RULES,
        tiles=tables.tiles(values),
        both_models=tables.both_models(values),
        others=tables.others(values),
        controls=tables.controls(values),
        tasks=tables.tasks(values),
        win_rate=catalogue.shown("win_rate", values.get("win_rate")),
        charts=[
            (name, label, Markup(figures.inline_svg(figure, name, label)))
            for name, label, figure in charts(inputs)
        ],
        slices=tables.slice_rows(inputs.slices),
        enough_images=ENOUGH_IMAGES,
        gallery=[
            (
                name,
                sentence,
                [
                    gallery.card(row, by_id.get(str(row["id"])), inputs.image)
                    for row in rows_of(rows)
                ],
            )
            for (name, sentence), rows in zip(gallery.PARTS, (won, lost, changed), strict=True)
        ],
        asked=gallery.questions(inputs.answers, inputs.image, QUESTIONS),
        grades=gallery.grades(inputs.answers),
        funnel=funnel(inputs.preprocess, inputs.format),
        splits=split_rows(inputs.preprocess, inputs.format),
        audit=rows_of(inputs.audit)[:AUDITED],
        method=method(inputs),
        parameters=without_absolute_paths(dumped(inputs.parameters)),
        text=gallery.folded,
    )


# charts


def charts(inputs: Inputs) -> list[tuple[str, str, Any]]:
    """(name, label, figure) of everything that there is to draw."""
    found = [
        (f"curve-{name}", f"{figures.PANELS[name][0]} by training step", figure)
        for name, figure in figures.curves(inputs.train_curve, inputs.validation_curve).items()
    ]
    overall = inputs.metrics.get("win_rate")
    others = (
        ("margins", "Reward margins of the test pairs", figures.margins(inputs.margins)),
        (
            "slices",
            "Win rate by slice, with its interval",
            figures.slices(inputs.slices, overall if is_known(overall) else None),
        ),
        ("lengths", "Tokens of prompt, chosen and rejected", figures.lengths(inputs.lengths)),
    )
    return found + [(name, label, figure) for name, label, figure in others if figure is not None]


# data and method


def funnel(preprocess: Mapping[str, Any], formatted_: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From the rows of the source to the pairs that were used: what stayed, what went and why."""
    meanings = {**REASONS, "longer_than_cutoff_len": "prompt and answer exceed format.cutoff_len"}
    rows: list[dict[str, Any]] = []

    def kept(text: str, value: Any) -> None:
        if is_known(value):
            rows.append({"text": text, "count": value, "left_out": False, "detail": ""})

    def left_out(reasons: Mapping[str, Any]) -> None:
        none = [reason for reason, count in reasons.items() if not count]
        apart = [reason for reason in reasons if reason not in none or len(none) == 1]
        named = [
            (reason.replace("_", " "), reasons[reason], meanings.get(reason, ""))
            for reason in apart
        ]
        if len(none) > 1:
            named.append(("each of these", 0, ", ".join(none).replace("_", " ")))
        for text, count, detail in named:
            rows.append({"text": text, "count": count, "left_out": True, "detail": detail})

    kept("Rows in the source", preprocess.get("rows_in"))
    left_out(preprocess.get("left_out", {}))
    kept("Pairs after preprocess", preprocess.get("rows_kept"))
    left_out(formatted_.get("left_out", {}))
    kept("Pairs after format", formatted_.get("pairs_kept"))
    largest = max((row["count"] for row in rows), default=0) or 1
    return [{**row, "share": row["count"] / largest} for row in rows]


def split_rows(
    preprocess: Mapping[str, Any], formatted_: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Pairs and images of each split; pairs as format kept them."""
    pairs = formatted_.get("kept_by_split") or preprocess.get("pairs_by_split", {})
    images = preprocess.get("images_by_split", {})
    total = sum(pairs.get(split, 0) for split in SPLITS) or 1
    return [
        {
            "split": split,
            "pairs": pairs.get(split, 0),
            "images": images.get(split, 0),
            "share": pairs.get(split, 0) / total,
        }
        for split in SPLITS
    ]


def method(inputs: Inputs) -> list[tuple[str, str]]:
    """What was compared with what: names and values, of what is known."""
    training, values = inputs.training, inputs.metrics
    curves = (inputs.train_curve, inputs.validation_curve)
    last = max(
        (int(one["step"].max()) for one in curves if one is not None and len(one)), default=0
    )
    batch = [
        int(training.get(key) or 0)
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    ]
    tuning = str(training.get("finetuning_type", ""))
    if "lora_rank" in training:
        tuning += f", rank {training['lora_rank']}"
    if inputs.adapter_parameters:
        tuning += f", {inputs.adapter_parameters:,} trained parameters"
    if bits := training.get("quantization_bit"):
        tuning += f", base in {bits} bits"
    extra = training.get("pref_ftx")
    method = LOSSES.get(str(training.get("pref_loss")))
    loss = f"{training.get('pref_loss', DASH)}, beta {training.get('pref_beta', DASH)}"
    if extra:
        loss += f", plus {extra} times the SFT loss on chosen"
    reference = card.NO_REFERENCE if method and not method.reference else ""
    schedule = [
        f"{last:,} steps" if last else "",
        f"{training['num_train_epochs']} epochs" if "num_train_epochs" in training else "",
        f"{math.prod(batch)} pairs a step and device" if all(batch) else "",
        f"learning rate {training['learning_rate']:g}"
        if is_known(training.get("learning_rate"))
        else "",
        str(training.get("lr_scheduler_type", "")),
        f"seed {training['seed']}" if "seed" in training else "",
    ]
    tested = f"{values.get('pairs', 0):,} pairs on {values.get('images', 0):,} images"
    if values.get("answers"):
        tested += f"; {values['answers']:,} generated answers"
    if values.get("questions"):
        tested += f"; {values['questions']:,} questions"
    return [
        (name, text)
        for name, text in (
            ("Method", capitalized(method.words if method else "")),
            ("Loss", loss),
            ("Reference", reference),
            ("Adapter", tuning),
            ("Once merged", card.other_once_merged(bits) if bits else ""),
            ("Training", ", ".join(part for part in schedule if part)),
            ("Forward pass", forward_pass(inputs.first_batch)),
            ("Test", tested),
        )
        if text
    ]


def forward_pass(first_batch: Mapping[str, Any]) -> str:
    """How training computed log-probs, and how far that was from LLaMA-Factory's own way."""
    if not first_batch:
        return "LLaMA-Factory's own"
    if reason := first_batch.get("stock_because"):
        return f"LLaMA-Factory's own: {reason}"
    text = (
        "prompt shared by both answers; on the first "
        f"{COUNT.text(first_batch['pairs'])} pairs the policy's log-probs differ by at most "
        f"{first_batch['policy_difference']:.1g} nats from LLaMA-Factory's own"
    )
    if "reference_difference" in first_batch:
        difference = first_batch["reference_difference"]
        text += f", and the reference's, looked up, by at most {difference:.1g}"
    return f"{text} (the largest log-prob is {first_batch['largest_logps']:.0f} nats)"


# reading


def table(path: Path) -> pd.DataFrame | None:
    """A CSV file, or ``None`` where there is none or it is empty."""
    try:
        return pd.read_csv(path)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return None


def parsed(path: Path) -> dict[str, Any]:
    """A JSON file that a stage wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def yaml(path: Path) -> dict[str, Any]:
    """A YAML file.

    Raises:
        UserError: it is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; `dvc repro -f train` makes it again")
    return YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}


def described(folder: Path, source: params.DataSource | params.ModelSource) -> Origin:
    """Where a fetched folder came from, and what pins it."""
    found = fetched.read(folder)
    weights = next((file for file in found.files if file.path.endswith(".safetensors")), None)
    return Origin(
        found.kind,
        KINDS[found.kind].name(source, found),
        found.commit,
        found.licence,
        parameter_count(folder),
        weights.sha256 if weights else None,
    )


def parameter_count(folder: Path) -> int | None:
    """Numbers in a folder's safetensors files, from their headers alone; ``None`` if none."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as weights:
            total += sum(math.prod(weights.get_slice(k).get_shape()) for k in weights.keys())  # noqa: SIM118
    return total or None


def dumped(parameters: Mapping[str, Any]) -> str:
    """The parameters as YAML, in their order."""
    from io import StringIO

    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(dict(parameters), stream)
    return stream.getvalue()
