"""Estimate what the parameters' run takes, and say what this machine lacks for it.

    make plan

In: params.yaml, and what is here already: the counts of ``format``, the base's config.json. Out:
hours by stage on GPUs that can be rented, memory, disk, what the network must bring, what would be
refused here, and what was assumed, on standard output. It takes seconds and no GPU.

All of it is arithmetic; ``plan.yaml`` has what is published of GPUs, data sets and lm-eval's tasks.
A token takes two operations for each weight, frozen weights have no gradient, and attention is left
out, 2% at 536 tokens (``benchmarks.flops`` counts it).
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tabulate import tabulate

from stages.commands import BASE, FORMATTED
from stages.core import command
from stages.core.errors import UserError
from stages.families import known
from stages.pairs.pairs import SPLITS
from stages.params import machine, params
from stages.params.losses import LOSSES
from stages.params.params import PARAMS_FILE, Params, flattened
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
REPORT = Path("reports/format.json")
ASSUMED = (
    f"{100 * UTILISATION:.0f}% of a GPU's peak",
    "answers of the greatest length allowed, on one GPU",
    f"{1e3 * LAYER_SECONDS} ms a layer for each token of an answer, or what reading the "
    "weights takes",
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


@dataclass(frozen=True)
class Counts:
    """Pairs of each split, a typical one, and held-out questions with known answers."""

    train: int
    validation: int
    test: int
    pair: Pair
    questions: int = 0


@dataclass(frozen=True)
class Work:
    """A part of a stage: its ``flop``, and ``tokens`` that it makes one after the other."""

    stage: str
    what: str
    flop: float
    tokens: int = 0


def main() -> None:
    p, here = params.load(), ran()
    size, counts = model_size(p, here), counted(p, here)
    data_gb = {item: announced(source)[1] / 1e3 for item, source in sources(p).items()}
    needed = disk(p, size, sum(data_gb.values()))
    free = shutil.disk_usage(Path()).free / GIGA
    takes = memory(p, size, config.dtype(p))
    pairs = (f"{getattr(counts, split):,} {split}" for split in SPLITS)
    data = " and ".join(map(named, sources(p).values()))
    print(f"{named(p.model.source)} on {data}: {', '.join(pairs)} pairs")
    print(f"Memory of a training process at a batch of the longest pairs: {listed(takes)}.")
    print(f"Disk: {listed(needed)}; {free:.1f} GB are free here.\n")
    print(hours(p, size, counts))
    small = ["the disk is too small"] if free < sum(needed.values()) else []
    unknown = [f"nothing of {n}" for n in p.evaluate.lm_eval if n not in tasks(p)]
    for title, lines in (
        ("The network must bring", network(p, here, size, data_gb)),
        ("This machine would refuse", machine.lacking(p) + small),
        ("Assumed", [*ASSUMED, *unknown]),
    ):
        print("\n".join([f"\n{title}:", *(f"  - {line}" for line in lines or ["nothing"])]))


def ran() -> set[str]:
    """The stages that ran with the parameters that are here now, as dvc.lock says, and whose
    outputs are here: a fresh clone has only those that Git holds."""
    now = tags.parameters(Path())
    return {
        name
        for name, one in tags.locked(Path()).items()
        if flattened(one.get("params", {}).get(str(PARAMS_FILE), {})).items() <= now.items()
        and all(Path(out["path"]).exists() for out in one.get("outs", []))
    }


def sources(p: Params) -> dict[str, Any]:
    """Sources of data by DVC's item."""
    return {f"fetch@{name}": source for name, source in p.data.sources.items()}


def announced(source: Any) -> tuple[int, float]:
    """Pairs and megabytes of a source of data, where they are known."""
    pairs, mb = published()["pairs"].get(named(source), (0, 0))
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
    file = (BASE if "fetch-model" in here else Path(name)) / "config.json"
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
    found = {named(source): announced(source)[0] for source in sources(p).values()}
    if unknown := [name for name, number in found.items() if not number]:
        raise UserError(
            f"the pairs of {' and '.join(unknown)} are not counted here; "
            "`WITHOUT_GPU=1 dvc repro format` counts them, then plan again"
        )
    pairs, pair = sum(found.values()), Pair(image_tokens(p))
    validation, test = (round(pairs * s) for s in (p.preprocess.validation, p.preprocess.test))
    return Counts(pairs - validation - test, validation, test, pair)


def hours(p: Params, size: Size, counts: Counts) -> str:
    """A row for each part of a stage, a column for each GPU if the parameters ask for one."""
    parts = work(p, size, counts)
    gpus = published()["gpus"] if p.train.gpus else {}
    figures = [
        [one.flop / TERA, *(seconds(p, size, one, gpu) / 3600 for gpu in gpus)] for one in parts
    ]
    figures.append([sum(column) for column in zip(*figures, strict=True)])
    names = [*((one.stage, one.what) for one in parts), ("together", "")]
    rows = [[*name, *each] for name, each in zip(names, figures, strict=True)]
    head = (f"hours on {name}, {gb} GB" for name, (_, gb, _) in gpus.items())
    table = tabulate(rows, ["stage", "what", "TFLOP", *head], floatfmt=",.2f")
    return f"{table}\n`make costs` says what stages took when they ran here."


def network(p: Params, here: set[str], size: Size, data_gb: Mapping[str, float]) -> list[str]:
    """What is fetched, and how much of it."""
    weights = 2 * sum(parameters(size).values()) / GIGA
    items = {**sources(p), "fetch-model": p.model.source}
    fetched = [
        f"{named(source)}, {data_gb.get(item, weights):.2g} GB ({item})"
        for item, source in items.items()
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
    """Numbers in the weights: of the ``layers``, of the ``head`` (tied to the embeddings), of the
    ``vision`` tower with its mergers. Norms, biases and position embeddings, 0.1%, are left out."""
    text, vision = size["text"], size["vision"]
    hidden, seen = text["hidden_size"], vision["hidden_size"]
    heads = 2 * (text["num_attention_heads"] + text["num_key_value_heads"]) * text["head_dim"]
    tower = vision["depth"] * (4 * seen**2 + 2 * seen * vision["intermediate_size"])
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    merged = PATCHES * seen * (PATCHES * seen + vision["out_hidden_size"])
    return {
        "layers": text["num_hidden_layers"] * hidden * (heads + 3 * text["intermediate_size"]),
        "head": hidden * text.get("vocab_size", VOCABULARY),
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
        tokens = pair.prompt + 2 * pair.answer
        return forward(size, (2 + again) * tokens, pair.image, 2 * 2 * pair.answer)
    passes, tokens = 2 + LOSSES[p.train.loss].reference, 2 * (pair.prompt + pair.answer)
    return forward(size, (passes + again) * tokens, 2 * (passes - 1) * pair.image, passes * tokens)


def steps(p: Params, train_pairs: int) -> int:
    """Optimizer steps, as transformers' Trainer counts them."""
    options = p.train.passed_through
    if (most := int(options.get("max_steps", -1))) > 0:
        return most
    pairs = min(train_pairs, int(options.get("max_samples") or train_pairs))
    accumulated = int(options.get("gradient_accumulation_steps", 1))
    batches = math.ceil(pairs / (per_step(p) // accumulated))
    epochs = float(options.get("num_train_epochs", 3.0))
    return math.ceil(epochs * max(1, math.ceil(batches / accumulated)))


def per_step(p: Params) -> int:
    """Pairs of an optimizer's step, over all devices."""
    options = p.train.passed_through
    batch = int(options.get("per_device_train_batch_size", 8))
    return batch * int(options.get("gradient_accumulation_steps", 1)) * p.train.processes


def work(p: Params, size: Size, counts: Counts) -> list[Work]:
    """Of the stages that use the model. Answers are as long as they may be."""
    pair, options, all_steps = counts.pair, p.train.passed_through, steps(p, counts.train)
    scored = forward(size, pair.prompt + 2 * pair.answer, pair.image, 2 * pair.answer)
    every = int(options.get("eval_steps") or options.get("logging_steps") or 500)
    looks = {"steps": all_steps // every, "epoch": math.ceil(options.get("num_train_epochs", 3))}
    watched = looks.get(options.get("eval_strategy", "no"), 0) * counts.validation
    trained = all_steps * per_step(p) * step(p, size, pair) + watched * scored
    everything = counts.train + counts.validation + counts.test
    controls = 2 * min(counts.test, p.evaluate.controls)
    return [
        Work("reference", f"{everything:,} pairs", everything * scored),
        Work("baseline", f"{controls:,} pairs with other images", controls * scored),
        Work("train", f"{all_steps:,} steps of {per_step(p)} pairs", trained),
        Work("evaluate", f"{counts.test + controls:,} pairs", (counts.test + controls) * scored),
        *answers(p, size, counts),
    ]


def answers(p: Params, size: Size, counts: Counts) -> list[Work]:
    """What base and tuned both answer: questions of the data set, and lm-eval's tasks."""
    pair, most = counts.pair, p.evaluate.generation.max_new_tokens
    own = min(counts.test, p.evaluate.generation.prompts)
    own += min(counts.questions, p.evaluate.generation.questions)
    at_once = p.scoring.batch_tokens // (pair.prompt + most)
    asked = [("questions", own, most, at_once, pair.prompt)]
    at_once = p.scoring.batch_tokens // (p.format.image_max_pixels // 28**2 + TEXT)
    for name in tasks(p):
        there, parts, most, _ = published()["tasks"][name]
        number = parts * min(there, p.evaluate.lm_eval[name] or there)
        asked.append((name, number, most, at_once, pair.image + TEXT))
    return [
        Work(
            "baseline, evaluate",
            f"2 x {number:,} answers to {name}, {most} tokens",
            2 * number * forward(size, tokens, pair.image),
            2 * math.ceil(number / max(1, at_once)) * most,
        )
        for name, number, most, at_once, tokens in asked
    ]


def tasks(p: Params) -> list[str]:
    """Of lm-eval's tasks that the parameters name, those whose size is known."""
    return [name for name in p.evaluate.lm_eval if name in published()["tasks"]]


def downloads(p: Params) -> dict[str, tuple[float, float]]:
    """Of the data of lm-eval's tasks, by name: GB to download, and GB unpacked beside that."""
    names = dict.fromkeys(data for task in tasks(p) for data in published()["tasks"][task][3])
    return {name: tuple(mb / 1e3 for mb in published()["benchmarks"][name]) for name in names}


def memory(p: Params, size: Size, dtype: str) -> dict[str, float]:
    """GB (10^9 bytes) of a training process, at a batch of pairs as long as ``format.cutoff_len``
    lets them be. The vision tower's activations are its own and freed."""
    text, shared, options = size["text"], p.train.shared_prefix, p.train.passed_through
    numbers, bits, width = parameters(size), p.model.quantization_bit, BYTES[dtype]
    layers = numbers["layers"] * (QUANTISED[bits] if bits else width)
    batch = int(options.get("per_device_train_batch_size", 8))
    prompt = Pair(image_tokens(p)).prompt
    answered = batch * 2 * max(1, p.format.cutoff_len - prompt)
    tokens = batch * (1 if shared else 2) * prompt + answered
    inside = 8 * text["hidden_size"] + 4 * text["intermediate_size"]
    all_kept = options.get("disable_gradient_checkpointing", False)
    kept = text["num_hidden_layers"] * (inside if all_kept else text["hidden_size"]) + inside
    predicted = min(HEAD_TOKENS, answered) if shared else tokens
    return {
        "weights": (layers + width * (numbers["head"] + numbers["vision"])) / GIGA,
        "activations": width * tokens * kept / GIGA,
        # float32 logits, their log-softmax and gradient
        "logits": 3 * 4 * predicted * text.get("vocab_size", VOCABULARY) / GIGA,
        "other": OTHER_GB if p.train.gpus else 0.0,
    }


def image_tokens(p: Params) -> int:
    """Of an image as large as it may be: 32 by 32 pixels are a token, in Qwen2.5-VL 28 by 28."""
    return max(1, p.format.image_max_pixels // 32**2)


def disk(p: Params, size: Size, data_gb: float) -> dict[str, float]:
    """GB that stay on disk: sources and what is made of them, in the folder and in DVC's cache."""
    return {
        "base model": 4 * sum(parameters(size).values()) / GIGA,
        "data, as published and as pairs": 4 * data_gb,
        "lm-eval's data": sum(map(sum, downloads(p).values())),
        "packages (.venv), adapters": 7.0,
    }


def seconds(p: Params, size: Size, work: Work, gpu: str) -> float:
    """On GPUs of that name. Pairs use all of them, answers one; a token takes as long as reading
    the weights, or as starting the layers."""
    tera, _, bandwidth = published()["gpus"][gpu]
    count = 1 if work.tokens else max(1, p.train.gpus)
    read = memory(p, size, p.scoring.dtype)["weights"] / bandwidth
    token = max(read, LAYER_SECONDS * size["text"]["num_hidden_layers"])
    return work.flop / (tera * TERA * UTILISATION * count) + work.tokens * token


if __name__ == "__main__":
    command.run(main)
