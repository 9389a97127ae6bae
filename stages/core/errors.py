"""The one exception that means "the user can fix this", and the hint that its messages give."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, the parameters or the machine.

    The message is one clear sentence or two: it names the file, row or key, and the fix. It is
    shown as it is, without a stack trace (see ``stages.core.command``).
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name closest to ``name``, else the empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
