"""Grading of generated answers: what they say, whether it is right, and how repetitive they are."""

import re
from collections.abc import Collection, Iterator

from stages.sources.topics import COLOURS, SHAPES, asked_topic, is_negated, kind_of

# "Yes." and "No, it is teal." answer outright; "No red shape is present." is a statement.
_EXPLICIT = re.compile(r"\W*(?:(yes)\b|(no)(?=\s*$|\s*[^\w\s]|\s+(?:it|that|the|there|this)\b))")

# "I'm not sure", "I can't tell", "It is not possible to determine": an answer that declines.
_HEDGE = re.compile(
    r"\b(?:not (?:sure|certain|clear|enough)|unsure|uncertain|unclear|(?:do not|don't) know"
    r"|(?:can ?not|can't|could not|couldn't|unable to|(?:not |im)possible to|(?:hard|difficult) to)"
    r" (?:be |definitively |really )?"
    r"(?:tell|say|know|determined?|confirm(?:ed)?|ascertain(?:ed)?|judged?|verif(?:y|ied)|answer))\b"
)
# "There is not only a dog but also a cat", "no doubt there is": words of denial that deny nothing.
_NO_DENIAL = re.compile(r"\bnot (?:only|just|merely|to mention)\b|\b(?:no|without(?: a)?) doubt\b")


def is_correct(question: str, truth: str, answer: str) -> bool:
    """Whether a generated answer gives the true one-word answer to a question, strictly.

    For a colour or a shape the answer must name exactly one topic of the kind that is asked about,
    and that is the true one; one bare word will do.

    For presence, an answer that begins with an explicit yes or no is decided by that word, unless
    what it goes on to say contradicts it ("Yes, it is teal." of a red shape): then it is wrong.
    Without such a word, it is decided by what the shape is said to be: naming only the topic that
    was asked about says that it is there, naming only another, or denying the one asked about, says
    that it is not, and the true yes or no (of a question that may be negated) must follow. One that
    declines ("I'm not sure") says neither.
    """
    # Models write both apostrophes.
    said = answer.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if kind_of(question) != "presence":
        options = COLOURS if truth in COLOURS else SHAPES
        return {word for word in re.findall(r"[a-z]+", said) if word in options} == {truth}
    word = _EXPLICIT.match(said)
    rest = said[word.end() :] if word else said
    there = _says_there(asked_topic(question), rest)
    if word:
        claimed = bool(word[1]) != is_negated(question)
        if there not in (None, claimed):
            return False
        there = claimed
    return there is not None and truth == ("yes" if there != is_negated(question) else "no")


def _says_there(asked: str, statement: str) -> bool | None:
    """Whether a statement says that the topic asked about is in the image; None if it is open."""
    if _HEDGE.search(statement):
        return None
    options = COLOURS if asked in COLOURS else SHAPES
    words = re.findall(r"[a-z']+", _NO_DENIAL.sub(" ", statement))
    named = {word for word in words if word in options}
    if len(named) != 1:
        return None
    denied = any(w in ("no", "not", "none", "without") or w.endswith("n't") for w in words)
    return asked in named and not denied


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's n-grams of words that occurred earlier in it: 1 - distinct / all.

    0 where no n-gram comes twice, and for fewer than ``n`` words; near 1 for a text that loops.
    Words are what spaces separate. Source: seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319,
    section 6), there of tokens.
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# published benchmarks


def said(answer: str) -> str | None:
    """``yes``, ``no`` or, for an answer that is neither, None.

    A yes or no at its beginning decides; else the first sentence: one that declines is neither, a
    denial is a no, a yes is a yes.
    """
    first = answer.lower().replace("\u2019", "'").split(".")[0]
    words = re.findall(r"[a-z']+", _NO_DENIAL.sub(" ", first))
    if words[:1] in (["yes"], ["no"]):
        return words[0]
    if _HEDGE.search(first):
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
