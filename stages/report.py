"""Write all that is known of one experiment on one HTML page that opens offline.

In: what evaluate measured, both models' answers, the data's counts and the sources.
Out: the page and the adapter's model card. Both follow from their inputs alone: times, devices, the
commit and the cost are in MLflow and in the diary (``make costs``). The experiment's
MLflow run is completed by the results, the page and the card.
"""

from pathlib import Path

import pandas as pd

from stages.core import command
from stages.families import known
from stages.model import formatted
from stages.pairs.pairs import SPLITS
from stages.params import params
from stages.reporting import card as model_card
from stages.reporting import page as report
from stages.reporting import verdicts
from stages.reporting.inputs import Inputs, folder_name, origin, parameter_count, parsed
from stages.tracking import runs


def main(
    results: Path,
    details: Path,
    curves: Path,
    preprocess: Path,
    format_report: Path,
    formatted_data: Path,
    images: Path,
    raw: Path,
    model: Path,
    adapter: Path,
    page: Path,
    card: Path,
) -> None:
    p, first_batch = params.load(), curves / "first_batch.json"
    by_split = {split: formatted.read(formatted_data, split) for split in SPLITS}
    given = Inputs(
        p=p,
        metrics=parsed(results / "metrics.json"),
        scores=pd.read_parquet(details / "scores.parquet"),
        answers=pd.read_parquet(details / "answers.parquet"),
        slices=pd.read_csv(results / "slices.csv"),
        audit=pd.read_csv(details / "audit.csv"),
        preprocess=parsed(preprocess),
        format=parsed(format_report),
        first_batch=parsed(first_batch) if first_batch.is_file() else {},
        test_pairs=by_split["test"],
        questions=len({formatted.question(row) for rows in by_split.values() for row in rows}),
        image=lambda name: path.read_bytes() if (path := images / name).is_file() else None,
        data=[origin(raw / name, name) for name in p.data.sources],
        model=origin(model, folder_name(p.model.source)),
        configuration=(adapter / "llamafactory.yaml").read_text(encoding="utf-8"),
        adapter=parsed(adapter / "adapter_config.json"),
        adapter_parameters=parameter_count(adapter),
    )
    page.write_text(report.render(given), encoding="utf-8")
    card.write_text(model_card.render(given, known.of_model(model)), encoding="utf-8")
    for kind, text in verdicts.concerns(given.metrics, given.slices, p.evaluate.confidence):
        print(f"{kind}: {text}")
    print(f"{page}: open it in a browser; {card}: the adapter's model card")
    runs.complete_run(results, curves, adapter, (page, card))


if __name__ == "__main__":
    command.run(main)
