"""What a training step holds on fake tensors, beside arithmetic and beside a step on real ones.

    python -m benchmarks.memory
    python -m benchmarks.memory --size 100m --image-tokens 256 --answer-tokens 120

The first line is for the presets of one GPU, at a batch of pairs as long as ``format.cutoff_len``
allows (``planning.step_memory``, as in ``make plan``). The second runs the same step on the
CPU in float32: *allocated* is what torch's own allocator hands out, by its profiler. *Process* is
what the kernel counts, with libraries' work space and what the C library keeps of freed blocks;
both were small once a first step had loaded the libraries and freed blocks went back at once.
"""

import ctypes
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from benchmarks.peer import peak_memory
from benchmarks.throughput import SIZES
from stages.commands.planning import step_memory
from stages.commands.planning.dimensions import GIGA, VOCABULARY, Pair, Size, batch, image_tokens
from stages.core import command
from stages.model.prefix import CHUNK
from stages.params.params import Params
from stages.tuning import config
from tests.contracts import PRESETS, preset_of

ONE_GPU = ("qwen3-vl-4b", "qwen3-vl-4b-24gb")
MMAP_THRESHOLD = -3  # of glibc's mallopt
WAYS: dict[str, tuple[bool, bool]] = {  # one row for both answers, activations kept
    "LLaMA-Factory's": (False, False),
    "ours": (True, False),
    "ours, without checkpointing": (True, True),
}


def with_train(p: Params, **changed: Any) -> Params:
    return p.model_copy(update={"train": p.train.model_copy(update=changed)})


def longest(p: Params) -> Pair:
    """The longest pair that ``format`` keeps."""
    image = image_tokens(p)
    return Pair(image, answer=p.format.cutoff_len - Pair(image).prompt)


def arithmetic(p: Params, size: Size, pair: Pair, *, kept: bool) -> float:
    """Bytes of activations and logits. Per layer by what its products keep; the vision tower's
    activations are its own and freed."""
    text, ours = size["text"], p.train.shared_prefix
    width = getattr(torch, config.dtype(p)).itemsize
    answered = batch(p) * 2 * pair.answer
    tokens = batch(p) * (1 if ours else 2) * pair.prompt + answered
    # In 16 bits what adapters read is kept twice.
    inside = 8 * text["hidden_size"] + (8 if width == 2 else 5) * text["intermediate_size"]
    layers = text["num_hidden_layers"] * (inside if kept else text["hidden_size"]) + inside
    predicted = min(CHUNK, answered) if ours else tokens
    # float32 logits, their log-softmax and gradient
    logits = 3 * 4 * predicted * text.get("vocab_size", VOCABULARY)
    return float(width * tokens * layers + logits)


def on_real_tensors(p: Params, size: Size, pair: Pair, *, kept: bool) -> tuple[float, float]:
    """Bytes beside the weights at the peak of a second step on the CPU: of torch's allocator, and
    of the process."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)  # freed tensors go back to the kernel
    _, step = step_memory.prepared(p, size, pair, kept=kept)
    step()
    before = peak_memory(restart=True)
    step()
    process = (peak_memory() - before) * 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    waiting, peak = list(watched.profiler.kineto_results.experimental_event_tree()), 0
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            peak = max(peak, event.extra_fields.total_allocated)
    return peak, process


def main(
    size: str = "",
    image_tokens: int = 256,
    question_tokens: int = 40,
    answer_tokens: int = 120,
    batch_size: int = 2,
) -> None:
    presets = {path.stem: preset_of(path) for path in PRESETS}
    if size:
        pair = Pair(image_tokens, question_tokens, answer_tokens)
        print("| a step, GB beside the weights | fake | allocated | process |\n|---|---|---|---|")
        for name, (shared, kept) in WAYS.items():
            options = {"shared_prefix": shared, "per_device_train_batch_size": batch_size}
            p = with_train(presets["demo"], **options)
            fake = step_memory.measured(p, SIZES[size], pair, kept=kept)
            found = (fake, *on_real_tensors(p, SIZES[size], pair, kept=kept))
            shown = " | ".join(f"{each / GIGA:.3f}" for each in found)
            print(f"| {name} | {shown} |", flush=True)
        return
    print("| a step, GB beside the weights | fake tensors | arithmetic |\n|---|---|---|")
    for preset in ONE_GPU:
        for name, (shared, kept) in WAYS.items():
            p = with_train(presets[preset], shared_prefix=shared)
            given = (p, SIZES["4b"], longest(p))
            both = (f(*given, kept=kept) / GIGA for f in (step_memory.measured, arithmetic))
            print(f"| `{preset}`, {name} | {' | '.join(f'{gb:.1f}' for gb in both)} |", flush=True)
    print("\n| pairs at a time, ours | GB |\n|---|---|")
    for pairs in (1, 2, 4, 8):
        p = with_train(presets[ONE_GPU[0]], per_device_train_batch_size=pairs)
        held = step_memory.measured(p, SIZES["4b"], longest(p), kept=False)
        print(f"| {pairs} | {held / GIGA:.2f} |", flush=True)


if __name__ == "__main__":
    command.run(main)
