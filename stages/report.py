"""Report: everything that is known of one experiment, as a single HTML page that opens offline.

In: what evaluate measured, both models' answers, the curves, the data's counts and the sources.
Out: the page and the adapter's model card. Both follow from their inputs alone: times, devices, the
commit and the cost are in MLflow and in the diary (``make costs``). The experiment's
MLflow run is completed by the results, the page, the card and the charts.
"""

import tempfile
from pathlib import Path

from stages.core import command
from stages.families import known
from stages.params import params
from stages.reporting import card as model_card
from stages.reporting import figures, inputs, verdicts
from stages.reporting import page as report
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
    given = inputs.read(
        params.load(),
        results=results,
        details=details,
        curves=curves,
        preprocess=preprocess,
        format_report=format_report,
        lengths=lengths,
        formatted_data=formatted_data,
        images=images,
        raw=raw,
        model=model,
        adapter=adapter,
    )
    page.write_text(report.render(given), encoding="utf-8")
    card.write_text(model_card.render(given, known.of_model(model)), encoding="utf-8")
    for concern in verdicts.concerns(given.metrics, given.slices):
        print(f"{'warning' if concern.warning else 'note'}: {concern.text}")
    print(f"{page}: open it in a browser; {card}: the adapter's model card")

    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder, "figures")
        for name, _, figure in report.charts(given):
            figures.save(figure, drawn / f"{name}.png")
        runs.complete_run(results, curves, adapter, (page, card, drawn))


if __name__ == "__main__":
    command.run(main)
