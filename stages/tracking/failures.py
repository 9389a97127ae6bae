"""What a stage that fails leaves in MLflow."""

import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def reported(main: Callable[P, R]) -> Callable[P, R]:
    """``main`` of a stage: if it fails, the run of its experiment says so (``runs.fail``).

    Of a stage without an ``adapter`` that is told of experiments alone (``dvc exp run``, a sweep,
    the queue): a slip in ``dvc repro`` is seen where it happens, and MLflow takes 10 s to load. Nor
    is it told that such a stage was interrupted.
    """

    @wraps(main)
    def reporting(*given: P.args, **named: P.kwargs) -> R:
        try:
            return main(*given, **named)
        except BaseException as error:
            adapter = inspect.signature(main).bind(*given, **named).arguments.get("adapter")
            early = isinstance(error, Exception) and os.environ.get("DVC_EXP_NAME")
            if adapter is not None or early:
                with suppress(Exception):  # of a tracker; this error is the one to tell
                    from stages.tracking import runs

                    stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2] or main.__module__
                    runs.fail(error, stage, adapter)
            raise

    return reporting
