"""Grading of generated answers: what they say, whether it is right, and how repetitive they are."""

import re

from stages.sources.topics import COLOURS, SHAPES, asked_topic, is_negated, kind_of

# "Yes." and "No, it is teal." answer outright; "No red shape is present." is a statement.
_EXPLICIT = re.compile(r"\W*(?:(yes)\b|(no)(?=\s*$|\s*[^\w\s]|\s+(?:it|that|the|there|this)\b))")

# "I'm not sure", "I can't tell", "It is not possible to determine": an answer that declines.
HEDGE = re.compile(
    r"\b(?:not (?:sure|certain|clear|enough)|unsure|uncertain|unclear|(?:do not|don't) know"
    r"|(?:can ?not|can't|could not|couldn't|unable to|(?:not |im)possible to|(?:hard|difficult) to)"
    r" (?:be |definitively |really )?"
    r"(?:tell|say|know|determined?|confirm(?:ed)?|ascertain(?:ed)?|judged?|verif(?:y|ied)|answer))\b"
)
# "There is not only a dog but also a cat", "no doubt there is": words of denial that deny nothing.
NO_DENIAL = re.compile(r"\bnot (?:only|just|merely|to mention)\b|\b(?:no|without(?: a)?) doubt\b")


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
    if HEDGE.search(statement):
        return None
    options = COLOURS if asked in COLOURS else SHAPES
    words = re.findall(r"[a-z']+", NO_DENIAL.sub(" ", statement))
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
