"""Both answers of a preference pair in one row, with the same log-probs as in a row each.

Chosen and rejected share image and question. A row ``[prompt | chosen | rejected]`` reads them
once: the attention mask hides chosen from rejected, and rejected's positions start again where the
prompt ends, so that each answer sees what it would see by itself. Prefix sharing for text is arXiv
2410.20305; here it is exact for Qwen3-VL (deepstack, interleaved mrope) and Qwen2.5-VL, in scoring
and in training. ``why_not`` tells where it is not, and the caller takes the plain way.

Only answer tokens reach the head, a chunk at a time: the vocabulary is 151,936 tokens wide, and the
logits of all positions in float32 would be the largest tensors of a training.

    batch = prefix.pack(features, model, process_images)
    scored = prefix.log_probs(model, batch)                    # no gradients
    prefix.install(model); scored = wrapped_model(**batch)     # inside a trainer
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import PurePath
from types import MethodType
from typing import Any

from stages.families import known

IGNORE = -100  # the label of a token that is not trained on, as in LLaMA-Factory
TUNERS = ("LORA", "OFT")  # PEFT's methods that change layers, not the sequence

# Tokens that go to the head together. With a vocabulary of 151,936 a chunk's logits take 156 MB in
# float32, and the head is as fast as with all tokens at once.
CHUNK = 256

# What a token is part of is ``PARTS`` times its pair's number in the batch, plus one of these.
PARTS = 3
PROMPT, CHOSEN, REJECTED = range(PARTS)
PADDING = -1


def why_not(model: Any) -> str | None:
    """One sentence on why a row can't hold both answers for this model; None where it can.

    ``model`` may be wrapped by PEFT. A model in training mode must have no dropout: chosen and
    rejected would share the prompt's.
    """
    inner = plain(model)
    family = getattr(inner.config, "model_type", None)
    exact = known.in_one_row()
    if family not in exact or not hasattr(inner.model, "language_model"):
        return f"a shared prompt is exact for {' and '.join(exact)}, and this model is {family}"
    text = inner.model.language_model.config
    attention = text._attn_implementation
    if attention not in ("sdpa", "eager", "flex_attention"):
        return f"{attention} has no mask that hides one answer from the other; sdpa has one"
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "with a sliding window, rejected would lose sight of the prompt behind chosen"
    for adapter in getattr(model, "peft_config", {}).values():
        method = getattr(adapter.peft_type, "value", adapter.peft_type)
        if method not in TUNERS:
            return f"PEFT's {method} changes the sequence; {' and '.join(TUNERS)} do not"
    if model.training:
        from torch.nn import Dropout

        rates = [module.p for module in model.modules() if isinstance(module, Dropout)]
        if max([*rates, getattr(text, "attention_dropout", 0.0)]) > 0:
            return "with dropout, chosen and rejected would share the prompt's noise; set it to 0"
    return None


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
    row_tokens: int | None = None,
    always_look: Any = None,
) -> dict[str, Any]:
    """A batch of n pairs as tensors on the CPU, which ``forward`` takes by name.

    Args:
        features: LLaMA-Factory's pairwise features: ``chosen_input_ids``, ``chosen_labels``, the
            same for rejected, and ``images``.
        process_images: makes ``pixel_values`` and ``image_grid_thw`` of a list of images; it is
            given each distinct image of the batch once.
        row_tokens: put pairs that follow each other into one row while it has no more tokens than
            this; by default each pair has a row.
        always_look: an image that the vision tower sees, to no effect, when the batch has none.
            Where parameters are sharded, all processes must call the same modules.

    Returns:
        ``input_ids`` (rows, width); ``position_ids`` (4, rows, width), text first, then mrope's
        three axes; ``segments`` (rows, width), what each token is part of; ``predictors`` and
        ``targets`` (2, n, longest answer), chosen first: where in the flattened rows an answer's
        token is predicted, and the token, or ``IGNORE``; with images ``pixel_values``,
        ``image_grid_thw``, ``image_order``, which of them comes where in the rows, and
        ``image_keys`` (images,), a number for each that follows from its file's name.

    Raises:
        ValueError: a pair has videos or audios, an image token outside of its prompt, or another
            number of image tokens than its images have.
    """
    import torch

    body, image_token = plain(model).model, plain(model).config.image_token_id
    images: dict[Any, Any] = {}
    order: list[int] = []
    for feature in features:
        if feature.get("videos") or feature.get("audios"):
            raise ValueError("a shared prompt takes images only, and a pair has a video or audio")
        for image in feature.get("images") or []:
            key = image if isinstance(image, str) else id(image)
            images.setdefault(key, image)
            order.append(list(images).index(key))
    seen = list(images.values()) or ([] if always_look is None else [always_look])
    pixels = dict(process_images(seen)) if seen else {}

    rows: list[list[tuple[torch.Tensor, ...]]] = []
    start = used = 0  # the next pair's place in the flattened rows is fixed once widths are known
    answers: list[tuple[int, int, list[tuple[list[int], list[int]]]]] = []
    for number, feature in enumerate(features):
        grids = [pixels["image_grid_thw"][i] for i in order[start : start + _images(feature)]]
        start += len(grids)
        tokens, places, parts, predicted = _row(feature, number, grids, body, image_token)
        if not rows or row_tokens is None or used + len(tokens) > row_tokens:
            rows.append([])
            used = 0
        rows[-1].append((tokens, places, parts))
        answers.append((len(rows) - 1, used, predicted))
        used += len(tokens)

    width = max(sum(len(pair[0]) for pair in row) for row in rows)
    width += -width % 8
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(4, len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), PADDING)
    for i, row in enumerate(rows):
        joined = [torch.cat(tensors, dim=-1) for tensors in zip(*row, strict=True)]
        length = len(joined[0])
        input_ids[i, :length], position_ids[:, i, :length], segments[i, :length] = joined
    longest = max(len(side[0]) for _, _, predicted in answers for side in predicted)
    predictors = torch.zeros(2, len(features), longest, dtype=torch.long)
    targets = torch.full_like(predictors, IGNORE)
    for number, (row_number, offset, predicted) in enumerate(answers):
        for side, (places_, tokens_) in enumerate(predicted):
            at = row_number * width + offset + torch.tensor(places_, dtype=torch.long)
            predictors[side, number, : len(at)] = at
            targets[side, number, : len(at)] = torch.tensor(tokens_, dtype=torch.long)
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segments": segments,
        "predictors": predictors,
        "targets": targets,
    }
    if seen:
        batch |= pixels | {
            "image_order": torch.tensor(order, dtype=torch.long),
            "image_keys": torch.tensor([_image_key(image) for image in images or ["placeholder"]]),
        }
    return batch


def _image_key(image: Any) -> int:
    """63 bits of an image's name, which names its content; 0 for one without a name."""
    if not isinstance(image, str):
        return 0
    return int.from_bytes(hashlib.sha256(PurePath(image).name.encode()).digest()[:8], "big") >> 1


def _images(feature: Mapping[str, Any]) -> int:
    return len(feature.get("images") or [])


def _row(
    feature: Mapping[str, Any], number: int, grids: list[Any], body: Any, image_token: int
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
    # An answer is text: it goes on one by one, on all of mrope's axes from the largest of them.
    end[1:] = end[1:].max()
    positions += [end + torch.arange(len(ids)) for ids, _ in suffixes]
    sizes = [length, len(suffixes[0][0]), len(suffixes[1][0])]
    segments = PARTS * number + torch.arange(PARTS).repeat_interleave(torch.tensor(sizes))

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


def install(model: Any, *, keep_vision_features: bool = False) -> None:
    """Let the model's own ``forward`` take a batch of ``pack``; any other input goes as before.

    What wraps the model (PEFT, accelerate's autocast, DDP) then works as in any training. With
    ``keep_vision_features`` what the vision tower makes of an image is kept in memory (5 MB for 512
    by 512 pixels at the 4B size) and the tower sees the image once in the whole training; it must
    be frozen.
    """
    inner = plain(model)
    inner.vision_features = {} if keep_vision_features else None
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
    image_keys: Any = None,
    mean_logits: bool = False,
) -> dict[str, Any]:
    """Log-probs of both answers' tokens; the tensors are ``pack``'s.

    Returns:
        ``logps`` (2, n, longest answer): log-prob of each token of chosen and of rejected in
        float32 at least, 0 behind an answer's end. ``lengths`` (2, n): their tokens. With
        ``mean_logits`` also ``logits`` (2,): the mean over the vocabulary and over all tokens of
        prompt and chosen, and of prompt and rejected.
    """
    body = inner.model
    embeds = body.get_input_embeddings()(input_ids)
    visual: dict[str, Any] = {}
    if pixel_values is not None:
        mask = input_ids == inner.config.image_token_id
        kept = getattr(inner, "vision_features", None)
        keys = [0] * len(image_grid_thw) if image_keys is None else image_keys.tolist()
        features, deepstack = _seen(
            body, pixel_values, image_grid_thw, image_order.tolist(), keys, kept
        )
        embeds = embeds.masked_scatter(mask[..., None], features.to(embeds.device, embeds.dtype))
        if deepstack:
            visual = {"visual_pos_masks": mask, "deepstack_visual_embeds": deepstack}
    hidden = body.language_model(
        inputs_embeds=embeds,
        position_ids=position_ids,
        attention_mask=attention_mask(
            segments, body.language_model.config._attn_implementation, embeds.dtype
        ),
        use_cache=False,
        **visual,
    ).last_hidden_state

    answered = targets != IGNORE
    states = hidden.flatten(0, 1)[predictors[answered]]
    flat = token_log_probs(inner.lm_head, states, targets[answered])
    logps = flat.new_zeros(targets.shape).masked_scatter(answered, flat)
    output = {"logps": logps, "lengths": answered.sum(dim=-1)}
    if mean_logits:
        output["logits"] = _mean_logits(inner.lm_head, hidden.detach(), segments)
    return output


def _seen(
    body: Any,
    pixels: Any,
    grids: Any,
    order: list[int],
    keys: list[int],
    kept: dict[int, list[Any]] | None,
) -> tuple[Any, list[Any]]:
    """What the tower makes of distinct images, put where they occur: (image tokens, hidden), and
    the same for each level of deepstack (Qwen3-VL). ``kept`` holds that by key, levels after the
    merger's output, and gets what is new.
    """
    import torch

    known = kept or {}
    new = [i for i, key in enumerate(keys) if not key or key not in known]
    found: dict[int, list[Any]] = {i: known[keys[i]] for i in range(len(keys)) if i not in new}
    if new:
        parts = pixels.split(grids.prod(dim=1).tolist())
        # A frozen tower needs no graph, which gradient checkpointing would make it keep.
        trained = any(weight.requires_grad for weight in body.visual.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            seen = body.get_image_features(
                torch.cat([parts[i] for i in new]), grids[new], return_dict=True
            )
        sizes = [len(image) for image in seen.pooler_output]
        levels = [level.split(sizes) for level in getattr(seen, "deepstack_features", None) or []]
        for place, i in enumerate(new):
            found[i] = [seen.pooler_output[place], *(level[place] for level in levels)]
            if kept is not None and keys[i]:
                kept[keys[i]] = [tensor.detach().cpu() for tensor in found[i]]

    def placed(level: int) -> Any:
        images = [found[i][level].to(pixels.device) for i in range(len(keys))]
        return torch.cat([images[i] for i in order]) if order else images[0][:0]

    return placed(0), [placed(level) for level in range(1, len(found[0]))]


def attention_mask(segments: Any, implementation: str, dtype: Any) -> Any:
    """What each token sees, (rows, 1, width, width): everything before it in its own part and in
    its pair's prompt. Padding sees padding, since softmax over nothing is not a number.

    sdpa takes booleans, eager takes what is added to the scores; flex attention takes a block mask
    that skips what is hidden (it needs a GPU, and was not run on one: the mask alone is tested).
    """
    import torch

    sees = seeing(segments)
    rows, width = segments.shape
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, rows, None, width, width, device=segments.device)
    row = torch.arange(rows, device=segments.device)[:, None, None]
    place = torch.arange(width, device=segments.device)
    seen = sees(row, None, place[:, None], place)[:, None]
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return seen


def seeing(segments: Any) -> Callable[..., Any]:
    """Whether a token sees another, in the form of flex attention's ``mask_mod``."""

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        mine, other = segments[row, query], segments[row, key]
        prompt_of_mine = (other >= 0) & (other == mine - mine % PARTS)
        return (key <= query) & ((other == mine) | prompt_of_mine)

    return sees


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


def _mean_logits(head: Any, hidden: Any, segments: Any) -> Any:
    """The head is linear: the mean of logits is the logits of the mean."""
    import torch

    part = torch.where(segments == PADDING, PADDING, segments % PARTS)
    with torch.no_grad():
        means = [
            hidden[(part == PROMPT) | (part == answer)]
            .mean(dim=0, dtype=torch.promote_types(hidden.dtype, torch.float32))
            .to(hidden.dtype)
            for answer in (CHOSEN, REJECTED)
        ]
        logits = head(torch.stack(means))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).mean(dim=-1)
