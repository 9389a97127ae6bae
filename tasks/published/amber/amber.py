"""AMBER for lm-eval: its questions and photographs, its word lists, and its metrics.

Images come from a table that VLMEvalKit uses too, word lists and annotations from AMBER's own
repository. Differences from AMBER's script, which asks two language models that PyPI does not have:

* Its second look at a word is off: by spaCy's vectors (``en_core_web_lg``, similarity above 0.8) a
  word that is on no list of the image may be near to one that is. It only excuses words or counts
  more objects as named.
* It takes nouns only, by nltk's tagger. Here a word of the lists counts in any role, but for "can"
  and "hot".

``benchmarks/RESULTS.md`` says what both change, on published answers.
"""

import base64
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from stages.model import formatted
from tasks.published import data_sets
from tasks.published.grades import mentioned, said

# AMBER's repository at its head of January 2024, Apache-2.0.
LISTS = (
    "https://raw.githubusercontent.com/junyangwang0410/AMBER/"
    "534babf6bbfcce2e735c26289dedfb21cef3c939/data/"
)
ANNOTATIONS = (
    LISTS + "annotations.json",
    "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797",
)
RELATION = (
    LISTS + "relation.json",
    "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e",
)
SAFE_WORDS = (
    LISTS + "safe_words.txt",
    "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043",
)
COLUMNS = ("index", "image_path", "question", "answer", "category")  # and ``image``, in base64
DIMENSIONS = {  # a question's category, to the dimension that the paper reports
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}
# Words of the lists that in a description are hardly ever nouns: "can be seen", "a hot day".
NOT_NOUNS = frozenset({"can", "hot"})


# documents


def questions(repo: str, revision: str, **_: Any) -> dict[str, Any]:
    """The yes/no questions with ``image`` (a file), ``answer`` and ``dimension``, in hash order."""
    return documents(
        [
            {
                "id": row["index"],
                "question": row["question"],
                "answer": row["answer"].strip().lower(),
                "dimension": DIMENSIONS[row["category"]],
                "image": row["image"],
            }
            for row in unpacked(repo, revision)
        ]
    )


def descriptions(repo: str, revision: str, **_: Any) -> dict[str, Any]:
    """The photographs with ``truth`` and ``hallu`` (objects that are there, and that people would
    expect and are not), in hash order.
    """
    files = {Path(row["image"]).stem: row["image"] for row in unpacked(repo, revision)}
    annotated = json.loads(data_sets.pinned(*ANNOTATIONS).read_text(encoding="utf-8"))
    lists()  # grading needs them: a download that fails, fails here
    return documents(
        [
            {"id": name, "truth": each["truth"], "hallu": each["hallu"], "image": files[name]}
            for each in annotated
            if each["type"] == "generative"
            for name in [f"AMBER_{each['id']}"]
        ]
    )


def documents(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(formatted.sample(rows, len(rows)))}


def unpacked(repo: str, revision: str) -> list[dict[str, str]]:
    """The rows of the table, ``image`` being a file: the table repeats an image for each question,
    and lm-eval would hold all of it in memory.
    """
    import pandas as pd
    from huggingface_hub import hf_hub_download

    folder = data_sets.cache() / revision
    table = folder / "questions.parquet"
    if not table.exists():
        tsv = hf_hub_download(repo, "AMBER.tsv", repo_type="dataset", revision=revision)
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        with pd.read_csv(tsv, sep="\t", dtype=str, keep_default_na=False, chunksize=200) as chunks:
            for chunk in chunks:
                names = [PurePosixPath(path).name for path in chunk["image_path"]]
                for name, content in zip(names, chunk["image"], strict=True):
                    if not (folder / name).exists():
                        (folder / name).write_bytes(base64.b64decode(content))
                parts.append(chunk[list(COLUMNS)].assign(image_path=names))
        part = table.with_suffix(".part")
        pd.concat(parts).to_parquet(part, index=False)
        part.replace(table)
    rows = pd.read_parquet(table)
    rows["image"] = [str(folder / name) for name in rows["image_path"]]
    names = [str(name) for name in rows.columns]
    return [dict(zip(names, values, strict=True)) for values in rows.itertuples(index=False)]


# grades


def judged(doc: dict[str, Any], answers: list[str]) -> dict[str, float | tuple[int, int]]:
    """Every metric's value for one question; those of F1 are 2·(rightly denied), and denied or not
    there, and nothing in the F1 of another dimension.
    """
    word, truth = said(answers[0]), doc["answer"]
    denied = (2 * int(word == truth == "no"), (word == "no") + (truth == "no"))
    return {
        "accuracy": float(word == truth),
        "f1": denied,
        **{
            f"f1_{dimension}": denied if dimension == doc["dimension"] else (0, 0)
            for dimension in ("existence", "attribute", "relation")
        },
        "yes_ratio": float(word == "yes"),
        "unclear": float(word is None),
    }


@functools.cache
def lists() -> tuple[dict[str, list[str]], frozenset[str], frozenset[str]]:
    """AMBER's word lists: the words for an object, all of them, and those that are never
    held against a description.
    """
    relation = json.loads(data_sets.pinned(*RELATION).read_text(encoding="utf-8"))
    words_for = {plain(key): [plain(word) for word in words] for key, words in relation.items()}
    known = {word for key, words in words_for.items() for word in (key, *words)}
    never = data_sets.pinned(*SAFE_WORDS).read_text(encoding="utf-8").split()
    return words_for, frozenset(known), frozenset(plain(word) for word in never)


def plain(word: str) -> str:
    """A word of the lists as ``mentioned`` reads it: "TV", "e-book"."""
    return re.sub(r"[^a-z]", "", word.lower())


def described(doc: dict[str, Any], answers: list[str]) -> dict[str, float | tuple[int, int]]:
    """Every metric's value for one description; part and whole but for ``hal`` and ``words``."""
    words_for, known, never = lists()
    text = re.sub(rf"\b({'|'.join(sorted(NOT_NOUNS))})\b", " ", answers[0], flags=re.IGNORECASE)
    truth, hallu = ([plain(word) for word in doc[key]] for key in ("truth", "hallu"))
    words = mentioned(text, known)
    invented, seen, expected = 0, set(), set()
    for word in words:
        if word in never:
            continue
        if (there := meant(word, truth, words_for)) is not None:
            seen.add(there)
            continue
        invented += 1
        if (tempting := meant(word, hallu, words_for)) is not None:
            expected.add(tempting)
    return {
        "chair": (invented, len(words)),
        "cover": (len(seen), len(truth)),
        "hal": float(invented > 0),
        "cog": (len(expected), len(hallu)),
        "words": float(len(answers[0].split())),
    }


def meant(word: str, objects: Iterable[str], words_for: dict[str, list[str]]) -> str | None:
    """Which of an image's objects a word means: the first that has it among its words, else the one
    of that name, as in AMBER's script.
    """
    others = [each for each in objects if word in words_for.get(each, ())]
    return others[0] if others else word if word in objects else None
