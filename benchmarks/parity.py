"""Every switch for speed, held against LLaMA-Factory's way; writes PARITY.md.

    python -m benchmarks.parity

Two parts. Random batches on tiny models, in float64, float32 and bfloat16: the largest differences
of log-probs, loss and gradients, and of the loss at each step of a training. Then trainings of the
demo through ``llamafactory-cli``, in one process and in two, with LLaMA-Factory's trainer and with
ours: the loss at each step. The second part needs what `make repro` leaves in ``data`` and
``models``. Bounds are stated beside what was measured, and the command fails where one is broken.

In float32 and bfloat16 rounding is all of the difference, and does not say who is right: over 50
steps in float32, LLaMA-Factory's own loss was 9e-4 from float64's, and ours 7e-5. So there all
ways, LLaMA-Factory's too, are held against float64 with the same weights, and none may be more than
three times as far from it as LLaMA-Factory's rows are.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.pipeline import stack
from stages.core import command
from stages.core.errors import UserError
from stages.model import prefix
from stages.params import params
from stages.tuning import config, history, process
from tests.rounding import COMMITTED

OUT, RUNS = Path("benchmarks/PARITY.md"), Path("models/training")
SEED_MODEL = Path("demo/model")
CHUNK = 16  # tokens that go to the head together here, so that every batch has several chunks
LEARNING_RATE = 5e-4

# Largest differences that are allowed in float64: of gradients, relative, and of the loss at any
# step, relative where it is above 1. The trainer keeps the cached reference in float32, which
# rounds log-probs of 100 nats by 4e-6.
EXACT, CACHED = 1e-9, 1e-4
DTYPES = ("float64", "float32", "bfloat16")
STOCK, SHARED = "LLaMA-Factory's rows", "prompt shared (all of the above but the cache)"
SLACK = 3.0

# Where `python -m tests.rounding` gave the committed hash, and where the demo's results were made.
CPUS = (
    ("Intel Xeon, Sapphire Rapids", "AVX-512, AMX", "where the demo was made", "yes"),
    ("AMD EPYC", "AVX-512", "a reviewer's machine", "yes"),
    ("AMD EPYC Rome", "AVX2", "emulated by qemu-user 7.2", "not tried"),
    ("Intel Haswell", "AVX2", "emulated by qemu-user 7.2", "not tried"),
)

Batch = tuple[str, list[dict[str, Any]]]  # the family's name and its pairs


# Random batches on tiny models


@dataclass(frozen=True)
class Way:
    """``log_probs(model, pairs, process_images)``: of shape (2, n).

    cached: the reference's log-probs come from a table in float32. gradients: whether it has any.
    """

    log_probs: Callable[..., Any]
    cached: bool = False
    gradients: bool = True


@dataclass
class Found:
    """The largest differences from LLaMA-Factory's way so far."""

    logps: float = 0.0
    loss: float = 0.0
    gradient: float = 0.0
    steps: list[float] = field(default_factory=list)


def ways() -> dict[str, Way]:
    """All that is held against LLaMA-Factory's rows, and these themselves."""
    from tests import one_by_one as plain

    return {
        STOCK: Way(plain.one_by_one),
        "LLaMA-Factory's rows, a pair at a time": Way(a_pair_at_a_time),
        "head on answer tokens in chunks, a row for each answer": Way(head_in_chunks),
        "cached reference, a row for each answer": Way(plain.one_by_one, cached=True),
        SHARED: Way(shared),
        "prompt shared, cached reference (what the pipeline trains with)": Way(shared, cached=True),
        "prompt shared, FlexAttention, not compiled": Way(flexed),
        "prompt shared, scoring": Way(scored, gradients=False),
    }


def a_pair_at_a_time(model: Any, pairs: Sequence[Any], look: Any) -> Any:
    import torch

    from tests.one_by_one import one_by_one

    return torch.cat([one_by_one(model, [pair], look) for pair in pairs], dim=1)


def head_in_chunks(model: Any, pairs: Sequence[Any], look: Any) -> Any:
    from tests.one_by_one import padded

    inputs, labels = padded(model, pairs, look)
    inner = prefix.plain(model)
    answered = labels[:, 1:] != prefix.IGNORE
    states = inner.model(**inputs).last_hidden_state[:, :-1][answered]
    flat = prefix.token_log_probs(inner.lm_head, states, labels[:, 1:][answered])
    logps = flat.new_zeros(answered.shape).masked_scatter(answered, flat)
    return logps.sum(dim=-1).reshape(2, -1)


def shared(model: Any, pairs: Sequence[Any], look: Any) -> Any:
    batch = prefix.pack(pairs, model, look)
    return prefix.forward(prefix.plain(model), **batch)["logps"].sum(dim=-1)


def flexed(model: Any, pairs: Sequence[Any], look: Any) -> Any:
    from tests.one_by_one import flexed

    return flexed(model, pairs, look)["logps"].sum(dim=-1)


def scored(model: Any, pairs: Sequence[Any], look: Any) -> Any:
    return prefix.log_probs(model, prefix.pack(pairs, model, look))["logps"].sum(dim=-1)


def random_batches(count: int, longest: int) -> list[Batch]:
    """As many different batches of one to four pairs, the same ones each time."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    from tests.one_by_one import PATCH as FAMILIES
    from tests.one_by_one import pairs

    found: list[Batch] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(FAMILIES)), st.lists(pairs(longest), min_size=1, max_size=4))
    def draw(family: str, batch: list[dict[str, Any]]) -> None:
        found.append((family, batch))

    draw()
    return found


def models(dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiny models of both families, and the same weights in float64. In bfloat16 the adapter stays
    in float32, as in training.
    """
    import torch

    from tests.one_by_one import tiny

    exact = tiny(SEED_MODEL)
    if dtype == "float64":
        return exact, exact
    made = {name: copy.deepcopy(one).to(getattr(torch, dtype)) for name, one in exact.items()}
    if dtype == "bfloat16":
        for model in made.values():
            for weight in trained(model):
                weight.data = weight.data.float()
    return made, {name: copy.deepcopy(model).double() for name, model in made.items()}


def trained(model: Any) -> list[Any]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@contextmanager
def precision(model: Any) -> Iterator[None]:
    """float64 throughout, norms included; or what a training in bfloat16 runs in."""
    import torch

    from tests.one_by_one import in_float64

    inside: Any = nullcontext()
    if model.dtype == torch.float64:
        inside = in_float64(model)
    elif model.dtype == torch.bfloat16:
        inside = torch.autocast("cpu", dtype=torch.bfloat16)
    chunk, prefix.CHUNK = prefix.CHUNK, CHUNK
    try:
        with inside:
            yield
    finally:
        prefix.CHUNK = chunk


def loss(model: Any, way: Way, batch: Sequence[Any], look: Any) -> tuple[Any, Any]:
    """Log-probs (2, n) and DPO's loss; the reference is the model without its adapter."""
    import torch

    from tests.one_by_one import loss as dpo

    with torch.no_grad(), model.disable_adapter():
        reference = (scored if way.cached else way.log_probs)(model, batch, look)
    if way.cached:
        reference = reference.to(torch.float32)  # ``float`` stays in float64 there
    logps = way.log_probs(model, batch, look)
    return logps, dpo(logps - reference)


def measured(model: Any, way: Way, batch: Sequence[Any], look: Any) -> tuple[Any, float, Any]:
    """Log-probs, loss and gradients of a batch, the latter two where the way has any."""
    import torch

    with precision(model):
        if not way.gradients:
            return way.log_probs(model, batch, look), 0.0, None
        logps, value = loss(model, way, batch, look)
        gradients = torch.autograd.grad(value, trained(model))
    return logps.detach(), value.item(), torch.cat([one.flatten() for one in gradients])


def compare(dtype: str, batches: Sequence[Batch], which: Mapping[str, Way]) -> dict[str, Found]:
    """The largest differences of one pass over each batch, by way."""
    from tests.one_by_one import Looks

    (made, truth), found = models(dtype), {name: Found() for name in which}
    for family, batch in batches:
        expected = measured(truth[family], which[STOCK], batch, Looks(family))
        for name, way in which.items():
            logps, value, gradient = measured(made[family], way, batch, Looks(family))
            one = found[name]
            one.logps = max(one.logps, (logps - expected[0]).abs().max().item())
            if gradient is not None:
                one.loss = max(one.loss, abs(value - expected[1]) / max(1.0, expected[1]))
                apart = (gradient - expected[2]).norm() / expected[2].norm()
                one.gradient = max(one.gradient, apart.item())
    return found


def train(model: Any, batches: Sequence[Batch], way: Way) -> list[float]:
    """The loss at each step of a training of the tiny Qwen3-VL, a batch a step."""
    import torch

    from tests.one_by_one import Looks

    model, look = copy.deepcopy(model), Looks("qwen3_vl")
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE)
    losses = []
    with precision(model):
        for _, batch in batches:
            _, value = loss(model, way, batch, look)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses


def random_part(
    dtype: str, batches: Sequence[Batch], steps: int, which: Mapping[str, Way]
) -> dict[str, Found]:
    """``compare``, and the difference of the loss at each of so many steps. Not in bfloat16, where
    trainings on random pairs part within a few steps, LLaMA-Factory's too.
    """
    found = compare(dtype, batches, which)
    if dtype == "bfloat16":
        return found
    made, truth = (one["qwen3_vl"] for one in models(dtype))
    for_steps = [batch for batch in batches if batch[0] == "qwen3_vl"]
    for_steps = (for_steps * steps)[:steps]
    expected = train(truth, for_steps, which[STOCK])
    for name, way in which.items():
        if way.gradients:
            losses = zip(train(made, for_steps, way), expected, strict=True)
            found[name].steps = [abs(a - b) / max(1.0, b) for a, b in losses]
    return found


def broken(dtype: str, found: Mapping[str, Found], which: Mapping[str, Way]) -> list[str]:
    """A sentence for each bound that is not kept."""
    stock, sentences = found[STOCK], []
    for name, one in found.items():
        exact = CACHED if which[name].cached else EXACT
        kept = {
            "log-probs": (one.logps, SLACK * stock.logps or EXACT),
            "gradients": (one.gradient, SLACK * stock.gradient or exact),
            "losses": (most(one.steps), SLACK * most(stock.steps) or exact),
        }
        sentences += [
            f"{dtype}, {name}: {what} differ by {value:.2g}, and {bound:.2g} is allowed"
            for what, (value, bound) in kept.items()
            if not value <= bound
        ]
    return sentences


def most(values: Sequence[float]) -> float:
    return max(values, default=0.0)


# Trainings of the demo


@dataclass(frozen=True)
class Training:
    """A training by ``llamafactory-cli``: ``options`` on top of the demo's, how many processes,
    and whose trainer. ``resumed``: it goes on from another one's checkpoint in the middle.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    ours: bool = True
    cached: bool = False
    resumed: str | None = None
    loss: str = "sigmoid"


STEPS, SHORT = 50, {"per_device_train_batch_size": 4}
SAVED = {"save_strategy": "steps", "save_steps": STEPS // 2, "save_total_limit": 2}
ACCUMULATED = SHORT | {"gradient_accumulation_steps": 2}
TRAININGS = {
    "LLaMA-Factory": Training(ours=False),
    "prompt shared": Training(SAVED),
    "cached": Training(cached=True),
    "resumed": Training(resumed="prompt shared"),
    "LLaMA-Factory, two processes": Training(SHORT, processes=2, ours=False),
    "two processes": Training(SHORT, processes=2),
    "no checkpointing": Training({"disable_gradient_checkpointing": True}),
    "LLaMA-Factory, accumulation": Training(ACCUMULATED, ours=False),
    "accumulation": Training(ACCUMULATED),
    "LLaMA-Factory, bfloat16": Training({"bf16": True}, ours=False),
    "LLaMA-Factory, bfloat16, accumulation": Training(ACCUMULATED | {"bf16": True}, ours=False),
    "bfloat16": Training({"bf16": True}),
    "LLaMA-Factory, mpo": Training(loss="mpo", ours=False),
    "mpo": Training(SAVED, loss="mpo", cached=True),
    "mpo, resumed": Training(loss="mpo", cached=True, resumed="mpo"),
    "mdpo": Training(SAVED, loss="mdpo"),
    "mdpo, cached": Training(loss="mdpo", cached=True),
    "mdpo, resumed": Training(loss="mdpo", resumed="mdpo"),
}

# What is held against what, and how much the loss may differ at any step; None: as the two rows
# of LLaMA-Factory in bfloat16 do.
SAME = (
    ("prompt shared, reference computed", "prompt shared", "LLaMA-Factory", 1e-4),
    ("prompt shared, cached reference", "cached", "LLaMA-Factory", 1e-4),
    ("resumed in the middle, against uninterrupted", "resumed", "prompt shared", 0.0),
    ("two processes", "two processes", "LLaMA-Factory, two processes", 1e-4),
    ("without gradient checkpointing", "no checkpointing", "LLaMA-Factory", 1e-4),
    ("gradients accumulated over 2 batches", "accumulation", "LLaMA-Factory, accumulation", 1e-4),
    (
        "LLaMA-Factory in bfloat16: batches of 8 against two of 4",
        "LLaMA-Factory, bfloat16, accumulation",
        "LLaMA-Factory, bfloat16",
        None,
    ),
    ("bfloat16", "bfloat16", "LLaMA-Factory, bfloat16", None),
    ("mpo, cached reference", "mpo", "LLaMA-Factory, mpo", 1e-4),
    ("mpo, resumed, against uninterrupted", "mpo, resumed", "mpo", 0.0),
    ("mdpo, cached reference, against computed", "mdpo, cached", "mdpo", 1e-4),
    ("mdpo, resumed, against uninterrupted", "mdpo, resumed", "mdpo", 0.0),
)


DATA, MODEL, REFERENCE = Path("data/formatted"), Path("models/base"), Path("data/reference")


def settings(training: Training) -> params.Params:
    p = params.load(Path("params/demo.yaml"))
    given = {"loss": training.loss, "shared_prefix": training.ours}
    return p.model_copy(update={"train": p.train.model_copy(update=given)})


def configured(training: Training) -> tuple[dict[str, Any], Path]:
    """The configuration of a training, and its folder, which is named by all that decides it."""
    p = settings(training)
    configuration = config.dpo_config(
        p,
        model=MODEL,
        formatted=DATA,
        images=Path("data/pairs/images"),
        output=RUNS,
        validated=False,
    )
    configuration |= {
        "per_device_train_batch_size": 8,
        "max_samples": 8 * STEPS,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        **training.options,
    }
    name = config.fingerprint(configuration, p, DATA, MODEL, REFERENCE if training.cached else None)
    name += f"-{training.processes}"
    return configuration, RUNS / (name + "-resumed" * bool(training.resumed))


def losses_of(training: Training) -> list[float]:
    """The loss at each step; a training that was finished by an earlier run is not run again."""
    configuration, folder = configured(training)
    if not (folder / history.STATE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        run(training, configuration, folder)
    losses = [entry["loss"] for entry in history.read(folder) if "loss" in entry]
    if len(losses) != STEPS:
        raise UserError(f"the training in {folder} logged {len(losses)} of {STEPS} steps")
    if training.ours:
        told = json.loads((folder / history.FIRST_BATCH).read_text(encoding="utf-8"))
        if told.get("reference") != ("cached" if training.cached else "computed"):
            raise UserError(f"the training in {folder} was not what it should be: {told}")
    return losses


def run(training: Training, configuration: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    if training.resumed:
        middle = f"checkpoint-{STEPS // 2}"
        _, other = configured(TRAININGS[training.resumed])
        shutil.copytree(other / middle, folder / middle)
    file = folder / "llamafactory.yaml"
    OmegaConf.save(OmegaConf.create(configuration), file)
    environment = config.environment(0, os.environ, is_portable=True)
    if training.processes > 1:
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(training.processes)}
    if training.ours:
        p, cached = settings(training), REFERENCE if training.cached else None
        under_view = config.under_view(p, DATA, MODEL, cached)
        environment |= process.shared_prefix(cached, config.view(p), under_view)
    process.launch(
        ["train", str(file), f"output_dir={folder}"], folder, environment, lambda entry: None
    )


def main(batches: int = 16, longest: int = 120, out: Path = OUT) -> None:
    import torch

    torch.set_num_threads(1)  # models this small are slower on several
    which = ways()
    drawn = random_batches(batches, longest)
    lines = [
        "# Parity",
        "",
        "Made by `python -m benchmarks.parity`, which says in its docstring what is compared. "
        f"Differences from LLaMA-Factory's way; {stack()}.",
        "",
        f"## {len(drawn)} random batches",
        "",
        "Of one to four pairs on tiny models: Qwen3-VL, Qwen2.5-VL, Qwen3.5; up to two images, "
        f"answers of 1 to {longest} tokens that may begin alike, padding. The largest difference "
        "of an answer's log-prob (nats), the largest relative one of a batch's gradients, and, "
        f"over {STEPS} steps of AdamW on Qwen3-VL, of the loss (relative where it is above 1). In "
        "float64 from LLaMA-Factory's rows; else each row, LLaMA-Factory's too, from float64 with "
        f"the same weights. No row may be more than {SLACK:.0f} times as far as LLaMA-Factory's.",
    ]
    wrong = []
    for dtype in DTYPES:
        found = random_part(dtype, drawn, STEPS, which)
        wrong += broken(dtype, found, which)
        lines += ["", f"### {dtype}", "", "| way | log-probs | gradients | loss, any step |"]
        lines += ["|---|---|---|---|"]
        for name, one in found.items():
            trains = which[name].gradients
            shown = (
                f"{one.logps:.1e}",
                f"{one.gradient:.1e}" if trains else "",
                f"{max(one.steps):.1e}" if one.steps else "",
            )
            lines.append(f"| {name} | {' | '.join(shown)} |")
    if not REFERENCE.is_dir():
        raise UserError(f"{REFERENCE} is missing; `dvc repro reference` makes it")
    losses = {name: losses_of(training) for name, training in TRAININGS.items()}
    lines += [
        "",
        "## Trainings of the demo",
        "",
        f"{STEPS} steps of 8 pairs by `llamafactory-cli` with the demo's settings; two processes "
        "are torchrun's, over gloo, with 4 pairs each. The loss at each step is compared, and so "
        "are the two trainers with each other where nothing else is said.",
        "",
        "| training | largest difference of the loss | at step | first and last loss |",
        "|---|---|---|---|",
    ]
    of_bfloat16 = None
    for title, name, other, bound in SAME:
        apart = [abs(a - b) for a, b in zip(losses[name], losses[other], strict=True)]
        largest = max(apart)
        first, *_, last = losses[name]
        lines.append(
            f"| {title} | {largest:.1e} | {apart.index(largest) + 1} | {first:.4f}, {last:.4f} |"
        )
        if bound is None:
            of_bfloat16, bound = of_bfloat16 or largest, SLACK * (of_bfloat16 or largest)
        if not largest <= bound:
            wrong.append(f"{title}: the loss differs by {largest:.2g}, and {bound:.2g} is allowed")
    lines += [
        "",
        "## CPUs tried",
        "",
        "In portable arithmetic (`scoring.portable`, `train.portable`) loss and gradients of the "
        f"demo's model, by `python -m tests.rounding`, had the hash `{COMMITTED}` on each of "
        "these; the demo's `data/reference` and `models/adapter` had the same bits on those of the "
        "last column. `make test` compares the hash wherever it runs on x86-64.",
        "",
        "| CPU | vectors | where | the demo's bits |",
        "|---|---|---|---|",
        *(f"| {' | '.join(cpu)} |" for cpu in CPUS),
    ]
    lines += ["", "## Bounds", ""]
    lines += [f"- broken: {sentence}" for sentence in wrong] or ["All are kept."]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if wrong:
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    command.run(main)
