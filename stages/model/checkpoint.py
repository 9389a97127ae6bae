"""A model on disk, base or tuned: loaded when it is first needed, and what it gives is kept.

Log-probs, answers and the results of tasks are expensive, so each finished piece (512 pairs, the
answers, one task) is written to ``models/kept/`` under a fingerprint of everything that decides it.
A stage that died, or that runs again because something else changed, finds its pieces, and does not
load the model for them. ``dvc repro -f`` computes them again.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.core import console, portable
from stages.core.command import is_forced, project_root
from stages.core.errors import UserError
from stages.core.meaning import code, digest
from stages.core.processes import do_each
from stages.families import known
from stages.model import by_vllm, reference_logps, scoring
from stages.params.params import Params

KEPT = Path("models", "kept")
CHUNK, ANSWERS = 512, 256  # pairs and answers of a piece
# The code that decides tokens and numbers, besides the family's.
CODE = ("model/formatted.py", "model/prefix.py", "model/scoring.py", "model/tokens.py")
# Of a formatted row; images are named by their content.
DECISIVE = ("id", "messages", "chosen", "rejected", "images")


@dataclass
class Checkpoint:
    """``adapter``: a folder with an adapter on top of the base in ``model``, or ``None``."""

    model: Path
    p: Params
    adapter: Path | None = None
    seconds: float = field(default=0.0, init=False)
    scored: int = field(default=0, init=False)
    fresh: set[str] = field(default_factory=set, init=False)  # pieces that other processes made
    said: set[str] = field(default_factory=set, init=False)  # labels of pieces that were there

    def __post_init__(self) -> None:
        portable.prepare(self.p.scoring.device, portable=self.p.scoring.portable)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the model is loaded again."""
        return Checkpoint, (self.model, self.p, self.adapter)

    @cached_property
    def policy(self) -> scoring.Policy:
        return scoring.load(self.model, self.p, self.adapter)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, the parameters that decide tokens and numbers, the device, the code and
        the packages that compute.

        Raises:
            UserError: the base model was not fetched.
        """
        device = scoring.device_of(self.p)
        adapter = sorted(self.adapter.glob("adapter_*")) if self.adapter else []
        return digest(
            base=reference_logps.made_with(self.model, self.p, dtype=self.p.scoring.dtype),
            adapter={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in adapter},
            parameters=[self.p.scoring.model_dump(), self.p.format.model_dump()],
            device=scoring.device_name(device),
            code=code(*CODE) | known.of_model(self.model).fingerprint,
            peft=version("peft") if adapter else None,
        )

    def kept(self, kind: str, make: Callable[[], bytes], *, label: str, **decides: Any) -> bytes:
        """``make()``, or what it gave an earlier run under the same fingerprint.

        Args:
            kind: of piece; the first part of its file's name.
            label: what is said when it is there.
            decides: all that decides the piece besides the checkpoint, as JSON values.
        """
        path = self.place(kind, **decides)
        found = None if is_forced() and path.name not in self.fresh else _read(path)
        if found is None:
            found = make()
            try:
                _write(path, found)
            except OSError as error:
                print(f"{label}: can't be kept for a later run ({error.strerror})")
        elif path.name not in self.fresh and label not in self.said:
            self.said.add(label)
            print(f"{label}: kept from an earlier run")
        return found

    def place(self, kind: str, **decides: Any) -> Path:
        """The file of a piece."""
        name = digest(checkpoint=self.fingerprint, kind=kind, decides=decides)
        return project_root() / KEPT / f"{kind}-{name}"

    def kept_table(
        self, kind: str, make: Callable[[], pd.DataFrame], *, label: str, **decides: Any
    ) -> pd.DataFrame:
        """The same for a table, which comes back as Parquet has it."""
        content = self.kept(kind, lambda: make().to_parquet(index=False), label=label, **decides)
        return pd.read_parquet(BytesIO(content))

    def log_probs(
        self, pairs: Sequence[Mapping[str, Any]], images: Path, *, label: str
    ) -> pd.DataFrame:
        """``scoring.log_probs`` of one pair or more, in their order.

        Chunks are cut from pairs in the order of their length, so that a batch has like lengths.
        With several GPUs, a process for each computes and keeps them (``stages.core.processes``).

        Raises:
            UserError: a log-prob is not finite.
        """
        order = scoring.by_length(pairs)
        places = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        chunks = [[pairs[place] for place in those] for those in places]
        work, start = partial(self.chunk, images=images, label=label), time.monotonic()
        pieces = {self.place("log-probs", pairs=decisive(chunk)): chunk for chunk in chunks}
        with console.bar(len(pairs), label, "pairs"):
            if made := self.side_by_side(work, pieces, label):
                self.seconds += time.monotonic() - start
                self.scored += sum(map(len, made))
            tables = [
                work(chunk).set_index(those) for those, chunk in zip(places, chunks, strict=True)
            ]
        return pd.concat(tables).sort_index()

    def side_by_side(
        self, work: Callable[[Any], object], pieces: Mapping[Path, Any], label: str
    ) -> list[Any]:
        """Let a process for each GPU make and keep the pieces whose files are missing, by ``work``
        (``stages.core.processes.do_each``); those that were made so.
        """
        missing = {path: piece for path, piece in pieces.items() if is_forced() or not _read(path)}
        if len(missing) < 2 or (count := processes(self.p)) < 2:
            return []
        cpu = self.p.scoring.device == "cpu"
        if not do_each(work, list(missing.values()), count=count, cpu=cpu):
            print(f"{label}: one of {count} processes failed; one computes what is missing")
            return []
        self.fresh |= {path.name for path in missing}
        return list(missing.values())

    def chunk(
        self, pairs: Sequence[Mapping[str, Any]], images: Path, *, label: str
    ) -> pd.DataFrame:
        """``scoring.log_probs`` of some pairs, kept as one piece."""
        score = partial(self.score, pairs, images, label=label)
        return self.kept_table("log-probs", score, label=label, pairs=decisive(pairs))

    def score(self, pairs: Sequence[Any], images: Path, *, label: str) -> pd.DataFrame:
        """``scoring.log_probs`` of every pair, computed now and not kept.

        Raises:
            UserError: a log-prob is not finite.
        """
        policy, start = self.policy, time.monotonic()
        table = scoring.log_probs(
            policy, pairs, images, batch_tokens=self.p.scoring.batch_tokens, label=label
        )
        self.seconds += time.monotonic() - start
        self.scored += len(pairs)
        finite = np.isfinite(table[scoring.LOGPS].to_numpy()).all(axis=1)
        if not finite.all():
            name = "tuned" if self.adapter else "base"
            also = "lower train.learning_rate, or " if self.adapter else ""
            raise UserError(
                f"the {name} model gives log-probs that are not finite for {(~finite).sum()} of "
                f"{len(table)} pairs (first: {table['id'][~finite].iloc[0]}); {also}set "
                "scoring.dtype to float32"
            )
        return table

    def answers(
        self, rows: Sequence[dict[str, Any]], images: Path, *, max_new_tokens: int, label: str
    ) -> pd.DataFrame:
        """Greedy answers to formatted prompts, in their order: ``id``, ``answer``, its ``tokens``,
        and whether it ``finished``. vLLM takes all GPUs' work itself.
        """
        parts = [rows[start : start + ANSWERS] for start in range(0, len(rows), ANSWERS)] or [[]]
        by = by_vllm.decides() if self.by_vllm else {}
        decides = {"max_new_tokens": max_new_tokens, "by": by}
        work = partial(self._answers, images=images, decides=decides, label=label)
        pieces = {self.place("answers", rows=decisive(part), **decides): part for part in parts}
        with console.bar(len(rows), label, "answers"):
            if not by:
                self.side_by_side(work, pieces, label)
            return pd.concat([work(part) for part in parts], ignore_index=True)

    @property
    def by_vllm(self) -> bool:
        return self.p.evaluate.generation.engine == "vllm"

    def _answers(
        self, rows: Sequence[dict[str, Any]], images: Path, *, decides: dict[str, Any], label: str
    ) -> pd.DataFrame:
        """``answers`` of some prompts, kept as one piece."""
        most = decides["max_new_tokens"]

        def given() -> pd.DataFrame:
            if not rows:
                said = []
            elif self.by_vllm:
                said = by_vllm.answer(self.model, self.p, self.adapter, rows, images, most)
            else:
                options = {"max_new_tokens": most, "batch_tokens": self.p.scoring.batch_tokens}
                said = scoring.answer(self.policy, rows, images, **options, label=label)
            return pd.DataFrame(
                {
                    "id": pd.Series([row["id"] for row in rows], dtype="str"),
                    "answer": pd.Series([answer.text for answer in said], dtype="str"),
                    "tokens": pd.Series([answer.tokens for answer in said], dtype="int64"),
                    "finished": pd.Series([answer.finished for answer in said], dtype="bool"),
                }
            )

        return self.kept_table("answers", given, label=label, rows=decisive(rows), **decides)

    def cost(self) -> dict[str, Any]:
        """For the diary: the device, and pairs/s of what was computed now."""
        found: dict[str, Any] = {}
        if "policy" in self.__dict__:
            found["device"] = scoring.device_name(scoring.device_of(self.p))
        if self.fresh:
            found["processes"] = processes(self.p)
        if self.scored:
            found["pairs_per_second"] = round(self.scored / self.seconds, 2)
        return found


def processes(p: Params) -> int:
    """How many processes score: one for each visible GPU, or one on the CPU."""
    if scoring.device_of(p) == "cpu":
        return 1
    import torch

    return torch.cuda.device_count()


def decisive(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of formatted rows decides their scores or answers."""
    return [{name: row[name] for name in DECISIVE if name in row} for row in rows]


# A piece's file is the hash of its content, 32 bytes, and the content.


def _read(path: Path) -> bytes | None:
    """The content of a piece; None where there is none, or where it is damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    return stored[32:] if hashlib.sha256(stored[32:]).digest() == stored[:32] else None


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        unfinished.write_bytes(hashlib.sha256(content).digest() + content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
