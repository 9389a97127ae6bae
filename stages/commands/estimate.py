"""Steps, work, memory, disk and hours of the parameters' run, from its pairs and the model's size.

Everything here is an estimate by arithmetic, made to decide which machine to rent. What is left
out is said where it is left out.
"""

import math
from dataclasses import dataclass

from stages.commands import flops
from stages.commands.flops import GIGA, Pair, Size, Way
from stages.params.losses import LOSSES
from stages.params.params import Params

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED = {4: 0.56, 8: 1.05}  # bytes of a number in bitsandbytes' NF4 or int8, with its scales
TRAINED = 16  # bytes of a trained number: float32 weight, gradient, and Adam's two averages
HEAD_TOKENS = 256  # of stages.model.prefix.CHUNK
CONTEXT_GB = 1.0  # CUDA's context, its kernels and what its allocator can't use


@dataclass(frozen=True)
class Gpu:
    """``tera``: peak of dense matrix products in bfloat16, TFLOP/s; ``memory_gb``: 10^9 bytes."""

    name: str
    tera: float
    memory_gb: float


# From NVIDIA's data sheets, without sparsity.
GPUS = (
    Gpu("RTX 4090", 165, 24),
    Gpu("L40S", 362, 48),
    Gpu("A100 80GB", 312, 80),
    Gpu("H100", 989, 80),
    Gpu("H200", 989, 141),
)


@dataclass(frozen=True)
class Counts:
    """Pairs of each split, and the tokens of a typical pair and of the longest."""

    train: int
    validation: int
    test: int
    typical: Pair
    longest: Pair

    @property
    def all(self) -> int:
        return self.train + self.validation + self.test


@dataclass(frozen=True)
class Work:
    """What a stage does: ``pairs`` that go through the model, ``tokens``, and its ``flop``."""

    stage: str
    pairs: int
    tokens: float
    flop: float


def per_step(p: Params) -> int:
    """Pairs of an optimizer's step, over all devices."""
    options = p.train.passed_through
    batch = int(options.get("per_device_train_batch_size", 8))
    return batch * int(options.get("gradient_accumulation_steps", 1)) * p.train.processes


def steps(p: Params, train_pairs: int) -> int:
    """Optimizer steps, as transformers' Trainer counts them."""
    options = p.train.passed_through
    if (most := int(options.get("max_steps", -1))) > 0:
        return most
    pairs = min(train_pairs, int(options.get("max_samples") or train_pairs))
    batch = int(options.get("per_device_train_batch_size", 8)) * p.train.processes
    batches = math.ceil(pairs / batch)
    an_epoch = max(1, math.ceil(batches / int(options.get("gradient_accumulation_steps", 1))))
    return math.ceil(float(options.get("num_train_epochs", 3.0)) * an_epoch)


def way(p: Params) -> Way:
    """How a training step of these parameters is computed."""
    shared = p.train.shared_prefix
    checkpointing = not p.train.passed_through.get("disable_gradient_checkpointing", False)
    if not shared:
        free = not LOSSES[p.train.loss].reference
        return Way(False, free, 2 if free else 4, False, checkpointing)
    return Way(True, True, int(not p.train.keep_vision_features), True, checkpointing)


def work(p: Params, size: Size, counts: Counts) -> list[Work]:
    """Of the stages that use the model. Generated answers and lm-eval's tasks are left out: what
    they take is bound by memory, and depends on what is said."""
    pair, how = counts.typical, way(p)
    row = pair.prompt + 2 * pair.answer
    scored = flops.score(size, pair, shared=True)
    trained = steps(p, counts.train) * per_step(p)
    stepped = sum(flops.step(size, pair, how).values())
    watched = validations(p, steps(p, counts.train)) * counts.validation
    controls = 2 * min(counts.test, p.evaluate.controls)

    def scoring(stage: str, pairs: int) -> Work:
        return Work(stage, pairs, pairs * row, pairs * scored)

    in_training = row if how.shared else 2 * (pair.prompt + pair.answer)
    return [
        scoring("reference", counts.all),
        scoring("baseline", controls),
        Work(
            "train",
            trained + watched,
            (trained + watched) * in_training,
            trained * stepped + watched * flops.score(size, pair, shared=how.shared),
        ),
        scoring("evaluate", counts.test + controls),
    ]


def validations(p: Params, all_steps: int) -> int:
    """How often the validation split is looked at during training."""
    options = p.train.passed_through
    strategy = options.get("eval_strategy", "no")
    if strategy == "epoch":
        return math.ceil(float(options.get("num_train_epochs", 3.0)))
    every = int(options.get("eval_steps") or options.get("logging_steps") or 500)
    return all_steps // every if strategy == "steps" else 0


def memory(p: Params, size: Size, pair: Pair, dtype: str) -> dict[str, float]:
    """GB (10^9 bytes) of a training process whose batch holds pairs of that length: ``weights``,
    ``optimizer`` (what is trained, its gradients and Adam's averages), ``activations``, ``logits``,
    and ``context``. A batch of one device; the vision tower's activations are its own and freed.
    """
    text, how = size["text"], way(p)
    numbers, bits = flops.parameters(size), p.model.quantization_bit
    width = BYTES[dtype]
    layers = numbers["layers"] * (QUANTISED[bits] if bits else width)
    batch = int(p.train.passed_through.get("per_device_train_batch_size", 8))
    row = pair.prompt + 2 * pair.answer if how.shared else 2 * (pair.prompt + pair.answer)
    tokens = batch * row
    inside = 8 * text["hidden_size"] + 4 * text["intermediate_size"]
    kept = text["hidden_size"] if how.checkpointing else inside
    rows = min(HEAD_TOKENS, 2 * batch * pair.answer) if how.answers_only else tokens
    vocabulary = text.get("vocab_size", flops.VOCABULARY)
    rank = int(p.train.passed_through.get("lora_rank", 8))
    return {
        name: number / GIGA
        for name, number in {
            "weights": layers + width * (numbers["head"] + numbers["vision"]),
            "optimizer": TRAINED * flops.adapter_parameters(size, rank),
            "activations": width * tokens * (text["num_hidden_layers"] * kept + inside),
            # float32 logits, their log-softmax and gradient
            "logits": 3 * 4.0 * rows * vocabulary,
            "context": CONTEXT_GB * GIGA if p.train.gpus else 0.0,
        }.items()
    }


def disk(p: Params, size: Size, data_bytes: float) -> dict[str, float]:
    """GB that stay on disk: sources and what is made of them, in the folder and in DVC's cache."""
    weights = 2.0 * sum(flops.parameters(size).values())
    rank = int(p.train.passed_through.get("lora_rank", 8))
    adapter = 4 * flops.adapter_parameters(size, rank)
    kept = 1 + int(p.train.passed_through.get("save_total_limit") or 10)
    return {
        name: number / GIGA
        for name, number in {
            "base model": 2 * weights,
            "data, as published and as pairs": 4 * data_bytes,
            "adapter and checkpoints": 2 * adapter + 3 * kept * adapter,
            "packages (.venv)": 6 * GIGA,
        }.items()
    }


def hours(flop: float, gpu: Gpu, utilisation: float, gpus: int) -> float:
    """Hours at a share ``utilisation`` of the peak, on so many GPUs."""
    return flop / (gpu.tera * flops.TERA * utilisation * max(1, gpus)) / 3600


def named(device: str) -> Gpu | None:
    """The known GPU of a device's name in the diary ("1 x NVIDIA H200"), the longest match."""
    fits = [gpu for gpu in GPUS if all(word in device for word in gpu.name.split())]
    return max(fits, key=lambda gpu: len(gpu.name), default=None)
