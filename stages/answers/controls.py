"""The test pairs with something else to look at: a blank image, or another pair's.

A policy that prefers chosen for what the image shows must lose that preference here. If its win
rate stays, it has learned from the words alone.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.meaning import code
from stages.model import formatted
from stages.model.checkpoint import Checkpoint, decisive

GREY = (128, 128, 128)


def log_probs(
    checkpoint: Checkpoint, pairs: Sequence[dict[str, Any]], images: Path, *, label: str
) -> pd.DataFrame:
    """Log-probs of a fixed sample of the ``pairs`` with images, as ``scoring.log_probs`` has them,
    with ``shown``: "blank" or "shuffled". No rows where ``evaluate.controls`` is 0.

    Raises:
        UserError: a log-prob is not finite.
    """
    seeing = [pair for pair in pairs if pair["images"]]
    sample = formatted.sample(seeing, checkpoint.p.evaluate.controls)

    def measured() -> pd.DataFrame:
        with tempfile.TemporaryDirectory() as folder:
            tables = [
                checkpoint.score(changed, images, label=f"{label} {way}").assign(shown=way)
                for way, changed in shown(sample, images, Path(folder)).items()
            ]
        return pd.concat(tables) if tables else pd.DataFrame(columns=["id", "shown"])

    return checkpoint.kept_table(
        "controls",
        measured,
        label=f"{label} controls",
        pairs=decisive(sample),
        code=code("answers/controls.py"),
    )


def shown(pairs: Sequence[dict[str, Any]], images: Path, folder: Path) -> dict[str, list[Any]]:
    """Formatted pairs with other images: ``blank`` and ``shuffled``, in the order of ``pairs``.

    Args:
        images: the folder that the pairs' image names are relative to.
        folder: where images that don't exist yet are written (PNG).

    Returns:
        ``blank``: a mid-grey image. ``shuffled``: that of the next pair, where the pairs' images
        are ordered by size and then by name, which is a hash of their content; so each image goes
        to another one's pairs, and the same way every time. It is left out where there is one image
        only. A substitute has the size of the image it replaces, so that the number of image tokens
        stays, and nothing but what is seen changes.
    """
    from PIL import Image

    names = sorted({name for pair in pairs for name in pair["images"]})
    sizes = {}
    for name in names:
        with Image.open(images / name) as image:
            sizes[name] = image.size
    order = sorted(names, key=lambda name: (sizes[name], name))
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))

    def substitute(way: str, name: str) -> str:
        path = folder / f"{way}-{Path(name).stem}.png"
        with Image.open(images / following[name]) as other:
            fitting = other.convert("RGB").resize(sizes[name], Image.Resampling.BICUBIC)
        grey = Image.new("RGB", sizes[name], GREY)
        (grey if way == "blank" else fitting).save(path)
        return str(path.resolve())  # absolute, it stays what it is when it is joined to a folder

    found: dict[str, list[Any]] = {}
    for way in ("blank", "shuffled")[: len(names)]:  # one image can't be exchanged
        path = {name: substitute(way, name) for name in names}
        found[way] = [pair | {"images": [path[name] for name in pair["images"]]} for pair in pairs]
    return found
