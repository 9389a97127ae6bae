"""A training step with each switch for speed, against LLaMA-Factory's, side by side.

    python -m benchmarks.train
    python -m benchmarks.train --size 100m-3.5        # Qwen3.5's architecture
    python -m benchmarks.train --size 4b --device-name cuda --dtype bfloat16 --image-tokens 576

Random weights with the shapes and the vocabulary of a real model, as in ``benchmarks.throughput``:
an image, a question, two answers. A step is forward, reference and backward through
LLaMA-Factory's own loss: LoRA of rank 8, gradient checkpointing. Batches are collated beforehand,
so processing of images is not in it. The ways take turns in one process, so that a busy machine
slows all of them; memory is what a step needs on top of the model.

``used`` is the share of the device's rate of plain matrix products, measured here, that goes into
what the task needs (``benchmarks.flops``): each token once, no reference, nothing computed again.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks import flops
from benchmarks.peer import peak_memory
from benchmarks.pipeline import stack
from benchmarks.throughput import SIZES, make_model, make_pairs
from stages.core import command
from stages.families import known
from stages.model import prefix, scoring

QUESTION = "<image>What is the shape in the image, and which color does it have? Say both."
TOKEN_SIDE = 32  # pixels
NEEDED = flops.Way(shared=True, cached=True, vision=1, answers_only=True, checkpointing=False)


def main(
    size: str = "100m",
    device_name: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 2,
    image_tokens: int = 256,
    answer_tokens: int = 120,
    repeats: int = 5,
    model: str = "",
) -> None:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(model or folder, "model")
        make_model(model_dir, SIZES[size], device_name, dtype)
        stock, ours, view = trainers(
            model_dir, Path(folder, "output"), image_tokens, device_name, dtype
        )
        rows = make_pairs(
            Path(folder), stock.processing_class, batch_size, answer_tokens, side_of(image_tokens)
        )
        for row in rows:
            row["messages"][0]["content"] = QUESTION
        features = encode(stock, rows, Path(folder))
        two_rows = stock._prepare_inputs(stock.data_collator([dict(f) for f in features]))
        one_row = ours._prepare_inputs(ours.data_collator(features))
        with torch.no_grad():
            reference = torch.stack(ours.compute_reference_log_probs(ours.model, one_row))
        cached = one_row | {"reference": reference}
        viewed = view._prepare_inputs(view.data_collator(features))
        viewed["reference"] = torch.cat([reference, reference[:1]])
        found = side_by_side(
            {
                "LLaMA-Factory": partial(step, stock, two_rows),
                "reference cached": with_reference(stock, two_rows, reference),
                "prompt shared, reference computed": partial(step, ours, one_row),
                "prompt shared, reference cached": partial(step, ours, cached),
                "the same, all logits": partial(with_all_logits, ours, cached),
                "the same, no checkpointing": partial(without_checkpointing, ours, cached),
                "mDPO, prompt shared, reference cached": partial(step, view, viewed),
            },
            repeats,
        )
    rate = matmul_rate(stock.model.device, getattr(torch, dtype))
    question = two_rows["attention_mask"][0].sum().item() - image_tokens - answer_tokens
    pair = flops.Pair(image_tokens, question, answer_tokens)
    needed = sum(flops.step(SIZES[size], pair, NEEDED).values())
    parameters = sum(weight.numel() for weight in stock.model.parameters()) / 1e6
    print(
        f"\ncommand: python -m benchmarks.train --size {size} --device-name {device_name} "
        f"--dtype {dtype} --batch-size {batch_size} --image-tokens {image_tokens} "
        f"--answer-tokens {answer_tokens} --repeats {repeats}\n"
        f"{stack()}\n"
        f"{parameters:,.0f} M parameters, {dtype}; {batch_size} pairs with {image_tokens} image "
        f"tokens and two answers of {answer_tokens} tokens: {two_rows['input_ids'].numel():,} "
        f"tokens a batch, {one_row['input_ids'].numel():,} with the prompt shared; medians of "
        f"{repeats}\n"
        f"matrix products: {rate / flops.TERA:.2f} TFLOP/s; needed: {needed / flops.TERA:.3f} "
        f"TFLOP a pair\n\n"
        "| training step | pairs/s | times LLaMA-Factory | memory, GB | used |\n"
        "|---|---|---|---|---|"
    )
    first = found["LLaMA-Factory"][0]
    for name, (seconds, memory) in found.items():
        print(
            f"| {name} | {batch_size / seconds:.3f} | {first / seconds:.2f} | {memory:.2f} "
            f"| {batch_size * needed / seconds / rate:.0%} |"
        )


def side_of(image_tokens: int) -> int:
    """Pixels of the side of a square image of so many tokens."""
    side = round(image_tokens**0.5)
    if side**2 != image_tokens:
        raise ValueError(f"{image_tokens} image tokens are no square")
    return TOKEN_SIDE * side


def trainers(
    model_dir: Path, output: Path, image_tokens: int, device_name: str, dtype: str
) -> tuple[Any, Any, Any]:
    """LLaMA-Factory's DPO trainer, the one on shared prompts, and that with mDPO's loss, of one
    model with an adapter.
    """
    from llamafactory.data import PairwiseDataCollatorWithPadding, get_template_and_fix_tokenizer
    from llamafactory.extras.constants import IGNORE_INDEX
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    from stages.tuning.trainer import SharedPrefixTrainer

    pixels = side_of(image_tokens) ** 2
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(
        {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": str(model_dir),
            "template": known.of_model(model_dir).templates[0],
            "dataset": "none",
            "cutoff_len": 4096,
            "image_max_pixels": pixels,
            "image_min_pixels": pixels,
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_target": "all",
            "bf16": dtype == "bfloat16",
            "use_cpu": device_name == "cpu",
            "output_dir": str(output),
            "report_to": "none",
        }
    )
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    model = load_model(module["tokenizer"], model_args, finetuning_args, is_trainable=True).train()

    def build(kind: Any) -> Any:
        made = kind(
            model=model,
            ref_model=None,
            args=training_args,
            finetuning_args=finetuning_args,
            data_collator=PairwiseDataCollatorWithPadding(
                template=template,
                model=model,
                pad_to_multiple_of=8,
                label_pad_token_id=IGNORE_INDEX,
                **module,
            ),
            **module,
        )
        made.data_args = data_args
        return made

    class Mdpo(SharedPrefixTrainer):
        view = "cropped"

    return build(CustomDPOTrainer), build(SharedPrefixTrainer), build(Mdpo)


def encode(trainer: Any, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """LLaMA-Factory's pairwise features of formatted pairs."""
    from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor

    collator = trainer.data_collator
    processor = PairwiseDatasetProcessor(
        template=collator.template,
        tokenizer=collator.tokenizer,
        processor=collator.processor,
        data_args=trainer.data_args,
    )
    policy: Any = SimpleNamespace(
        template=collator.template, processor=collator.processor, pairwise=processor
    )
    return scoring.encode(policy, rows, folder)


def step(trainer: Any, batch: dict[str, Any]) -> None:
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    trainer.model.zero_grad()


def with_reference(stock: Any, batch: dict[str, Any], reference: Any) -> Callable[[], None]:
    """A step of LLaMA-Factory's trainer that looks the reference up."""

    def work() -> None:
        with mock.patch.object(stock, "compute_reference_log_probs", return_value=tuple(reference)):
            step(stock, batch)

    return work


def with_all_logits(ours: Any, batch: dict[str, Any]) -> None:
    """A step with one chunk for the head, which it then holds in float32."""
    with mock.patch.object(prefix, "CHUNK", batch["input_ids"].numel()):
        step(ours, batch)


def without_checkpointing(ours: Any, batch: dict[str, Any]) -> None:
    layers = [m for m in ours.model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        step(ours, batch)
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def matmul_rate(device: Any, dtype: Any, repeats: int = 10) -> float:
    """FLOP/s of a large matrix product: the median."""
    import torch

    side = 8192 if torch.device(device).type == "cuda" else 2048
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for turn in range(repeats + 1):
        peak_memory()  # waits for a GPU
        start = time.perf_counter()
        one @ other
        peak_memory()
        if turn:
            seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / statistics.median(seconds)


def side_by_side(
    ways: dict[str, Callable[[], None]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Median seconds and peak memory (GB) of each way, after one turn that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            before = peak_memory(restart=True)
            start = time.perf_counter()
            work()
            memory_after = peak_memory()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                memory[name] = max(memory.get(name, 0.0), memory_after - before)
    return {name: (statistics.median(taken), memory[name]) for name, taken in seconds.items()}


if __name__ == "__main__":
    command.run(main)
