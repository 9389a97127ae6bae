"""Turns a stage's ``main`` into a command line: one ``--option`` for each of its arguments.

Each run of a stage leaves a note of what it cost in ``reports/diary/<stage>.json``, and what
libraries said in ``<stage>.log`` beside it. The diary is no output of the pipeline: it differs from
run to run, so nothing that must be reproduced may read it. This module also
knows where the project is, and whether the user forced the stage.
"""

import argparse
import errno
import inspect
import json
import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from stages.core import console
from stages.core.errors import UserError

DIARY = Path("reports", "diary")
FORCE = re.compile(r"--force|-[a-z]*f[a-z]*")  # one-letter options may be joined: dvc repro -sf

# What a disk lacks; no stage can know where it will happen.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[..., Mapping[str, Any] | None]) -> None:
    """Call ``main`` with the arguments of the command line, each converted by its annotation.

    ``def main(raw: Path, out: Path)`` answers to ``--raw data/raw --out data/pairs``. A
    ``UserError`` becomes one message on standard error and exit status 1, and so does a disk that
    is full or can't be written. Any other exception keeps its trace. What ``main`` returns, such as
    ``{"device": "cpu"}``, goes into the diary.
    """
    parser = argparse.ArgumentParser(description=inspect.getmodule(main).__doc__)
    for name, parameter in inspect.signature(main).parameters.items():
        options: dict[str, Any] = {"type": parameter.annotation, "required": True}
        if parameter.default is not parameter.empty:
            options |= {"default": parameter.default, "required": False}
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    arguments = vars(parser.parse_args())
    # Being terminated unwinds like being interrupted, so that a subprocess is not left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # It warns that a package is missing, which would fetch code from the Hub for weights in 4 bits.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # DVC names the stage it runs; without it nobody asked for a stage.
    stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    log = DIARY / f"{stage}.log"
    start = time.monotonic()
    try:
        with console.logged(log) if stage else nullcontext():
            facts = main(**arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:  # `make plan | head`: what is left to say has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(
            f"error: {error.strerror}: {error.filename or 'while writing'}; free some space, or "
            "make it writable, then run the same command again: what was finished is kept",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception:
        there = stage and log.is_file()
        text = log.read_text(encoding="utf-8", errors="replace") if there else ""
        if said := console.last_lines(text):
            print(*said, f"({log} has all of it)", sep="\n", file=sys.stderr)
        raise
    if stage:
        seconds = time.monotonic() - start
        print(f"{stage}: {seconds:,.1f} s", flush=True)
        write_diary(stage, seconds, facts or {})


def write_diary(stage: str, seconds: float, facts: Mapping[str, Any]) -> None:
    """``<stage>.json``: seconds, when it ended (UTC), peak memory of the largest process (GB), and
    ``facts``. Where it can't be written, nothing is lost but the note.
    """
    memory = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    entry = {
        "stage": stage,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(memory * unit / 2**30, 2),
        **facts,
    }
    torch = sys.modules.get("torch")  # not imported: then there was no GPU to ask
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        entry["gpu_peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    with suppress(OSError):
        DIARY.mkdir(parents=True, exist_ok=True)
        (DIARY / f"{stage}.json").write_text(json.dumps(entry) + "\n", encoding="utf-8")


def project_root(root: Path = Path()) -> Path:
    """The project that the user works in, absolute.

    ``dvc exp run --temp`` and ``--queue`` run stages in a copy below ``.dvc/tmp/exps/``, which
    DVC deletes afterwards together with whatever was written into it; the project is what holds
    that ``.dvc``.
    """
    path = root.resolve()
    parts = path.parts
    for i in range(len(parts) - 2):
        if parts[i : i + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:i])
    return path


@cache
def is_forced() -> bool:
    """Whether the user forced the stage that runs, with ``dvc repro -f`` or ``dvc exp run -f``.

    DVC does not tell a stage how it was called, and its records can't tell either: it deletes a
    stage's outputs before it runs, so a forced stage looks like one whose outputs were lost, as all
    are in a fresh clone. So the command line of the DVC that started this process is read. Of an
    experiment from the queue it does not hold the option: that one runs as if it was not forced.
    """
    if "DVC_STAGE" not in os.environ:
        return False
    import psutil  # type: ignore[import-untyped]

    for process in psutil.Process().parents():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "dvc" in (Path(word).name for word in words[:3]):
                return any(FORCE.fullmatch(word) for word in words)
    return False
