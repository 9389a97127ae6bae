"""The folder of a release: what a reader and the Hugging Face Hub need, of the pipeline's outputs.

It is what ``huggingface_hub``'s ``upload_folder`` takes: the adapter with its card as README.md,
and its base named by repository and commit.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.commands.outputs import Places
from stages.core.errors import UserError
from stages.params import params
from stages.reporting import card
from stages.sources import source as fetched
from stages.sources.source import Source
from stages.tuning.config import sha256
from stages.tuning.process import WEIGHTS

RELEASES = Path("releases")  # not in Git: made of what is
FACTS = "release.json"
CONFIG = "adapter_config.json"
# What the registry holds of it: no weights, and not the page, which holds images.
DESCRIBING = ("README.md", "LICENCES.md", FACTS, "metrics.json", "dvc.lock", "params.yaml",
              "requirements.txt", CONFIG)  # fmt: skip


def write(
    folder: Path, at: Places, version: str, provenance: Mapping[str, str], forced: Sequence[str]
) -> dict[str, Any]:
    """Write a release into an empty folder, and return its facts, which ``release.json`` holds.

    ``provenance``: what ``tracking.tags`` says of commit, hashes and sources; ``forced``: what
    spoke against the release, if it was forced.

    Raises:
        UserError: the adapter is not the one that its training left.
    """
    made = json.loads((at.adapter / "fingerprint.json").read_text(encoding="utf-8"))
    if made["adapter_sha256"] != sha256(at.adapter / WEIGHTS):
        raise UserError(
            f"{at.adapter / WEIGHTS} is not the file that its training left; "
            "`dvc checkout --force` brings that back"
        )
    base = fetched.read(at.model)
    data = [fetched.read(at.raw / name) for name in params.load().data.sources]
    for name in (WEIGHTS, "llamafactory.yaml", "fingerprint.json"):
        shutil.copyfile(at.adapter / name, folder / name)
    shutil.copyfile(at.card, folder / "README.md")
    shutil.copyfile(at.page, folder / "report.html")
    shutil.copyfile(at.results / "metrics.json", folder / "metrics.json")
    for name in ("dvc.lock", "params.yaml", "requirements.txt"):
        shutil.copyfile(name, folder / name)
    config = json.loads((at.adapter / CONFIG).read_text(encoding="utf-8"))
    _write(folder / CONFIG, config | named(base))
    licence = card.licence_of(*(each.licence for each in data), base.licence)
    (folder / "LICENCES.md").write_text(licences(data, base, licence), encoding="utf-8")
    facts = {
        "version": version,
        "adapter_sha256": made["adapter_sha256"],
        "fingerprint": made["fingerprint"],
        "dvc.path": at.adapter.as_posix(),
        "licence": licence.shown,
        **{key: value for key, value in sorted(provenance.items()) if key != "git.branch"},
        "forced_although": list(forced),
    }
    _write(folder / FACTS, facts)
    return facts


def named(base: Source) -> dict[str, Any]:
    """Of ``adapter_config.json``: the base as PEFT finds it on the Hub, where it is there.

    A base that is a folder of this project keeps the path that the pipeline fetches it to.
    """
    if base.kind != "hub":
        return {}
    return {"base_model_name_or_path": base.repo, "revision": base.commit}


def licences(data: Sequence[Source], base: Source, licence: card.Licence) -> str:
    """Which licences the parts have, and which one holds for the adapter."""
    parts = [*(("the training data", each) for each in data), ("the base model", base)]
    lines = [
        "# Licences",
        "",
        f"**The adapter: {licence.shown}**, the strictest of what it was made from.",
        "",
        *(
            f"- {what}, {source.repo or 'local files'}: {source.licence or 'unknown'}"
            for what, source in parts
        ),
        "- the code of the pipeline: Apache-2.0",
    ]
    bound = dict.fromkeys(what for what, one in parts if card.is_non_commercial(one.licence))
    if bound:
        lines += ["", f"**Not for commercial use**, because of {' and '.join(bound)}."]
    if not all(source.licence for _, source in parts):
        lines += ["", "A licence is unknown: find it out before you pass the adapter on."]
    lines += ["", "`report.html` shows images and answers of the training data's test split."]
    return "\n".join(lines) + "\n"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
