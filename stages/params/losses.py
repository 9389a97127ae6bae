"""The preference losses: what people may set ``train.loss`` to, and all that differs between them.

Formulas in terms of an answer's log-prob relative to the reference, r(y) = log π(y) - log π_ref(y),
for chosen w and rejected l. LLaMA-Factory 0.9.5 computes them (``train/dpo/trainer.py``), the first
three by TRL 0.24. As in TRL, ``ipo`` takes means per token where the paper has sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


LOSSES = {
    "sigmoid": Loss(  # -log_sigmoid(β·(r(w) - r(l)))
        words="direct preference optimization (DPO)",
        tag="dpo",
        smoothed=True,
        paper="2305.18290",
    ),
    "hinge": Loss(  # max(0, 1 - β·(r(w) - r(l)))
        words="direct preference optimization with a hinge loss",
        tag="dpo",
        stock=False,
        paper="2305.10425",
    ),
    "ipo": Loss(  # (r(w) - r(l) - 1/(2β))², r per token
        words="identity preference optimization (IPO)",
        tag="ipo",
        mean=True,
        stock=False,
        paper="2310.12036",
    ),
    "orpo": Loss(  # -log π(w) - β·log_sigmoid(log odds(w) - log odds(l)), per token
        words="odds ratio preference optimization (ORPO)",
        tag="orpo",
        reference=False,
        mean=True,
        paper="2403.07691",
    ),
    "simpo": Loss(  # -log_sigmoid(β·(log π(w) - log π(l)) - simpo_gamma), per token
        words="simple preference optimization (SimPO)",
        tag="simpo",
        reference=False,
        mean=True,
        paper="2405.14734",
    ),
    # 0.8·sigmoid + 0.2·BCO - log π(w) per token, with BCO = -log_sigmoid(β·r(w) - δ)
    # - log_sigmoid(δ - β·r(l)), δ the running mean of all rewards. LLaMA-Factory weighs the first
    # two as (sigmoid + weight·BCO) / (1 + weight).
    "mpo": Loss(
        words="mixed preference optimization (MPO)",
        tag="mpo",
        paper="2411.10442",
        options={"pref_loss": "sigmoid", "pref_bco_weight": 0.25, "pref_ftx": 1.0},
    ),
    # sigmoid - log_sigmoid(β·(r(w) - r'(w))) - log_sigmoid(β·r(w)), r' with another view
    "mdpo": Loss(
        words="conditional preference optimization on images (mDPO)",
        tag="mdpo",
        paper="2406.11839",
        stock=False,
        view=True,
        options={"pref_loss": "sigmoid"},
    ),
}
