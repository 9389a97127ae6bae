"""Plan: what the parameters' run takes, and what this machine lacks for it.

    make plan

In: params.yaml, and what is here already: the counts of ``format``, the base's config.json. Out:
hours by stage on GPUs that can be rented, memory, disk, what the network must bring, what would be
refused here, and what was assumed, on standard output. It takes seconds and no GPU.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from stages.commands import costs, estimate, lockfile
from stages.commands.estimate import GIGA, TERA, Counts, Pair, Size
from stages.core import command
from stages.core.errors import UserError
from stages.families import known
from stages.pairs.pairs import SPLITS
from stages.params import machine, params
from stages.params.params import Params
from stages.tuning import config

FORMATTED, REPORT = Path("data/formatted"), Path("reports/format.json")
MODEL = Path("models/base")
ASSUMED = (
    f"{100 * estimate.UTILISATION:.0f}% of a GPU's peak",
    "answers as long as they may be, on one GPU",
    f"{1e3 * estimate.LAYER_SECONDS} ms a layer for each token of an answer, or what reading the "
    "weights takes",
)


def main(lock: Path = lockfile.LOCK) -> None:
    p = params.load()
    ran = lockfile.read(lock) if lock.is_file() else {}
    here = {name for name, stage in ran.items() if stage.had(p.model_dump(mode="json"))}
    size, counts = model_size(p, here), counted(p, here)
    data_gb = {item: published(source)[1] / 1e3 for item, source in sources(p).items()}
    needed = estimate.disk(p, size, sum(data_gb.values()))
    free = shutil.disk_usage(Path()).free / GIGA
    memory = estimate.memory(p, size, config.dtype(p))
    pairs = (f"{getattr(counts, split):,} {split}" for split in SPLITS)
    data = " and ".join(map(named, sources(p).values()))
    print(f"{named(p.model.source)} on {data}: {', '.join(pairs)} pairs")
    print(f"Memory of a training process at a batch of the longest pairs: {listed(memory)}.")
    print(f"Disk: {listed(needed)}; {free:.1f} GB are free here.\n")
    print(hours(p, size, counts))
    small = ["the disk is too small"] if free < sum(needed.values()) else []
    unknown = [f"nothing of {n}" for n in p.evaluate.lm_eval if n not in estimate.tasks(p)]
    for title, lines in (
        ("The network must bring", network(p, here, size, data_gb)),
        ("This machine would refuse", machine.lacking(p) + small),
        ("Assumed", [*ASSUMED, *counts.assumed, *unknown]),
    ):
        print("\n".join([f"\n{title}:", *(f"  - {line}" for line in lines or ["nothing"])]))


def sources(p: Params) -> dict[str, Any]:
    """Sources of data by DVC's item."""
    return {f"fetch@{name}": source for name, source in p.data.sources.items()}


def published(source: Any) -> tuple[int, float]:
    """Pairs and megabytes of a source of data, where they are known."""
    pairs, mb = estimate.published()["pairs"].get(named(source), (0, 0))
    return pairs, mb


def named(source: Any) -> str:
    """A repository, a folder or a package, as params.yaml names it."""
    return str(getattr(source, "repo", None) or getattr(source, "path", None) or source.kind)


def model_size(p: Params, here: set[str]) -> Size:
    """The base's dimensions, by its config.json or as its family publishes them.

    Raises:
        UserError: neither is there.
    """
    name = named(p.model.source)
    file = (MODEL if "fetch-model" in here else Path(name)) / "config.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        text = found.get("text_config", found)
        head = {"head_dim": text["hidden_size"] // text["num_attention_heads"]}
        seen = {"deepstack_visual_indexes": [], "out_hidden_size": text["hidden_size"]}
        return {"text": head | text, "vision": seen | found["vision_config"]}
    if name in known.published():
        return known.published()[name]
    raise UserError(
        f"model.source is {name}, whose dimensions are not known here; `dvc repro fetch-model` "
        "fetches it, then plan again"
    )


def counted(p: Params, here: set[str]) -> Counts:
    """Pairs and tokens as ``format`` counted them, or else as they were published.

    Raises:
        UserError: nothing says how many pairs there are.
    """
    if {"preprocess", "format"} <= here:
        report = json.loads(REPORT.read_text(encoding="utf-8"))
        parts = ("image", "prompt", "chosen", "rejected")
        image, prompt, *answers = (report["tokens"][part]["median"] for part in parts)
        questions = json.loads((FORMATTED / "questions.json").read_text(encoding="utf-8"))
        train, validation, test = (report["kept_by_split"][split] for split in SPLITS)
        pair = Pair(image, prompt - image, max(answers))
        return Counts(train, validation, test, pair, len(questions))
    found = {named(source): published(source)[0] for source in sources(p).values()}
    if unknown := [name for name, number in found.items() if not number]:
        raise UserError(
            f"the pairs of {' and '.join(unknown)} are not counted here; "
            "`WITHOUT_GPU=1 dvc repro format` counts them, then plan again"
        )
    pairs, pair = sum(found.values()), Pair(estimate.image_tokens(p))
    validation, test = (round(pairs * s) for s in (p.preprocess.validation, p.preprocess.test))
    said = (
        f"{pairs:,} pairs, all of them kept, with {pair.image} tokens of the image, "
        f"{pair.question} of the question and {pair.answer} of each answer"
    )
    return Counts(pairs - validation - test, validation, test, pair, assumed=(said,))


def hours(p: Params, size: Size, counts: Counts) -> str:
    """A row for each part of a stage, a column for each GPU if the parameters ask for one."""
    parts = estimate.work(p, size, counts)
    gpus = estimate.published()["gpus"] if p.train.gpus else {}
    times = [[estimate.seconds(p, size, one, gpu) for gpu in gpus] for one in parts]
    rows = [
        [one.stage, one.what, f"{one.flop / TERA:,.1f}", *map(costs.duration, taken)]
        for one, taken in zip(parts, times, strict=True)
    ]
    total = map(costs.duration, map(sum, zip(*times, strict=True)))
    rows.append(["together", "", f"{sum(one.flop for one in parts) / TERA:,.1f}", *total])
    head = [*(f"{name}, {memory} GB" for name, (_, memory, _) in gpus.items())]
    table = tabulate(rows, ["stage", "what", "TFLOP", *head], disable_numparse=True)
    return f"{table}\n`make costs` says what stages took when they ran here."


def network(p: Params, here: set[str], size: Size, data_gb: Mapping[str, float]) -> list[str]:
    """What is fetched, and how much of it."""
    weights = 2 * sum(estimate.parameters(size).values()) / GIGA
    items = {**sources(p), "fetch-model": p.model.source}
    fetched = [
        f"{named(source)}, {data_gb.get(item, weights):.2g} GB ({item})"
        for item, source in items.items()
        if item not in here and source.kind == "hub"
    ]
    tasks = estimate.downloads(p).items()
    return fetched + [f"{name}, {much:.2g} GB (lm-eval, in baseline)" for name, (much, _) in tasks]


def listed(parts: Mapping[str, float]) -> str:
    """Gigabytes together and each."""
    each = ", ".join(f"{name} {part:.1f}" for name, part in parts.items() if part)
    return f"{sum(parts.values()):.1f} GB ({each})"


if __name__ == "__main__":
    command.run(main)
