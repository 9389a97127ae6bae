"""A model on disk, base or tuned: loaded when it is first needed, and what it gave is kept.

Log-probs, answers and the results of tasks are dear, so each finished piece (2,048 pairs, one task)
is written to ``models/kept/`` under a fingerprint of everything that decides it. A stage that died,
or that runs again because something else changed, takes them up. ``dvc repro -f`` does not.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.project import is_forced, project_root
from stages.model import scoring
from stages.parameters.params import Params

KEPT = Path("models", "kept")
MOST_KEPT = 400  # pieces, the latest; of 21,376 pairs and 3 tasks a checkpoint makes about 20
CHUNK = 2048  # pairs, in whole batches
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "tokenizers", "pillow", "lm_eval")


@dataclass
class Checkpoint:
    """``adapter``: a folder with an adapter on top of the base in ``model``, or ``None``."""

    model: Path
    p: Params
    adapter: Path | None = None
    seconds: float = field(default=0.0, init=False)
    scored: int = field(default=0, init=False)

    @cached_property
    def policy(self) -> scoring.Policy:
        return scoring.load(self.model, self.p, self.adapter)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, the sections of the parameters that decide tokens and numbers, the
        device, this folder's code and the versions of the packages that compute."""
        import torch

        adapter = self.adapter and _sha256(self.adapter / "adapter_model.safetensors")
        return digest(
            model=_sha256(self.model / "SOURCE.json"),
            adapter=adapter or "",
            parameters=[
                self.p.scoring.model_dump(),
                self.p.format.model_dump(),
                self.p.model.template,
                self.p.model.trust.remote_code,
                self.p.model.quantization_bit,
            ],
            device=scoring.choose_device(self.p.scoring.device, torch.cuda.is_available()),
            code=code(*sorted(Path(__file__).parent.glob("*.py"))),
            packages={name: version(name) for name in PACKAGES},
        )

    def kept(self, what: str, make: Callable[[], bytes], **decides: Any) -> bytes:
        """``make()``, or what it gave an earlier run under the same fingerprint.

        ``decides``: all that decides the piece besides the checkpoint, as JSON values.
        """
        folder = project_root() / KEPT
        name = "".join(c if c.isalnum() else "-" for c in what)
        path = folder / f"{name}-{digest(checkpoint=self.fingerprint, what=what, **decides)}"
        if path.is_file() and not is_forced():
            os.utime(path)
            print(f"{what}: finished in an earlier run, taken up from {KEPT / path.name}")
            return path.read_bytes()
        content = make()
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
        unfinished.write_bytes(content)
        unfinished.replace(path)
        for old in sorted(folder.iterdir(), key=lambda file: -file.stat().st_mtime)[MOST_KEPT:]:
            old.unlink(missing_ok=True)
        return content

    def kept_table(self, what: str, make: Callable[[], pd.DataFrame], **decides: Any) -> Any:
        """The same for a table, which comes back as Parquet has it."""
        from io import BytesIO

        content = self.kept(what, lambda: make().to_parquet(index=False), **decides)
        return pd.read_parquet(BytesIO(content))

    def log_probs(
        self, pairs: Sequence[Mapping[str, Any]], images: Path, *, label: str
    ) -> pd.DataFrame:
        """``scoring.to_table`` of every pair, in their order.

        The batches are those of one call of ``scoring.log_probs``: chunks are cut from the order
        that it would take, at whole batches.
        """
        size = self.p.scoring.batch_size
        order = scoring.by_length(pairs)
        chunk = max(CHUNK // size, 1) * size
        tables = []
        for start in range(0, len(order), chunk):
            places = order[start : start + chunk]
            part = [pairs[place] for place in places]
            what = f"{label} {start + len(places)} of {len(pairs)}"
            table = self.kept_table(what, partial(self._score, part, images, label), pairs=part)
            tables.append(table.set_index(places))
        return pd.concat(tables).sort_index() if tables else scoring.to_table([], scoring.NOTHING)

    def _score(self, pairs: list[Any], images: Path, label: str) -> pd.DataFrame:
        policy, start = self.policy, time.monotonic()
        logps = scoring.log_probs(
            policy, pairs, images, batch_size=self.p.scoring.batch_size, label=label
        )
        self.seconds, self.scored = (
            self.seconds + time.monotonic() - start,
            self.scored + len(pairs),
        )
        return scoring.to_table(pairs, logps)

    def cost(self) -> dict[str, Any]:
        """For the diary: the device, and pairs/s of what was not taken up."""
        found: dict[str, Any] = {}
        if "policy" in self.__dict__:
            found["device"] = scoring.device_name(self.policy)
        if self.scored:
            found["pairs_per_second"] = round(self.scored / self.seconds, 2)
        return found


def digest(**parts: Any) -> str:
    """16 hexadecimal digits of JSON values by name."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code(*files: Path) -> dict[str, str]:
    """Name and hash of source files: what was computed by other code is not taken up."""
    return {file.name: _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
