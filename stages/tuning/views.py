"""A pair with something else to look at, for losses that ask whether the image matters.

mDPO (arXiv 2406.11839, section 3.2) compares chosen with the image m against chosen with an image
m' that lacks what it needs. The paper crops, and so does its authors' code, where an option called
``mask_visual_tokens`` asks for it (``luka-group/mDPO``, ``bunny/modeling_bunny_phi.py``): a new
crop each time, of another shape, which here is one for each image and keeps its shape. ``masked``
is this project's own: no token of the text attends to one of the image.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from stages.model import prefix

GREY = (128, 128, 128)
KEPT = 0.01, 0.2  # of an image's area, least and most, in a crop (as in the authors' code)


@dataclass(frozen=True)
class Shown:
    """What is shown in place of the image at ``path``; ``other`` is the path of another one."""

    view: str
    path: str
    other: str


def row(feature: Mapping[str, Any], view: str, paths: Sequence[str]) -> dict[str, Any]:
    """LLaMA-Factory's feature of a pair with chosen alone, under a view.

    ``paths``: images of training, for the view ``other``; the same one stands in for an image each
    time.
    """
    length = prefix.shared_length(feature)
    names = ("rejected_input_ids", "rejected_labels")
    alone = {**feature, **{name: feature[name][:length] for name in names}}
    if view == "masked":
        return alone | {prefix.UNSEEN: True}
    shown = [Shown(view, path, another(path, paths)) for path in feature.get("images") or []]
    return alone | {"images": shown}


def another(path: str, paths: Sequence[str]) -> str:
    """One of the paths that is not this one, by its name; itself where there is no other."""
    others = [each for each in paths if each != path]
    return others[int(digest(path)[:12], 16) % len(others)] if others else path


def image(shown: Shown) -> Image.Image:
    """The substitute, of the size of the image, so that the number of its tokens stays."""
    with Image.open(shown.path) as opened:
        own = opened.convert("RGB")
    if shown.view == "blank":
        return Image.new("RGB", own.size, GREY)
    if shown.view == "other":
        with Image.open(shown.other) as opened:
            return opened.convert("RGB").resize(own.size, Image.Resampling.BICUBIC)
    share, left, top = (int(digest(shown.path)[i : i + 8], 16) / 16**8 for i in (0, 8, 16))
    kept = KEPT[0] + (KEPT[1] - KEPT[0]) * share
    width, height = (max(1, round(side * kept**0.5)) for side in own.size)
    x, y = round(left * (own.width - width)), round(top * (own.height - height))
    return own.crop((x, y, x + width, y + height)).resize(own.size, Image.Resampling.BICUBIC)


def digest(path: str) -> str:
    """Of the file's name, which names its content."""
    return hashlib.sha256(PurePath(path).name.encode()).hexdigest()


def process(template: Any, processor: Any, images: list[Any]) -> dict[str, Any]:
    """``prefix.process_images`` of paths, images, and what is shown in their place."""
    drawn = [image(each) if isinstance(each, Shown) else each for each in images]
    return prefix.process_images(template, processor, drawn)


def kept(file: Path) -> dict[str, float]:
    """Log-probs by ``prefix.pair_key`` that ``keep`` wrote; none where there is no whole file."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def keep(logps: Mapping[str, float], file: Path) -> None:
    """All of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.partial")
    unfinished.write_text(json.dumps(logps), encoding="utf-8")
    unfinished.replace(file)
