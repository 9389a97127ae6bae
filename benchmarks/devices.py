"""Where every operation runs on a machine with a GPU, told without one.

    python -m benchmarks.devices

Tensors stay on the CPU, with their values, and a mode of torch keeps which of them would be on the
GPU: what is moved there, made there, or made of what is there. The code of scoring and generation
so runs whole, as ``FakeTensorMode`` can't run it, whose tensors have no values to stop an answer
by. An operation on tensors of both devices is refused, as CUDA refuses it; indexing by a tensor on
the CPU is refused too, which CUDA allows and waits for. Only forward: kernels are the CPU's.
"""

import tempfile
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.throughput import SIZES, make_model, make_pairs, parameters_of
from stages.core import command

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# They read of another tensor no more than its shape, or move what they are given.
MIXING = ("to", "copy_", "expand_as", "view_as", "reshape_as", "__set__")
PRODUCTS = ("linear", "matmul", "__matmul__", "bmm", "scaled_dot_product_attention", "conv3d")


class LeftOnTheCPU(Exception):
    """An operation has tensors of both devices."""


class OnCuda(TorchFunctionMode):
    """While it lasts, a model is on the GPU. ``seen`` counts operations by name, device and
    precisions of their tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
        self.there: Any = weakref.WeakSet()  # storages
        for tensor in (*model.parameters(), *model.buffers()):
            self.there.add(tensor.untyped_storage())

    def device(self, tensor: torch.Tensor) -> torch.device:
        return CUDA if tensor.untyped_storage() in self.there else CPU

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs, asked = getattr(func, "__name__", str(func)), dict(kwargs or {}), []
        if func == torch.Tensor.device.__get__:
            return self.device(args[0])
        if func == torch.Tensor.is_cuda.__get__:
            return self.device(args[0]) == CUDA

        def on_cpu(given: Any) -> Any:
            named = isinstance(given, str) and given in ("cpu", "cuda", "cuda:0")
            if named or isinstance(given, torch.device):
                asked.append(CUDA if torch.device(given).type == "cuda" else CPU)
                return CPU
            return given

        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if name in ("cpu", "cuda"):
            asked.append(CUDA if name == "cuda" else CPU)
            func, args, kwargs = torch.Tensor.clone, args[:1], {}
        if name == "to" and len(tensors) == 2:
            asked.append(self.device(tensors[1]))
        args, kwargs = tree_map(
            lambda each: each if isinstance(each, torch.Tensor) else on_cpu(each), (args, kwargs)
        )
        devices = {self.device(each) for each in tensors if each.dim() or self.device(each) == CUDA}
        if (len(devices) > 1 and name not in MIXING) or (name == "numpy" and CUDA in devices):
            which = [f"{tuple(t.shape)} {t.dtype} on {self.device(t).type}" for t in tensors]
            raise LeftOnTheCPU(f"{name}: {', '.join(which)}")
        made = func(*args, **kwargs)
        device = asked[-1] if asked else max(devices, key=str, default=CPU)
        if asked and isinstance(made, torch.Tensor) and tensors and device not in devices:
            made = made.clone()  # on the other device
        results = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        for each in results if device == CUDA else ():
            self.there.add(each.untyped_storage())
        if results and not name.startswith("__"):
            kinds = sorted({str(each.dtype).removeprefix("torch.") for each in tensors + results})
            self.seen[name, device.type, tuple(kinds)] += 1
        return made


def table(seen: Counter[tuple[str, str, tuple[str, ...]]]) -> str:
    """Operations on the GPU and on the CPU, and products on the GPU by precision, as cells."""
    devices, products = Counter[str](), Counter[str]()
    for (name, device, kinds), count in seen.items():
        devices[device] += count
        if name in PRODUCTS and device == "cuda":
            products["/".join(kinds)] += count
    shown = ", ".join(f"{count} {name}" for name, count in products.most_common())
    return f"{devices['cuda']} | {devices['cpu']} | {shown}"


def main(size: str = "tiny", dtype: str = "bfloat16") -> None:
    from stages.model import scoring

    scoring.WORKERS = 0  # one process prepares, under the mode
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"), SIZES[size], "cpu", dtype)
        policy = scoring.load(Path(folder, "model"), parameters_of("cpu", dtype, 64 * 1024))
        rows = make_pairs(Path(folder), policy.tokenizer, 2, 8, side=256)
        given: Any = {"batch_tokens": 512, "label": ""}
        print("| | on the GPU | on the CPU | products |\n|---|---|---|---|")
        with OnCuda(policy.model) as run:
            scoring.log_probs(policy, rows, Path(folder), **given)
        print(f"| scoring | {table(run.seen)} |")
        with OnCuda(policy.model) as run:
            scoring.answer(policy, rows, Path(folder), max_new_tokens=4, **given)
        print(f"| generation | {table(run.seen)} |")


if __name__ == "__main__":
    command.run(main)
