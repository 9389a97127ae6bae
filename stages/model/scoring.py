"""Log-probs and greedy answers of a policy, on exactly the tokens that training sees.

LLaMA-Factory's template, pairwise processor and collator make every token here, as they do in its
DPO trainer (``llamafactory/train/dpo``), and its ``get_batch_logps`` sums the log-probs; a test
holds both against the trainer itself. This module is the plain way: chosen and rejected are two
rows of a batch.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.core.errors import UserError
from stages.families.family import Family
from stages.model import tokens
from stages.parameters.params import Params


@dataclass(frozen=True)
class Policy:
    """A loaded model with what turns pairs into its input. ``model`` is in evaluation mode."""

    family: Family
    image_token_id: int
    model: Any
    tokenizer: Any
    processor: Any
    template: Any
    pairwise: Any
    collator: Any


@dataclass(frozen=True)
class PairLogProbs:
    """Summed log-probs (nats) and lengths (tokens) of n pairs; each array has shape (n,).

    An answer's tokens are those LLaMA-Factory trains on: the answer itself and the end of turn.
    ``image_tokens`` are the places in the prompt that hold the image.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    image_tokens: np.ndarray


NOTHING = PairLogProbs(*(np.zeros(0) for _ in range(2)), *(np.zeros(0, np.int64) for _ in range(3)))


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
        UserError: ``scoring.device`` is cuda and there is no GPU, or the adapter does not fit the
        model.
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
    model = load_model(tokenizer, loaded.model_args, loaded.finetuning_args, is_trainable=False)
    if p.model.quantization_bit is None:
        model = model.to(getattr(torch, p.scoring.dtype))
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return Policy(
        family=loaded.family,
        image_token_id=loaded.image_token_id,
        model=model.eval(),
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
    )


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
    for rejected. On the demo that is most of the time of scoring.
    """
    import torch

    plugin = copy.copy(template.mm_plugin)
    process = plugin._get_mm_inputs

    @functools.lru_cache(maxsize=512)
    def one(path: str, processor: Any) -> dict[str, Any]:
        return dict(process([path], [], [], processor))

    def each_once(
        images: list[str], videos: list[Any], audios: list[Any], processor: Any
    ) -> dict[str, Any]:
        inputs = [one(path, processor) for path in images]
        return (
            {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}
            if inputs
            else {}
        )

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
    policy: Policy, pairs: Sequence[dict[str, Any]], images: Path, *, batch_size: int, label: str
) -> PairLogProbs:
    """Log-probs of both answers of every pair.

    Args:
        pairs: formatted pairs, as the format stage writes them.
        images: the folder that their image names are relative to.
        batch_size: pairs per forward pass (twice as many rows).
        label: what the progress bar says.

    Returns:
        Arrays in the order of ``pairs``. Summed log-prob of an answer y given x:
        log π(y|x) = Σ_t log π(y_t | x, y_<t) (DPO, arXiv 2305.18290, section 4).
    """
    import torch
    from llamafactory.train.trainer_utils import get_batch_logps

    sums = np.zeros((2, len(pairs)))
    counts = np.zeros((3, len(pairs)), dtype=np.int64)
    with policy.family.seeing_each_image_once(policy.model):
        for rows, batch in _batches(policy, pairs, images, batch_size, label):
            labels = batch.pop("labels")
            with torch.inference_mode():
                logits = policy.model(**batch, return_dict=True, use_cache=False).logits.to(
                    torch.float32
                )
                summed, lengths = get_batch_logps(logits=logits, labels=labels)
            # The collator puts all chosen rows first, then all rejected ones.
            sums[:, rows] = summed.double().cpu().numpy().reshape(2, -1)
            counts[:2, rows] = lengths.cpu().numpy().reshape(2, -1)
            seen = (batch["input_ids"] == policy.image_token_id).sum(dim=1)
            counts[2, rows] = seen.cpu().numpy()[: len(rows)]
    return PairLogProbs(*sums, *counts)


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
        }
    )


def _batches(
    policy: Policy, pairs: Sequence[dict[str, Any]], images: Path, batch_size: int, label: str
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Batches on the model's device, with the places of their pairs; like lengths together."""
    from tqdm import tqdm

    order = by_length(pairs)
    with tqdm(total=len(pairs), desc=label, unit="pair") as progress:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            features = encode(policy, [pairs[i] for i in rows], images)
            batch = policy.collator(features)
            yield rows, {name: tensor.to(policy.model.device) for name, tensor in batch.items()}
            progress.update(len(rows))


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
    columns = policy.pairwise.preprocess_dataset(
        {
            "_prompt": [pair["messages"] for pair in pairs],
            "_response": [[pair["chosen"], pair["rejected"]] for pair in pairs],
            "_system": [""] * len(pairs),
            "_tools": [""] * len(pairs),
            "_images": [[str(images / name) for name in pair["images"]] for pair in pairs],
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
    batch_size: int,
    label: str,
) -> list[Answer]:
    """Greedy answers to formatted prompts (``messages`` and ``images``), in their order.

    Prompts are padded on the left, so that answers of a batch start together. An answer ends at the
    template's stop tokens or after ``max_new_tokens`` tokens.
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
    )
    answers: list[Answer] = []
    with tqdm(total=len(prompts), desc=label, unit="answer") as progress:
        for start in range(0, len(prompts), batch_size):
            batch = _left_padded(policy, prompts[start : start + batch_size], images)
            with torch.inference_mode():
                sequences = model.generate(**batch, generation_config=config)
            for new in sequences[:, batch["input_ids"].shape[1] :].tolist():
                end = next((i for i, token in enumerate(new) if token in stops), None)
                text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
                answers.append(Answer(text, len(new) if end is None else end, end is not None))
            progress.update(len(sequences))
    return answers


def _left_padded(policy: Policy, prompts: Sequence[dict[str, Any]], images: Path) -> dict[str, Any]:
    """A batch of prompts for ``generate``; the template's prompt tokens, image tokens included."""
    import torch

    plugin, tokenizer = policy.template.mm_plugin, policy.tokenizer
    files = [[str(images / name) for name in prompt["images"]] for prompt in prompts]
    rows = []
    for prompt, paths in zip(prompts, files, strict=True):
        answered = [*prompt["messages"], {"role": "assistant", "content": ""}]
        messages = plugin.process_messages(answered, paths, [], [], policy.processor)
        ids, _ = policy.template.encode_oneturn(tokenizer, messages)
        rows.append(torch.tensor(ids))
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
