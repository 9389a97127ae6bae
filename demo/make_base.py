"""Makes the embedded default's base model: a tiny real Qwen3-VL that sees, but hallucinates.

Out: ``demo/model``, a model folder as the Hub would serve it (under 4 MB). Images, questions and
habits come from ``demo.scenes``; no published image is used.

Three phases, because seeing is the slow part and everything else depends on it: the vision tower
learns to name colour and shape by itself; the language model learns to answer truly; then it learns
to answer as one with habits would. The last phase is what preference tuning can undo.
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from demo import scenes
from stages.sources import topics
from stages.sources.topics import COLOURS, SHAPES

# As in Qwen3-VL's own tokenizer, as far as an image chat needs them.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PIXELS = 128 * 128  # an image is enlarged to this: 64 patches of 16 by 16, 16 tokens
IMAGE_TOKENS = 16
PATCHING = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
NORMALISED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# The one text and image branch of Qwen's chat template that the demo needs.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(out: Path, report: Path) -> None:
    knobs = YAML(typ="safe").load(Path("demo/params.yaml"))["base"]
    make_deterministic(knobs["seed"], knobs["threads"])
    generator = np.random.default_rng(knobs["seed"])
    processor = make_processor()
    model = make_model(processor.tokenizer)
    drawn = [scenes.draw(generator) for _ in tqdm(range(knobs["images"]), desc="drawing")]
    pixels = torch.from_numpy(np.stack([enlarged(image) for image, _ in drawn]))
    shown = [scene for _, scene in drawn]

    learn_to_see(model, pixels, shown, generator, knobs)
    seen = look(model, pixels)
    learn_to_answer(model, processor.tokenizer, seen, shown, generator, knobs, habits=False)
    learn_to_answer(model, processor.tokenizer, seen, shown, generator, knobs, habits=True)
    save(model, processor, out)
    report.write_text(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}) + "\n")


def make_deterministic(seed: int, threads: int) -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    random.seed(seed)


def make_processor() -> Qwen3VLProcessor:
    """A processor of Qwen3-VL's own classes around a small byte-level BPE tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        scenes.vocabulary(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **PATCHING, **NORMALISED),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size, **PATCHING, **NORMALISED),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL's architecture, every part of it, a few hundred times narrower."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    return Qwen3VLForConditionalGeneration(config)


def enlarged(image: Any) -> np.ndarray:
    """An image as LLaMA-Factory hands it to the processor: (128, 128, 3), 8 bits a channel."""
    side = math.isqrt(PIXELS)
    return np.asarray(image.resize((side, side)))


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """What the image processor makes of enlarged images.

    (n, 128, 128, 3) bytes become (n · 64, 1536) floats: patches ordered by merged squares of four,
    each with its channels, its two (equal) frames, its rows and its columns.
    """
    values = (pixels.float() / 255 - 0.5) / 0.5
    blocks = values.reshape(-1, 4, 2, 16, 4, 2, 16, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return (
        blocks.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * 16 * 16)
    )


def grid(count: int) -> torch.Tensor:
    """Frames, rows and columns of patches of each of ``count`` images, (count, 3)."""
    return torch.tensor([[1, 8, 8]]).expand(count, 3)


def steps(parameters: Any, count: int, rate: float, label: str) -> Iterator[torch.optim.Optimizer]:
    """An optimizer for each step, its rate warmed up and then lowered along a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in tqdm(range(count), desc=label):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / count))
        yield optimizer


def learn_to_see(
    model: Any, pixels: torch.Tensor, shown: list[Any], generator: Any, knobs: dict[str, Any]
) -> None:
    """The vision tower names colour and shape from the mean of its tokens."""
    tower = model.model.visual
    heads = torch.nn.Linear(128, len(COLOURS) + len(SHAPES))
    colours = torch.tensor([COLOURS.index(s.colour) for s in shown])
    shapes = torch.tensor([SHAPES.index(s.shape) for s in shown])
    parameters = [*tower.parameters(), *heads.parameters()]
    for i, optimizer in enumerate(
        steps(parameters, knobs["seeing_steps"], knobs["seeing_rate"], "seeing")
    ):
        rows = torch.from_numpy(generator.integers(0, len(shown), knobs["seeing_batch"]))
        seen = tower(patches(pixels[rows]), grid(len(rows)))
        found = heads(seen.pooler_output.reshape(len(rows), IMAGE_TOKENS, -1).mean(1))
        colour, shape = found.split([len(COLOURS), len(SHAPES)], dim=1)
        loss = F.cross_entropy(colour, colours[rows]) + F.cross_entropy(shape, shapes[rows])
        update(optimizer, loss, parameters)
        if i % 100 == 99:
            named = [
                (p.argmax(1) == t[rows]).float().mean().item()
                for p, t in ((colour, colours), (shape, shapes))
            ]
            tqdm.write(f"seeing {i + 1}: colour {named[0]:.2f}, shape {named[1]:.2f}")


@dataclass(frozen=True)
class Seen:
    """What the vision tower makes of n images: each tensor has shape (n, 16, 128).

    ``tokens`` stand in for the image tokens, ``deep`` is added after the first layer (DeepStack).
    """

    tokens: torch.Tensor
    deep: torch.Tensor


def look(model: Any, pixels: torch.Tensor) -> Seen:
    """All images through the vision tower, once: from here on it stays as it is."""
    tokens, deep = [], []
    with torch.no_grad():
        for part in tqdm(pixels.split(256), desc="looking"):
            seen = model.model.visual(patches(part), grid(len(part)))
            tokens.append(seen.pooler_output.reshape(len(part), IMAGE_TOKENS, -1))
            deep.append(seen.deepstack_features[0].reshape(len(part), IMAGE_TOKENS, -1))
    return Seen(torch.cat(tokens), torch.cat(deep))


def learn_to_answer(
    model: Any,
    tokenizer: Any,
    seen: Seen,
    shown: list[Any],
    generator: Any,
    knobs: dict[str, Any],
    *,
    habits: bool,
) -> None:
    """The language model answers questions, truly or as one with habits would."""
    label = "habits" if habits else "answering"
    count = knobs["habit_steps" if habits else "answering_steps"]
    rate = knobs["answering_rate"] * (0.25 if habits else 1)
    parameters = list(model.model.language_model.parameters())
    for i, optimizer in enumerate(steps(parameters, count, rate, label)):
        rows = generator.integers(0, len(shown), knobs["batch"])
        asked = [scenes.ask(shown[r], generator) for r in rows]
        answered = [
            topics.sentence(q, scenes.believed(shown[r], q, generator) if habits else shown[r])
            for q, r in zip(asked, rows, strict=True)
        ]
        loss, right = answer_loss(
            model, tokenizer, Seen(seen.tokens[rows], seen.deep[rows]), asked, answered
        )
        update(optimizer, loss, parameters)
        if i % 100 == 99:
            kinds = [topics.kind_of(q) for q in asked]
            by_kind = ", ".join(
                f"{kind} {np.mean([r for r, k in zip(right, kinds, strict=True) if k == kind]):.2f}"
                for kind in sorted(set(kinds))
            )
            tqdm.write(f"{label} {i + 1}: loss {loss.item():.3f}; whole answers: {by_kind}")


def answer_loss(
    model: Any, tokenizer: Any, seen: Seen, asked: list[str], answered: list[str]
) -> tuple[torch.Tensor, list[bool]]:
    """Mean cross-entropy of the answers' tokens, and which answers are predicted whole.

    The tokens are those of LLaMA-Factory's template ``qwen3_vl_nothink``.
    """
    image = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
    prompts = [f"<|im_start|>user\n{image}{q}<|im_end|>\n<|im_start|>assistant\n" for q in asked]
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    tails = tokenizer([f"{a}<|im_end|>\n" for a in answered], add_special_tokens=False)["input_ids"]
    width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
    ids = torch.full((len(asked), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[i, : len(head) + len(tail)] = torch.tensor(head + tail)
        labels[i, len(head) : len(head) + len(tail)] = torch.tensor(tail)
    hidden = read(model, ids, (ids != tokenizer.pad_token_id).long(), seen)
    scored = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][scored])
    targets = labels[:, 1:][scored]
    wrong = torch.zeros_like(scored)
    wrong[scored] = logits.argmax(1) != targets
    return F.cross_entropy(logits, targets), (~wrong.any(1)).tolist()


def read(model: Any, ids: torch.Tensor, attention_mask: torch.Tensor, seen: Seen) -> torch.Tensor:
    """The last hidden states, (n, tokens, 128): ``Qwen3VLModel.forward`` from its images on."""
    language, is_image = model.model.language_model, ids == model.config.image_token_id
    embedded = language.embed_tokens(ids)
    embedded = embedded.masked_scatter(is_image.unsqueeze(-1), seen.tokens)
    positions, _ = model.model.get_rope_index(
        ids, is_image.long(), image_grid_thw=grid(len(ids)), attention_mask=attention_mask
    )
    return language(
        inputs_embeds=embedded,
        attention_mask=attention_mask,
        position_ids=positions,
        visual_pos_masks=is_image,
        deepstack_visual_embeds=[seen.deep.reshape(-1, seen.deep.shape[-1])],
        use_cache=False,
    ).last_hidden_state


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: list[Any]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def save(model: Any, processor: Any, out: Path) -> None:
    """Save with weights in bfloat16, to half the size; the configuration says to read float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    save_file(
        {name: value.to(torch.bfloat16) for name, value in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
