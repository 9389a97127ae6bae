"""What a training logs: curves, what it cost, and the signs that it can't be right."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.errors import UserError
from stages.tuning.inside.sitecustomize import FIRST_BATCH

# Names in LLaMA-Factory's log history, and the field's terms that our curves use.
CURVES = {
    "loss": "loss",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}

SPLITS = ("train", "validation")  # one table of curves each
STATE = "trainer_state.json"  # the trainer's last file


def read(folder: Path) -> list[dict[str, Any]]:
    """The trainer's log history: one dict for each step that was logged or evaluated."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    entries: list[dict[str, Any]] = state["log_history"]
    return entries


def first_batch(folder: Path) -> dict[str, Any]:
    """What the training found on its first batch.

    Raises:
        UserError: it did not compare shared prompts with stock: another trainer than ours runs.
    """
    path = folder / FIRST_BATCH
    if not path.is_file():
        raise UserError(
            f"the training wrote no {path}, so it does not share prompts as train.shared_prefix "
            f"asks for; {folder / 'train.log'} may say why in a line with sitecustomize.py, and "
            "train.shared_prefix: false trains the stock way"
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def check(entry: Mapping[str, Any], beta: float | None) -> None:
    """Whether a training can be right that logged this. ``beta`` is None without a reference.

    Step 1 is logged before its update, when the new adapter still changes nothing, so its reward
    margin is about 0. Another margin means that the reference is not the base model, as when an
    adapter was stacked on an adapter (LLaMA-Factory#8974).

    Raises:
        UserError: the loss is not a number (the trainer replaces such a loss by the mean of those
            before, ``logging_nan_inf_filter``, so the log-probs tell), nor is a log-prob of the
            reference, or the margin at step 1 is further from 0 than rounding explains.
    """
    of_policy = dict.fromkeys(
        ("loss", "logps/chosen", "logps/rejected"),
        "the training diverged; lower train.learning_rate or train.max_grad_norm",
    )
    of_reference = dict.fromkeys(
        ("rewards/chosen", "rewards/rejected"),
        "the reference's log-probs are not numbers; `dvc repro -f reference` computes them again",
    )
    for name, why in (of_policy | of_reference).items():
        for key in (name, f"eval_{name}"):
            if not math.isfinite(entry.get(key, 0.0)):
                raise UserError(f"{key} is {entry[key]} at step {entry['step']}: {why}")
    if beta is None or entry["step"] != 1 or "rewards/margins" not in entry:
        return
    margin = float(entry["rewards/margins"])
    nats = max(abs(float(entry["logps/chosen"])), abs(float(entry["logps/rejected"])), 1.0)
    if abs(margin) > 0.005 * beta * nats:  # bfloat16 keeps 8 bits; equal passes differ far less
        raise UserError(
            f"the reward margin at step 1 is {margin:.4g}, not about 0: the policy does not start "
            "at the reference; is model.source a plain base model, without an adapter of its own?"
        )


def point(entry: Mapping[str, Any]) -> tuple[str, dict[str, float]] | None:
    """The split that an entry measures and its values by our names, None for a summary."""
    split = "train" if "loss" in entry else "validation" if "eval_loss" in entry else None
    if split is None:
        return None
    prefix = "" if split == "train" else "eval_"
    return split, {
        ours: entry[prefix + name] for name, ours in CURVES.items() if prefix + name in entry
    }


def curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """Curves keyed by split: columns ``step``, ``epoch`` and the values of ``CURVES``."""
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for entry in entries:
        if measured := point(entry):
            split, values = measured
            rows[split].append({"step": entry["step"], "epoch": round(entry["epoch"], 4), **values})
    every = ["step", "epoch", *CURVES.values()]
    tables = {}
    for split, measured_rows in rows.items():
        # A table without rows keeps its columns: a plot of none of its points still names them.
        logged = set().union(*measured_rows) or set(every)
        columns = [name for name in every if name in logged]
        tables[split] = pd.DataFrame(measured_rows, columns=columns)
    return tables


def write_curves(folder: Path, curves_folder: Path) -> None:
    """One CSV for each split, of the training in ``folder``, and how its first batch compared with
    stock, where that was looked at.
    """
    curves_folder.mkdir(parents=True, exist_ok=True)
    (curves_folder / FIRST_BATCH).unlink(missing_ok=True)
    if (folder / FIRST_BATCH).is_file():
        shutil.copyfile(folder / FIRST_BATCH, curves_folder / FIRST_BATCH)
    for split, table in curves(read(folder)).items():
        table.to_csv(curves_folder / f"{split}.csv", index=False)


def has_curves(curves_folder: Path) -> bool:
    return all((curves_folder / f"{split}.csv").is_file() for split in SPLITS)


def cost(entries: Sequence[Mapping[str, Any]], gpus: int, resumed: bool) -> dict[str, Any]:
    """What the diary tells of a training: its device, and pairs/s.

    Of a resumed one the trainer divides all pairs by the time since it resumed; no rate then.
    """
    device = "cpu"
    if gpus:
        import torch

        device = f"{gpus} x {torch.cuda.get_device_name(0)}"
    rates = [entry["train_samples_per_second"] for entry in entries if "train_runtime" in entry]
    return {"device": device} | ({"pairs_per_second": rates[-1]} if rates and not resumed else {})
