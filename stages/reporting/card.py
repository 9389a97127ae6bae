"""The model card: ``reports/model_card.md``, as the Hugging Face Hub reads a ``README.md``.

Metadata (YAML front matter) and a page about one adapter, from facts that stages recorded: its
parameters, metrics, counts and sources. The page's words are in ``card.md`` next to this module.
The same facts give the same bytes: no time, no machine, no commit of this repository. Who publishes
the adapter copies the card next to it as ``README.md``.

The Hub's fields: https://huggingface.co/docs/hub/model-cards. ``huggingface_hub`` writes and checks
them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.text import readable
from stages.evaluation import catalogue, regression
from stages.evaluation.catalogue import METRICS, is_known
from stages.families.family import Family
from stages.params.losses import LOSSES
from stages.params.params import Params
from stages.reporting import tables
from stages.reporting.text import capitalized, cell, code, fenced, literal, without_absolute_paths
from stages.sources.kinds import KINDS
from stages.sources.local import PathModel
from stages.sources.source import About, Source

TEMPLATE = Path(__file__).with_suffix(".md")

_NON_COMMERCIAL = re.compile(r"(?:^|[-_ ])nc(?:$|[-_ ])|non-?commercial", re.IGNORECASE)

# For the losses that have no reference, here and in the report.
NO_REFERENCE = (
    "This loss uses no reference; the win rate and reward margin below compare with the base all "
    "the same, on DPO's scale."
)

DEMO_BASE = Path("demo/model")  # made by demo/make_base.py, with the habits that DPO takes away


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

    @property
    def shown(self) -> str:
        return self.name or self.identifier


# As in CITATION.cff.
CITATIONS = {
    "llamafactory": """@article{zheng2024llamafactory,
  title  = {LlamaFactory: Unified Efficient Fine-Tuning of 100+ Language Models},
  author = {Zheng, Yaowei and Zhang, Richong and Zhang, Junhao and Ye, Yanhan and Luo, Zheyan and
            Feng, Zhangchi and Ma, Yongqiang},
  year   = {2024},
  note   = {arXiv:2403.13372}
}""",
    "tpo": """@article{he2024systematic,
  title  = {Systematic Reward Gap Optimization for Mitigating VLM Hallucinations},
  author = {He, Lehan and Chen, Zeren and Shi, Zhelun and Yu, Tianyu and Shao, Jing and Sheng, Lu},
  year   = {2024},
  note   = {arXiv:2411.17265}
}""",
}

# What goes into model-index: a metric and its type there.
INDEXED = {"win_rate": "win_rate", "tuned_accuracy": "accuracy", "tuned_correct": "accuracy"}


def render(
    p: Params,
    *,
    metrics: Mapping[str, float],
    preprocess: Mapping[str, Any],
    formatted: Mapping[str, Any],
    data: Sequence[Source],
    model: Source,
    configuration: str,
    adapter: Mapping[str, Any],
    family: Family,
) -> str:
    """The card.

    ``metrics``, ``preprocess`` and ``formatted`` are ``metrics.json``, ``preprocess.json`` and
    ``format.json`` of ``reports``; ``data`` and ``model`` say what was fetched; ``configuration``
    is the text of ``models/adapter/llamafactory.yaml`` and ``adapter`` its ``adapter_config.json``;
    ``family`` is the base's. Groups of metrics that a run lacks are left out.

    Raises:
        ValueError: the Hub's library does not read back the metadata that it wrote.
    """
    import jinja2

    base_name = _base_name(p, model)
    data_licence = strictest(source.licence for source in data)
    licence = licence_of(data_licence, model.licence)
    known = _about(data)
    loss = LOSSES[p.train.loss]
    parts = (("data", data_licence), ("base model", model.licence))
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "fenced": fenced,
        "literal": literal,
        "number": lambda value: f"{value:,}",
        "capitalized": capitalized,
        "cell": cell,
    }
    bits = p.model.quantization_bit
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=f"---\n{_metadata(p, metrics, data, model, adapter, family, licence)}\n---",
        # One by one and here, because the contract tests look for what is read in this file.
        parameters={
            "beta": p.train.beta,
            "loss": p.train.loss,
            "gpus": p.train.gpus,
            "template": p.model.template,
            "once_merged": bits and other_once_merged(bits),
            "image_min_pixels": p.format.image_min_pixels,
            "image_max_pixels": p.format.image_max_pixels,
            "cutoff_len": p.format.cutoff_len,
            "max_new_tokens": p.evaluate.generation.max_new_tokens,
        },
        title=_title(p, base_name),
        metrics=metrics,
        preprocess=preprocess,
        used=formatted["kept_by_split"],
        left_out=preprocess["rows_left_out"] + sum(formatted["left_out"].values()),
        method=loss.words,
        no_reference="" if loss.reference else NO_REFERENCE,
        adapter_kind=str(adapter.get("peft_type", "adapter")).replace("LORA", "LoRA"),
        rank=f" of rank {adapter['r']}" if "r" in adapter else "",
        adapter_base=str(adapter.get("base_model_name_or_path")),
        peft=str(adapter.get("peft_version", "unknown")),
        base={
            "name": base_name,
            "local": _is_local(model),
            "family": family.name,
            "of_the_demo": _is_the_demos(p),
            "commit": model.commit,
            "revision": _revision(model),
            "licence": model.licence,
            "files": len(model.files),
            "size": readable(model.size),
        },
        data={
            "name": _data_name(data),
            "described": _described(data),
            "commit": data[0].commit if len(data) == 1 else None,
            "licence": data_licence,
            "note": known.note if known else "",
        },
        licence=licence,
        unknown=" and of the ".join(what for what, licence in parts if not licence),
        non_commercial=[
            {"what": what, "licence": licence}
            for what, licence in parts
            if is_non_commercial(licence)
        ],
        both_models=tables.both_models(metrics),
        win_rate=tables.figure(metrics, "win_rate"),
        tasks=tables.tasks(metrics),
        controls=tables.controls(metrics),
        figures=[
            {"key": key, "figure": tables.figure(metrics, key), "meaning": metric.meaning}
            for key, metric in METRICS.items()
            if key in metrics
        ],
        confidence=f"{p.evaluate.confidence * 100:g}%",
        logps_changes=[
            catalogue.with_interval(metrics, key)
            for key in ("chosen_logps_change", "rejected_logps_change")
            if is_known(metrics.get(key))
        ],
        grew_although_chosen_fell=is_known(metrics.get("chosen_logps_change"))
        and metrics["chosen_logps_change"] < 0
        and is_known(metrics.get("reward_margin"))
        and metrics["reward_margin"] > 0,
        configuration=without_absolute_paths(configuration),
        citations="\n\n".join(
            [
                *(loss.citation, CITATIONS["llamafactory"]),
                family.citation,
                *(CITATIONS[name] for name in (known.citations if known else ())),
            ]
        ),
    )
    # Blank lines that an omitted section leaves; not inside blocks, which have at most one.
    text = re.sub(r"\n{3,}", "\n\n", body).rstrip() + "\n"
    _check_reads_back(text, licence)
    return text


# --------------------------------------------------------------------------------------------------
# Licences

# Licences by the Hub's names, each more restrictive than those before it: what is made from works
# under both may be passed on under the later one. Others (share-alike alone, no derivatives, a
# model's own licence) fit into no such order: next to a different one, both are named.
LICENCES = (
    "cc0-1.0",
    "unlicense",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "apache-2.0",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
)


def strictest(licences: Iterable[str | None]) -> str | None:
    """The licence of several works taken together; ``None`` if one of them is unknown.

    All in ``LICENCES``: the latest there. Else no rule says which holds, and all are named.
    """
    given = list(licences)
    if not all(given):
        return None
    named = {identifier(str(licence)): str(licence) for licence in given}
    if all(name in LICENCES for name in named):
        return named[max(named, key=LICENCES.index)]
    return " and ".join(named.values())


def identifier(licence: str) -> str:
    """Spelt as the Hub does: "CC BY-NC 4.0" is cc-by-nc-4.0."""
    return "-".join(licence.lower().split())


def licence_of(data: str | None, base: str | None) -> Licence:
    """The licence of an adapter of that base, trained on that data: the more restrictive one.

    Where no rule says which holds, it is ``other``, by the names that the sources give. Spelling is
    the Hub's: "CC BY-NC 4.0" is cc-by-nc-4.0.
    """
    found = strictest(identifier(licence or "") for licence in (data, base))
    if found is None:
        return Licence("unknown")
    return Licence(found) if found in LICENCES else Licence("other", found)


def is_non_commercial(licence: str | None) -> bool:
    """Whether the licence's name says so: "cc-by-nc-4.0" does."""
    return bool(licence and _NON_COMMERCIAL.search(licence))


# --------------------------------------------------------------------------------------------------
# Metadata


def _metadata(
    p: Params,
    metrics: Mapping[str, float],
    data: Sequence[Source],
    model: Source,
    adapter: Mapping[str, Any],
    family: Family,
    licence: Licence,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base_name = _base_name(p, model)
    known = _about(data)
    on_hub = all(source.kind == "hub" for source in data)
    measured = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=", ".join(str(source.repo or "local") for source in data),
            dataset_name=_data_name(data)
            + (", its own test questions" if METRICS[key].rows == "questions" else ""),
            # The pairs' split is the pipeline's, none of the source. The library makes one entry of
            # results that agree in type, split and revision, whatever their names.
            dataset_split=None if METRICS[key].rows == "questions" else "held out by image",
            dataset_revision=data[0].commit if on_hub and len(data) == 1 else None,
            metric_type=kind,
            metric_name=METRICS[key].title,
            metric_value=metrics[key],
        )
        for key, kind in INDEXED.items()
        if is_known(metrics.get(key))
    ] + [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=one.task,
            dataset_name=f"{one.task} (lm-eval)",
            metric_type=one.metric,
            metric_name=f"{one.task} {one.metric}",
            metric_value=one.change.after,
        )
        for one in regression.read(metrics)
        if is_known(one.change.after)
    ]
    tag = LOSSES[p.train.loss].tag
    facts = ModelCardData(
        base_model=None if _is_local(model) else base_name,  # the field names a repository
        library_name="peft",
        pipeline_tag="image-text-to-text",
        license=licence.identifier,
        license_name=licence.name,
        datasets=[str(source.repo) for source in data] if on_hub else None,
        language=[known.language] if known else None,
        tags=[
            tag,
            str(adapter.get("peft_type", "adapter")).lower(),
            "llama-factory",
            "preference-tuning",
            family.tag,
            "dvc",
        ],
        model_name=_title(p, base_name) if measured else None,
        eval_results=measured or None,
    )
    return facts.to_yaml()


def _check_reads_back(text: str, licence: Licence) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    if card.data.to_dict().get("license") != licence.identifier or not card.text.strip():
        raise ValueError("the model card's metadata does not read back as it was written")


def _title(p: Params, base_name: str) -> str:
    published = KINDS[p.model.source.kind].address is not None
    name = base_name.rpartition("/")[2] if published else base_name
    return f"{name.replace('/', '-')}-{LOSSES[p.train.loss].tag}-adapter"


def _base_name(p: Params, model: Source) -> str:
    return KINDS[p.model.source.kind].name(p.model.source, model)


def _is_local(model: Source) -> bool:
    """Whether no repository of the Hub holds the base: its name there would be another model's."""
    return KINDS[model.kind].address is None


def _is_the_demos(p: Params) -> bool:
    source = p.model.source
    return isinstance(source, PathModel) and source.path == DEMO_BASE


def _revision(model: Source) -> str:
    """What pins the base, to follow its name: its commit, else the digest of its first weights
    file, by name."""
    weights = sorted(
        (file.path, file.sha256) for file in model.files if file.path.endswith(".safetensors")
    )
    if not model.commit and weights:
        path, digest = weights[0]
        return f"whose {code(path)} has a SHA-256 that begins with {code(digest[:12])}"
    return f"at {code(model.commit or 'unknown')}"


def _data_name(data: Sequence[Source]) -> str:
    return ", ".join(str(source.repo or "local files") for source in data)


def _described(data: Sequence[Source]) -> str:
    """The sources in words, each with its licence where there are several."""
    words = [KINDS[source.kind].words(source) for source in data]
    if len(data) == 1:
        return words[0]
    licences = (source.licence or "licence unknown" for source in data)
    return "several sources: " + "; ".join(
        f"{each} ({licence})" for each, licence in zip(words, licences, strict=True)
    )


def _about(data: Sequence[Source]) -> About | None:
    known = [about for source in data if (about := KINDS[source.kind].about(source))]
    if not known:
        return None
    notes = dict.fromkeys(about.note for about in known)
    citations = dict.fromkeys(name for about in known for name in about.citations)
    return About(known[0].language, " ".join(notes), tuple(citations))
