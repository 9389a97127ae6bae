"""Publish: upload a release to the Hugging Face Hub.

    python -m stages publish --repo owner/name                     # the highest version's folder
    python -m stages publish --repo owner/name --version v1.0.0 --public 1

In: a folder of ``releases/``, as ``make release`` made it, and HF_TOKEN with write access. Out: a
model repository on the Hub, private unless asked otherwise, with one commit and the version as its
tag.
"""

import json
import os
import re
from pathlib import Path

from stages.commands import bundle
from stages.core import command, hub_errors
from stages.core.errors import UserError


def main(repo: str, version: str = "", public: str = "", releases: Path = bundle.RELEASES) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{repo}' is not a repository's name; write REPO=owner/name")
    folder = releases / (version or highest(releases))
    if not (folder / bundle.FACTS).is_file():
        raise UserError(f"there is no {folder}; `make release VERSION={folder.name}` makes it")
    facts = json.loads((folder / bundle.FACTS).read_text(encoding="utf-8"))
    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "HF_TOKEN is not set; create a token with write access "
            "(https://huggingface.co/settings/tokens) and set it in the environment"
        )

    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT

    api, page = HfApi(), f"{ENDPOINT}/{repo}"
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise UserError(
                f"{page} exists and is public; PUBLIC=1 says that this release may be, or choose "
                "another repository"
            )
        done = api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            commit_message=f"{facts['version']}: adapter {facts['adapter_sha256'][:12]}",
        )
        api.create_tag(repo, tag=facts["version"], revision=done.oid, exist_ok=True)
    except UserError:
        raise
    except Exception as error:
        told = hub_errors.explain(error, f"the repository {repo}", page=page)
        if told is None:
            raise
        raise UserError(f"not published: {told}") from error
    print(f"{page}: {facts['version']}, {'public' if public else 'private'}")


def highest(releases: Path) -> str:
    """The name of the highest version that was released here.

    Raises:
        UserError: there is none.
    """
    from gto.versions import SemVer

    found = [each.name for each in releases.glob("v*") if SemVer.is_valid(each.name)]
    if not found:
        raise UserError(f"{releases} holds no release; `make release VERSION=v1.0.0` makes one")
    return max(found, key=SemVer)


if __name__ == "__main__":
    command.run(main)
