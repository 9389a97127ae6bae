"""The reference's log-probs on disk, and what they were made with.

The reference is frozen, so what it says of a pair is data: a training that looks it up spends
nothing on a second forward pass. The numbers hold for the weights, tokens and precision that made
them, so all of that is kept beside them, and ``differences`` says what a training does otherwise.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.errors import UserError
from stages.params.params import Params

TABLE = "logps.parquet"
MADE_WITH = "made_with.json"

# What makes tokens and numbers, and what prepares images.
PACKAGES = ("llamafactory", "torch", "torchvision", "transformers", "tokenizers", "pillow")
QUANTISES = "bitsandbytes"  # where it is installed


def made_with(model: Path, p: Params, *, dtype: str, **more: Any) -> dict[str, Any]:
    """All that decides the log-probs of a base model without an adapter, as JSON values.

    ``dtype``: float32, bfloat16 or float16. ``more``: what else the caller does to the model.

    Raises:
        UserError: the base model was not fetched.
    """
    source = model / "SOURCE.json"  # it holds the hash of each of the model's files
    if not source.is_file():
        raise UserError(f"{source} is missing; `dvc repro fetch-model` fetches the base model")
    return {
        "weights": hashlib.sha256(source.read_bytes()).hexdigest(),
        "model.trust.remote_code": p.model.trust.remote_code,
        "model.template": p.model.template,
        "model.quantization_bit": p.model.quantization_bit,
        "format.image_max_pixels": p.format.image_max_pixels,
        "format.image_min_pixels": p.format.image_min_pixels,
        "dtype": dtype,
        "packages": {name: version(name) for name in PACKAGES}
        | {QUANTISES: version(QUANTISES) if find_spec(QUANTISES) else None},
        **more,
    }


def write(folder: Path, logps: pd.DataFrame, made: Mapping[str, Any]) -> None:
    """``logps``: tables of ``scoring.log_probs``, which hold each pair's key."""
    folder.mkdir(parents=True, exist_ok=True)
    logps.to_parquet(folder / TABLE, index=False)
    text = json.dumps(made, indent=2, sort_keys=True)
    (folder / MADE_WITH).write_text(text + "\n", encoding="utf-8")


def by_pair(folder: Path) -> dict[str, tuple[float, float]]:
    """Summed log-probs (chosen, rejected) in nats by ``prefix.pair_key``."""
    table = pd.read_parquet(folder / TABLE, columns=["key", "chosen_logps", "rejected_logps"])
    return {key: (chosen, rejected) for key, chosen, rejected in table.itertuples(index=False)}


def differences(folder: Path, wanted: Mapping[str, Any]) -> list[str]:
    """What of all that decides log-probs is another in training than for the reference."""
    made, here = json.loads((folder / MADE_WITH).read_text(encoding="utf-8")), dict(wanted)
    for values in (made, here):
        values |= values.pop("packages")
    return [name for name in sorted({*made, *here}) if made.get(name) != here.get(name)]
