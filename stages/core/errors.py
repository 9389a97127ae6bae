"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in the input, the parameters or the machine.

    The message is one clear sentence or two: it names the file, row or key, and the fix. It is
    shown as it is, without a stack trace (see ``stages.core.command``).
    """
