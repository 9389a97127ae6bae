"""Croissant 1.1 metadata of the table of pairs: JSON-LD that data catalogues and loaders read.

What it says follows from the table, from the source's SOURCE.json and from dvc.lock: files with
their SHA-256, columns, splits, where the rows came from, their licence and what it allows. Source:
https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html.
"""

from pathlib import Path
from typing import Any

from stages.commands import lockfile
from stages.commands.statement import published, sha256
from stages.pairs.pairs import PAIRS, SPLITS
from stages.reporting.card import is_non_commercial
from stages.sources import source as manifest
from stages.sources.kinds import KINDS

FILE = Path("reports/croissant.json")
TABLE, IMAGES, RAW = "data/pairs/pairs.parquet", "data/pairs/images", "data/raw"
STAGE = "preprocess"

Json = dict[str, Any]

# The specification's own, for version 1.1, and PROV-O.
_TERMS = (
    *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field"),
    *("fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset"),
    *("jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
_OTHERS: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
CONTEXT: Json = dict(sorted(({term: f"cr:{term}" for term in _TERMS} | _OTHERS).items()))
MEANINGS = {
    "id": "names the pair by its content",
    "images": "files in the folder of images, named by their content, in the order of the prompt",
    "widths": "of the images, pixels",
    "heights": "of the images, pixels",
    "system": "system prompt, or empty",
    "history": "turns before the question, as JSON of user and assistant",
    "question": "what is asked",
    "chosen": "the preferred answer",
    "rejected": "the other answer",
    "origin": "the data set that the row came from, or empty",
    "kind": "question type, or empty",
    "group": "pairs of one group share an image and a split",
    "split": "train, validation or test; an image is in one of them",
}
TYPES = {"string": "sc:Text", "int32": "cr:Int32"}


def make(root: Path = Path()) -> Json:
    """The metadata of the pairs in ``root``.

    Raises:
        UserError: the pairs' source or dvc.lock is missing.
    """
    source = manifest.read(root / RAW)
    stages = lockfile.read(root / lockfile.LOCK)
    kind = KINDS[source.kind]
    link = published(source.kind, source.repo, source.commit, RAW)
    about = kind.about(source)
    name = (source.repo or source.kind).replace("/", "--")
    size = (root / TABLE).stat().st_size if (root / TABLE).is_file() else 0
    found: Json = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": f"{name}-preference-pairs",
        "description": f"Preference pairs with images, one table, made from {kind.words(source)}. "
        "Images are named by their content, and the split is by image."
        + (f" {about.note}" if about else ""),
        "license": source.licence or "unknown",
        "usageInfo": use(source.licence),
        "prov:wasDerivedFrom": {
            "@type": "sc:Dataset",
            "name": source.repo or source.kind,
            "version": source.commit or "not versioned",
            **({"url": link} if link else {}),
        },
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "name": STAGE,
            "description": stages[STAGE].cmd if STAGE in stages else STAGE,
        },
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "pairs.parquet",
                "name": "pairs.parquet",
                "description": "All pairs of all splits.",
                "contentUrl": TABLE,
                "contentSize": f"{size} B",
                "encodingFormat": "application/x-parquet",
                "sha256": sha256(root / TABLE),
            },
            {
                "@type": "cr:FileSet",
                "@id": "images",
                "name": "images",
                "description": "The images of all pairs and of held-out questions.",
                "encodingFormat": "image/jpeg",
                "includes": f"{IMAGES}/*.jpg",
            },
        ],
        "recordSet": [splits(), pairs()],
    }
    if link:
        found["url"] = link
    return found


def use(licence: str | None) -> str:
    """What the licence's name allows, in a sentence."""
    if not licence:
        return "The source names no licence. Ask its authors before you use or pass on the pairs."
    if is_non_commercial(licence):
        return (
            f"Research and other non-commercial use only ({licence}). What is trained on the pairs "
            "falls under the same condition."
        )
    return f"As {licence} allows; keep its notice where you pass the pairs on."


def splits() -> Json:
    return {
        "@type": "cr:RecordSet",
        "@id": "splits",
        "name": "splits",
        "description": "Names of the splits.",
        "dataType": "cr:Split",
        "key": {"@id": "splits/name"},
        "field": [_field("splits/name", "sc:Text", "train, validation or test")],
        "data": [{"splits/name": split} for split in SPLITS],
    }


def pairs() -> Json:
    """The columns of ``PAIRS``. What is nested (turns) is text here."""
    fields = []
    for column in PAIRS:
        inner = getattr(column.type, "value_type", None)
        kind = TYPES.get(str(inner or column.type), "sc:Text")
        field = _field(f"pairs/{column.name}", kind, MEANINGS[column.name])
        field["source"] = {
            "fileObject": {"@id": "pairs.parquet"},
            "extract": {"column": column.name},
        }
        if inner is not None:
            field |= {"isArray": True, "arrayShape": "-1"}
        if column.name == "split":
            field["references"] = {"field": {"@id": "splits/name"}}
        fields.append(field)
    return {
        "@type": "cr:RecordSet",
        "@id": "pairs",
        "name": "pairs",
        "description": "One row a pair.",
        "key": {"@id": "pairs/id"},
        "field": fields,
    }


def _field(name: str, kind: str, meaning: str) -> Json:
    return {
        "@type": "cr:Field",
        "@id": name,
        "name": name.rpartition("/")[2],
        "description": meaning,
        "dataType": kind,
    }
