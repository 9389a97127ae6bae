"""Estimate what the parameters' run takes, and say what this machine lacks for it.

    make plan

In: params.yaml, and what is here already: the counts of ``format``, the base's config.json. Out:
hours by stage on GPUs that can be rented, memory, disk, what the network must bring, what would be
refused here, and what was assumed, on standard output.

All of it is arithmetic, with ``plan.yaml`` for what is published of GPUs, data sets and tasks. A
token takes two operations for each weight, frozen weights have no gradient, and attention is left
out, 2% at 536 tokens (``benchmarks.flops`` counts it).
"""

import json
import math
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tabulate import tabulate

from stages.commands import BASE, FORMATTED, stale
from stages.core import command
from stages.core.errors import UserError
from stages.families import known
from stages.families.family import Family
from stages.pairs.pairs import SPLITS
from stages.params import machine, params
from stages.params.losses import LOSSES
from stages.params.params import Params
from stages.tracking import tags
from stages.tuning import config

TERA, GIGA = 1e12, 1e9
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED = {4: 0.56, 8: 1.05}  # bytes of a number in bitsandbytes' NF4 or int8, with its scales
UTILISATION = 0.35  # of a GPU's peak; what fine-tuning with gradient checkpointing often has
HEAD_TOKENS = 256  # of stages.model.prefix.CHUNK
OTHER_GB = 1.5  # CUDA's context and kernels; an adapter of rank 8, gradients, Adam's averages
LAYER_SECONDS = 8e-4  # that transformers takes to start a layer for the next token (assumed)
TEXT = 256  # tokens of a document of lm-eval besides its image, as stages.answers.lm_eval takes it
PATCHES = 4  # of the vision tower, to an image token
VOCABULARY = 151936  # Qwen's; a config.json says its own

Size = Mapping[str, Mapping[str, Any]]  # "text" and "vision": dimensions as in config.json
Counts = Mapping[str, int]  # pairs by split, and "questions" with known answers
# Stage, what of it, operations, and tokens that are made one after the other.
Work = tuple[str, str, float, int]
REPORT = Path("reports/format.json")
ASSUMED = (
    f"{100 * UTILISATION:.0f}% of a GPU's peak",
    "answers of the greatest length allowed, all on one GPU, though several GPUs share them",
    f"{1e3 * LAYER_SECONDS} ms a layer for each token of an answer",
    "of pairs that are not counted here: all are kept, with the largest image, 40 tokens of "
    "question and 120 of each answer",
)


@dataclass(frozen=True)
class Pair:
    """Tokens of one pair: of its image, of the rest of its prompt, and of each answer."""

    image: int = 256
    question: int = 40
    answer: int = 120

    @property
    def prompt(self) -> int:
        return self.image + self.question


def main() -> None:
    p = params.load()
    here = tags.locked(Path()).keys() - set(stale())
    size, (counts, pair) = model_size(p, here), counted(p, here)
    data_gb = {name: announced(source)[1] / 1e3 for name, source in p.data.sources.items()}
    needed = disk(p, size, sum(data_gb.values()))
    free = shutil.disk_usage(Path()).free / GIGA
    pairs = (f"{counts[split]:,} {split}" for split in SPLITS)
    data = " and ".join(map(named, p.data.sources.values()))
    takes = memory(p, size, config.dtype(p))
    print(f"{named(p.model.source)} on {data}: {', '.join(pairs)} pairs")
    print(f"Memory of a training process at a batch of the longest pairs: {listed(takes)}.")
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


def named(source: Any) -> str:
    """A repository, a folder or a package, as params.yaml names it."""
    return str(getattr(source, "repo", None) or getattr(source, "path", None) or source.kind)


def model_size(p: Params, here: Set[str]) -> Size:
    """The base's dimensions, by its config.json or as its family publishes them.

    Raises:
        UserError: neither is there.
    """
    name = named(p.model.source)
    file = (BASE if "fetch-model" in here else Path(name)) / "config.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        text = found.get("text_config", found)
        head = {"head_dim": text["hidden_size"] // text["num_attention_heads"]}
        head["tie_word_embeddings"] = found.get("tie_word_embeddings", True)
        seen = {"deepstack_visual_indexes": [], "out_hidden_size": text["hidden_size"]}
        return {"text": head | text, "vision": seen | found["vision_config"]}
    if name in known.published():
        return known.published()[name]
    raise UserError(
        f"model.source is {name}, whose dimensions are not known here; `dvc repro fetch-model` "
        "fetches it, then plan again"
    )


def counted(p: Params, here: Set[str]) -> tuple[Counts, Pair]:
    """Pairs and a typical one as ``format`` counted them, or else as they were published.

    Raises:
        UserError: nothing says how many pairs there are.
    """
    if {"preprocess", "format"} <= here:
        report = json.loads(REPORT.read_text(encoding="utf-8"))
        parts = ("image", "prompt", "chosen", "rejected")
        image, prompt, *answers = (report["tokens"][part]["median"] for part in parts)
        questions = json.loads((FORMATTED / "questions.json").read_text(encoding="utf-8"))
        pair = Pair(image, prompt - image, max(answers))
        return report["kept_by_split"] | {"questions": len(questions)}, pair
    found = {named(source): announced(source)[0] for source in p.data.sources.values()}
    if not all(found.values()):
        raise UserError(
            f"the pairs of {' and '.join(found)} are not counted here; "
            "`WITHOUT_GPU=1 dvc repro format` counts them, then plan again"
        )
    pairs, held_out = sum(found.values()), ("validation", "test")
    counts = {split: round(pairs * getattr(p.preprocess, split)) for split in held_out}
    counts |= {"train": pairs - sum(counts.values()), "questions": 0}
    return counts, Pair(image_tokens(p))


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


# the arithmetic


@cache
def published() -> Any:
    """What ``plan.yaml`` says."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    return YAML(typ="safe").load(text)


def parameters(size: Size) -> dict[str, float]:
    """Numbers in the weights: of the ``layers``, of the ``head``, of the ``embeddings`` where they
    are not the head's, of the ``vision`` tower with its mergers. Norms, biases and position
    embeddings, up to 0.2%, are left out.
    """
    text, vision = size["text"], size["vision"]
    hidden, seen = text["hidden_size"], vision["hidden_size"]
    heads = 2 * (text["num_attention_heads"] + text["num_key_value_heads"]) * text["head_dim"]
    if "linear_num_key_heads" in text:  # Qwen3.5: gated attention in one of four layers
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        gated = heads + text["num_attention_heads"] * text["head_dim"]
        heads = (gated + 3 * (2 * keys + 3 * values)) / 4
    tower = vision["depth"] * (4 * seen**2 + 2 * seen * vision["intermediate_size"])
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    merged = PATCHES * seen * (PATCHES * seen + vision["out_hidden_size"])
    vocabulary = hidden * text.get("vocab_size", VOCABULARY)
    return {
        "layers": text["num_hidden_layers"] * hidden * (heads + 3 * text["intermediate_size"]),
        "head": vocabulary,
        "embeddings": 0 if text.get("tie_word_embeddings", True) else vocabulary,
        "vision": tower + mergers * merged,
    }


def forward(size: Size, tokens: float, images: float, predicted: float = 0) -> float:
    """Operations of a pass over ``tokens`` and ``images`` (in tokens of the first), of which
    ``predicted`` go through the head."""
    numbers = parameters(size)
    seen = PATCHES * images * numbers["vision"]
    return 2 * (tokens * numbers["layers"] + predicted * numbers["head"] + seen)


def step(p: Params, size: Size, pair: Pair) -> float:
    """Operations of a training step on one pair: forward, backward, forward again where activations
    are not kept, and once more for a reference that is not looked up."""
    again = not p.train.passed_through.get("disable_gradient_checkpointing", False)
    if p.train.shared_prefix:
        rows = 1 + LOSSES[p.train.loss].view  # which also goes through the reference
        passes = (2 + again) * rows + (rows - 1)
        return forward(size, passes * row_tokens(p, pair), pair.image, 4 * rows * pair.answer)
    passes, tokens = 2 + LOSSES[p.train.loss].reference, 2 * (pair.prompt + pair.answer)
    return forward(size, (passes + again) * tokens, 2 * (passes - 1) * pair.image, passes * tokens)


def row_tokens(p: Params, pair: Pair) -> int:
    """Tokens of a pair in scoring and in training."""
    return pair.prompt + 2 * pair.answer


def family(p: Params) -> Family:
    return next(each for each in known.FAMILIES if p.model.template in each.templates)


def steps(p: Params, train_pairs: int) -> int:
    """Optimizer steps, as transformers' Trainer counts them."""
    options = p.train.passed_through
    if (most := int(options.get("max_steps", -1))) > 0:
        return most
    pairs = min(train_pairs, int(options.get("max_samples") or train_pairs))
    return math.ceil(options.get("num_train_epochs", 3.0) * math.ceil(pairs / per_step(p)))


def per_step(p: Params) -> int:
    """Pairs of an optimizer's step, over all devices."""
    options = p.train.passed_through
    batch = int(options.get("per_device_train_batch_size", 8))
    return batch * int(options.get("gradient_accumulation_steps", 1)) * p.train.processes


def work(p: Params, size: Size, counts: Counts, pair: Pair) -> list[Work]:
    """Of the stages that use the model. Answers are as long as they may be."""
    options, all_steps = p.train.passed_through, steps(p, counts["train"])
    scored = forward(size, row_tokens(p, pair), pair.image, 2 * pair.answer)
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


def memory(p: Params, size: Size, dtype: str) -> dict[str, float]:
    """GB (10^9 bytes) of a training process, at a batch of pairs as long as ``format.cutoff_len``
    lets them be. The vision tower's activations are its own and freed."""
    text, options = size["text"], p.train.passed_through
    ours = p.train.shared_prefix
    numbers, bits, width = parameters(size), p.model.quantization_bit, BYTES[dtype]
    layers = numbers["layers"] * (QUANTISED[bits] if bits else width)
    batch = int(options.get("per_device_train_batch_size", 8))
    prompt = Pair(image_tokens(p)).prompt
    answered = batch * 2 * max(1, p.format.cutoff_len - prompt)
    tokens = batch * (1 if ours else 2) * prompt + answered
    # Of a layer, by measure (benchmarks.memory); in 16 bits what adapters read is kept twice.
    inside = 8 * text["hidden_size"] + (8 if width == 2 else 5) * text["intermediate_size"]
    all_kept = options.get("disable_gradient_checkpointing", False)
    kept = text["num_hidden_layers"] * (inside if all_kept else text["hidden_size"]) + inside
    predicted = min(HEAD_TOKENS, answered) if ours else tokens
    return {
        "weights": (layers + width * (sum(numbers.values()) - numbers["layers"])) / GIGA,
        "activations": width * tokens * kept / GIGA,
        # float32 logits, their log-softmax and gradient
        "logits": 3 * 4 * predicted * text.get("vocab_size", VOCABULARY) / GIGA,
        "other": OTHER_GB if p.train.gpus else 0.0,
    }


def image_tokens(p: Params) -> int:
    """Of an image as large as it may be."""
    return max(1, p.format.image_max_pixels // family(p).token_side ** 2)


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
