"""Release: the adapter here as a version that others get by name.

    python -m stages release --version v1.0.0             # make release VERSION=v1.0.0
    python -m stages release --version v1.0.0 --force 1   # although something speaks against it

In: the current commit with its outputs. Refused, unless forced: changes that are not committed; a
``dvc.lock`` that is not current, or whose outputs no DVC remote has; a win rate that is not clearly
above that of the champion (the version before, on the same pairs), or without one above one half; a
task of lm-eval that got worse. Forced, all of that is written into the tag.

Out: ``releases/v1.0.0``, a folder for people and for the Hub; an annotated tag of GTO's,
``adapter@v1.0.0``; and a version in MLflow's registry with the alias ``champion``. A release that
was interrupted is completed by the same command. Nothing is pushed: the last line says how.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from stages.commands import bundle, outputs, versions
from stages.core import command
from stages.core.errors import UserError
from stages.reporting import verdicts
from stages.tracking import registered, runs
from stages.tracking.tags import git, provenance


def main(version: str, force: str = "", out: Path = bundle.RELEASES) -> None:
    at = outputs.read()
    before = versions.champion(version)
    metrics_file, made = at.results / "metrics.json", at.adapter / "fingerprint.json"
    outputs.require(made, metrics_file, at.card, at.page, at.model, at.raw, Path("dvc.lock"))
    tagged, head = versions.commit_of(version), git(Path(), "rev-parse", "HEAD")
    if tagged and tagged != head:
        raise UserError(
            f"{versions.tag_of(version)} is the commit {tagged[:7]}, not this one; choose a higher "
            "version"
        )
    against = [*versions.unready(), *versions.undefensible(at, before)]
    if against and not force:
        raise UserError(
            "\n  ".join([f"{version} is not released:", *against])
            + "\nFORCE=1 releases it all the same, and says so in the tag"
        )

    folder = out / version
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{version}.") as place:
        part = Path(place, version)
        part.mkdir()
        facts = bundle.write(part, at, version, provenance(), against)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
    told = describe(version, verdicts.headline(metrics), facts["adapter_sha256"], against)
    if not tagged:
        versions.register(version, told)
    print(f"{told}\n\n{folder}: the release, with its page, card and licences")
    print(f"{versions.tag_of(version)}: the tag")
    mirror(version, folder, facts, told)
    print(f"others can get it after: git push origin {versions.tag_of(version)}")


def describe(version: str, headline: str, digest: str, against: list[str]) -> str:
    """The tag's message."""
    lines = [f"{versions.ARTIFACT} {version}", "", headline, f"SHA-256 of the weights: {digest}"]
    if against:
        lines += ["", "Released by force, although:", *(f"- {each}" for each in against)]
    return "\n".join(lines)


def mirror(version: str, folder: Path, facts: dict[str, object], told: str) -> None:
    """Tell MLflow's registry; never raises because of MLflow, which only mirrors Git."""
    tags = {key: str(value) for key, value in facts.items() if isinstance(value, str) and value}
    tags["git.tag"] = versions.tag_of(version)
    try:
        with tempfile.TemporaryDirectory() as place:
            for name in bundle.DESCRIBING:
                shutil.copyfile(folder / name, Path(place, name))
            fingerprint = str(facts["fingerprint"])
            print(f"MLflow: {registered.register(version, fingerprint, Path(place), tags, told)}")
    except Exception as error:  # whatever a tracker raises, the release is there
        print(
            f"MLflow: not registered, {runs.reason(error)}; the same command tries it again",
            file=sys.stderr,
        )


if __name__ == "__main__":
    command.run(main)
