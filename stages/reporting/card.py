"""The model card: ``reports/model_card.md``, as the Hugging Face Hub reads a ``README.md``.

Metadata (https://huggingface.co/docs/hub/model-cards) and a page about one adapter, from facts that
stages recorded. The page's words are in ``card.md`` next to this module. The same facts give the
same bytes: no time, no machine, no commit of this repository.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.evaluation import catalogue, paired
from stages.evaluation.catalogue import FIGURE, METRICS, is_known
from stages.families.family import Family
from stages.params.losses import LOSSES
from stages.reporting.inputs import Inputs
from stages.reporting.markup import filled, without_absolute_paths

TEMPLATE = Path(__file__).with_suffix(".md")

_NON_COMMERCIAL = re.compile(r"(?:^|[-_ ])nc(?:$|[-_ ])|non-?commercial", re.IGNORECASE)

# For the losses that have no reference, here and in the report.
NO_REFERENCE = (
    "This loss uses no reference. The win rate and reward margin below still compare with the "
    "base, on DPO's scale."
)

DEMO_BASE = "demo/model"  # made by demo/make_base.py, with the habits that DPO takes away
# What goes into model-index: a metric and its type there.
INDEXED = {"win_rate": "win_rate", "tuned_accuracy": "accuracy", "tuned_correct": "accuracy"}


# Published data sets by repository: a note for readers, and the terms that bind their answers.
KNOWN = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))


def terms_of(repos: Iterable[str | None]) -> list[tuple[str, str, bool]]:
    """The terms of these repositories: each with its repository, and whether it forbids this."""
    known = [(repo, KNOWN[repo]["terms"]) for repo in repos if repo in KNOWN]
    return [(str(repo), term["says"], term["forbids"]) for repo, terms in known for term in terms]


def other_once_merged(bits: int) -> str:
    """What ``make export`` makes of an adapter whose base was quantised."""
    return (
        f"The adapter was trained and measured on the base in {bits} bits. make export merges it "
        "into the unquantised base, since there is no exact merge into quantised weights: that is "
        "another model than the one measured here, and nobody has measured it."
    )


@dataclass(frozen=True)
class Licence:
    """``identifier`` is the Hub's; ``name`` says what ``other`` is, and is ``None`` else."""

    identifier: str
    name: str | None = None


def render(inputs: Inputs, family: Family) -> str:
    """The card. ``family`` is the base's. Groups of metrics that a run lacks are left out."""
    p, metrics, base = inputs.p, inputs.metrics, inputs.model
    loss = LOSSES[p.train.loss]
    licence = licence_of(*(part.licence for part in (*inputs.data, base)))
    name = base.name.rpartition("/")[2] if base.kind == "hub" else base.name
    title = f"{name.replace('/', '-')}-{loss.tag}-adapter"
    return filled(
        TEMPLATE,
        inputs=inputs,
        metadata=_metadata(inputs, family, licence, title),
        title=title,
        left_out=inputs.preprocess["rows_left_out"] + sum(inputs.format["left_out"].values()),
        loss=loss,
        no_reference="" if loss.reference else NO_REFERENCE,
        once_merged=other_once_merged(bits) if (bits := p.model.quantization_bit) else "",
        family=family,
        of_the_demo=base.kind == "path" and base.name == DEMO_BASE,
        notes=[KNOWN[each.repo]["note"] for each in inputs.data if each.repo in KNOWN],
        terms=terms_of(each.repo for each in inputs.data),
        parts=[*(("data", each) for each in inputs.data), ("base model", base)],
        is_non_commercial=is_non_commercial,
        licence=licence,
        both_models=catalogue.of_both_models(metrics),
        tasks=list(paired.read_tasks(metrics)),
        FIGURE=FIGURE,
        controls=catalogue.controls(metrics),
        citations=citations,
        figures=[metric for key, metric in METRICS.items() if key in metrics],
        configuration=without_absolute_paths(inputs.configuration),
    )


def citations(papers: Sequence[str]) -> str:
    """BibTeX of papers, by their numbers on arXiv and in their order."""
    entries = Path(__file__).with_suffix(".bib").read_text(encoding="utf-8").split("\n\n")
    found = {paper: entry.strip() for paper in papers for entry in entries if paper in entry}
    return "\n\n".join(found[paper] for paper in papers)


# Licences by the Hub's names, each more restrictive than those before it: what is made from works
# under both may be passed on under the later one. Others (share-alike alone, no derivatives, a
# model's own licence) fit into no such order: next to a different one, both are named.
LICENCES = (
    *("cc0-1.0", "unlicense", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "cc-by-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
)


def licence_of(*parts: str | None) -> Licence:
    """The licence of an adapter made from data and a base under these: the most restrictive one.

    Where no rule says which holds, it is ``other``, by the names that the sources give. Spelling is
    the Hub's: "CC BY-NC 4.0" is cc-by-nc-4.0.
    """
    if not all(parts):
        return Licence("unknown")
    names = list(dict.fromkeys("-".join(str(part).lower().split()) for part in parts))
    if all(name in LICENCES for name in names):
        return Licence(max(names, key=LICENCES.index))
    return Licence("other", " and ".join(names))


def is_non_commercial(licence: str | None) -> bool:
    """Whether the licence's name says so: "cc-by-nc-4.0" does."""
    return bool(licence and _NON_COMMERCIAL.search(licence))


def _metadata(inputs: Inputs, family: Family, licence: Licence, title: str) -> str:
    from huggingface_hub import ModelCardData

    adapter = str(inputs.adapter.get("peft_type", "adapter")).lower()
    loss = LOSSES[inputs.p.train.loss].tag
    measured = _measured(inputs)
    on_hub = [each.name for each in inputs.data if each.kind == "hub"]
    facts = ModelCardData(
        # The field names a repository; a local base has none.
        base_model=inputs.model.name if inputs.model.kind == "hub" else None,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        license=licence.identifier,
        license_name=licence.name,
        datasets=on_hub or None,
        tags=[loss, adapter, "llama-factory", "preference-tuning", family.tag, "dvc"],
        model_name=title if measured else None,
        eval_results=measured or None,
    )
    return facts.to_yaml()


def _measured(inputs: Inputs) -> list[Any]:
    """Results for the index: on the pairs, on the data set's own questions, of lm-eval's tasks.

    The pairs' split is the pipeline's, none of the source. The library makes one entry of results
    that agree in type, split and revision, whatever their names.
    """
    from huggingface_hub import EvalResult

    metrics, data = inputs.metrics, inputs.data
    commits = [each.commit for each in data if each.kind == "hub"]
    name = ", ".join(each.repo or "local files" for each in data)
    of_data = {
        "dataset_type": ", ".join(each.repo or "local" for each in data),
        "dataset_revision": commits[0] if len(commits) == len(data) == 1 else None,
    }
    pairs = of_data | {"dataset_name": name, "dataset_split": "held out by image"}
    questions = of_data | {"dataset_name": f"{name}, its own test questions"}
    by = {"win_rate": ", by implicit reward"}  # its title stands alone there
    found: list[tuple[dict[str, Any], str, str, Any]] = [
        (
            questions if METRICS[key].rows == "questions" else pairs,
            *(kind, METRICS[key].title + by.get(key, ""), metrics.get(key)),
        )
        for key, kind in INDEXED.items()
    ]
    for one in paired.read_tasks(metrics):
        of_task = {"dataset_type": one.task, "dataset_name": f"{one.task} (lm-eval)"}
        found.append((of_task, one.metric, f"{one.task} {one.metric}", one.change.after))
    return [
        EvalResult(
            task_type="image-text-to-text",
            metric_type=kind,
            metric_name=title,
            metric_value=value,
            **where,
        )
        for where, kind, title, value in found
        if is_known(value)
    ]
