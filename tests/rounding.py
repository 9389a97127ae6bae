"""How this machine rounds in portable arithmetic: a hash of gradients of the demo's model, computed
by transformers alone.

    python -m tests.rounding

It is ``COMMITTED`` on every x86-64 CPU that was tried (benchmarks/PARITY.md), and where it is, the
demo's results come out again to the bit.
"""

import hashlib
import os

from stages.core import portable
from tests.tiny_models import DEMO

COMMITTED = "bc9af2a75179cb40"

IMAGE, SIDE, TOKENS = 6, 8, 64  # the image token; patches of a side; tokens of a row


def main() -> None:
    os.environ |= portable.environment(portable=True)
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
    rows = 16
    patches = rows * SIDE**2
    ids = 20 + torch.arange(rows * TOKENS).reshape(rows, TOKENS) * 7 % 300
    ids[:, 4 : 4 + SIDE**2 // 4] = IMAGE
    width = model.config.vision_config.patch_size**2 * 3 * 2
    loss = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.linspace(-1, 1, patches * width).sin().reshape(patches, width),
        image_grid_thw=torch.tensor([[1, SIDE, SIDE]] * rows),
        labels=ids,
    ).loss
    loss.backward()
    digest = hashlib.sha256(loss.detach().numpy().tobytes())
    for weight in model.parameters():
        if weight.grad is not None:
            digest.update(weight.grad.numpy().tobytes())
    print(digest.hexdigest()[:16])


def cpu() -> str:
    """The name of this machine's CPU."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(
            line.partition(": ")[2] for line in file if line.startswith("model name")
        ).strip()


if __name__ == "__main__":
    main()
