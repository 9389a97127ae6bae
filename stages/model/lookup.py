"""How a training finds the reference's log-probs of its pairs.

A pair is known by its content, ``pair_key``: one that is not there is an error, never a guess.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from stages.core.errors import UserError

TABLE = "logps.parquet"  # of the reference stage


def by_pair(folder: Path) -> dict[str, tuple[float, float]]:
    """Summed log-probs (chosen, rejected) in nats by ``pair_key``.

    Raises:
        UserError: the table can't be read, or two rows of a pair disagree.
    """
    path = folder / TABLE
    columns = ["key", "chosen_logps", "rejected_logps"]
    try:
        table = pd.read_parquet(path, columns=columns).drop_duplicates()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({' '.join(str(error).split())[:200]}); "
            "`dvc repro -f reference` makes it again"
        ) from None
    twice = table["key"][table["key"].duplicated()]
    if len(twice):
        raise UserError(
            f"{path} has two different rows of the pair {twice.iloc[0]}; "
            "`dvc repro -f reference` makes it again"
        )
    return {
        key: (chosen, rejected)
        for key, chosen, rejected in table.itertuples(index=False, name=None)
    }


def pair_key(feature: Mapping[str, Any]) -> str:
    """A pair by its content: LLaMA-Factory's token ids of both answers with their prompt, and the
    names of the images, which name their content; 32 hex digits.
    """
    parts: list[Sequence[Any]] = [
        list(feature["chosen_input_ids"]),
        list(feature["rejected_input_ids"]),
        [PurePath(str(image)).name for image in feature.get("images") or []],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
