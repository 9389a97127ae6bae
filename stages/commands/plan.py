"""Plan: what the parameters' run will take, and whether there is anything to learn and to see.

    make plan
    python -m stages plan --pairs 21376 --utilisation 0.3

In: params.yaml, and what is here already: the counts of ``format``, the base's config.json, the
reference's log-probs, the diary of earlier runs. Out: steps, tokens, work, memory, disk and hours
on named GPUs, what the network must bring, what would be refused, and what is missing, on standard
output. It takes seconds and no GPU, so it runs before one is rented. Of pairs that are not here yet
it takes the published number and says so.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from stages.commands import costs, estimate, flops, lockfile
from stages.commands.estimate import GPUS, Counts, Work
from stages.commands.flops import Pair, Size
from stages.core import command
from stages.core.errors import UserError
from stages.core.text import readable
from stages.evaluation import catalogue, metrics, shortcuts, statistics
from stages.model import formatted
from stages.pairs.pairs import SPLITS
from stages.params import params
from stages.params.params import Params
from stages.tuning import config

FORMATTED, IMAGES = Path("data/formatted"), Path("data/pairs/images")
REFERENCE, MODEL = Path("data/reference"), Path("models/base")
REPORT, LENGTHS = Path("reports/format.json"), Path("reports/token_lengths.csv")
# Published data sets that presets name: pairs, bytes.
PUBLISHED = {"helehan/topic-overwrite": (21_376, 1.2e9)}
MARGIN = 1.25  # of memory: what the estimate leaves out, such as masks and the vision tower
UTILISATION = 0.35  # of the peak; what fine-tuning with gradient checkpointing often has


@dataclass(frozen=True)
class Known:
    """What is here of these parameters' run, by the stages that made it."""

    here: frozenset[str]

    def __contains__(self, stage: str) -> bool:
        return stage in self.here


def main(
    pairs: int = 0,
    utilisation: float = UTILISATION,
    diary: Path = command.DIARY,
    lock: Path = lockfile.LOCK,
) -> None:
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is {utilisation}; it is a share of the peak, such as 0.35")
    p = params.load()
    known = made(p, lock)
    size, missing = model_size(p, known)
    counts, assumed = counted(p, known, pairs)
    missing += assumed
    work = estimate.work(p, size, counts)
    entries = costs.entries(diary) if {"fetch-model", "format"} <= known.here else {}

    print(f"{named(p.model.source)} on {named_data(p)}\n")
    print(tabulate(facts(p, size, counts), tablefmt="plain", disable_numparse=True))
    print("\n" + table_of_work(work))
    print("\n" + table_of_gpus(p, size, counts, work, utilisation, entries))
    for title, lines in (
        ("Will we see it?", visible(p, known, counts)),
        ("The network must bring", network(p, known, size)),
        ("Would be refused here", refused(p, size, counts, known)),
        ("Missing", [*missing, *room(p, size)]),
    ):
        print(f"\n{title}:")
        print("\n".join(f"  - {line}" for line in lines) if lines else "  nothing")


def made(p: Params, lock: Path) -> Known:
    """Stages whose outputs are here, made with these parameters, and all that they follow from."""
    if not lock.is_file():
        return Known(frozenset())
    stages, parameters = lockfile.read(lock), p.model_dump(mode="json")
    found: set[str] = set()
    outs: dict[str, str] = {out: name for name, ran in stages.items() for out in ran.outs}
    for name, ran in stages.items():
        before = {outs[dep] for dep in ran.deps if dep in outs}
        if before <= found and ran.had(parameters) and all(Path(out).exists() for out in ran.outs):
            found.add(name)
    return Known(frozenset(found))


def named(source: Any) -> str:
    """A repository, a folder or a package, as params.yaml names it."""
    return str(getattr(source, "repo", None) or getattr(source, "path", None) or source.kind)


def named_data(p: Params) -> str:
    """All sources of data, as params.yaml names them."""
    return ", ".join(map(named, p.data.sources.values()))


# what is known of model and pairs


def model_size(p: Params, known: Known) -> tuple[Size, list[str]]:
    """The base's dimensions, and what is missing to know them for sure.

    Raises:
        UserError: nothing here says them.
    """
    name = named(p.model.source)
    for folder, fetched in ((MODEL, "fetch-model" in known), (Path(name), True)):
        if fetched and (folder / "config.json").is_file():
            return flops_size(json.loads((folder / "config.json").read_text("utf-8"))), []
    if name in flops.PUBLISHED:
        said = "the base model: its published dimensions are taken; `dvc repro fetch-model` "
        return flops.PUBLISHED[name], [said + f"brings {name}"]
    raise UserError(
        f"model.source is {name}, whose dimensions are not known here; `dvc repro fetch-model` "
        "fetches it, then plan again"
    )


def flops_size(config_json: Mapping[str, Any]) -> Size:
    text = {**config_json.get("text_config", config_json)}
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    vision = {"deepstack_visual_indexes": [], **config_json["vision_config"]}
    vision.setdefault("out_hidden_size", text["hidden_size"])
    return {"text": text, "vision": vision}


def counted(p: Params, known: Known, given: int) -> tuple[Counts, list[str]]:
    """Pairs and tokens as ``format`` counted them, or else as assumed, and what is missing.

    Raises:
        UserError: nothing says how many pairs there are.
    """
    if "format" in known and REPORT.is_file() and LENGTHS.is_file() and not given:
        report, lengths = json.loads(REPORT.read_text("utf-8")), pd.read_csv(LENGTHS)
        mean, most = lengths.mean(), lengths.max()
        tokens = report["tokens"]["image"]
        typical = Pair(
            tokens["median"],
            max(0, round(mean["prompt"]) - tokens["median"]),
            round((mean["chosen"] + mean["rejected"]) / 2),
        )
        longest = Pair(
            tokens["max"],
            max(0, int(most["prompt"]) - tokens["max"]),
            int(max(most["chosen"], most["rejected"])),
        )
        split = report["kept_by_split"]
        return Counts(split["train"], split["validation"], split["test"], typical, longest), []
    pairs = given or PUBLISHED.get(named_data(p), (0, 0.0))[0]
    if not pairs:
        raise UserError(
            f"the data are {named_data(p)}, and their pairs are not counted here; run "
            "`dvc repro format`, or name a number with make plan PAIRS=1000"
        )
    image = max(1, p.format.image_max_pixels // 1024)
    typical = Pair(image, flops.DEFAULT.question, flops.DEFAULT.answer)
    room = max(1, p.format.cutoff_len - typical.prompt)
    validation, test = (
        round(pairs * share) for share in (p.preprocess.validation, p.preprocess.test)
    )
    missing = [
        f"the pairs: {pairs:,} are taken, all of them kept, with {typical.image} image tokens, "
        f"{typical.question} of the question and {typical.answer} of each answer; "
        "`dvc repro format` counts them",
    ]
    longest = Pair(image, typical.question, room)
    return Counts(pairs - validation - test, validation, test, typical, longest), missing


# what it takes


def facts(p: Params, size: Size, counts: Counts) -> list[list[str]]:
    pair, steps = counts.typical, estimate.steps(p, counts.train)
    epochs = steps * estimate.per_step(p) / max(1, counts.train)
    return [
        [
            "pairs",
            f"{counts.train:,} train, {counts.validation:,} validation, {counts.test:,} test",
        ],
        [
            "a pair",
            f"{pair.image} image, {pair.question} question, 2 x {pair.answer} answer tokens; the "
            f"longest {counts.longest.prompt + 2 * counts.longest.answer:,} together",
        ],
        ["steps", f"{steps:,} of {estimate.per_step(p)} pairs, {epochs:.2g} epochs"],
        ["parameters", f"{sum(flops.parameters(size).values()) / 1e6:,.1f} million"],
    ]


def table_of_work(work: list[Work]) -> str:
    rows = [
        [one.stage, f"{one.pairs:,}", f"{one.tokens / 1e6:,.1f} M", tera(one.flop)] for one in work
    ]
    total = sum(one.flop for one in work)
    rows.append(["together", "", f"{sum(one.tokens for one in work) / 1e6:,.1f} M", tera(total)])
    return (
        tabulate(rows, ["stage", "pairs", "tokens", "TFLOP"], disable_numparse=True)
        + "\nNot counted: generated answers and lm-eval's tasks."
    )


def tera(flop: float) -> str:
    return f"{flop / flops.TERA:,.0f}" if flop >= 10 * flops.TERA else f"{flop / flops.TERA:.2g}"


def table_of_gpus(
    p: Params,
    size: Size,
    counts: Counts,
    work: list[Work],
    utilisation: float,
    diary: Mapping[str, Mapping[str, Any]],
) -> str:
    """Hours on GPUs, whether a step of the longest pairs fits, and what was measured here.

    ``fits`` is "tight" where a batch of the longest pairs may not, and "no" where one of typical
    pairs does not. A share of the peak that was measured here replaces the assumed one.
    """
    dtype = config.dtype(p)
    parts = estimate.memory(p, size, counts.longest, dtype)
    needed, typical = sum(parts.values()), estimate.memory(p, size, counts.typical, dtype)
    lines = [
        f"Memory of a training process: {gb(sum(typical.values()))} at typical pairs, {gb(needed)} "
        f"at a batch of the longest ({listed(parts)})."
    ]
    found = list(measured(work, diary))
    shares = {gpu.name: share for gpu, share in map(share_of_peak, found) if gpu}
    assumed = max(shares.values(), default=utilisation)
    rows = []
    for gpu in GPUS if p.train.gpus else ():
        share = shares.get(gpu.name, assumed)
        times = [estimate.hours(one.flop, gpu, share, p.train.gpus) for one in work]
        fits = "yes" if MARGIN * needed <= gpu.memory_gb else "tight"
        if sum(typical.values()) > gpu.memory_gb:
            fits = "no"
        rows.append([gpu.name, f"{gpu.memory_gb:.0f} GB", fits, f"{100 * share:.0f}%"])
        rows[-1] += [costs.duration(3600 * time) for time in (*times, sum(times))]
    head = ["GPU", "memory", "fits", "of peak", *(one.stage for one in work), "together"]
    if rows:
        lines.append("\n" + tabulate(rows, head, disable_numparse=True))
        source = "measured here" if shares else "assumed; UTILISATION=0.3 takes another share"
        lines.append(f"The share of the peak is {source}.")
    for stage, device, rate, achieved, seconds in found:
        lines.append(
            f"Measured here on {device}: {stage} {rate:,.1f} pairs/s, {achieved / flops.TERA:.2g} "
            f"TFLOP/s, so {costs.duration(seconds)} for these pairs."
        )
    return "\n".join(lines)


Measured = tuple[str, str, float, float, float]


def measured(work: list[Work], diary: Mapping[str, Mapping[str, Any]]) -> Iterator[Measured]:
    """(stage, device, pairs/s, FLOP/s, seconds for these pairs) of what the diary has."""
    for one in work:
        rate = diary.get(one.stage, {}).get("pairs_per_second")
        device = diary.get(one.stage, {}).get("device")
        if rate and device and one.pairs:
            achieved = rate * one.flop / one.pairs
            yield one.stage, str(device), float(rate), achieved, one.pairs / rate


def share_of_peak(found: Measured) -> tuple[estimate.Gpu | None, float]:
    _, device, _, achieved, _ = found
    gpu = estimate.named(device)
    return gpu, achieved / (gpu.tera * flops.TERA) if gpu else 0.0


# is there anything to learn, and will we see it?


def visible(p: Params, known: Known, counts: Counts) -> list[str]:
    """What the split can show, and shortcuts of the pairs, as far as they are here."""
    lines = []
    if "format" in known:
        by_split = {split: formatted.read(FORMATTED, split) for split in SPLITS}
        test = by_split["test"]
        groups = pd.Series([row["group"] for row in test])
        if "reference" in known:
            logps = pd.read_parquet(REFERENCE / "logps.parquet").set_index("id")
            logps = logps.loc[[row["id"] for row in test]]
            right = statistics.outcomes(
                statistics.preference_margin(
                    logps["chosen_logps"],
                    logps["rejected_logps"],
                    logps["chosen_tokens"],
                    logps["rejected_tokens"],
                )
            )
            lines.append(f"the base orders {100 * right.mean():.1f}% of the test pairs rightly")
        else:
            right = statistics.outcomes([1.0, -1.0] * len(test))[: len(test)]
        found = metrics.of_split(right, groups, p.evaluate)
        _, audited = shortcuts.listed(by_split, IMAGES)
        judged = shortcuts.judges(by_split["train"], test)
        found |= metrics.of_shortcuts(judged, audited, groups, p.evaluate)
        lines += [
            f"{key} {catalogue.with_interval(found, key)}: {catalogue.METRICS[key].meaning}"
            for key in found
            if key in catalogue.METRICS
        ]
    elif counts.test >= 2:
        half = statistics.outcomes([1.0, -1.0] * counts.test)[: counts.test]
        found = metrics.of_split(half, pd.Series(range(counts.test)), p.evaluate)
        lines.append(
            f"at best a win rate {100 * found['win_rate_detectable']:.1f} points from 50%, if each "
            "pair has its own image; the pairs are not here yet"
        )
    if "reference" not in known:
        lines.append("what the base gets right is known after `dvc repro reference`")
    return lines


# what it needs from outside


def network(p: Params, known: Known, size: Size) -> list[str]:
    lines = []
    weights = 2.0 * sum(flops.parameters(size).values())
    for item, source, download in (
        *(
            (f"fetch@{name}", source, PUBLISHED.get(named(source), (0, 0.0))[1])
            for name, source in p.data.sources.items()
        ),
        ("fetch-model", p.model.source, weights),
    ):
        if item not in known and source.kind == "hub":
            revision = getattr(source, "revision", "")
            much = f", about {gb(download / flops.GIGA)}" if download else ""
            lines.append(
                f"{named(source)} at {revision[:8]}{much}, from the Hugging Face Hub ({item})"
            )
    # A task that makes its own documents, from the formatted data, downloads none.
    texts = [path.read_text("utf-8") for path in p.evaluate.task_files.glob("*.yaml")]
    local = [text for text in texts if "custom_dataset:" in text]
    asking = [
        task for task in p.evaluate.lm_eval if not any(f"task: {task}\n" in text for text in local)
    ]
    if asking:
        lines.append(f"the data sets of lm-eval's tasks {', '.join(asking)} (baseline, evaluate)")
    return lines


def refused(p: Params, size: Size, counts: Counts, known: Known) -> list[str]:
    """What stages would refuse on this machine with these parameters."""
    lines = []
    paths = {name: Path() for name in ("model", "formatted", "images", "output")}
    try:
        config.dpo_config(p, **paths, validated=True)
    except UserError as error:
        lines.append(str(error))
    gpus = gpus_here()
    if p.train.gpus > len(gpus):
        lines.append(f"train.gpus is {p.train.gpus}, and this machine has {len(gpus) or 'no'} GPU")
    if p.scoring.device == "cuda" and not gpus:
        lines.append("scoring.device is cuda, and this machine has no GPU")
    if p.model.quantization_bit and not gpus:
        lines.append(f"model.quantization_bit is {p.model.quantization_bit}, which needs a GPU")
    needed = sum(estimate.memory(p, size, counts.longest, config.dtype(p)).values())
    lines += [
        f"{name} has {memory:.0f} GB, and a batch of the longest pairs may need {needed:.0f} GB"
        for name, memory in gpus[: p.train.gpus]
        if memory < needed
    ]
    if "fetch-model" in known and (said := config.without_effect(p, MODEL)):
        lines.append(said)
    return lines


def gpus_here() -> list[tuple[str, float]]:
    """Name and memory (GB) of each GPU, without importing torch."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return [
        (name.strip(), float(memory) * 2**20 / 1e9)
        for name, _, memory in rows
        if memory.strip().isdigit()
    ]


def room(p: Params, size: Size) -> list[str]:
    """A line if the disk is too small for what stays on it."""
    parts = estimate.disk(p, size, PUBLISHED.get(named_data(p), (0, 1e7))[1])
    needed, free = sum(parts.values()), shutil.disk_usage(Path()).free / 1e9
    said = f"{gb(needed)} ({listed(parts)}); {gb(free)} are free here"
    if free < needed:
        return [f"disk: {said}"]
    print(f"\nDisk: {said}.")
    return []


def gb(gigabytes: float) -> str:
    return readable(round(gigabytes * 1e9))


def listed(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {gb(value)}" for name, value in parts.items() if value)


if __name__ == "__main__":
    command.run(main)
