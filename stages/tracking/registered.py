"""The adapter's versions in MLflow's model registry, as references to Git and DVC.

A registered version holds the card, the numbers and the licence notes. Weights are not stored
again: its tags say which commit and which path DVC gets them from, and their hash.
"""

from collections.abc import Mapping
from pathlib import Path

from stages.tracking import runs
from stages.tracking.tags import redacted

CHAMPION = "champion"  # the alias of the version that was released last
VERSION = "version"  # the tag that holds v1.0.0; MLflow counts its own versions 1, 2, 3


def register(
    version: str, fingerprint: str, folder: Path, tags: Mapping[str, str], description: str
) -> str:
    """Register a version with the files of ``folder`` and make it the champion; where it is.

    The model has the name of the experiment. The version belongs to the completed run of the
    training with this ``fingerprint``; registered before, it is described again. Raises whatever
    MLflow does, ``LookupError`` without such a run.
    """
    client, experiment = at = runs.connect()
    name = client.get_experiment(experiment).name
    run = runs._run(at, fingerprint, "of this training", {"state": "complete"})
    place = f"releases/{version}"
    client.log_artifacts(run.info.run_id, str(folder), place)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Adapters, by reference to Git and DVC.")
    found = [
        each
        for each in client.search_model_versions(f"name = '{name}'")
        if each.tags.get(VERSION) == version
    ]
    number = (
        found[0].version
        if found
        else client.create_model_version(
            name,
            source=f"runs:/{run.info.run_id}/{place}",
            run_id=run.info.run_id,
            await_creation_for=0,
        ).version
    )
    client.update_model_version(name, number, description=redacted(description))
    for key, value in {VERSION: version, **tags}.items():
        client.set_model_version_tag(name, number, key, redacted(value))
    client.set_registered_model_alias(name, CHAMPION, number)
    return f"models:/{name}@{CHAMPION}"
