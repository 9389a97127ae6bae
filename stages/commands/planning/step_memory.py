"""What a training process holds on its GPU, its step measured without weights and without a GPU.

The step runs on fake tensors (``torch._subclasses.FakeTensorMode``), which have shapes but no
values, and every storage is counted from its making to its end. What runs is the model of
transformers with PEFT's adapter, our log-probs or LLaMA-Factory's, DPO's loss, its backward pass
and AdamW, without the vision tower, which is done before. ``benchmarks.memory`` has real tensors.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from stages.commands.planning.dimensions import GIGA, Pair, Size, batch, family, parameters
from stages.model import prefix
from stages.params.losses import LOSSES
from stages.params.params import Params
from stages.tuning import config

QUANTISED = {4: 0.56, 8: 1.05}  # bytes of a number in bitsandbytes' NF4 or int8, with its scales
SHALLOW = (4, 8)  # layers; Qwen3.5 has attention in each fourth
CUDA_GB = 1.5  # of a process: its context, kernels and libraries (assumed)


def of_process(p: Params, size: Size, pair: Pair, *, kept: bool) -> dict[str, float]:
    """GB (10^9 bytes) of a training process at a batch of such pairs, by part."""
    numbers, bits = parameters(size), p.model.quantization_bit
    width = getattr(torch, config.dtype(p)).itemsize
    layers = numbers["layers"] * (QUANTISED[bits] if bits else width)
    return {
        "weights": (layers + width * (sum(numbers.values()) - numbers["layers"])) / GIGA,
        "step": measured(p, size, pair, kept=kept) / GIGA,
        "CUDA": CUDA_GB if p.train.gpus else 0.0,
    }


def measured(p: Params, size: Size, pair: Pair, *, kept: bool) -> float:
    """Bytes that a step on fake tensors holds at its peak beside the weights. Of a deeper model two
    shallow ones are measured: what a layer adds is the same for each (RESULTS.md).
    """
    layers = size["text"]["num_hidden_layers"]
    if layers <= SHALLOW[-1]:
        return of_all_layers(p, size, pair, kept=kept)
    few, more = (of_all_layers(p, with_layers(size, n), pair, kept=kept) for n in SHALLOW)
    return more + (more - few) / (SHALLOW[1] - SHALLOW[0]) * (layers - SHALLOW[1])


def with_layers(size: Size, number: int) -> Size:
    text = {name: value for name, value in size["text"].items() if name != "layer_types"}
    return {"text": text | {"num_hidden_layers": number}, "vision": size["vision"]}


def of_all_layers(p: Params, size: Size, pair: Pair, *, kept: bool) -> int:
    """The same of a model as it is."""
    held = Held()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, step = prepared(p, size, pair, kept=kept)
        for parameter in model.parameters():
            held.count(parameter)
        weights = held.now
        with held:
            step()
    return held.peak - weights


def prepared(p: Params, size: Size, pair: Pair, *, kept: bool) -> tuple[Any, Callable[[], None]]:
    """A model of zeros with LoRA in float32 on every linear layer, and its step on a batch."""
    dtype, shared = getattr(torch, config.dtype(p)), p.train.shared_prefix
    with _disable_current_modes():
        model = adapted(p, size, dtype)
        inner = prefix.plain(model)
        rows = batch(p) * (1 + LOSSES[p.train.loss].view) * (1 if shared else 2)
        sides = (pair.answer, pair.answer if shared else 0)
        features = [encoded(pair, inner.config.image_token_id, sides)] * rows
        grid = torch.tensor([[1, 2, 2 * pair.image]])  # four patches to a token
        looks = {"image_grid_thw": grid, "pixel_values": grid}
        packed = prefix.pack(features, inner, lambda images: looks)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: here(each) for name, each in tensors.items() if each is not None}
    inner.tie_weights()
    levels = size["vision"].get("deepstack_visual_indexes", [])
    seen = torch.zeros(pair.image, size["text"]["hidden_size"], dtype=dtype)
    inner.model.get_image_features = lambda _, grids, **__: SimpleNamespace(
        pooler_output=[seen] * len(grids),
        deepstack_features=[torch.cat([seen] * len(grids)) for _ in levels],
    )
    if not kept:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(each for each in model.train().parameters() if each.requires_grad)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if shared:
                chosen, rejected = prefix.forward(inner, **packed)["logps"].sum(dim=-1)
            else:
                chosen, rejected = two_rows(model, packed)
            (-logsigmoid(p.train.beta * (chosen - rejected)).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    return model, step


def adapted(p: Params, size: Size, dtype: torch.dtype) -> Any:
    """The model of that size with its adapter, on the device that has no memory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    made = AutoConfig.for_model(
        family(p).model_types[0],
        text_config=dict(size["text"]),
        vision_config=dict(size["vision"]),
        tie_word_embeddings=size["text"].get("tie_word_embeddings", True),
    )
    made.image_token_id = made.text_config.vocab_size - 1
    rope = made.text_config.rope_parameters
    half = int(size["text"]["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
    rope.setdefault("mrope_section", [half - 2 * (half // 3), half // 3, half // 3])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(made, attn_implementation="sdpa").to(dtype)
        linear = (n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        layers = [name for name in linear if "language_model" in name]
        rank = int(p.train.passed_through.get("lora_rank", 8))
        return get_peft_model(model, LoraConfig(r=rank, target_modules=layers))


def here(tensor: Any) -> Any:
    """On the CPU, or fake, in the place of one without memory; of a parameter, a parameter."""
    made = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def encoded(pair: Pair, image_token: int, sides: tuple[int, int]) -> dict[str, Any]:
    """A pair as LLaMA-Factory encodes it, with so many tokens of chosen and of rejected."""
    prompt = [image_token] * pair.image + [1] * pair.question
    row: dict[str, Any] = {"images": ["one"]}
    for token, side, length in zip((2, 3), ("chosen", "rejected"), sides, strict=True):
        row[f"{side}_input_ids"] = prompt + [token] * length
        row[f"{side}_labels"] = [prefix.IGNORE] * len(prompt) + [token] * length
    return row


def two_rows(model: Any, packed: Mapping[str, Any]) -> Any:
    """Log-probs (2, n) as LLaMA-Factory computes them: a row each, all logits in float32."""
    from llamafactory.train.trainer_utils import get_batch_logps

    ids = packed["input_ids"]
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=packed["position_ids"],
        pixel_values=packed["pixel_values"],
        image_grid_thw=packed["image_grid_thw"].expand(len(ids), -1),
        use_cache=False,
    ).logits
    return torch.stack(get_batch_logps(logits.to(torch.float32), ids)[0].chunk(2))


class Held(TorchDispatchMode):
    """Bytes of all storages that are alive, ``now`` and at their ``peak``. Token ids, and what
    follows from them alone, have values: a mask then selects as many rows as it would.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: Any = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [places for index in args[1] for places in selected(index)])
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        real = given and not any(isinstance(each, FakeTensor) for each in given)
        if func is torch.ops.aten._local_scalar_dense.default and not real:
            return False  # whether a causal mask is all ones
        with _disable_current_modes() if real else nullcontext():
            made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self.count(each)
        return made

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = int(storage.nbytes())
        self.known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, size)

    def forget(self, size: int) -> None:
        self.now -= size


def selected(index: Any) -> Sequence[Any]:
    """Places that a mask selects in each dimension; of any other index itself."""
    if index is None or index.dtype != torch.bool:
        return [index]
    with _disable_current_modes():
        return list(index.nonzero(as_tuple=True))
