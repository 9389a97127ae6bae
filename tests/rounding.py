"""How this machine rounds: a hash of gradients of the demo's model, computed by transformers alone.

    python -m tests.rounding

Where it is ``COMMITTED``, the curves in ``reports/curves`` come out again to the bit, and a
difference is a change of this project's numerics. Whoever commits curves made elsewhere commits
what the command prints there. The number of threads counts: `make test` runs with
``OMP_NUM_THREADS=1``.
"""

import hashlib

from tests.tiny_models import DEMO

COMMITTED = "595b68a9ae46c796"

# Of the loss, at any step. Without vector instructions (ATEN_CPU_CAPABILITY=default) the demo's
# training moved by 1e-7 at most.
ELSEWHERE = 1e-5

IMAGE, SIDE, TOKENS = 6, 8, 64  # the image token; patches of a side; tokens of a row


def main() -> None:
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


if __name__ == "__main__":
    main()
