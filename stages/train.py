"""Train: Direct Preference Optimization of the base model on the train pairs, by LLaMA-Factory.

In: ``data/formatted``, the images, the base model. Out: the adapter with the complete LLaMA-Factory
configuration that made it, and the training curves.

Why a subprocess: ``llamafactory-cli`` is the interface that LLaMA-Factory documents, torchrun
included. It works in ``models/training/<fingerprint>``, which DVC leaves alone. A training that was
interrupted resumes there from its last checkpoint if nothing that matters has changed, else it
starts clean. An adapter that exists for the same fingerprint is not trained again, unless
``dvc repro -f`` asks for it.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stages.core import command
from stages.core.project import is_forced, project_root
from stages.dataset import formatted
from stages.parameters import params
from stages.tracking import runs
from stages.tuning import training

WORKSPACE = Path("models/training")


def main(
    formatted_data: Path, images: Path, model: Path, out: Path, curves: Path
) -> dict[str, Any]:
    p = params.load()
    config = training.dpo_config(
        p,
        model=model,
        formatted=formatted_data,
        images=images,
        output=WORKSPACE,
        validated=bool(formatted.read(formatted_data, "validation")),
    )
    fingerprint = training.fingerprint(config, formatted_data, model, p.train.gpus)
    if training.is_trained(fingerprint, out, curves) and not is_forced():
        print(
            f"training {fingerprint}: {out} holds its adapter already; nothing to train "
            "(`dvc repro -f train` trains it again)"
        )
        return {}
    training.require_gpus(p.train.gpus)
    # Experiments in DVC's temporary copies keep their checkpoints in the real project.
    folder = Path(os.path.relpath(project_root() / WORKSPACE / fingerprint))

    resumed = training.prepare(folder)
    print(
        f"training {fingerprint}: " + (f"resuming from {resumed}" if resumed else "a clean start")
    )
    configuration = folder / "llamafactory.yaml"
    # By the library that LLaMA-Factory reads it with: to YAML 1.1, a bare `no` is false.
    OmegaConf.save(OmegaConf.create(config), configuration)

    run = partial(runs.open_run, fingerprint)
    with runs.live(run, training.CURVES) as live_environment:
        training.launch(
            ["train", str(configuration), f"output_dir={folder}", "report_to=mlflow"],
            folder / "train.log",
            training.environment(p.train.gpus, os.environ | live_environment),
        )

    history = training.history(folder)
    if p.train.loss not in params.REFERENCE_FREE:
        margin = training.check_first_step(history, p.train.beta)
        print(f"reward margin at step 1: {margin:.2g} (the policy starts at the reference)")
    curves.mkdir(parents=True, exist_ok=True)
    for split, table in training.curves(history).items():
        table.to_csv(curves / f"{split}.csv", index=False)
    training.publish(folder, out, fingerprint)
    training.discard_checkpoints(folder)
    return training.cost(history, p.train.gpus, resumed is not None)


if __name__ == "__main__":
    command.run(main)
