"""Train the base model on the train pairs by Direct Preference Optimization, with LLaMA-Factory.

In: ``data/formatted``, the images, the base model, the reference's log-probs. Out: the adapter with
the complete LLaMA-Factory configuration that made it, and the training curves.

Why a subprocess: ``llamafactory-cli`` is the interface that LLaMA-Factory documents, torchrun
included. It works in ``models/training/<fingerprint>``, which DVC leaves alone. A training that was
interrupted resumes there from its last checkpoint if nothing that matters has changed, else it
starts clean. An adapter that exists for the same fingerprint is not trained again, unless
``dvc repro -f`` asks for it.
"""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf

from stages.core import command
from stages.core.command import is_forced, project_root
from stages.model import formatted
from stages.params import machine, params
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
    fingerprint = config.fingerprint(configuration, p, formatted_data, model, cached)
    shared = {}
    if p.train.shared_prefix:
        under_view = config.under_view(p, formatted_data, model, cached)
        shared = process.shared_prefix(cached, config.view(p), under_view)
    # Experiments in DVC's temporary copies keep their checkpoints in the real project.
    folder = Path(os.path.relpath(project_root() / WORKSPACE / fingerprint))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Experiments side by side may share a training: the second then uses what the first made.
    with FileLock(folder.parent / f".{fingerprint}.lock"):
        return trained_once(p, configuration, folder, shared, out, curves)


def trained_once(
    p: params.Params,
    configuration: dict[str, Any],
    folder: Path,
    shared: dict[str, str],
    out: Path,
    curves: Path,
) -> dict[str, Any]:
    """Train in ``folder``, which the fingerprint names, unless the adapter is there or an earlier
    experiment made it; the facts for the diary.
    """
    facts: dict[str, Any] = {}
    fingerprint = folder.name
    if process.holds(out, fingerprint) and history.has_curves(curves) and not is_forced():
        print(
            f"training {fingerprint}: {out} holds its adapter already; nothing to train "
            "(`dvc repro -f train` trains it again)"
        )
        return facts
    is_there = process.holds(folder, fingerprint) and (folder / history.STATE).is_file()
    if is_there and not is_forced():
        print(f"training {fingerprint}: finished in an earlier experiment, in {folder}")
    else:
        facts = train(p, configuration, folder, shared)
        process.finish(folder)
    process.publish(folder, out)
    history.write_curves(folder, curves)
    return facts


def train(
    p: params.Params, configuration: dict[str, Any], folder: Path, shared: dict[str, str]
) -> dict[str, Any]:
    """Train in ``folder``, with live curves in MLflow; the facts for the diary.

    ``shared``: the environment of the trainer on shared prompts, if it is to be used.

    Raises:
        UserError: the training failed, or what it logs can't be right; the latter ends it there.
    """
    machine.require(p, now=True)
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
                history.first_batch(folder)
            history.check(entry, beta)
            if measured := history.point(entry):
                live.log(entry["step"], *measured)

        environment = config.environment(p.train.gpus, os.environ, is_portable=p.train.portable)
        words = ["train", str(file), f"output_dir={folder}"]
        if machine.on_ray():
            words.append(f"ray_num_workers={p.train.processes}")
        process.launch(words, folder, environment | shared, watch)

    if p.train.shared_prefix and (way := history.first_batch(folder).get("attention")):
        print(f"attention: {way}, chosen on the first pairs ({folder / history.FIRST_BATCH})")
    entries = history.read(folder)
    for entry in entries:  # those before a checkpoint that it resumed from too
        history.check(entry, beta)
    if beta is not None:
        margin = next(entry for entry in entries if "rewards/margins" in entry)["rewards/margins"]
        print(f"reward margin at step 1: {margin:.2g} (the policy starts at the reference)")
    return history.cost(entries, p.train.gpus, resumed is not None)


if __name__ == "__main__":
    command.run(main)
