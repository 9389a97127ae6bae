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
    if prefix.why_apart(trainer.model):
        return {}
    seconds: dict[str, float] = {}
    way = told.get("attention") or os.environ.get(ATTENTION)
    if not way:
        if trainer.model.device.type != "cuda":
            return {}
        batch = trainer._prepare_inputs(trainer.data_collator(features))
        if batch["input_ids"].shape[1] < WIDE:
            return {}
        seconds = measured(trainer, batch, allowed)
        way = min(seconds, key=seconds.__getitem__)
    prefix.attend(trainer.model, way)
    finite = {each: taken for each, taken in seconds.items() if taken < math.inf}
    return {"attention": way, "attention_seconds": finite}


def measured(trainer: Any, batch: Mapping[str, Any], allowed: float) -> dict[str, float]:
    """Seconds of forward and backward by each way, the mean over processes; infinity where it fails
    or gives other log-probs or gradients than the first.
    """
    import torch

    first, seconds = None, {}
    for way in prefix.ATTENTIONS:
        prefix.attend(trainer.model, way)
        try:
            taken, logps, norm = _steps(trainer, batch)
            first = first or (logps, norm)
            apart = float((logps - first[0]).abs().max())
            agree = apart <= allowed and abs(norm / first[1] - 1) <= GRADIENTS
        except Exception as error:  # of many kinds: a compiler's, the driver's, too little memory
            print(f"{way} can't be used: {' '.join(str(error).split())[:300]}", flush=True)
            taken, agree = math.inf, False
        # The mean with infinity is infinity: a way that fails in one process is none for all.
        here = torch.tensor(taken if agree else math.inf, device=trainer.model.device)
        seconds[way] = round(float(trainer.accelerator.reduce(here, "mean")), 4)
    return seconds


def _steps(trainer: Any, batch: Mapping[str, Any]) -> tuple[float, Any, float]:
    """Median seconds of forward and backward after a first one, which compiles; the log-probs
    (2, n) of the answers; the norm of the gradients.
    """
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name != "reference"}
    taken = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        with trainer.compute_loss_context_manager():
            logps = trainer.model(**inputs)["logps"].sum(dim=-1)
        logps.sum().backward()
        norms = [each.grad.norm() for each in trainer.model.parameters() if each.grad is not None]
        norm = float(torch.stack(norms).norm())  # waits for a GPU
        trainer.model.zero_grad()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]), logps.detach(), norm
