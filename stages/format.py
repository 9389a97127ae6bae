"""Write the table of pairs as LLaMA-Factory's preference data set, one file for each split.

In: ``data/pairs`` (pairs.parquet, questions.parquet) and the base model's tokenizer and processor.
Out: ``train.json``, ``validation.json``, ``test.json`` and ``dataset_info.json`` for LLaMA-Factory,
``questions.json`` (held-out questions with known answers) for the evaluation, ``left_out.csv``;
a report of token lengths.

Why here: ``cutoff_len`` cuts image tokens, and the training then dies hours in ("image features and
image tokens do not match", LLaMA-Factory#6844). So tokens are counted with the real template and
processor now, and a pair that would be cut is left out and counted.
"""

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from stages.core import command, console
from stages.core.errors import UserError, shown
from stages.model import tokens
from stages.model.formatted import dataset_info, neutralised, prompt
from stages.model.tokens import Lengths
from stages.pairs.pairs import SPLITS
from stages.params import params

SECONDS = 20  # of work, for one prompt; it takes a hundredth of one
FEW = 3  # altered rows that need no more than to be counted
REASON = "longer_than_cutoff_len"
COUNTS = ("image", "prompt", "chosen", "rejected", "longest")  # of ``Lengths``
QUANTILES = {"median": 50, "p90": 90, "p99": 99, "max": 100}


def main(pairs: Path, model: Path, out: Path, report: Path) -> None:
    p = params.load()
    tokenization = tried(model, p)
    table = pd.read_parquet(pairs / "pairs.parquet")
    rows, altered = to_rows(table, tokenization.markers)
    sizes = [
        list(zip(widths, heights, strict=True))
        for widths, heights in zip(table["widths"], table["heights"], strict=True)
    ]
    counted = measured(table, tokens.count(tokenization, rows, sizes), p.format.cutoff_len)
    questions = to_questions(pd.read_parquet(pairs / "questions.parquet"), tokenization.markers)
    told = in_words(altered, len(table))

    out.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        there = (counted["split"] == name) & counted["kept"]
        write_json(out / f"{name}.json", [rows[place] for place in np.flatnonzero(there)])
    write_json(out / "questions.json", questions)
    write_json(out / "dataset_info.json", dataset_info(system_prompts=any(table["system"])))
    left_out = counted[~counted["kept"]].rename(columns={"longest": "tokens"})
    left_out = left_out.assign(reason=REASON, cutoff_len=p.format.cutoff_len)
    left_out = left_out[["id", "reason", "tokens", "cutoff_len"]]
    left_out.to_csv(out / "left_out.csv", index=False, lineterminator="\r\n")
    write_json(report, summary(counted, len(altered), told))
    if told:
        console.show(told)


def tried(model: Path, p: params.Params) -> tokens.Tokenization:
    """Tokenizer, processor and template of the model, tried on one prompt and one image.

    Raises:
        UserError: one of them is broken or another model's, which would be seen stages later.
    """
    try:
        loaded = tokens.load(model, p)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if loaded.image_token_id != config.get("image_token_id", loaded.image_token_id):
            raise ValueError(f"{loaded.family.image_token} has another ID in config.json")
        if len(loaded.tokenizer) > config.get("text_config", config)["vocab_size"]:
            raise ValueError("the tokenizer has more tokens than the model")
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        with at_most(SECONDS):
            if getattr(loaded.processor, "chat_template", None):  # lm-eval's tasks render it
                loaded.processor.apply_chat_template([{"role": "user", "content": content}])
        picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        pixels = loaded.processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        if not (pixels.isfinite().all() and pixels.std() > 0):
            raise ValueError("the image processor returns no usable pixels")
    except UserError:
        raise
    except BaseException as error:  # of the tokenizer's Rust, some are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(
            f"{model}: the tokenizer, the chat template or the image processor does not work "
            f"({type(error).__name__}: {shown(error, 200)}); get all files of one revision "
            "(model.source), or take another base model"
        ) from None
    return loaded


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop work that takes longer: a template may loop."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def to_rows(table: pd.DataFrame, markers: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """ShareGPT rows of a table of pairs, and the ids of those whose markers had to be broken."""
    pairs = table.to_dict("records")
    rows = [to_row(pair, partial(neutralised, markers=markers)) for pair in pairs]
    altered = [row["id"] for pair, row in zip(pairs, rows, strict=True) if row != to_row(pair, str)]
    return rows, altered


def to_row(pair: Mapping[Any, Any], clean: Callable[[str], str]) -> dict[str, Any]:
    """The ShareGPT row of a pair, each of its texts as ``clean`` makes it."""
    return (
        {name: pair[name] for name in ("id", "group", "origin", "kind")}
        | prompt(
            pair["question"],
            list(pair["images"]),
            system=pair["system"],
            history=[(turn["user"], turn["assistant"]) for turn in pair["history"]],
            clean=clean,
        )
        | {
            side: {"role": "assistant", "content": clean(pair[side])}
            for side in ("chosen", "rejected")
        }
    )


def in_words(altered: Sequence[str], rows: int) -> str | None:
    """What is said of altered rows when they are more than a few, with the cure."""
    if len(altered) <= FEW:
        return None
    return (
        f"ALTERED: {len(altered):,} of {rows:,} rows (the first is {altered[0]}) hold special "
        "tokens or placeholders of images, which were broken up so that they are read as text; "
        "remove them from the texts, or name those that the task needs in format.allowed_tokens"
    )


def to_questions(table: pd.DataFrame, markers: Sequence[str]) -> list[dict[str, Any]]:
    """Prompts of held-out questions with their true answers."""
    return [
        {"id": row["id"], "kind": row["kind"], "answer": row["answer"]}
        | prompt(neutralised(row["question"], markers), [row["image"]])
        for row in table.to_dict("records")
    ]


def measured(table: pd.DataFrame, counted: Sequence[Lengths], cutoff_len: int) -> pd.DataFrame:
    """Of each pair ``id``, ``split``, the lengths ``COUNTS``, and whether it is ``kept``.

    Raises:
        UserError: none of a split's pairs is within ``cutoff_len``.
    """
    lengths = {name: [getattr(each, name) for each in counted] for name in COUNTS}
    kept = [tokens.fits(each, cutoff_len) for each in counted]
    found = table[["id", "split"]].assign(**lengths, kept=kept)
    for name, any_kept in found.groupby("split")["kept"].any().items():
        if not any_kept:
            raise UserError(
                f"no {name} pair fits format.cutoff_len = {cutoff_len} tokens; "
                "raise it, or lower format.image_max_pixels"
            )
    return found


def summary(counted: pd.DataFrame, altered: int, told: str | None) -> dict[str, Any]:
    """What went in, what was kept and why the rest was not; quantiles (tokens) of all pairs."""
    kept = counted.loc[counted["kept"], "split"].value_counts()
    return {
        "pairs_in": len(counted),
        "pairs_kept": int(kept.sum()),
        "left_out": {REASON: len(counted) - int(kept.sum())},
        "kept_by_split": {name: int(kept.get(name, 0)) for name in SPLITS},
        "special_tokens_neutralised": altered,
        **({"altered": told} if told else {}),
        "tokens": {
            name: {
                label: int(np.percentile(counted[name], percent, method="higher"))
                for label, percent in QUANTILES.items()
            }
            for name in COUNTS
        },
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
