"""Both answers of a preference pair in one row, with the same log-probs as in a row each.

Chosen and rejected share image and question. A row ``[prompt | chosen | rejected]`` reads them
once: the attention mask hides chosen from rejected, and rejected's positions start again where the
prompt ends, so that each answer sees what it would see by itself. Prefix sharing for text is arXiv
2410.20305; here it is exact for Qwen3-VL (deepstack, interleaved mrope, mixture of experts),
Qwen2.5-VL and Qwen3.5 (``recurrence``), in scoring and in training. ``why_not`` tells where it is
not.

Only answer tokens reach the head, a chunk at a time: the vocabulary is 151,936 tokens wide, and the
logits of all positions in float32 would be the largest tensors of a training.

    batch = prefix.pack(features, model, process_images)
    scored = prefix.log_probs(model, batch)                    # no gradients
    prefix.install(model); scored = wrapped_model(**batch)     # inside a trainer
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import PurePath
from types import MethodType
from typing import Any

from stages.families import known
from stages.model import recurrence

IGNORE = -100  # the label of a token that is not trained on, as in LLaMA-Factory
UNSEEN = "unseen"  # of a feature: no text attends to its images

# Tokens that go to the head together. With a vocabulary of 151,936 a chunk's logits take 156 MB in
# float32, and the head is as fast as with all tokens at once.
CHUNK = 256

PADDING, PROMPT, CHOSEN, REJECTED = range(-1, 3)  # what a token is part of

# Ways to attend with a mask of ours, by transformers' names. The second is FlexAttention, which has
# no backward on a CPU.
ATTENTIONS = SDPA, FLEX = ("sdpa", "flex_attention")


def why_not(model: Any) -> str | None:
    """One sentence on why a row can't hold both answers for this model; None where it can.

    ``model`` may be wrapped by PEFT. A model in training mode must have no dropout: chosen and
    rejected would share the prompt's.
    """
    inner = plain(model)
    family = getattr(inner.config, "model_type", None)
    exact = known.model_types()
    if family not in exact:
        return f"a shared prompt is exact for {' and '.join(exact)}, and this model is {family}"
    text = inner.model.language_model.config
    attention = text._attn_implementation
    if attention not in ATTENTIONS:
        return f"{attention} has no mask that hides one answer from the other; sdpa has one"
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "with a sliding window, rejected would lose sight of the prompt behind chosen"
    if model.training:
        from torch.nn import Dropout

        rates = [module.p for module in model.modules() if isinstance(module, Dropout)]
        if max([*rates, getattr(text, "attention_dropout", 0.0)]) > 0:
            return "with dropout, chosen and rejected would share the prompt's noise; set it to 0"
    return None


def attentions(model: Any) -> Sequence[str]:
    """The ways to attend that go with the model: recurrent layers want a mask of tokens."""
    return ATTENTIONS[:1] if recurrence.layers(plain(model).model.language_model) else ATTENTIONS


def attend(model: Any, way: str) -> None:
    """Let the text attend by one of ``attentions``; transformers has no public way to for these."""
    plain(model).model.language_model.config._attn_implementation = way


def plain(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Rows


def process_images(template: Any, processor: Any, images: list[Any]) -> dict[str, Any]:
    """``pixel_values`` and ``image_grid_thw`` of images, by LLaMA-Factory's plugin."""
    count = len(images)
    seen = template.mm_plugin.get_mm_inputs(images, [], [], [count], [0], [0], [[]], processor)
    return {name: seen[name] for name in ("pixel_values", "image_grid_thw")}


def pack(
    features: Sequence[Mapping[str, Any]],
    model: Any,
    process_images: Callable[[list[Any]], Mapping[str, Any]],
    *,
    always_look: Any = None,
) -> dict[str, Any]:
    """A batch of n pairs, a row each, as tensors on the CPU, which ``forward`` takes by name.

    Args:
        features: LLaMA-Factory's pairwise features: ``chosen_input_ids``, ``chosen_labels``, the
            same for rejected, ``images``, their paths, and perhaps ``UNSEEN``.
        process_images: makes ``pixel_values`` and ``image_grid_thw`` of a list of images; it is
            given each distinct image of the batch once.
        always_look: an image that the vision tower sees, to no effect, when the batch has none:
            where the tower is trained, all processes must call it.

    Returns:
        ``input_ids`` (n, width); ``position_ids`` (4, n, width), text first, then mrope's three
        axes; ``segments`` (n, width), what each token is part of; ``predictors`` and ``targets``
        (2, n, longest answer), chosen first: where in the flattened rows an answer's token is
        predicted, and the token, or ``IGNORE``; with images ``pixel_values``, ``image_grid_thw``
        and ``image_order``, which of them comes where in the rows.

    Raises:
        ValueError: a pair has an image token outside of its prompt, or another number of image
            tokens than its images have.
    """
    import torch

    body, image_token = plain(model).model, plain(model).config.image_token_id
    names = [list(feature.get("images") or []) for feature in features]
    distinct = list(dict.fromkeys(name for of_pair in names for name in of_pair))
    seen = distinct or ([] if always_look is None else [always_look])
    pixels = dict(process_images(seen)) if seen else {}
    rows = []
    for feature, of_pair in zip(features, names, strict=True):
        grids = [pixels["image_grid_thw"][distinct.index(name)] for name in of_pair]
        rows.append(_row(feature, grids, body, image_token))

    width = max(len(tokens) for tokens, *_ in rows)
    width += -width % 8
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(4, len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), PADDING)
    longest = max(len(places) for *_, predicted in rows for places, _ in predicted)
    predictors = torch.zeros(2, len(rows), longest, dtype=torch.long)
    targets = torch.full_like(predictors, IGNORE)
    for i, (tokens, positions, parts, predicted) in enumerate(rows):
        input_ids[i, : len(tokens)] = tokens
        position_ids[:, i, : len(tokens)] = positions
        segments[i, : len(tokens)] = parts
        for side, (places, wanted) in enumerate(predicted):
            predictors[side, i, : len(places)] = i * width + torch.tensor(places, dtype=torch.long)
            targets[side, i, : len(places)] = torch.tensor(wanted, dtype=torch.long)
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segments": segments,
        "predictors": predictors,
        "targets": targets,
    }
    if seen:
        order = [distinct.index(name) for of_pair in names for name in of_pair]
        batch |= pixels | {"image_order": torch.tensor(order, dtype=torch.long)}
    return batch


def pair_key(feature: Mapping[str, Any]) -> str:
    """A pair by its content: LLaMA-Factory's token ids of both answers with their prompt, and the
    names of the images, which name their content; 32 hex digits.
    """
    parts: list[Sequence[Any]] = [
        list(feature["chosen_input_ids"]),
        list(feature["rejected_input_ids"]),
        [PurePath(str(image)).name for image in feature.get("images") or []],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _row(
    feature: Mapping[str, Any], grids: list[Any], body: Any, image_token: int
) -> tuple[Any, Any, Any, list[tuple[list[int], list[int]]]]:
    """One pair: tokens (length,), positions (4, length), segments (length,), and for both answers
    where in this row each token is predicted, and the tokens.
    """
    import torch

    length = shared_length(feature)
    prompt = list(feature["chosen_input_ids"][:length])
    suffixes = [
        (feature[f"{side}_input_ids"][length:], feature[f"{side}_labels"][length:])
        for side in ("chosen", "rejected")
    ]
    if any(image_token in ids for ids, _ in suffixes):
        raise ValueError("an image token lies outside of the prompt that both answers share")
    tokens = torch.tensor([*prompt, *suffixes[0][0], *suffixes[1][0]], dtype=torch.long)
    merged = body.config.vision_config.spatial_merge_size**2
    wanted = sum(int(grid.prod()) // merged for grid in grids)
    if (found := prompt.count(image_token)) != wanted:
        raise ValueError(f"the images of a pair make {wanted} tokens, and its prompt has {found}")

    positions = [prompt_positions(body, tokens[:length], grids, image_token)]
    end = positions[0].amax(dim=1, keepdim=True) + 1 if length else torch.zeros(4, 1).long()
    # An answer is text: its positions count one by one, on all of mrope's axes from the largest.
    end[1:] = end[1:].max()
    positions += [end + torch.arange(len(ids)) for ids, _ in suffixes]
    sizes = torch.tensor([length, len(suffixes[0][0]), len(suffixes[1][0])])
    segments = torch.tensor([PROMPT, CHOSEN, REJECTED]).repeat_interleave(sizes)
    if feature.get(UNSEEN):
        segments[tokens == image_token] = PADDING

    predicted = []
    start = length
    for ids, labels in suffixes:
        # What predicts an answer's first token is the prompt's end, for rejected too.
        before = [length - 1, *range(start, start + len(ids) - 1)][: len(ids)]
        kept = [i for i, label in enumerate(labels) if label != IGNORE and before[i] >= 0]
        predicted.append(([before[i] for i in kept], [labels[i] for i in kept]))
        start += len(ids)
    return tokens, torch.cat(positions, dim=1), segments, predicted


def shared_length(feature: Mapping[str, Any]) -> int:
    """Tokens of the longest beginning that both sequences share and neither is trained on.

    Answers that begin alike are told apart at their first token: it has a label.
    """
    length = 0
    for one, other, *labels in zip(
        feature["chosen_input_ids"],
        feature["rejected_input_ids"],
        feature["chosen_labels"],
        feature["rejected_labels"],
        strict=False,
    ):
        if one != other or labels != [IGNORE, IGNORE]:
            break
        length += 1
    return length


def prompt_positions(body: Any, prompt: Any, grids: list[Any], image_token: int) -> Any:
    """Positions (4, length) of a prompt: one by one, and mrope's three axes by the model itself."""
    import torch

    text = torch.arange(len(prompt))[None]
    if not grids:
        return text.expand(4, -1).clone()
    axes, _ = body.get_rope_index(
        prompt[None],
        mm_token_type_ids=(prompt == image_token).int()[None],
        image_grid_thw=torch.stack(grids),
    )
    return torch.cat([text, axes[:, 0]])


# The model


def log_probs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """``forward`` without gradients, on the model's device."""
    import torch

    inner = plain(model)
    with torch.inference_mode():
        return forward(inner, **{name: tensor.to(inner.device) for name, tensor in batch.items()})


def install(model: Any) -> None:
    """Let the model's own ``forward`` take a batch of ``pack``; any other input goes as before.

    What wraps the model (PEFT, accelerate's autocast, DDP) then works as in any training.
    """
    inner = plain(model)
    if hasattr(inner, "forward_one_by_one"):
        return
    inner.forward_one_by_one = inner.forward

    @wraps(inner.forward.__func__)
    def either(self: Any, *args: Any, **inputs: Any) -> Any:
        if "segments" not in inputs:
            return self.forward_one_by_one(*args, **inputs)
        # PEFT adds arguments of its own, all None.
        return forward(self, **{name: value for name, value in inputs.items() if value is not None})

    inner.forward = MethodType(either, inner)


def forward(
    inner: Any,
    *,
    input_ids: Any,
    position_ids: Any,
    segments: Any,
    predictors: Any,
    targets: Any,
    pixel_values: Any = None,
    image_grid_thw: Any = None,
    image_order: Any = None,
) -> dict[str, Any]:
    """Log-probs of both answers' tokens; the tensors are ``pack``'s.

    Returns:
        ``logps`` (2, n, longest answer): log-prob of each token of chosen and of rejected in
        float32 at least, 0 behind an answer's end. ``lengths`` (2, n): their tokens.
    """
    body = inner.model
    embeds = body.get_input_embeddings()(input_ids)
    visual: dict[str, Any] = {}
    if pixel_values is not None:
        image = input_ids == inner.config.image_token_id
        features, deepstack = _seen(body, pixel_values, image_grid_thw, image_order.tolist())
        embeds = embeds.masked_scatter(image[..., None], features.to(embeds.device, embeds.dtype))
        if deepstack:
            visual = {"visual_pos_masks": image, "deepstack_visual_embeds": deepstack}
    if body.language_model.config._attn_implementation == FLEX:
        mask = block_mask(segments)
    else:
        mask = attention_mask(segments)
    if recurrence.layers(body.language_model):
        fork = recurrence.parts(segments, PROMPT), recurrence.parts(segments, CHOSEN, REJECTED)
        setattr(mask, recurrence.FORK, fork)
    hidden = body.language_model(
        inputs_embeds=embeds,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=False,
        **visual,
    ).last_hidden_state

    answered = targets != IGNORE
    states = hidden.flatten(0, 1)[predictors[answered]]
    flat = token_log_probs(inner.lm_head, states, targets[answered])
    logps = flat.new_zeros(targets.shape).masked_scatter(answered, flat)
    return {"logps": logps, "lengths": answered.sum(dim=-1)}


def _seen(body: Any, pixels: Any, grids: Any, order: list[int]) -> tuple[Any, list[Any]]:
    """What the tower makes of distinct images, put where they occur: (image tokens, hidden), and
    the same for each level of deepstack (Qwen3-VL).
    """
    import torch

    # A frozen tower needs no graph, which gradient checkpointing would make it keep.
    trained = any(weight.requires_grad for weight in body.visual.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        seen = body.get_image_features(pixels, grids, return_dict=True)
    sizes = [len(image) for image in seen.pooler_output]
    deepstack = getattr(seen, "deepstack_features", None) or []
    levels = [seen.pooler_output, *(level.split(sizes) for level in deepstack)]
    placed = [torch.cat([level[i] for i in order]) if order else level[0][:0] for level in levels]
    return placed[0], placed[1:]


def attention_mask(segments: Any) -> Any:
    """What each token sees, (n, 1, width, width): everything before it in its own part and in the
    prompt. Padding sees padding, since softmax over nothing is not a number.
    """
    import torch

    mine, other = segments[:, :, None], segments[:, None, :]
    width = segments.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    sees = ((other == mine) | ((other == PROMPT) & (mine != PADDING))) & before
    return sees[:, None]


def block_mask(segments: Any) -> Any:
    """``attention_mask`` for FlexAttention, which skips blocks of 128 by 128 that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Any, _: Any, query: Any, key: Any) -> Any:
        mine, other = segments[row, query], segments[row, key]
        return ((other == mine) | ((other == PROMPT) & (mine != PADDING))) & (query >= key)

    rows, width = segments.shape
    return create_block_mask(sees, rows, None, width, width, device=segments.device)


# The head


def token_log_probs(head: Any, hidden: Any, targets: Any) -> Any:
    """log π of each target (n,), given the hidden states that predict them (n, hidden size).

    No more than ``CHUNK`` tokens have logits at a time, in backward too. A frozen head (LoRA) is
    read once: an answer's gradient by its hidden states is a factor, known only in backward, times
    ∂ log π / ∂ hidden, which costs one product while the chunk's logits are there. A trained head
    computes each chunk again in backward.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    trained = any(weight.requires_grad for weight in head.parameters())
    needed = torch.is_grad_enabled() and (trained or hidden.requires_grad)
    if not len(targets):  # pairs of empty answers: 0, with a gradient of 0
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)).sum(dim=-1)
    chunks = []
    for states, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        if not needed:
            chunks.append(_chunk(head, states, wanted))
        elif trained:
            chunks.append(checkpoint(_chunk, head, states, wanted, use_reentrant=False))
        else:
            leaf = states.detach().requires_grad_()
            value = _chunk(head, leaf, wanted)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
            # Worth 0, and its gradient by the hidden states is the slope.
            tangent = (states - leaf.detach()).to(value.dtype) * slope.to(value.dtype)
            chunks.append(value.detach() + tangent.sum(dim=-1))
    return torch.cat(chunks)


def _chunk(head: Any, hidden: Any, targets: Any) -> Any:
    import torch
    from torch.nn.functional import cross_entropy

    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -cross_entropy(logits, targets.to(logits.device), reduction="none")
