"""Which licence holds for what is made from works under several."""

from collections.abc import Iterable

# Licences by the Hub's names, each more restrictive than those before it: what is made from works
# under both may be passed on under the later one. Others (share-alike alone, no derivatives, a
# model's own licence) fit into no such order: next to a different one, both are named.
ORDER = (
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

    All in ``ORDER``: the latest there. Else no rule says which holds, and all are named.
    """
    given = list(licences)
    if not all(given):
        return None
    named = {identifier(str(licence)): str(licence) for licence in given}
    if all(name in ORDER for name in named):
        return named[max(named, key=ORDER.index)]
    return " and ".join(named.values())


def identifier(licence: str) -> str:
    """Spelt as the Hub does: "CC BY-NC 4.0" is cc-by-nc-4.0."""
    return "-".join(licence.lower().split())
