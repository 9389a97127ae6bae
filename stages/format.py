"""Format: the table of pairs becomes LLaMA-Factory's preference data set, one file a split.

In: ``data/pairs`` (pairs.parquet, questions.parquet) and the base model's tokenizer and processor.
Out: ``train.json``, ``validation.json``, ``test.json`` and ``dataset_info.json`` for LLaMA-Factory,
``questions.json`` (held-out questions with known answers) for the evaluation, ``left_out.csv``;
token lengths as a report and as a plot.

Why here: ``cutoff_len`` cuts image tokens, and the training then dies hours in ("image features and
image tokens do not match", LLaMA-Factory#6844). So tokens are counted with the real template and
processor now, and a pair that would be cut is left out and counted.
"""

import csv
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from stages.core import command
from stages.core.errors import UserError
from stages.core.text import shown
from stages.families.family import Family
from stages.model import tokens
from stages.model.formatted import PLACEHOLDERS, dataset_info, found, neutralised, prompt
from stages.model.tokens import Lengths
from stages.pairs.pairs import SPLITS
from stages.params import params
from stages.tracking import failures

SECONDS = 20  # of work, for one prompt; it takes a hundredth of one
FEW = 3  # altered rows that need no more than to be counted
QUANTILES = {"median": 50, "p90": 90, "p99": 99, "max": 100}


def main(pairs: Path, model: Path, out: Path, report: Path, lengths: Path) -> None:
    p = params.load()
    tokenization = tried(model, p)
    table = pd.read_parquet(pairs / "pairs.parquet")
    rows, changed = to_rows(table, tokenization.markers)
    sizes = [
        list(zip(widths, heights, strict=True))
        for widths, heights in zip(table["widths"], table["heights"], strict=True)
    ]
    counted = tokens.count(tokenization, rows, sizes)
    kept = tokens.within(tokenization, counted)
    by_split = {
        name: [
            row
            for row, split, ok in zip(rows, table["split"], kept, strict=True)
            if ok and split == name
        ]
        for name in SPLITS
    }
    refuse_empty(by_split, set(table["split"]), p.format.cutoff_len)
    questions = to_questions(pd.read_parquet(pairs / "questions.parquet"), tokenization.markers)

    out.mkdir(parents=True, exist_ok=True)
    for name, split_rows in by_split.items():
        write_json(out / f"{name}.json", split_rows)
    write_json(out / "questions.json", questions)
    write_json(out / "dataset_info.json", dataset_info(system_prompts=any(table["system"])))
    write_left_out(out / "left_out.csv", rows, counted, kept, p.format.cutoff_len)
    told = altered_in_words(changed, len(table), tokenization.family)
    write_json(report, summary(table["split"], kept, counted, changed, told))
    if told:
        print(told, file=sys.stderr)
    write_quantiles(lengths, [length for length, ok in zip(counted, kept, strict=True) if ok])


def tried(model: Path, p: params.Params) -> tokens.Tokenization:
    """Tokenizer, processor and template of the model, tried on one prompt and one image.

    Raises:
        UserError: one of them is broken or another model's, which would be seen stages later.
    """
    try:
        loaded = tokens.load(model, p)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if loaded.image_token_id != config.get("image_token_id", loaded.image_token_id):
            raise ValueError(f"{loaded.family.image_token} has another number in config.json")
        if len(loaded.tokenizer) > config.get("text_config", config)["vocab_size"]:
            raise ValueError("the tokenizer has more tokens than the model")
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        with at_most(SECONDS):
            if getattr(loaded.processor, "chat_template", None):  # lm-eval's tasks render it
                loaded.processor.apply_chat_template([{"role": "user", "content": content}])
        picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
        pixels = loaded.processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        if not (pixels.isfinite().all() and pixels.std() > 0):
            raise ValueError("the image processor makes nothing of an image")
    except UserError:
        raise
    except BaseException as error:  # of the tokenizer's Rust, some are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(
            f"{model}: tokenizer, chat template or image processor do not work "
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


@dataclass(frozen=True)
class Altered:
    """A row that held markers, which were broken: its id, they, and an excerpt of one text."""

    row: str
    markers: frozenset[str]
    excerpt: str


def to_rows(
    table: pd.DataFrame, markers: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Altered]]:
    """ShareGPT rows of a table of pairs, and which of them held markers that had to be broken."""
    rows: list[dict[str, Any]] = []
    changed: list[Altered] = []
    said: list[tuple[str, str]] = []  # the row's texts, before and after

    def clean(text: str) -> str:
        said.append((text, neutralised(text, markers)))
        return said[-1][1]

    for pair in table.to_dict("records"):
        said.clear()
        rows.append(
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
        before, after = zip(*said, strict=True)
        if before != after:
            changed.append(altered(pair["id"], before, after, markers))
    return rows, changed


def altered(
    row: str, before: Sequence[str], after: Sequence[str], markers: Sequence[str]
) -> Altered:
    """``before`` and ``after`` are all of a row's texts; the first that differs is shown."""
    broken = frozenset().union(*(found(text, markers) for text in before))
    one, other = next(pair for pair in zip(before, after, strict=True) if pair[0] != pair[1])
    return Altered(row, broken, excerpt(one, other))


def altered_in_words(changed: Sequence[Altered], rows: int, family: Family) -> str | None:
    """What is said of altered rows when they are more than a few: how many, of what, an example,
    and the cure.
    """
    if len(changed) <= FEW:
        return None
    often = Counter(marker for each in changed for marker in each.markers)
    named = ", ".join(f"{marker} in {count:,}" for marker, count in often.most_common(5))
    told = [
        f"ALTERED: {len(changed):,} of {rows:,} rows hold special tokens or placeholders, which "
        f"were broken up so that they are read as text ({named}).",
        f"For example in row {changed[0].row}: {changed[0].excerpt}",
    ]
    possible = [m for m, _ in often.most_common() if not family.builds_prompt(m)]
    if names := [marker for marker in possible if marker not in PLACEHOLDERS][:5]:
        told.append(
            "If the task needs them as the tokens they are, name them: "
            f"format.allowed_tokens: {json.dumps(names, ensure_ascii=False)}."
        )
    if set(often) & set(PLACEHOLDERS):
        told.append(
            "A placeholder marks where LLaMA-Factory puts an image; this pipeline puts it there "
            "itself: take it out of the texts."
        )
    return " ".join(told)


def excerpt(before: str, after: str) -> str:
    """Where a text was altered first, before and after, in at most 60 characters each."""
    places = enumerate(zip(before, after, strict=False))
    first = next((place for place, (one, other) in places if one != other), 0)
    start = max(first - 20, 0)
    return f"{before[start : start + 60]!r} became {after[start : start + 60]!r}."


def to_questions(table: pd.DataFrame, markers: Sequence[str]) -> list[dict[str, Any]]:
    """Prompts of held-out questions with their true answers."""
    return [
        {"id": row["id"], "kind": row["kind"], "answer": row["answer"]}
        | prompt(neutralised(row["question"], markers), [row["image"]])
        for row in table.to_dict("records")
    ]


def refuse_empty(by_split: dict[str, list[Any]], present: set[str], cutoff_len: int) -> None:
    """Raise ``UserError`` where none of a split's pairs is within ``cutoff_len``."""
    for name, rows in by_split.items():
        if not rows and name in present:
            raise UserError(
                f"no {name} pair fits format.cutoff_len = {cutoff_len} tokens; "
                "raise it, or lower format.image_max_pixels"
            )


def summary(
    splits: Iterable[str],
    kept: Sequence[bool],
    counted: Sequence[Lengths],
    changed: Sequence[Altered],
    altered: str | None,
) -> dict[str, Any]:
    """What went in, what was kept and why the rest was not; quantiles (tokens) of all pairs."""
    splits = list(splits)
    used = Counter(split for split, ok in zip(splits, kept, strict=True) if ok)
    cut = Counter(split for split, ok in zip(splits, kept, strict=True) if not ok)
    return {
        "pairs_in": len(counted),
        "pairs_kept": sum(kept),
        "left_out": {"longer_than_cutoff_len": len(kept) - sum(kept)},
        "kept_by_split": {name: used[name] for name in SPLITS},
        "left_out_by_split": {name: cut[name] for name in SPLITS},
        "special_tokens_neutralised": len(changed),
        **({"altered": altered} if altered else {}),
        "tokens": {
            name: {
                label: int(np.percentile([getattr(c, name) for c in counted], q, method="higher"))
                for label, q in QUANTILES.items()
            }
            for name in ("image", "prompt", "chosen", "rejected", "longest")
        },
    }


def write_quantiles(path: Path, counted: Sequence[Lengths]) -> None:
    """Token lengths of the kept pairs at each percentile, for the plot."""
    percentiles = np.arange(0, 101)
    curves = {
        name: np.percentile([getattr(c, name) for c in counted], percentiles, method="higher")
        for name in ("prompt", "chosen", "rejected")
    }
    frame = pd.DataFrame({"percentile": percentiles} | curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)


def write_left_out(
    path: Path,
    rows: Sequence[dict[str, Any]],
    counted: Sequence[Lengths],
    kept: Sequence[bool],
    limit: int,
) -> None:
    """The pairs that were left out, with their lengths."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "reason", "tokens", "cutoff_len"])
        for row, length, ok in zip(rows, counted, kept, strict=True):
            if not ok:
                writer.writerow([row["id"], "longer_than_cutoff_len", length.longest, limit])


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(failures.reported(main))
