"""Scoring pairs, against LLaMA-Factory's evaluation with a reference model, side by side.

    python -m benchmarks.score
    python -m benchmarks.score --size 4b --device-name cuda --dtype bfloat16 --pairs 64

Models and pairs are those of ``benchmarks.train``. LLaMA-Factory's way is ``do_eval`` of a DPO
training: ``trainer.evaluate``, which computes policy and reference. Ours is what the stage
``evaluate`` runs, ``stages.model.scoring``: the reference is in ``data/reference`` by then, so
there is a row without it and one with it. Each starts from images on disk; LLaMA-Factory's pairs
are tokenized beforehand, ours are not.
"""

import tempfile
from pathlib import Path

from benchmarks import flops
from benchmarks.pipeline import stack
from benchmarks.throughput import SIZES, make_model, make_pairs, parameters_of
from benchmarks.train import QUESTION, encode, matmul_rate, side_by_side, side_of, trainers
from stages.core import command
from stages.model import scoring


def main(
    size: str = "100m",
    device_name: str = "cpu",
    dtype: str = "float32",
    pairs: int = 8,
    batch_size: int = 2,
    image_tokens: int = 256,
    answer_tokens: int = 120,
    repeats: int = 3,
    model: str = "",
) -> None:
    import torch
    from datasets import Dataset

    p = parameters_of(device_name, dtype, side_of(image_tokens) ** 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = Path(model or folder, "model")
        make_model(model_dir, SIZES[size], device_name, dtype)
        stock, *_ = trainers(model_dir, folder / "output", image_tokens, device_name, dtype)
        stock.model.save_pretrained(folder / "adapter")
        base = scoring.load(model_dir, p)
        tuned = scoring.load(model_dir, p, folder / "adapter")
        rows = make_pairs(
            folder, stock.processing_class, pairs, answer_tokens, side_of(image_tokens)
        )
        for row in rows:
            row["messages"][0]["content"] = QUESTION
        data = Dataset.from_list(encode(stock, rows, folder))
        stock.args.per_device_eval_batch_size = batch_size
        # A batch of ours has as many pairs, so that memory can be compared.
        batch_tokens = batch_size * (len(data[0]["chosen_input_ids"]) + answer_tokens + 8)

        def scored(*policies: scoring.Policy) -> None:
            for policy in policies:
                scoring.log_probs(policy, rows, folder, batch_tokens=batch_tokens, label="scoring")

        found = side_by_side(
            {
                "LLaMA-Factory": lambda: stock.evaluate(eval_dataset=data),
                "ours, policy and reference": lambda: scored(tuned, base),
                "ours, policy (reference cached)": lambda: scored(tuned),
            },
            repeats,
        )
        question = len(data[0]["chosen_input_ids"]) - image_tokens - answer_tokens
    rate = matmul_rate(base.model.device, getattr(torch, dtype))
    pair = flops.Pair(image_tokens, question, answer_tokens)
    needed = flops.score(SIZES[size], pair, shared=True)
    print(
        f"\ncommand: python -m benchmarks.score --size {size} --device-name {device_name} "
        f"--dtype {dtype} --pairs {pairs} --batch-size {batch_size} "
        f"--image-tokens {image_tokens} --answer-tokens {answer_tokens} --repeats {repeats}\n"
        f"{stack()}\n"
        f"matrix products: {rate / flops.TERA:.2f} TFLOP/s; needed: {needed / flops.TERA:.3f} "
        "TFLOP a pair\n\n"
        "| scoring | pairs/s | times LLaMA-Factory | memory, GB | used |\n|---|---|---|---|---|"
    )
    first = found["LLaMA-Factory"][0]
    for way, (seconds, memory) in found.items():
        print(
            f"| {way} | {pairs / seconds:.3f} | {first / seconds:.2f} | {memory:.2f} "
            f"| {pairs * needed / seconds / rate:.0%} |"
        )


if __name__ == "__main__":
    command.run(main)
