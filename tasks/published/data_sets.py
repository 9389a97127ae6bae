"""Documents of published benchmarks: pinned files, a fair order, decoded images.

lm-eval loads the data sets of the Hub at the revision that a task's YAML names. What lies elsewhere
(word lists, annotations) is pinned by its SHA-256.
"""

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.model import formatted


def cache() -> Path:
    """Where what is downloaded or unpacked here lies, next to what lm-eval downloads."""
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE) / "pinned"


def pinned(url: str, sha256: str) -> Path:
    """The file of that content, from ``cache()`` or downloaded once.

    Raises:
        UserError: it can't be downloaded, or is another file than the one that is pinned.
    """
    import httpx
    from huggingface_hub import constants

    path = cache() / sha256
    if path.exists():
        return path
    fix = "or remove the task that needs it from evaluate.lm_eval"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{url} is not here yet and HF_HUB_OFFLINE is set; unset it once to download it, {fix}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=60) as answer:
            answer.raise_for_status()
            with part.open("wb") as file:
                file.writelines(answer.iter_bytes())
    except httpx.HTTPError as error:
        raise UserError(
            f"{url} can't be downloaded ({type(error).__name__}); check the network and the "
            f"proxy, {fix}"
        ) from None
    with part.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(
                f"{url} is not the file that is pinned (SHA-256 {sha256}); try again, {fix}"
            )
    return part.replace(path)


def in_hash_order(dataset: Any, *columns: str) -> Any:
    """The documents in the order of a hash of ``columns``, so that a limit draws a fair sample.

    Documents with the same values stay together, in their order. Images stay encoded until they
    are asked for: POPE's 9,000 decoded ones would fill 8 GB.
    """
    from datasets import Image

    ids = zip(*(dataset[column] for column in columns), strict=True)
    rows = [{"id": " ".join(map(str, values)), "at": at} for at, values in enumerate(ids)]
    order = [row["at"] for row in formatted.sample(rows, len(rows))]
    return dataset.cast_column("image", Image(decode=False)).select(order, keep_in_memory=True)


def images(doc: dict[str, Any]) -> list[Any]:
    """The image of a document, decoded: ``image`` is its file, or a struct that holds its bytes."""
    held = doc["image"]
    return [_decoded(held if isinstance(held, str) else held["bytes"])]


@functools.lru_cache(maxsize=1024)  # POPE asks 18 questions of an image, AMBER 14
def _decoded(source: bytes | str) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        return opened.convert("RGB")
