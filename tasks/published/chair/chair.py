"""CHAIR for lm-eval: COCO's objects in a description, by CHAIR's own list of synonyms.

What is in a photograph is the union of COCO's instances and of what its five reference captions
name, as in the original. Its special cases are here too. Singulars differ: the original asks the
package ``pattern``, whose last release is for Python 3.6; here a plural counts if the list has its
singular.
"""

import functools
import json
import zipfile
from collections.abc import Iterable
from typing import Any

from stages.core.errors import UserError
from tasks.published import data_sets
from tasks.published.grades import mentioned

# CHAIR's repository at its head of 2019: the name of an object, then its synonyms, on a line.
SYNONYMS = (
    "https://raw.githubusercontent.com/LisaAnne/Hallucination/"
    "6e4d33c4bedf6dfcd24c61bf527f40714717be47/data/synonyms.txt",
    "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2",
)
# COCO's own host, 241 MB; several data set libraries pin the same hash.
ANNOTATIONS = (
    "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
    "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
)
# Two words that name something else than their parts do, or nothing on the list.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
PHRASES = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"{age} {animal}": "" for age in ("baby", "adult") for animal in ("animal", "cub")},
    **{"passenger jet": "airplane", "passenger train": "train"},
    **{"bow tie": "tie", "toilet seat": "toilet", "home plate": "", "train track": ""},
}


@functools.cache
def vocabulary() -> dict[str, str]:
    """What may be said of a photograph, to the object that it means; "" where that is none."""
    lines = data_sets.pinned(*SYNONYMS).read_text(encoding="utf-8").lower().splitlines()
    synonyms = [[name.strip() for name in line.split(",")] for line in lines if line.strip()]
    return {name: names[0] for names in synonyms for name in names if name} | PHRASES


def named(text: str) -> list[str]:
    """The objects that a text names, one for each mention."""
    words = mentioned(text, vocabulary())
    if "toilet" in words:  # "the seat of the toilet" is not a chair
        words = [word for word in words if word != "seat"]
    return [name for word in words if (name := vocabulary()[word])]


def captions(dataset: Any) -> Any:
    """POPE's images, one document each, with the ``objects`` that are there, by name."""
    first = {source: at for at, source in reversed(list(enumerate(dataset["image_source"])))}
    documents = data_sets.in_hash_order(dataset.select(sorted(first.values())), "image_source")
    ids = [int(source.rpartition("_")[2]) for source in documents["image_source"]]
    objects = there(ids)
    return documents.add_column("objects", [sorted(objects[each]) for each in ids])


def there(ids: Iterable[int]) -> dict[int, set[str]]:
    """The objects in the images of val2014 with these ids.

    Raises:
        UserError: the annotations have none of an image.
    """
    found: dict[int, set[str]] = {each: set() for each in ids}
    with zipfile.ZipFile(data_sets.pinned(*ANNOTATIONS)) as archive:
        instances, reference = (
            json.loads(archive.read(f"annotations/{kind}_val2014.json"))
            for kind in ("instances", "captions")
        )
    names = {
        category["id"]: vocabulary().get(category["name"], category["name"])
        for category in instances["categories"]
    }
    for each in instances["annotations"]:
        if each["image_id"] in found:
            found[each["image_id"]].add(names[each["category_id"]])
    for each in reference["annotations"]:
        if each["image_id"] in found:
            found[each["image_id"]].update(named(each["caption"]))
    if unknown := [each for each, objects in found.items() if not objects]:
        raise UserError(
            f"evaluate.lm_eval.coco_chair: COCO's annotations of val2014 name no object in "
            f"{len(unknown)} of {len(found)} images, such as {unknown[0]}; remove the task"
        )
    return found


def graded(doc: dict[str, Any], answers: list[str]) -> dict[str, float | tuple[int, int]]:
    """Every metric's value for one description; of ``chair_i`` and ``recall``, part and whole."""
    objects, said = set(doc["objects"]), named(answers[0])
    invented = sum(name not in objects for name in said)
    return {
        "chair_i": (invented, len(said)),
        "chair_s": float(invented > 0),
        "recall": (len(objects & set(said)), len(objects)),
        "words": float(len(answers[0].split())),
    }
