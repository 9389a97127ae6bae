"""Grades of published benchmarks: what an answer says, which option it chooses, what it names."""

import re
from collections.abc import Collection, Iterator, Sequence

from stages.answers.grading import HEDGE, NO_DENIAL


def ratio(parts: Sequence[Sequence[float]]) -> float:
    """The sum of first values over the sum of second ones; 0 over nothing."""
    whole = sum(of for _, of in parts)
    return sum(part for part, _ in parts) / whole if whole else 0.0


def said(answer: str) -> str | None:
    """``yes``, ``no`` or, for an answer that is neither, None.

    A yes or no at its beginning decides; else the first sentence: one that declines is neither, a
    denial is a no, a yes is a yes.
    """
    first = answer.lower().replace("\u2019", "'").split(".")[0]
    words = re.findall(r"[a-z']+", NO_DENIAL.sub(" ", first))
    if words[:1] in (["yes"], ["no"]):
        return words[0]
    if HEDGE.search(first):
        return None
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def letter(answer: str) -> str | None:
    """The option, A to D, that an answer chooses; None where it chooses none, or more than one.

    The letter, capital or small, is in a box (``\\boxed{B}``), or it comes first, alone or before a
    punctuation mark ("B", "(b)", "B. a dog"), or after "answer", "option", "choice" or "it is"
    ("The correct answer is B."). "A dog" names no option.
    """
    if boxed := re.search(r"\\boxed\{\W*(?:text\{\W*)?([A-D])\b", answer, re.IGNORECASE):
        return boxed[1].upper()
    first = re.match(
        r"\W*([A-D])\b(?=\W*$|\s*[^\w\s'-]|\s*\n)(?!\W+[A-D]\W*$)", answer, re.IGNORECASE
    )
    if first:
        return first[1].upper()
    after = r"\b(?:(?:answer|option|choice)(?:\s+is)?|it\s+is|it's)\W*"
    named = re.findall(rf"{after}([B-D]\b(?!['-])|A\b(?!\s+\w|['-]))", answer, re.IGNORECASE)
    chosen = {found.upper() for found in named}
    return chosen.pop() if len(chosen) == 1 else None


def mentioned(text: str, names: Collection[str]) -> list[str]:
    """The names of a closed list, of one word or two, that a text contains: one for each mention.

    The longer name wins: "hot dog" is not a "dog". A plural counts as its singular, by the rules of
    WordNet's Morphy, if the list has that. There is no tagger: a word counts whether it is a noun
    there or not.
    """
    words = re.findall(r"[a-z]+", text.lower().replace("-", ""))
    found, at = [], 0
    while at < len(words):
        pair = [f"{words[at]} {form}" for form in _forms(*words[at + 1 : at + 2])]
        for length, forms in ((2, pair), (1, _forms(words[at]))):
            if name := next((form for form in forms if form in names), None):
                found.append(name)
                at += length
                break
        else:
            at += 1
    return found


# Morphy's rules for nouns, and -oes after it: ending of a plural, of its singular.
_PLURALS = (
    *(("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh")),
    *(("oes", "o"), ("men", "man"), ("ies", "y")),
)
# Its exceptions come first: "leaves" is the plural of "leaf", never of "leave".
_IRREGULAR = {
    **{"children": "child", "feet": "foot", "geese": "goose", "mice": "mouse", "teeth": "tooth"},
    **{f"{stem}ves": f"{stem}f" for stem in ("cal", "hal", "hoo", "lea", "loa", "scar", "shel")},
    **{f"{stem}ves": f"{stem}fe" for stem in ("kni", "li", "wi")},
    **{"thieves": "thief", "wolves": "wolf"},
}


def _forms(word: str = "") -> Iterator[str]:
    """A word, then what may be its singular."""
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
        return
    for plural, singular in _PLURALS:
        if word.endswith(plural):
            yield word.removesuffix(plural) + singular
