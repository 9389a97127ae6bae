"""Log-probs and greedy answers of a policy, on exactly the tokens that training sees.

LLaMA-Factory's template and pairwise processor make every token here, as they do in its DPO trainer
(``llamafactory/train/dpo``). A pair is one row, which reads image and question once
(``stages.model.prefix``). A test holds the log-probs against the trainer's.
"""

import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.core import console, portable
from stages.core.errors import UserError
from stages.model import formatted, prefix, tokens
from stages.params.params import Params

GROUP = 64  # pairs that a process prepares at a time
WORKERS = 8  # processes that prepare, at most; one for each core
IMAGES = 128  # processed images that are remembered: 0.8 GB at 512 by 512 pixels
LOGPS, LENGTHS = ["chosen_logps", "rejected_logps"], ["chosen_tokens", "rejected_tokens"]


@dataclass(frozen=True)
class Policy(tokens.Tokenization):
    """A loaded model with what turns pairs into its input. ``model`` is in evaluation mode."""

    model: Any
    pairwise: Any


@dataclass(frozen=True)
class Batch:
    """Pairs that go through the model together: where they are among all pairs, the model's inputs,
    and each pair's ``image_tokens`` and ``prefix.pair_key``.
    """

    places: np.ndarray
    inputs: dict[str, np.ndarray]
    image_tokens: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, its length in tokens without the end of turn, whether it ended."""

    text: str
    tokens: int
    finished: bool


def load(model_dir: Path, p: Params, adapter: Path | None = None) -> Policy:
    """Load a base model through LLaMA-Factory and, if given, a LoRA adapter on top of it.

    The adapter is not merged, so base and tuned differ by the adapter alone, also where the base is
    quantised (``model.quantization_bit`` applies here as it does in training).

    Raises:
        UserError: ``scoring.device`` is cuda and there is no GPU, the files do not hold all of the
            base model, the adapter does not fit it, or one row can't hold both answers of a pair.
    """
    import torch

    device = device_of(p)
    loaded = tokens.load(
        model_dir, p, infer_dtype=p.scoring.dtype, quantization_bit=p.model.quantization_bit
    )

    from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor
    from llamafactory.model import load_model

    loaded.model_args.device_map = {"": torch.device(device)}
    tokenizer, processor = loaded.tokenizer, loaded.processor
    template = _processing_images_once(loaded.template, processor)
    with _all_from_files(model_dir):
        model = load_model(tokenizer, loaded.model_args, loaded.finetuning_args, is_trainable=False)
    if p.model.quantization_bit is None:
        model = model.to(getattr(torch, p.scoring.dtype))
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if reason := prefix.why_not(model.eval()):
        raise UserError(f"{adapter or model_dir} can't be scored: {reason}")
    pairwise = PairwiseDatasetProcessor(
        template=template, tokenizer=tokenizer, processor=processor, data_args=loaded.data_args
    )
    return Policy(**vars(loaded) | {"template": template}, model=model, pairwise=pairwise)


@contextmanager
def _all_from_files(model_dir: Path) -> Iterator[None]:
    """While it lasts, a model that is loaded must have every parameter from its files.

    transformers makes up at random what is missing, and warns among other lines. What is tied to
    another parameter is not missing to it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    load_it = AutoModelForImageTextToText.from_pretrained
    own = vars(AutoModelForImageTextToText)["from_pretrained"]

    def loading(*arguments: Any, **more: Any) -> Any:
        try:
            model, found = load_it(*arguments, **more, output_loading_info=True)
        except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the model in {model_dir} can't be loaded: {reason}") from None
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{len(missing)} of the model's tensors are in none of the files in {model_dir}, "
                f"such as {missing[0]}; `dvc repro -f fetch-model` fetches them again, or "
                "model.source is no complete model"
            )
        return model

    AutoModelForImageTextToText.from_pretrained = loading
    try:
        yield
    finally:
        AutoModelForImageTextToText.from_pretrained = own


def device_of(p: Params) -> str:
    """``cpu`` or ``cuda``. On the CPU torch computes as ``scoring.portable`` says, so it must not
    have been used before.

    Raises:
        UserError: a GPU is wanted and there is none.
    """
    portable.prepare(p.scoring.device, portable=p.scoring.portable)
    import torch

    has_gpu = torch.cuda.is_available()
    if p.scoring.device == "cuda" and not has_gpu:
        raise UserError(
            "scoring.device is cuda, but torch finds no GPU here; run on a machine with one, "
            "or set scoring.device to cpu (the demo preset does)"
        )
    device = "cuda" if has_gpu and p.scoring.device != "cpu" else "cpu"
    if device == "cpu" and p.scoring.portable:
        torch.set_num_threads(portable.THREADS)
        used = torch.backends.cpu.get_cpu_capability()
        assert used != "AVX512", "torch was used before it was told to compute portably"
    return device


def device_name(device: str) -> str:
    """``cpu``, or the GPU's name."""
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else device


def _processing_images_once(template: Any, processor: Any) -> Any:
    """A copy of the template whose plugin remembers the images that it processed last.

    LLaMA-Factory processes the image of a pair four times: encoding and collating, for chosen and
    for rejected. On the demo that was most of the time of scoring.
    """
    import torch

    plugin = copy.copy(template.mm_plugin)
    process = plugin._get_mm_inputs

    @functools.lru_cache(IMAGES)
    def once(path: str) -> tuple[Any, Any]:
        seen = process([path], [], [], processor)
        return seen["pixel_values"], seen["image_grid_thw"]

    def each_once(images: list[str], *_: Any) -> dict[str, Any]:
        if not images:
            return {}
        pixels, grids = zip(*map(once, images), strict=True)
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}

    plugin._get_mm_inputs = each_once
    template = copy.copy(template)
    template.mm_plugin = plugin
    return template


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with an adapter, all of it; PEFT alone only warns of tensors that have no place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if stored != wanted:
            raise ValueError(
                f"{len(wanted - stored)} of its tensors are missing, and {len(stored - wanted)} "
                f"belong to no layer, such as {min(stored ^ wanted)}"
            )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the adapter in {adapter} does not fit the base model: {reason}; "
            "`dvc repro train` makes one that does"
        ) from None
    return adapted


def log_probs(
    policy: Policy, pairs: Sequence[dict[str, Any]], images: Path, *, batch_tokens: int, label: str
) -> pd.DataFrame:
    """Log-probs of both answers of every pair.

    Args:
        pairs: formatted pairs, as the format stage writes them.
        images: the folder that their image names are relative to.
        batch_tokens: tokens per forward pass at most, padding included; a pair with more goes
            alone.
        label: what the progress bar says; without one there is no bar.

    Returns:
        A row a pair, in their order: ``id``; the log-prob of each answer y given x,
        log π(y|x) = Σ_t log π(y_t | x, y_<t) (DPO, arXiv 2305.18290, section 4), in nats; their
        tokens, which are those that LLaMA-Factory trains on: the answer and the end of turn;
        ``image_tokens`` of the prompt; the pair's ``key`` (``prefix.pair_key``).
    """
    import torch

    logps, tokens_of = np.zeros((len(pairs), 2)), np.zeros((len(pairs), 3), dtype=np.int64)
    keys = np.full(len(pairs), "", dtype=object)
    for batch in _batches(policy, pairs, images, batch_tokens, label):
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        output = prefix.log_probs(policy.model, inputs)
        logps[batch.places] = output["logps"].double().sum(dim=-1).T.cpu()
        tokens_of[batch.places, :2] = output["lengths"].T.cpu()
        tokens_of[batch.places, 2] = batch.image_tokens
        keys[batch.places] = batch.keys
    measured = dict(zip(LOGPS, logps.T, strict=True)) | dict(
        zip([*LENGTHS, "image_tokens"], tokens_of.T, strict=True)
    )
    return pd.DataFrame({"id": [pair["id"] for pair in pairs], **measured, "key": keys})


def _batches(
    policy: Policy, pairs: Sequence[dict[str, Any]], images: Path, batch_tokens: int, label: str
) -> Iterator[Batch]:
    """All pairs, like lengths together. While a GPU works, processes prepare what comes next: its
    images are decoded, resized and put together. On the CPU they would take the model's cores.
    """
    from torch.utils.data import DataLoader

    order = by_length(pairs)
    groups: Any = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    workers = min(os.cpu_count() or 1, WORKERS) if policy.model.device.type == "cuda" else 0
    loader = DataLoader(
        groups,
        batch_size=None,
        collate_fn=functools.partial(_prepared, policy, pairs, images, batch_tokens),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # nothing is imported again
    )
    with console.bar(len(pairs), label, "pairs") as progress:
        for group in loader:
            for batch in group:
                yield batch
                progress.update(len(batch.places))


def _prepared(
    policy: Policy,
    pairs: Sequence[dict[str, Any]],
    images: Path,
    batch_tokens: int,
    places: np.ndarray,
) -> list[Batch]:
    """The batches of some of the pairs. Arrays, since tensors would pass between processes in
    shared memory, of which a container has 64 MB.
    """
    process = functools.partial(prefix.process_images, policy.template, policy.processor)
    features = encode(policy, [pairs[place] for place in places], images)
    widths = [
        len(each["chosen_input_ids"]) + len(each["rejected_input_ids"]) - prefix.shared_length(each)
        for each in features
    ]
    batches = []
    for batch in _of_like_length(widths, batch_tokens):
        those = [features[i] for i in batch]
        inputs = prefix.pack(those, policy.model, process)
        image_tokens = [each["chosen_input_ids"].count(policy.image_token_id) for each in those]
        batches.append(
            Batch(
                places=places[batch],
                inputs={name: tensor.numpy() for name, tensor in inputs.items()},
                image_tokens=np.array(image_tokens),
                keys=np.array([prefix.pair_key(each) for each in those], dtype=object),
            )
        )
    return batches


def by_length(pairs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Places of the pairs, shape (n,), in the order in which they are scored."""
    # Characters stand in for tokens here: the order only has to keep padding small.
    lengths = [
        len(pair["messages"][-1]["content"])
        + max(len(pair[side]["content"]) for side in ("chosen", "rejected"))
        for pair in pairs
    ]
    return np.argsort(np.array(lengths, dtype=np.int64), kind="stable")


def encode(policy: Policy, pairs: Sequence[dict[str, Any]], images: Path) -> list[dict[str, Any]]:
    """Token ids and labels of formatted pairs, a dict each, by LLaMA-Factory's own processor."""
    paths = [[str(images / name) for name in pair["images"]] for pair in pairs]
    columns = policy.pairwise.preprocess_dataset(
        {
            "_prompt": [formatted.turns(pair) for pair in pairs],
            "_response": [[pair["chosen"], pair["rejected"]] for pair in pairs],
            "_system": [formatted.system(pair) for pair in pairs],
            "_tools": [""] * len(pairs),
            "_images": paths,
            "_videos": [None] * len(pairs),
            "_audios": [None] * len(pairs),
        }
    )
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def answer(
    policy: Policy,
    prompts: Sequence[dict[str, Any]],
    images: Path,
    *,
    max_new_tokens: int,
    batch_tokens: int,
    label: str,
    **options: Any,
) -> list[Answer]:
    """Greedy answers to formatted prompts (``messages`` and ``images``), in their order.

    Prompts are padded on the left, so that answers of a batch start together; a batch has at most
    ``batch_tokens`` tokens when all answers are as long as they may be. An answer ends at the
    template's stop tokens or after ``max_new_tokens`` tokens. ``options`` are further ones of
    transformers' ``generate``. (Its key-value cache, which grows, was no slower than ``static``
    here: RESULTS.md.)
    """
    import torch
    from transformers import GenerationConfig

    model, tokenizer = policy.model, policy.tokenizer
    stops = policy.template.get_stop_token_ids(tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops,
    )
    asked = [prompt_tokens(policy, prompt, images) for prompt in prompts]
    answers: dict[int, Answer] = {}
    with console.bar(len(prompts), label, "answers") as progress:
        for places in _of_like_length([len(ids) + max_new_tokens for ids in asked], batch_tokens):
            batch = _left_padded(
                policy, [prompts[i] for i in places], [asked[i] for i in places], images
            )
            with torch.inference_mode():
                sequences = model.generate(**batch, generation_config=config, **options)
            for place, new in zip(
                places, sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True
            ):
                answers[place] = as_answer(tokenizer, new, stops)
            progress.update(len(places))
    return [answers[place] for place in range(len(prompts))]


def as_answer(tokenizer: Any, new: Sequence[int], stops: Sequence[int]) -> Answer:
    """What a model generated, up to the first stop token."""
    end = next((i for i, token in enumerate(new) if token in stops), None)
    text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
    return Answer(text, len(new) if end is None else end, end is not None)


def _of_like_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places, shortest first, in batches of at most ``batch_tokens`` tokens, padding included."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[place] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def prompt_tokens(
    policy: tokens.Tokenization, prompt: Mapping[str, Any], images: Path
) -> list[int]:
    """The template's tokens of a prompt, image tokens included."""
    paths = [str(images / name) for name in prompt["images"]]
    answered = [*formatted.turns(prompt), {"role": "assistant", "content": ""}]
    messages = policy.template.mm_plugin.process_messages(answered, paths, [], [], policy.processor)
    ids, _ = policy.template.encode_oneturn(policy.tokenizer, messages, formatted.system(prompt))
    return list(ids)


def _left_padded(
    policy: Policy, prompts: Sequence[dict[str, Any]], asked: Sequence[list[int]], images: Path
) -> dict[str, Any]:
    """A batch of prompts and their tokens for ``generate``."""
    batch = dict(
        policy.tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt")
    )
    batch["mm_token_type_ids"] = (batch["input_ids"] == policy.image_token_id).long()
    if files := [str(images / name) for prompt in prompts for name in prompt["images"]]:
        batch |= prefix.process_images(policy.template, policy.processor, files)
    return {name: tensor.to(policy.model.device) for name, tensor in batch.items()}
