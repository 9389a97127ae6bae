"""Report: everything that is known of one experiment, as a single HTML page that opens offline.

In: what evaluate measured, both models' answers, the curves, the data's counts and the sources.
Out: the page and the adapter's model card. Both follow from their inputs alone: times, devices, the
commit and the cost are in MLflow and in the diary (``python -m stages costs``). Page, card and
charts join the MLflow run.
"""

import tempfile
from pathlib import Path

import pandas as pd

from stages.core import command
from stages.families import known
from stages.model import formatted
from stages.params import params
from stages.reporting import card as model_card
from stages.reporting import figures, verdicts
from stages.reporting import page as report
from stages.reporting.page import contents, described, parameter_count, parsed, table, yaml
from stages.sources import source as fetched
from stages.tracking import runs


def main(
    results: Path,
    details: Path,
    curves: Path,
    preprocess: Path,
    format_report: Path,
    lengths: Path,
    formatted_data: Path,
    images: Path,
    raw: Path,
    model: Path,
    adapter: Path,
    page: Path,
    card: Path,
) -> None:
    p = params.load()
    inputs = report.Inputs(
        metrics=parsed(results / "metrics.json"),
        scores=pd.read_parquet(details / "scores.parquet"),
        answers=pd.read_parquet(details / "answers.parquet"),
        slices=table(results / "slices.csv"),
        margins=table(results / "margins.csv"),
        audit=table(details / "audit.csv"),
        train_curve=table(curves / "train.csv"),
        validation_curve=table(curves / "validation.csv"),
        lengths=table(lengths),
        preprocess=parsed(preprocess),
        format=parsed(format_report),
        test_pairs=formatted.read(formatted_data, "test"),
        image=lambda name: contents(images / name),
        data=[described(raw / name, source) for name, source in p.data.sources.items()],
        model=described(model, p.model.source),
        training=yaml(adapter / "llamafactory.yaml"),
        adapter_parameters=parameter_count(adapter),
        first_batch=parsed(first) if (first := curves / "first_batch.json").is_file() else {},
        confidence=p.evaluate.confidence,
        parameters={
            "data": p.data.model_dump(mode="json"),
            "model": p.model.model_dump(mode="json"),
            "preprocess": p.preprocess.model_dump(mode="json"),
            "format": p.format.model_dump(mode="json"),
            "scoring": p.scoring.model_dump(mode="json"),
            "train": p.train.model_dump(mode="json"),
            "evaluate": p.evaluate.model_dump(mode="json"),
        },
    )
    page.write_text(report.render(inputs), encoding="utf-8")
    card.write_text(
        model_card.render(
            p,
            metrics=inputs.metrics,
            preprocess=inputs.preprocess,
            formatted=inputs.format,
            data=[fetched.read(raw / name) for name in p.data.sources],
            model=fetched.read(model),
            configuration=(adapter / "llamafactory.yaml").read_text(encoding="utf-8"),
            adapter=parsed(adapter / "adapter_config.json"),
            family=known.of_model(model),
        ),
        encoding="utf-8",
    )
    for concern in verdicts.concerns(inputs.metrics, inputs.slices):
        print(f"{'warning' if concern.warning else 'note'}: {concern.text}")
    print(f"{page}: open it in a browser; {card}: the adapter's model card")

    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder, "figures")
        for name, _, figure in report.charts(inputs):
            figures.save(figure, drawn / f"{name}.png")
        fingerprint = parsed(adapter / "fingerprint.json")["fingerprint"]
        runs.attach(fingerprint, (page, card, drawn))


if __name__ == "__main__":
    command.run(main)
