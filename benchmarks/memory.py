"""What a training step holds, measured without weights and without a GPU, beside the arithmetic.

    python -m benchmarks.memory
    python -m benchmarks.memory --size 100m --image-tokens 256 --answer-tokens 120

The step runs on fake tensors (``torch._subclasses.FakeTensorMode``), which have shapes but no
values, and every storage is counted from its making to its end. What runs is the model of
transformers with PEFT's adapter, ``stages.model.prefix`` or LLaMA-Factory's ``get_batch_logps``,
DPO's loss, its backward pass, and AdamW. Two things are left out: the vision tower, which is frozen
and done before the language model starts, and what CUDA and its allocator take.

The first line is for the presets of one GPU, at a batch of pairs as long as ``format.cutoff_len``
allows; the second is comparable with what ``benchmarks.train`` measures on the CPU.
"""

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import logsigmoid
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.peer import peak_memory
from benchmarks.throughput import SIZES, config_of
from stages.commands import plan
from stages.commands.plan import GIGA
from stages.core import command
from stages.model import prefix
from stages.params.params import Params
from tests.contracts import PRESETS, preset_of

LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BETA = 0.1
BATCH = "per_device_train_batch_size"
WAYS: dict[str, dict[str, bool]] = {
    "LLaMA-Factory's": {"shared": False, "checkpointing": True},
    "ours": {"shared": True, "checkpointing": True},
    "ours, without checkpointing": {"shared": True, "checkpointing": False},
}


class Held(TorchDispatchMode):
    """Bytes of all storages that are alive, ``now`` and at their ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: Any = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


class Known(TorchFunctionMode):
    """Values of token ids, and what follows from them alone, are kept beside the fake tensors, as
    their ``value``: a mask then selects as many rows as it would.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _places(args[1]), *args[2:])
        if func is torch.Tensor.expand_as:  # of the other tensor only the shape counts
            func, args = torch.Tensor.expand, (args[0], args[1].shape)
        made = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if given and all(hasattr(each, "value") for each in given):
            with _disable_current_modes():
                real = func(*tree_map(_value, args), **tree_map(_value, kwargs or {}))
            for fake, value in zip(tree_leaves(made), tree_leaves(real), strict=True):
                if isinstance(fake, torch.Tensor):
                    fake.value = value
        return made


def _value(given: Any) -> Any:
    return given.value if isinstance(given, torch.Tensor) else given


def _places(index: Any) -> Any:
    """An index with masks replaced by the places that they select."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
            with _disable_current_modes():
                parts += part.value.nonzero(as_tuple=True)
        else:
            parts.append(part)
    return tuple(parts) if isinstance(index, tuple) or len(parts) > 1 else parts[0]


def held(
    size: plan.Size,
    pair: plan.Pair,
    *,
    shared: bool,
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
    real: bool = False,
) -> tuple[float, float]:
    """GB of the weights, and what a step on ``batch`` pairs holds beside them at its peak.

    ``real``: on tensors with values, and the peak is that of the process, by the kernel.
    """
    model = adapted(size, dtype)
    inner, hidden = prefix.plain(model), size["text"]["hidden_size"]
    rows = [features(pair, inner.config.image_token_id)] * batch
    grid = torch.tensor([[1, 2, 2 * pair.image]])  # four patches to a token
    packed = prefix.pack(rows, inner, lambda images: {"image_grid_thw": grid, "pixel_values": grid})
    levels = len(size["vision"]["deepstack_visual_indexes"])
    counted = Held()
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {name: here(each) for name, each in tensors.items() if each is not None}
        inner.tie_weights()
        image = torch.zeros(pair.image, hidden, dtype=inner.dtype)
        inner.model.get_image_features = lambda _, grids, **__: SimpleNamespace(
            pooler_output=[image] * len(grids),
            deepstack_features=[torch.cat([image] * len(grids)) for _ in range(levels)],
        )
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for parameter in model.parameters():
            counted.count(parameter)
        weights = counted.now
        optimizer = torch.optim.AdamW(each for each in model.parameters() if each.requires_grad)
        before = peak_memory(restart=True)
        with (
            nullcontext() if real else counted,
            nullcontext() if real else Known(),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            chosen, rejected = (one_row if shared else two_rows)(model.train(), packed, rows)
            (-logsigmoid(BETA * (chosen - rejected)).mean()).backward()
            optimizer.step()
    step = (peak_memory() - before) * 2**30 / GIGA if real else (counted.peak - weights) / GIGA
    return weights / GIGA, step


def adapted(size: plan.Size, dtype: torch.dtype) -> Any:
    """The model of that size with LoRA of rank 8 in float32, on the device that has no memory."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        made = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config_of(size))).to(dtype)
        return get_peft_model(made, LoraConfig(r=8, target_modules=LAYERS))


def here(tensor: Any) -> Any:
    """On the CPU, or fake, in the place of one without memory; of a parameter, a parameter."""
    made = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def features(pair: plan.Pair, image_token: int) -> dict[str, Any]:
    """A pair as LLaMA-Factory encodes it; what the tokens are decides nothing here."""
    prompt = [1] * (pair.question // 2) + [image_token] * pair.image
    prompt += [1] * (pair.prompt - len(prompt))
    row: dict[str, Any] = {"images": ["one"]}
    for token, side in ((2, "chosen"), (3, "rejected")):
        answer = [token] * pair.answer
        row[f"{side}_input_ids"] = prompt + answer
        row[f"{side}_labels"] = [prefix.IGNORE] * len(prompt) + answer
    return row


def known(values: torch.Tensor) -> torch.Tensor:
    """The tensor as it is made here; of a fake one the values are kept."""
    made = values.clone()
    made.value = values
    return made


def one_row(model: Any, packed: Mapping[str, Any], rows: Any) -> Any:
    """Log-probs (2, n) by ``stages.model.prefix``."""
    batch = {name: known(tensor) for name, tensor in packed.items()}
    batch["image_order"] = SimpleNamespace(tolist=packed["image_order"].tolist)
    return prefix.forward(prefix.plain(model), **batch)["logps"].sum(dim=-1)


def two_rows(model: Any, packed: Mapping[str, Any], rows: Any) -> Any:
    """Log-probs (2, n) as LLaMA-Factory computes them: a row each, all logits in float32."""
    from llamafactory.train.trainer_utils import get_batch_logps

    with _disable_current_modes():
        ids, labels = (
            torch.tensor([row[f"{side}_{kind}"] for side in ("chosen", "rejected") for row in rows])
            for kind in ("input_ids", "labels")
        )
        seen, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand(4, *ids.shape)
    logits = model(
        input_ids=known(ids),
        attention_mask=known(seen),
        position_ids=known(positions),
        pixel_values=packed["pixel_values"],
        image_grid_thw=packed["image_grid_thw"].expand(len(ids), -1),
        use_cache=False,
    ).logits.to(torch.float32)
    return torch.stack(get_batch_logps(logits, known(labels))[0].chunk(2))


def main(
    size: str = "",
    image_tokens: int = 256,
    question_tokens: int = 40,
    answer_tokens: int = 120,
    batch: int = 2,
) -> None:
    other = "process, real tensors" if size else "arithmetic"
    print(f"| a step, GB beside the weights | fake tensors | {other} |\n|---|---|---|")
    if size:
        pair, dtype = plan.Pair(image_tokens, question_tokens, answer_tokens), torch.float32
        for name, how in WAYS.items():
            fake, real = (
                held(SIZES[size], pair, batch=batch, dtype=dtype, real=each, **how)[1]
                for each in (False, True)
            )
            print(f"| {name} | {fake:.2f} | {real:.2f} |", flush=True)
        return
    for path in PRESETS:
        if path.stem in ("qwen3-vl-4b", "qwen3-vl-4b-24gb"):
            p = preset_of(path)
            image = plan.image_tokens(p)
            pair = plan.Pair(image, answer=p.format.cutoff_len - plan.Pair(image).prompt)
            for name, how in WAYS.items():
                told = by_arithmetic(p, SIZES["4b"], "bfloat16", **how)
                fake = held(SIZES["4b"], pair, batch=p.train.passed_through[BATCH], **how)[1]
                print(f"| `{path.stem}`, {name} | {fake:.1f} | {told:.1f} |", flush=True)


def by_arithmetic(
    p: Params, size: plan.Size, dtype: str, *, shared: bool, checkpointing: bool
) -> float:
    """What ``make plan`` says of activations and logits, GB."""
    how = {"shared_prefix": shared, "disable_gradient_checkpointing": not checkpointing}
    train = p.train.model_copy(update=how)
    takes = plan.memory(p.model_copy(update={"train": train}), size, dtype)
    return takes["activations"] + takes["logits"]


if __name__ == "__main__":
    command.run(main)
