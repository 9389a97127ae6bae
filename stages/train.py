"""Train: Direct Preference Optimization of the base model on the train pairs, by LLaMA-Factory.

In: ``data/formatted``, the images, the base model, the reference's log-probs. Out: the adapter with
the complete LLaMA-Factory configuration that made it, and the training curves.

Why a subprocess: ``llamafactory-cli`` is the interface that LLaMA-Factory documents, torchrun
included. It works in ``models/training/<fingerprint>``, which DVC leaves alone. A training that was
interrupted resumes there from its last checkpoint if nothing that matters has changed, else it
starts clean. An adapter that exists for the same fingerprint is not trained again, unless
``dvc repro -f`` asks for it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from stages.core import command
from stages.core.command import is_forced, project_root
from stages.model import formatted
from stages.params import params
from stages.tracking import runs
from stages.tuning import config, history, process
from stages.tuning.config import WORKSPACE


def main(
    formatted_data: Path, images: Path, model: Path, reference: Path, out: Path, curves: Path
) -> dict[str, Any]:
    p = params.load()
    config.check_modules(p, model)
    configuration = config.dpo_config(
        p,
        model=model,
        formatted=formatted_data,
        images=images,
        output=WORKSPACE,
        validated=bool(formatted.read(formatted_data, "validation")),
    )
    cached = config.cached_reference(p, reference, model)
    fingerprint = config.fingerprint(
        configuration,
        formatted_data,
        model,
        p.train.processes,
        ours=config.ours(p),
        cached=cached,
    )
    # Experiments in DVC's temporary copies keep their checkpoints in the real project.
    folder = Path(os.path.relpath(project_root() / WORKSPACE / fingerprint))
    with alone(folder):
        return trained_once(p, configuration, folder, cached, out, curves)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time train in ``folder``: experiments side by side may share a training,
    and the second then uses what the first made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"training {folder.name}: another process trains it; waiting", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def trained_once(
    p: params.Params,
    configuration: dict[str, Any],
    folder: Path,
    cached: Path | None,
    out: Path,
    curves: Path,
) -> dict[str, Any]:
    """Train in ``folder``, which the fingerprint names, unless the adapter is there or an earlier
    experiment made it; the facts for the diary.
    """
    facts: dict[str, Any] = {}
    fingerprint = folder.name
    trained = process.is_trained(fingerprint, out) and not is_forced()
    if trained and (history.has_curves(curves) or (folder / history.STATE).is_file()):
        print(
            f"training {fingerprint}: {out} holds its adapter already; nothing to train "
            "(`dvc repro -f train` trains it again)"
        )
    elif process.is_finished(folder) and not is_forced():
        print(f"training {fingerprint}: finished in an earlier experiment, in {folder}")
        process.publish(folder, out, fingerprint)
    else:
        facts = train(p, configuration, folder, cached)
        process.publish(folder, out, fingerprint)
        process.finish(folder)
    if not trained or not history.has_curves(curves):
        history.write_curves(folder, curves)
    return facts


def train(
    p: params.Params, configuration: dict[str, Any], folder: Path, cached: Path | None
) -> dict[str, Any]:
    """Train in ``folder``, with live curves in MLflow; the facts for the diary.

    ``cached``: where the reference's log-probs are, if this training may use them.

    Raises:
        UserError: the training failed, or what it logs can't be right; the latter ends it there.
    """
    config.check_environment(os.environ)
    here = min(p.train.gpus, 1) if config.on_ray(os.environ) else p.train.gpus
    config.require_gpus(here, bf16=config.dtype(p) == "bfloat16")
    resumed = process.prepare(folder)
    start = f"resuming from {resumed}" if resumed else "a clean start"
    print(f"training {folder.name}: {start}", flush=True)
    file = folder / "llamafactory.yaml"
    # By the library that LLaMA-Factory reads it with: to YAML 1.1, a bare `no` is false.
    OmegaConf.save(OmegaConf.create(configuration), file)

    beta = p.train.beta if config.starts_at_reference(p) else None
    with runs.Live(folder.name) as live:

        def watch(entry: dict[str, Any]) -> None:
            if p.train.shared_prefix:
                history.require_first_batch(folder)
            history.check(entry, beta)
            if measured := history.point(entry):
                live.log(entry["step"], *measured)

        environment = config.environment(p.train.gpus, os.environ, is_portable=p.train.portable)
        if p.train.shared_prefix:
            environment = process.with_shared_prefix(
                environment, cached, p.train.keep_vision_features
            )
        words = ["train", str(file), f"output_dir={folder}"]
        if config.on_ray(environment):
            words.append(f"ray_num_workers={p.train.processes}")
        process.launch(words, folder, environment, watch)

    if p.train.shared_prefix:
        history.require_first_batch(folder)
    entries = history.read(folder)
    for entry in entries:  # those before a checkpoint that it resumed from too
        history.check(entry, beta)
    if beta is not None:
        margin = history.first_margin(entries)
        print(f"reward margin at step 1: {margin:.2g} (the policy starts at the reference)")
    return history.cost(entries, p.train.gpus, resumed is not None)


if __name__ == "__main__":
    command.run(main)
