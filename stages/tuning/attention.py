"""The attention of a training, chosen by measuring.

With a mask, torch's sdpa can't use its FlashAttention. FlexAttention is compiled for the mask and
skips blocks that nobody sees, such as rejected against chosen. Which is faster depends on the GPU
and on the lengths, so both take a few steps first. In torch 2.11 FlexAttention has no backward on a
CPU, where sdpa stays.
"""

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from stages.model import prefix

ATTENTION = "TRAINING_ATTENTION"  # in the environment: the way to take, without measuring
WIDE = 1024  # tokens of a row; below, attention is less of a step than compiling would cost
STEPS, GRADIENTS = 3, 0.1  # steps by each way; how much the norm of gradients may differ


def choose(
    trainer: Any, features: Sequence[Any], *, told: Mapping[str, Any], allowed: float
) -> dict[str, Any]:
    """Let the trainer's model attend by the faster way, and say which. Empty: sdpa, unmeasured.

    Args:
        features: pairs of a micro-batch.
        told: what the start of a training that is resumed found; it stays.
        allowed: nats by which an answer's log-prob may differ between the ways.
    """
    way = told.get("attention") or os.environ.get(ATTENTION)
    found: dict[str, Any] = {}
    ways = prefix.attentions(trainer.model)
    if len(ways) < 2 or not (way or trainer.model.device.type == "cuda"):
        return found
    if not way:
        batch = trainer._prepare_inputs(trainer.data_collator(features))
        if batch["input_ids"].shape[1] < WIDE:
            return found
        seconds = measured(trainer, batch, allowed)
        way = min(seconds, key=seconds.__getitem__)
        found["attention_seconds"] = {each: t for each, t in seconds.items() if t < math.inf}
    prefix.attend(trainer.model, way)
    return found | {"attention": way}


def measured(trainer: Any, batch: Mapping[str, Any], allowed: float) -> dict[str, float]:
    """Seconds of forward and backward by each way: the median after a first step, which compiles,
    and the mean over processes. Infinity: it fails, or its log-probs or gradients are not sdpa's.
    """
    import torch

    model, first, seconds = trainer.model, None, {}
    inputs = {name: tensor for name, tensor in batch.items() if name != "reference"}
    for way in prefix.ATTENTIONS:
        prefix.attend(model, way)
        try:
            times = [time.perf_counter()]
            for _ in range(STEPS + 1):
                with trainer.compute_loss_context_manager():
                    logps = model(**inputs)["logps"].sum(dim=-1)
                logps.sum().backward()
                norms = [each.grad.norm() for each in model.parameters() if each.grad is not None]
                norm = float(torch.stack(norms).norm())  # waits for a GPU
                model.zero_grad()
                times.append(time.perf_counter())
            first = first or (logps.detach(), norm)
            apart = float((logps.detach() - first[0]).abs().max())
            agree = apart <= allowed and abs(norm / first[1] - 1) <= GRADIENTS
            taken = statistics.median(b - a for a, b in pairwise(times[1:]))
        except Exception as error:  # of many kinds: a compiler's, the driver's, too little memory
            print(f"{way} can't be used: {' '.join(str(error).split())[:300]}", flush=True)
            taken, agree = math.inf, False
        # The mean with infinity is infinity: a way that fails in one process is none for all.
        here = torch.tensor(taken if agree else math.inf, device=model.device)
        seconds[way] = round(float(trainer.accelerator.reduce(here, "mean")), 4)
    return seconds
