"""How far the answers of the pairs are from what the base would say, measured before any training.

All by one yardstick: the base's log-prob per token, in nats, of chosen, of rejected, and of its own
greedy answer to the same question. DPO gains less on answers that the base would hardly give
(OPA-DPO, arXiv 2501.09695).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.model.checkpoint import Checkpoint
from stages.model.scoring import LENGTHS, LOGPS
from stages.model.tokens import PLACEHOLDERS

ANSWERS = ("chosen", "rejected", "own")
RARE = 0.01  # quantile of the base's own answers, below which it hardly ever goes


def per_token(
    base: Checkpoint, asked: Sequence[dict[str, Any]], answered: pd.DataFrame, images: Path
) -> pd.DataFrame:
    """``id`` and the log-prob per token of ``ANSWERS``, a row for each test pair that was asked and
    whose answer by the base ended and says something.

    ``asked`` and ``answered`` are those of ``answers.prompts``.
    """
    ended = answered[(answered["of"] == "pair") & answered["finished"] & (answered["answer"] != "")]
    said = {
        name: {"role": "assistant", "content": text}
        for name, text in zip(ended["id"], ended["answer"], strict=True)
        if not any(mark in text for mark in PLACEHOLDERS)
    }
    pairs = [row for row in asked if row["of"] == "pair" and row["id"] in said]
    if not pairs:
        return pd.DataFrame(columns=["id", *ANSWERS])
    own = [row | dict.fromkeys(("chosen", "rejected"), said[row["id"]]) for row in pairs]
    given = base.log_probs(pairs, images, label="base on these pairs")
    itself = base.log_probs(own, images, label="base on its own answers")
    chosen, rejected = (given[LOGPS].to_numpy() / given[LENGTHS].to_numpy()).T
    spoken = itself[LOGPS[0]] / itself[LENGTHS[0]]
    return pd.DataFrame(
        {"id": given["id"], "chosen": chosen, "rejected": rejected, "own": spoken.to_numpy()}
    )


def figures(table: pd.DataFrame) -> dict[str, float]:
    """Three numbers of ``per_token``, under their names in ``evaluation.catalogue``."""
    if table.empty:
        return {}
    own, chosen, rejected = (table[name].to_numpy() for name in ("own", "chosen", "rejected"))
    return {
        "own_answers": len(table),
        "off_policy_distance": float(np.median(own - chosen)),
        "off_policy_chosen": float((chosen < np.quantile(own, RARE)).mean()),
        "off_policy_rejected": float((rejected > chosen).mean()),
    }
