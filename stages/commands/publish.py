"""Publish: upload a released version to the Hugging Face Hub.

    make publish REPO=owner/name                      # the highest version
    make publish REPO=owner/name VERSION=v1.0.0 PUBLIC=1

In: the tag that ``make release`` made, whose files come from DVC's cache or remote, and HF_TOKEN
with write access. Out: a model repository on the Hub, private unless asked otherwise, with one
commit and the version as its tag. It holds the adapter, whose configuration names a base from the
Hub by repository and commit, the card as README.md, page, numbers, dvc.lock and parameters.
"""

import json
import os
import re
import tempfile
from pathlib import Path

from stages.commands import outputs
from stages.commands.release import ARTIFACT
from stages.core import command
from stages.core.errors import UserError, of_the_hub
from stages.sources import source
from stages.tracking.tags import git


def main(repo: str, version: str = "", public: str = "") -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{repo}' is not a repository's name; write REPO=owner/name")
    version = version or highest()
    tag = f"{ARTIFACT}@{version}"
    if not git(Path(), "tag", "--list", tag):
        raise UserError(f"there is no tag {tag}; `make release VERSION={version}` makes it")
    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "HF_TOKEN is not set; create a token with write access "
            "(https://huggingface.co/settings/tokens) and set it in the environment"
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, version)
        bundle(tag, outputs.read(), folder)
        upload(folder, repo, version, private=not public)


def highest() -> str:
    """The highest version that has a tag.

    Raises:
        UserError: there is none.
    """
    from gto.versions import SemVer

    names = git(Path(), "tag", "--list", f"{ARTIFACT}@*").splitlines()
    found = [each for name in names if SemVer.is_valid(each := name.partition("@")[2])]
    if not found:
        raise UserError("nothing was released yet; `make release VERSION=v1.0.0` makes a version")
    return max(found, key=SemVer)


def bundle(tag: str, at: outputs.Places, folder: Path) -> None:
    """Make the folder of what the Hub gets, of the files of a tag.

    Raises:
        UserError: they are neither in the cache nor in the remote.
    """
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(rev=tag)
    names = {
        at.card: "README.md",
        at.page: "report.html",
        at.results / "metrics.json": "metrics.json",
        at.model / source.FETCHED: source.FETCHED,
        **{Path(name): name for name in ("dvc.lock", "params.yaml", "requirements.txt")},
    }
    try:
        files.get(at.adapter.as_posix(), folder.as_posix(), recursive=True)
        for path, name in names.items():
            files.get_file(path.as_posix(), (folder / name).as_posix())
    except Exception as error:  # DVC's and the remote's have no class in common
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{tag}: its files can't be read ({told}); `dvc pull` gets them") from error
    base = source.read(folder)
    (folder / source.FETCHED).unlink()
    if base.kind == "hub":
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base.repo, "revision": base.commit}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def upload(folder: Path, repo: str, version: str, *, private: bool) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT

    api, page = HfApi(), f"{ENDPOINT}/{repo}"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"{page} exists and is public; PUBLIC=1 says that this version may be, or choose "
                "another repository"
            )
        done = api.upload_folder(folder_path=folder, repo_id=repo, commit_message=version)
        api.create_tag(repo, tag=version, revision=done.oid, exist_ok=True)
    except UserError:
        raise
    except Exception as error:
        told = of_the_hub(error, f"the repository {repo}", page=page)
        if told is None:
            raise
        raise UserError(f"not published: {told}") from error
    print(f"{page}: {version}, {'private' if private else 'public'}")


if __name__ == "__main__":
    command.run(main)
