"""Log-probs and greedy answers of a policy, on exactly the tokens that training sees.

LLaMA-Factory's template and pairwise processor make every token here, as they do in its DPO trainer
(``llamafactory/train/dpo``). A pair is one row, which reads image and question once
(``stages.model.prefix``). Where that is not exact, LLaMA-Factory's collator makes a row of each
answer, and its ``get_batch_logps`` sums the log-probs. A test holds both against the trainer.
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

from stages.core.errors import UserError
from stages.families.family import Family
from stages.model import formatted, lookup, prefix, tokens
from stages.params.params import Params

GROUP = 64  # pairs that a process prepares at a time
WORKERS = 8  # processes that prepare, at most; one for each core
IMAGES = 128  # processed images that are remembered: 0.8 GB at 512 by 512 pixels


@dataclass(frozen=True)
class Policy:
    """A loaded model with what turns pairs into its input. ``model`` is in evaluation mode.

    ``two_rows_because``: why a pair can't be one row for this model; None where it can.
    """

    family: Family
    image_token_id: int
    model: Any
    tokenizer: Any
    processor: Any
    template: Any
    pairwise: Any
    collator: Any
    two_rows_because: str | None


@dataclass(frozen=True)
class PairLogProbs:
    """Summed log-probs (nats) and lengths (tokens) of n pairs; each array has shape (n,).

    An answer's tokens are those LLaMA-Factory trains on: the answer itself and the end of turn.
    ``image_tokens`` are the places in the prompt that hold the image. ``keys`` name the pairs
    (``lookup.pair_key``).
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    image_tokens: np.ndarray
    keys: np.ndarray


def nothing() -> PairLogProbs:
    """The log-probs of no pairs."""
    floats, counts = np.zeros((2, 0)), np.zeros((3, 0), np.int64)
    return PairLogProbs(*(*floats, *counts, np.zeros(0, dtype=object)))


@dataclass(frozen=True)
class Batch:
    """Pairs that go through the model together: where they are among all pairs, the model's inputs,
    and what else ``PairLogProbs`` says of each.
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
            base model, or the adapter does not fit it.
    """
    import torch

    device = choose_device(p.scoring.device, torch.cuda.is_available())
    loaded = tokens.load(
        model_dir, p, infer_dtype=p.scoring.dtype, quantization_bit=p.model.quantization_bit
    )

    from llamafactory.data import PairwiseDataCollatorWithPadding
    from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor
    from llamafactory.extras.constants import IGNORE_INDEX
    from llamafactory.model import load_model

    loaded.model_args.device_map = {"": torch.device(device)}
    tokenizer, processor = loaded.tokenizer, loaded.processor
    template = _processing_images_once(loaded.template)
    with _all_from_files(model_dir):
        model = load_model(tokenizer, loaded.model_args, loaded.finetuning_args, is_trainable=False)
    if p.model.quantization_bit is None:
        model = model.to(getattr(torch, p.scoring.dtype))
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if reason := prefix.why_not(model.eval()):
        print(f"each answer is scored in a row of its own: {reason}")
    return Policy(
        family=loaded.family,
        image_token_id=loaded.image_token_id,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        template=template,
        pairwise=PairwiseDatasetProcessor(
            template=template, tokenizer=tokenizer, processor=processor, data_args=loaded.data_args
        ),
        collator=PairwiseDataCollatorWithPadding(
            template=template,
            model=model,
            pad_to_multiple_of=8,
            label_pad_token_id=IGNORE_INDEX,
            tokenizer=tokenizer,
            processor=processor,
        ),
        two_rows_because=reason,
    )


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


def choose_device(wanted: str, has_gpu: bool) -> str:
    """``cpu`` or ``cuda`` for ``scoring.device``.

    Raises:
        UserError: a GPU is wanted and there is none.
    """
    if wanted == "cuda" and not has_gpu:
        raise UserError(
            "scoring.device is cuda, but torch finds no GPU here; run on a machine with one, "
            "or set scoring.device to cpu (the demo preset does)"
        )
    if wanted == "auto":
        return "cuda" if has_gpu else "cpu"
    return wanted


def device_name(policy: Policy) -> str:
    """``cpu``, or the GPU's name."""
    import torch

    device = policy.model.device
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else str(device)


def _processing_images_once(template: Any) -> Any:
    """A copy of the template whose plugin remembers the images that it processed last.

    LLaMA-Factory processes the image of a pair four times: encoding and collating, for chosen and
    for rejected. On the demo that was most of the time of scoring.
    """
    import torch

    plugin = copy.copy(template.mm_plugin)
    process = plugin._get_mm_inputs
    kept: dict[str, tuple[Any, Any]] = {}  # pixel values and grid by path

    def each_once(
        images: list[str], videos: list[Any], audios: list[Any], processor: Any
    ) -> dict[str, Any]:
        if new := [path for path in dict.fromkeys(images) if path not in kept]:
            seen = process(new, [], [], processor)
            grids = seen["image_grid_thw"]
            pixels = seen["pixel_values"].split(grids.prod(dim=1).tolist())
            for old in list(kept)[: max(len(kept) + len(new) - IMAGES, 0)]:
                if old not in images:
                    del kept[old]
            kept.update(zip(new, zip(pixels, grids.split(1), strict=True), strict=True))
        if not images:
            return {}
        pixels, grids = zip(*(kept[path] for path in images), strict=True)
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
) -> PairLogProbs:
    """Log-probs of both answers of every pair.

    Args:
        pairs: formatted pairs, as the format stage writes them.
        images: the folder that their image names are relative to.
        batch_tokens: tokens per forward pass at most, padding included; a pair with more goes
            alone.
        label: what the progress bar says.

    Returns:
        Arrays in the order of ``pairs``. Summed log-prob of an answer y given x:
        log π(y|x) = Σ_t log π(y_t | x, y_<t) (DPO, arXiv 2305.18290, section 4).
    """
    import torch

    measure = _two_rows if policy.two_rows_because else _one_row
    sums = np.zeros((2, len(pairs)))
    counts = np.zeros((3, len(pairs)), dtype=np.int64)
    keys = np.full(len(pairs), "", dtype=object)
    for batch in _batches(policy, pairs, images, batch_tokens, label):
        inputs = {
            name: torch.from_numpy(array).to(policy.model.device)
            for name, array in batch.inputs.items()
        }
        sums[:, batch.places], counts[:2, batch.places] = measure(policy, inputs)
        counts[2, batch.places] = batch.image_tokens
        keys[batch.places] = batch.keys
    return PairLogProbs(*(*sums, *counts, keys))


def _one_row(policy: Policy, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probs and lengths, both (2, n), of ``prefix.pack``'s batch."""
    output = prefix.log_probs(policy.model, batch)
    return output["logps"].double().sum(dim=-1).cpu().numpy(), output["lengths"].cpu().numpy()


def _two_rows(policy: Policy, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The same of a batch of LLaMA-Factory's: all chosen rows first, then all rejected ones."""
    import torch
    from llamafactory.train.trainer_utils import get_batch_logps

    inputs = dict(batch)
    labels = inputs.pop("labels")
    with torch.inference_mode(), policy.family.seeing_each_image_once(policy.model):
        logits = policy.model(**inputs, return_dict=True, use_cache=False).logits
        summed, lengths = get_batch_logps(logits=logits.to(torch.float32), labels=labels)
    return (
        summed.double().cpu().numpy().reshape(2, -1),
        lengths.cpu().numpy().reshape(2, -1),
    )


def to_table(pairs: Sequence[dict[str, Any]], logps: PairLogProbs) -> pd.DataFrame:
    """One row a pair: ``id`` and the measurements."""
    return pd.DataFrame(
        {
            "id": [pair["id"] for pair in pairs],
            "chosen_logps": logps.chosen,
            "rejected_logps": logps.rejected,
            "chosen_tokens": logps.chosen_tokens,
            "rejected_tokens": logps.rejected_tokens,
            "image_tokens": logps.image_tokens,
            "key": logps.keys,
        }
    )


def _batches(
    policy: Policy, pairs: Sequence[dict[str, Any]], images: Path, batch_tokens: int, label: str
) -> Iterator[Batch]:
    """All pairs, like lengths together. While a GPU works, processes prepare what comes next: its
    images are decoded, resized and put together. On the CPU they would take the model's cores.
    """
    from torch.utils.data import DataLoader
    from tqdm import tqdm

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
    with tqdm(total=len(pairs), desc=label, unit="pair") as progress:
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
    features = encode(policy, [pairs[place] for place in places], images)
    widths = []
    for feature in features:
        chosen, rejected = (len(feature[f"{side}_input_ids"]) for side in ("chosen", "rejected"))
        one_row = chosen + rejected - prefix.shared_length(feature)
        widths.append(2 * max(chosen, rejected) if policy.two_rows_because else one_row)
    batches = []
    for batch in _of_like_length(widths, batch_tokens):
        those = [features[i] for i in batch]
        if policy.two_rows_because:
            inputs = policy.collator(those)
        else:
            process = functools.partial(prefix.process_images, policy.template, policy.processor)
            inputs = prefix.pack(those, policy.model, process)
        image_tokens = [each["chosen_input_ids"].count(policy.image_token_id) for each in those]
        batches.append(
            Batch(
                places=places[batch],
                inputs={name: tensor.numpy() for name, tensor in inputs.items()},
                image_tokens=np.array(image_tokens),
                keys=np.array([lookup.pair_key(each) for each in those], dtype=object),
            )
        )
    return batches


def by_length(pairs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Places of the pairs, shape (n,), in the order in which they are scored."""
    # Characters stand in for tokens here: the order only has to keep padding small.
    lengths = [
        len(_prompt(pair)) + max(len(_answer(pair, s)) for s in ("chosen", "rejected"))
        for pair in pairs
    ]
    return np.argsort(np.array(lengths, dtype=np.int64), kind="stable")


def encode(policy: Policy, pairs: Sequence[dict[str, Any]], images: Path) -> list[dict[str, Any]]:
    """Token ids and labels of formatted pairs, a dict each, by LLaMA-Factory's own processor."""
    paths = [[str(images / name) for name in pair["images"]] for pair in pairs]
    # All at once, which takes a third of the time.
    policy.template.mm_plugin._get_mm_inputs(
        [path for of_one in paths for path in of_one], [], [], policy.processor
    )
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
    cache: str | None = None,
) -> list[Answer]:
    """Greedy answers to formatted prompts (``messages`` and ``images``), in their order.

    Prompts are padded on the left, so that answers of a batch start together; a batch has at most
    ``batch_tokens`` tokens when all answers are as long as they may be. An answer ends at the
    template's stop tokens or after ``max_new_tokens`` tokens. ``cache`` is transformers' kind of
    key-value cache; its default, which grows, was no slower than ``static`` here (RESULTS.md).
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    model, tokenizer = policy.model, policy.tokenizer
    stops = policy.template.get_stop_token_ids(tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops,
        cache_implementation=cache,
    )
    asked = [_prompt_tokens(policy, prompt, images) for prompt in prompts]
    answers: dict[int, Answer] = {}
    with tqdm(total=len(prompts), desc=label, unit="answer") as progress:
        for places in _of_like_length([len(ids) + max_new_tokens for ids in asked], batch_tokens):
            batch = _left_padded(
                policy, [prompts[i] for i in places], [asked[i] for i in places], images
            )
            with torch.inference_mode():
                sequences = model.generate(**batch, generation_config=config)
            for place, new in zip(
                places, sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True
            ):
                end = next((i for i, token in enumerate(new) if token in stops), None)
                text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
                answers[place] = Answer(text, len(new) if end is None else end, end is not None)
            progress.update(len(places))
    return [answers[place] for place in range(len(prompts))]


def answers_table(rows: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> pd.DataFrame:
    """``id``, ``answer``, its ``tokens``, and whether it ``finished``, one row a prompt."""
    return pd.DataFrame(
        {
            "id": pd.Series([row["id"] for row in rows], dtype="str"),
            "answer": pd.Series([answer.text for answer in answers], dtype="str"),
            "tokens": pd.Series([answer.tokens for answer in answers], dtype="int64"),
            "finished": pd.Series([answer.finished for answer in answers], dtype="bool"),
        }
    )


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


def _prompt_tokens(policy: Policy, prompt: Mapping[str, Any], images: Path) -> list[int]:
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
    import torch

    plugin, tokenizer = policy.template.mm_plugin, policy.tokenizer
    files = [[str(images / name) for name in prompt["images"]] for prompt in prompts]
    rows = [torch.tensor(ids) for ids in asked]
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, width - len(row) :] = row
        attention_mask[i, width - len(row) :] = 1
    seen = plugin.get_mm_inputs(
        [path for paths in files for path in paths],
        [],
        [],
        [len(paths) for paths in files],
        [0] * len(files),
        [0] * len(files),
        rows,
        policy.processor,
    )
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        **policy.family.position_inputs(input_ids, policy.image_token_id),
        **seen,
    }
    return {name: tensor.to(policy.model.device) for name, tensor in batch.items()}


def _prompt(pair: Mapping[str, Any]) -> str:
    return str(pair["messages"][-1]["content"])


def _answer(pair: Mapping[str, Any], side: str) -> str:
    return str(pair[side]["content"])
