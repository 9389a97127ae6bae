"""Turns a stage's ``main`` into a command line: one ``--option`` for each of its arguments."""

import argparse
import inspect
import signal
import sys
from collections.abc import Callable
from typing import Any

from stages.errors import UserError


def run(main: Callable[..., None]) -> None:
    """Call ``main`` with the arguments of the command line, each converted by its annotation.

    ``def main(raw: Path, out: Path)`` answers to ``--raw data/raw --out data/pairs``. A
    ``UserError`` becomes one message on standard error and exit status 1; any other exception keeps
    its trace.
    """
    parser = argparse.ArgumentParser(description=inspect.getmodule(main).__doc__)
    for name, parameter in inspect.signature(main).parameters.items():
        options: dict[str, Any] = {"type": parameter.annotation, "required": True}
        if parameter.default is not parameter.empty:
            options = {"type": parameter.annotation, "default": parameter.default}
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    arguments = vars(parser.parse_args())
    # Being terminated unwinds like being interrupted, so that a subprocess is not left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(**arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
