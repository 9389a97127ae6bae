"""Estimate what the parameters' run takes, and say what this machine lacks for it.

    make plan

In: params.yaml, and what is here already: the counts of ``format``, the base's config.json. Out:
hours by stage on GPUs that can be rented, memory, disk, what the network must bring, what would be
refused here, and what was assumed, on standard output.

The memory of a training step is measured (``step_memory``). The rest is arithmetic, with
``plan.yaml`` for what is published of GPUs, data sets and tasks: a token takes two operations for
each weight, frozen weights have no gradient, and attention is left out, 2% at 536 tokens
(``benchmarks.flops`` counts it).
"""

import json
import math
import shutil
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tabulate import tabulate

from stages.commands import FORMATTED, stale
from stages.commands.planning import dimensions
from stages.commands.planning.dimensions import GIGA, Pair, Size, batch, forward, named, parameters
from stages.core import command
from stages.core.errors import UserError
from stages.pairs.pairs import SPLITS
from stages.params import machine, params
from stages.params.losses import LOSSES
from stages.params.params import Params
from stages.tracking import tags

TERA = 1e12
UTILISATION = 0.35  # of a GPU's peak; what fine-tuning with gradient checkpointing often has
USABLE = 0.9  # of a GPU's memory; the allocator can't use all of it
LAYER_SECONDS = 8e-4  # that transformers takes to start a layer for the next token (assumed)
TEXT = 256  # tokens of a document of lm-eval besides its image, as stages.answers.lm_eval takes it

Counts = Mapping[str, int]  # pairs by split, and "questions" with known answers
# Stage, what of it, operations, and tokens that are made one after the other.
Work = tuple[str, str, float, int]
REPORT = Path("reports/format.json")
ASSUMED = (
    f"{100 * UTILISATION:.0f}% of a GPU's peak, {100 * USABLE:.0f}% of its memory",
    "answers of the greatest length allowed, all on one GPU, though several GPUs share them",
    f"{1e3 * LAYER_SECONDS} ms a layer for each token of an answer",
    "of pairs that are not counted here: all are kept, with the largest image, 40 tokens of "
    "question and 120 of each answer",
)


def main() -> None:
    p = params.load()
    here = tags.locked(Path()).keys() - set(stale())
    size, (counts, pair, longest) = dimensions.model_size(p, here), counted(p, here)
    data_gb = {name: announced(source)[1] / 1e3 for name, source in p.data.sources.items()}
    needed = disk(p, size, sum(data_gb.values()))
    free = shutil.disk_usage(Path()).free / GIGA
    pairs = (f"{counts[split]:,} {split}" for split in SPLITS)
    data = " and ".join(map(named, p.data.sources.values()))
    print(f"{named(p.model.source)} on {data}: {', '.join(pairs)} pairs", flush=True)
    print("\n".join(memory(p, size, longest)))
    print(f"Disk: {listed(needed)}; {free:.1f} GB are free here.\n")
    print(hours(p, size, counts, pair))
    small = ["the disk is too small"] if free < sum(needed.values()) else []
    unknown = [f"nothing of {n}" for n in p.evaluate.lm_eval if n not in tasks(p)]
    for title, lines in (
        ("The network must bring", network(p, here, size, data_gb)),
        ("This machine would refuse", machine.lacking(p) + small),
        ("Assumed", [*ASSUMED, *unknown]),
    ):
        print("\n".join([f"\n{title}:", *(f"  - {line}" for line in lines or ["nothing"])]))


def announced(source: Any) -> tuple[int, float]:
    """Pairs and megabytes of a source of data, where they are known."""
    pairs, mb = published()["pairs"].get(named(source), (0, 0))
    return pairs, mb


def counted(p: Params, here: Set[str]) -> tuple[Counts, Pair, Pair]:
    """Pairs, a typical one and the longest, as ``format`` counted them or as they were published.

    Raises:
        UserError: nothing says how many pairs there are.
    """
    if {"preprocess", "format"} <= here:
        report = json.loads(REPORT.read_text(encoding="utf-8"))
        parts = ("image", "prompt", "chosen", "rejected")
        pairs = []
        for measure in ("median", "max"):
            image, prompt, *answers = (report["tokens"][part][measure] for part in parts)
            pairs.append(Pair(image, prompt - image, max(answers)))
        questions = json.loads((FORMATTED / "questions.json").read_text(encoding="utf-8"))
        return report["kept_by_split"] | {"questions": len(questions)}, *pairs
    found = {named(source): announced(source)[0] for source in p.data.sources.values()}
    if not all(found.values()):
        raise UserError(
            f"the pairs of {' and '.join(found)} are not counted here; "
            "`WITHOUT_GPU=1 dvc repro format` counts them, then plan again"
        )
    number, held_out = sum(found.values()), ("validation", "test")
    counts = {split: round(number * getattr(p.preprocess, split)) for split in held_out}
    counts |= {"train": number - sum(counts.values()), "questions": 0}
    pair = Pair(dimensions.image_tokens(p))
    return counts, pair, Pair(pair.image, answer=max(1, p.format.cutoff_len - pair.prompt))


def hours(p: Params, size: Size, counts: Counts, pair: Pair) -> str:
    """A row for each part of a stage, a column for each GPU if the parameters ask for one. Pairs
    use all GPUs, answers one."""
    gpus = published()["gpus"] if p.train.gpus else {}
    token = LAYER_SECONDS * size["text"]["num_hidden_layers"]
    rows = []
    for stage, what, flop, tokens in work(p, size, counts, pair):
        used = TERA * UTILISATION * (1 if tokens else max(1, p.train.gpus))
        times = (flop / (tera * used) + tokens * token for tera, _ in gpus.values())
        rows.append([stage, what, flop / TERA, *(each / 3600 for each in times)])
    rows.append(["together", "", *map(sum, list(zip(*rows, strict=True))[2:])])
    head = (f"hours on {name}, {gb} GB" for name, (_, gb) in gpus.items())
    table = tabulate(rows, ["stage", "what", "TFLOP", *head], floatfmt=",.2f")
    return f"{table}\n`make costs` says what stages took when they ran here."


def network(p: Params, here: Set[str], size: Size, data_gb: Mapping[str, float]) -> list[str]:
    """What is fetched, and how much of it."""
    items = {f"fetch@{name}": (p.data.sources[name], gb) for name, gb in data_gb.items()}
    items["fetch-model"] = (p.model.source, 2 * sum(parameters(size).values()) / GIGA)
    fetched = [
        f"{named(source)}, {gb:.2g} GB ({item})"
        for item, (source, gb) in items.items()
        if item not in here and source.kind == "hub"
    ]
    tasks = downloads(p).items()
    return fetched + [f"{name}, {much:.2g} GB (lm-eval, in baseline)" for name, (much, _) in tasks]


def listed(parts: Mapping[str, float]) -> str:
    """Gigabytes together and each."""
    each = ", ".join(f"{name} {part:.1f}" for name, part in parts.items() if part)
    return f"{sum(parts.values()):.1f} GB ({each})"


@cache
def published() -> Any:
    """What ``plan.yaml`` says."""
    return YAML(typ="safe").load(Path(__file__).with_suffix(".yaml"))


def step(p: Params, size: Size, pair: Pair) -> float:
    """Operations of a training step on one pair: forward, backward, forward again where activations
    are not kept, and once more for a reference that is not looked up."""
    again = not p.train.passed_through.get("disable_gradient_checkpointing", False)
    if p.train.shared_prefix:
        rows = 1 + LOSSES[p.train.loss].view  # which also goes through the reference
        passes = (2 + again) * rows + (rows - 1)
        return forward(size, passes * pair.row, pair.image, 4 * rows * pair.answer)
    passes, tokens = 2 + LOSSES[p.train.loss].reference, 2 * (pair.prompt + pair.answer)
    return forward(size, (passes + again) * tokens, 2 * (passes - 1) * pair.image, passes * tokens)


def steps(p: Params, train_pairs: int) -> int:
    """Optimizer steps, as transformers' Trainer counts them."""
    options = p.train.passed_through
    if (most := int(options.get("max_steps", -1))) > 0:
        return most
    pairs = min(train_pairs, int(options.get("max_samples") or train_pairs))
    return math.ceil(options.get("num_train_epochs", 3.0) * math.ceil(pairs / per_step(p)))


def per_step(p: Params) -> int:
    """Pairs of an optimizer's step, over all devices."""
    accumulated = int(p.train.passed_through.get("gradient_accumulation_steps", 1))
    return batch(p) * accumulated * p.train.processes


def work(p: Params, size: Size, counts: Counts, pair: Pair) -> list[Work]:
    """Of the stages that use the model. Answers are as long as they may be."""
    options, all_steps = p.train.passed_through, steps(p, counts["train"])
    scored = forward(size, pair.row, pair.image, 2 * pair.answer)
    every = int(options.get("eval_steps") or options.get("logging_steps") or 500)
    looks = {"steps": all_steps // every, "epoch": math.ceil(options.get("num_train_epochs", 3))}
    watched = looks.get(options.get("eval_strategy", "no"), 0) * counts["validation"]
    trained = all_steps * per_step(p) * step(p, size, pair) + watched * scored
    everything, tested = sum(counts[split] for split in SPLITS), counts["test"]
    controls = 2 * min(tested, p.evaluate.controls)
    return [
        ("reference", f"{everything:,} pairs", everything * scored, 0),
        ("baseline", f"{controls:,} pairs with other images", controls * scored, 0),
        ("train", f"{all_steps:,} steps of {per_step(p)} pairs", trained, 0),
        ("evaluate", f"{tested + controls:,} pairs", (tested + controls) * scored, 0),
        *answers(p, size, counts, pair),
    ]


def answers(p: Params, size: Size, counts: Counts, pair: Pair) -> list[Work]:
    """What base and tuned both answer: questions of the data set, and lm-eval's tasks."""
    asks, most = p.evaluate.generation, p.evaluate.generation.max_new_tokens
    own = min(counts["test"], asks.prompts) + min(counts["questions"], asks.questions)
    at_once = p.scoring.batch_tokens // (pair.prompt + most)
    asked = [("questions", own, most, at_once, pair.prompt)]
    at_once = p.scoring.batch_tokens // (p.format.image_max_pixels // 28**2 + TEXT)
    for name, (there, parts, most, _) in tasks(p).items():
        number = parts * min(there, p.evaluate.lm_eval[name] or there)
        asked.append((name, number, most, at_once, pair.image + TEXT))
    return [
        (
            "baseline, evaluate",
            f"2 x {number:,} answers to {name}, {most} tokens",
            2 * number * forward(size, tokens, pair.image),
            2 * math.ceil(number / max(1, at_once)) * most,
        )
        for name, number, most, at_once, tokens in asked
    ]


def tasks(p: Params) -> dict[str, Any]:
    """Of lm-eval's tasks that the parameters name, those that ``plan.yaml`` has, with its row."""
    return {n: row for n, row in published()["tasks"].items() if n in p.evaluate.lm_eval}


def downloads(p: Params) -> dict[str, tuple[float, float]]:
    """Of the data of lm-eval's tasks, by name: GB to download, and GB unpacked beside that."""
    names = dict.fromkeys(data for *_, where in tasks(p).values() for data in where)
    return {name: tuple(mb / 1e3 for mb in published()["benchmarks"][name]) for name in names}


def memory(p: Params, size: Size, longest: Pair) -> list[str]:
    """What a training process holds at a batch of the longest pairs, and for each size of GPU the
    options of the largest batch that fits at the same step, without checkpointing where that fits.
    A step's memory grows at most in proportion to its batch (by measure).
    """
    from stages.commands.planning import step_memory  # torch takes 6 s to import

    options = p.train.passed_through
    here = bool(options.get("disable_gradient_checkpointing", False))
    takes = {here: step_memory.of_process(p, size, longest, kept=here)}
    lines = [f"Memory of a process at its longest batch, measured: {listed(takes[here])}."]
    if not p.train.gpus:
        return lines
    takes[not here] = step_memory.of_process(p, size, longest, kept=not here)
    lines.append(f"The largest batches that fit, at the same {per_step(p)} pairs a step:")
    rounds, found = int(options.get("gradient_accumulation_steps", 1)), dict[str, list[str]]()
    for gpu in sorted({gb for _, gb in published()["gpus"].values()}):
        fitting = [
            (kept, times, gb)
            for kept, parts in takes.items()
            for times in range(1, rounds + 1)
            if rounds % times == 0
            and (gb := sum(parts.values()) + (times - 1) * parts["step"]) <= USABLE * gpu
        ]
        for kept, times, gb in sorted(fitting)[-1:]:
            changed = []
            if times > 1:
                changed.append(f"per_device_train_batch_size={batch(p) * times}")
                changed.append(f"gradient_accumulation_steps={rounds // times}")
            if kept != here:
                changed.append(f"disable_gradient_checkpointing={str(kept).lower()}")
            told = " ".join(f"-S ++train.{option}" for option in changed)
            found.setdefault(f"{told or 'as it is'} ({gb:.1f} GB)", []).append(str(gpu))
    return lines + [f"  - {' or '.join(gpus)} GB: {told}" for told, gpus in found.items()]


def disk(p: Params, size: Size, data_gb: float) -> dict[str, float]:
    """GB that stay on disk: sources and what is made of them, in the folder and in DVC's cache."""
    return {
        "base model": 4 * sum(parameters(size).values()) / GIGA,
        "data, as published and as pairs": 4 * data_gb,
        "lm-eval's data": sum(map(sum, downloads(p).values())),
        "packages (.venv), adapters": 7.0,
    }


if __name__ == "__main__":
    command.run(main)
