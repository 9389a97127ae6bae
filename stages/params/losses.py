"""What differs between the preference losses that ``train.loss`` names: ``losses.yaml``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

# What mdpo shows in place of a pair's image (``tuning/views.py``).
VIEWS = ("masked", "cropped", "blank", "other")
WORDS = ("words", "tag", "paper")  # fields that no number depends on


@dataclass(frozen=True)
class Loss:
    """
    reference: whether it compares with the reference; else its margin is not 0 at the start.
    mean: whether it takes an answer's mean log-prob per token; else the sum.
    stock: whether LLaMA-Factory's own trainer computes it: to TRL it does not pass the name on, and
        trains sigmoid.
    smoothed: whether ``train.dpo_label_smoothing`` goes with it.
    view: whether it also takes chosen with something else to look at, ``train.view``.
    options: LLaMA-Factory's options that make it, whatever ``train`` says of them; without any,
        LLaMA-Factory knows it by its name.
    words: for the page and the card.
    tag: the Hub's, of the card.
    paper: number of its source on arXiv, for the card (``reporting/card.bib``).
    """

    words: str
    tag: str
    paper: str
    reference: bool = True
    mean: bool = False
    stock: bool = True
    smoothed: bool = False
    view: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decides(self) -> dict[str, Any]:
        """All that a training depends on."""
        return {name: value for name, value in asdict(self).items() if name not in WORDS}


_TABLE = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))
LOSSES = {name: Loss(**entry) for name, entry in _TABLE.items()}
