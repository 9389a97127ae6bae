"""Tiny models, random pairs, and the plain way that rows of both answers are held against: a row
for each answer and the logits of all positions, as in LLaMA-Factory.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from transformers.models.qwen3_5 import modeling_qwen3_5

from stages.model import prefix
from tests import tiny_models

START, END, IMAGE = 3, 4, 6  # the demo's token ids, which the tiny Qwen2.5-VL takes over
PATCH = {"qwen3_vl": 16, "qwen2_5_vl": 14, "qwen3_5": 16}
CLOSE = 1e-9
BETA = 0.3
WIDE = {"float32": torch.float64}


def tiny(model_dir):
    """Each family by name, in float64, with a LoRA adapter that changes every log-prob."""
    from transformers import Qwen3VLForConditionalGeneration

    qwen3 = Qwen3VLForConditionalGeneration.from_pretrained(model_dir, attn_implementation="sdpa")
    others = {"qwen2_5_vl": tiny_models.random_qwen2_5(), "qwen3_5": tiny_models.random_qwen3_5()}
    return {name: adapted(model) for name, model in {"qwen3_vl": qwen3, **others}.items()}


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_dropout=0.0,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj|in_proj_qkv|in_proj_a)",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    # As the first thing that is trained on is the base, only the adapter has gradients.
    return get_peft_model(model.double().eval(), config)


@contextmanager
def in_float64(model):
    """transformers' norms go through float32, which rounds a sum of gradients otherwise than the
    gradients of a sum; to compare to 1e-9, they stay in float64.
    """

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    norms = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    norms = {kind for kind in norms if not kind.__name__.startswith("Qwen3_5")}  # of other form
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(modeling_qwen3_5, "torch", SimpleNamespace(**vars(torch) | WIDE))
        for kind in norms:
            patch.setattr(kind, "forward", norm)
        yield


def image(seed, rows=2, columns=2):
    """What stands for an image: a name, from which ``Looks`` draws pixels; sides in tokens."""
    return f"{seed}-{rows}-{columns}"


class Looks:
    """``process_images`` for a family; ``seen`` are the images that it was given, call by call."""

    def __init__(self, family):
        self.size = 3 * 2 * PATCH[family] ** 2
        self.seen: list[list[str]] = []

    def __call__(self, names):
        self.seen.append(list(names))
        pixels, grids = [], []
        for name in names:
            seed, rows, columns = map(int, name.split("-"))
            generator = torch.Generator().manual_seed(seed)
            pixels.append(torch.randn(4 * rows * columns, self.size, generator=generator))
            grids.append((1, 2 * rows, 2 * columns))
        return {
            "pixel_values": torch.cat(pixels).double(),
            "image_grid_thw": torch.tensor(grids),
        }


def pair(seed=0, chosen=5, rejected=7, images=(), alike=0, question=6):
    """LLaMA-Factory's features of a pair: ``alike`` tokens begin both answers."""
    generator = np.random.default_rng(seed)

    def words(count):
        return generator.integers(20, 369, count).tolist()

    prompt = words(3)
    for name in images:
        _, rows, columns = map(int, name.split("-"))
        prompt += [START, *[IMAGE] * (rows * columns), END]
    prompt += words(question)
    same = words(alike)
    answers = [same[:chosen] + words(max(chosen - alike, 0)) for _ in range(1)]
    answers.append(same[:rejected] + words(max(rejected - alike, 0)))
    feature: dict[str, list] = {"images": list(images)}
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        feature[f"{side}_input_ids"] = prompt + answer
        feature[f"{side}_attention_mask"] = [1] * len(prompt + answer)
        feature[f"{side}_labels"] = [prefix.IGNORE] * len(prompt) + answer
    return feature


def padded(model, features, process):
    """The plain way's input, a padded row for each answer, chosen first, and the rows' labels."""
    inner = prefix.plain(model)
    sides = [
        (feature[f"{side}_input_ids"], feature[f"{side}_labels"], feature["images"])
        for side in ("chosen", "rejected")
        for feature in features
    ]
    width = max(len(ids) for ids, _, _ in sides) + 3
    input_ids = torch.zeros(len(sides), width, dtype=torch.long)
    labels = torch.full_like(input_ids, prefix.IGNORE)
    mask = torch.zeros_like(input_ids)
    for i, (ids, wanted, _) in enumerate(sides):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, : len(ids)] = torch.tensor(wanted)
        mask[i, : len(ids)] = 1
    names = [name for _, _, images in sides for name in images]
    seen = process(names) if names else {}
    positions, _ = inner.model.get_rope_index(
        input_ids,
        mm_token_type_ids=(input_ids == IMAGE).int(),
        image_grid_thw=seen.get("image_grid_thw"),
        attention_mask=mask,
    )
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": torch.cat([positions[:1], positions]),  # as LLaMA-Factory's collator does
        "use_cache": False,
        **seen,
    }
    return inputs, labels


def one_by_one(model, features, process):
    """Log-probs (2, n) in the plain way: a padded row for each answer, all logits."""
    inputs, labels = padded(model, features, process)
    logits = model(**inputs).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return (logps * (wanted != prefix.IGNORE)).sum(-1).reshape(2, -1)


def shared(model, features, process, **more):
    batch = prefix.pack(features, model, process, **more)
    return prefix.forward(prefix.plain(model), **batch)


def flexed(model, features, process):
    """``shared`` with FlexAttention, not compiled: torch 2.11 has its gradients on a CPU, but
    refuses them.
    """
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations import flex_attention as called

    def plainly(*tensors, training, **more):
        return flex.flex_attention(*tensors, **more)

    if prefix.plain(model).config.model_type == "qwen3_5":
        return shared(model, features, process)  # it has sdpa alone
    prefix.attend(model, prefix.FLEX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_validate_device", lambda *_: None)
        patch.setattr(called, "compile_friendly_flex_attention", plainly)
        output = shared(model, features, process)
    prefix.attend(model, prefix.SDPA)
    return output


def unmasked(segments):
    """The mask of a causal row, in which rejected sees chosen too."""
    width = segments.shape[1]
    return torch.ones(len(segments), 1, width, width, dtype=torch.bool).tril()


def summed(output):
    return output["logps"].sum(-1)


def loss(logps):
    """DPO's, against a reference of log-probs that are all 0; the mean of the batch."""
    return -torch.nn.functional.logsigmoid(BETA * (logps[0] - logps[1])).mean()


def gradients(model, logps):
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    found = torch.autograd.grad(loss(logps), list(weights.values()))
    return torch.cat([gradient.flatten() for gradient in found])


def apart(one, other):
    """The largest difference, relative to the largest number."""
    return float(((one - other).abs().max() / other.abs().max()).detach())


# Random pairs

families = st.sampled_from(sorted(PATCH))
sizes = st.sampled_from([(2, 2), (1, 3), (3, 2)])
images = st.lists(
    st.builds(lambda seed, size: image(seed, *size), st.integers(0, 3), sizes), max_size=2
)


def pairs(longest=30):
    """Pairs with answers of up to so many tokens, that may begin alike, and up to two images."""
    lengths = st.integers(1, 30) | st.integers(1, longest)
    return st.builds(
        pair,
        seed=st.integers(0, 10**6),
        chosen=lengths,
        rejected=lengths,
        images=images,
        alike=st.integers(0, 8),
        question=st.integers(1, 9),
    )
