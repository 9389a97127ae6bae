"""Scoring and a training step with the prompt shared, against LLaMA-Factory's way, side by side.

    python -m benchmarks.prefix
    python -m benchmarks.prefix --size 4b --device-name cuda --dtype bfloat16

Random weights with the shapes and the vocabulary of a real model, as in ``benchmarks.throughput``:
a 512x512 image (256 tokens), a question, two answers. A training step is forward, reference and
backward through LLaMA-Factory's own loss: LoRA of rank 8, gradient checkpointing. Batches are
collated beforehand, so processing of images is not in it. The ways take turns in one process, so
that a busy machine slows all of them; memory is what a step needs on top of the model.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.pipeline import PACKAGES, device
from benchmarks.throughput import IMAGE_SIDE, SIZES, make_model, make_pairs
from stages.core import command
from stages.model import scoring
from stages.pairwise import prefix
from stages.parameters import params

QUESTION = "<image>What is the shape in the image, and which color does it have? Say both."


def main(
    size: str = "100m",
    device_name: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 2,
    answer_tokens: int = 120,
    repeats: int = 5,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_model(model, SIZES[size], device_name, dtype)
        stock, shared = trainers(model, Path(folder, "output"), device_name, dtype)
        rows = make_pairs(Path(folder), stock.processing_class, batch_size, answer_tokens)
        for row in rows:
            row["messages"][0]["content"] = QUESTION
        features = encode(stock, rows, Path(folder))
        batches = {
            "stock": stock._prepare_inputs(stock.data_collator([dict(f) for f in features])),
            "shared": shared._prepare_inputs(shared.data_collator(features)),
        }
    tokens = {name: batch["input_ids"].numel() for name, batch in batches.items()}
    import torch

    with torch.no_grad():
        cached = torch.stack(shared.compute_reference_log_probs(shared.model, batches["shared"]))
    batches["cached"] = batches["shared"] | {"reference": cached}
    scored = side_by_side(
        {
            "LLaMA-Factory": lambda: score(stock, batches["stock"]),
            "prompt shared": lambda: score(shared, batches["shared"]),
        },
        repeats,
    )
    trained = side_by_side(
        {
            "LLaMA-Factory": lambda: step(stock, batches["stock"]),
            "prompt shared": lambda: step(shared, batches["shared"]),
            "prompt shared, reference cached": lambda: step(shared, batches["cached"]),
        },
        repeats,
    )
    parameters = sum(weight.numel() for weight in stock.model.parameters()) / 1e6
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(
        f"\ncommand: python -m benchmarks.prefix --size {size} --device-name {device_name} "
        f"--dtype {dtype} --batch-size {batch_size} --answer-tokens {answer_tokens} "
        f"--repeats {repeats}\n"
        f"device: {device()}; {versions}\n"
        f"{parameters:,.0f} M parameters, {dtype}; {batch_size} pairs with 256 image tokens and "
        f"two answers of {answer_tokens} tokens: {tokens['stock']:,} tokens a batch, "
        f"{tokens['shared']:,} with the prompt shared; medians of {repeats}\n"
    )
    for what, found in (("scoring", scored), ("training step", trained)):
        print(f"| {what} | pairs/s | times LLaMA-Factory | memory, GB |\n|---|---|---|---|")
        reference = found["LLaMA-Factory"][0]
        for name, (seconds, memory) in found.items():
            rate, ratio = batch_size / seconds, reference / seconds
            print(f"| {name} | {rate:.3f} | {ratio:.2f} | {memory:.2f} |")
        print()


def trainers(model_dir: Path, output: Path, device_name: str, dtype: str) -> tuple[Any, Any]:
    """LLaMA-Factory's DPO trainer and the one on shared prompts, of one model with an adapter."""
    from llamafactory.data import PairwiseDataCollatorWithPadding, get_template_and_fix_tokenizer
    from llamafactory.extras.constants import IGNORE_INDEX
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    from stages.tuning.trainer import SharedPrefixTrainer

    pixels = IMAGE_SIDE * IMAGE_SIDE
    p = params.load(Path("params/demo.yaml"))
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(
        {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": str(model_dir),
            "template": p.model.template,
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

    return build(CustomDPOTrainer), build(SharedPrefixTrainer)


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
    policy: Any = SimpleNamespace(pairwise=processor)
    return scoring.encode(policy, rows, folder)


def score(trainer: Any, batch: dict[str, Any]) -> None:
    import torch

    if "segments" in batch:
        prefix.log_probs(trainer.model, batch)
        return
    with torch.inference_mode():
        trainer.concatenated_forward(trainer.model, batch)


def step(trainer: Any, batch: dict[str, Any]) -> None:
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    trainer.model.zero_grad()


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


def peak_memory(restart: bool = False) -> float:
    """The most memory used since the last restart (GB), of the GPU or of this process (Linux)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated()) / 2**30
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    command.run(main)
