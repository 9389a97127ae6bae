"""Images: any encoded picture becomes an upright RGB JPEG of bounded size, named by its content;
by worker processes, in order and in bounded memory, because decoding is the cost of preprocess.
"""

import contextlib
import hashlib
import io
import math
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from stages.core.errors import UserError
from stages.pairs.refusals import Refusal

# Named, because Pillow knows formats that run other programs, as EPS does Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
# A progressive JPEG has about ten scans, each of which is decoded over all pixels: one of 1,000
# scans, 336 kB large, takes seconds. Counted in the file, so that no clock decides what is kept.
MOST_SCANS = 100
_MOST_SCANNED = 10  # times preprocess.max_input_pixels, pixels of all scans together
LONGEST_JPEG_SIDE = 65500  # libjpeg's own limit
_ORIENTATION = 0x0112  # the EXIF tag
_PNG = b"\x89PNG"
# Rows go to the workers by the batch: one by one, handing them over costs more than decoding them.
_ROWS, _BYTES = 32, 2**20
_BATCHES = 3  # under way for each worker: enough that none waits behind one large image
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # of a TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Normal:
    """A JPEG as it is stored, and its size in pixels."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Stored:
    """An image in the folder: its file name (32 digits of its SHA-256) and its size in pixels."""

    name: str
    width: int
    height: int


Outcome = Stored | Refusal  # of one image
Outcomes = tuple[Stored, ...] | Refusal  # of a row
Work = Callable[[bytes], Outcome]


def store(data: bytes, *, folder: Path, limits: Any) -> Stored | Refusal:
    """Normalise one encoded image and write it into ``folder`` under the hash of what is written.

    Safe in several processes at once: equal images give equal bytes, and one process writes them.
    A file is written in its place: the folder is complete once all processes have ended well.
    ``limits`` are the section ``preprocess`` of the parameters.

    Raises:
        OSError: the folder cannot be written.
        MemoryError: the image is within ``limits`` but not within this machine.
    """
    normal = normalise(data, limits)
    if isinstance(normal, Refusal):
        return normal
    name = hashlib.sha256(normal.jpeg).hexdigest()[:32] + ".jpg"
    # Neither moved into place nor synced: 0.09 ms a file instead of 0.20.
    with contextlib.suppress(FileExistsError), (folder / name).open("xb", buffering=0) as file:
        file.write(normal.jpeg)
    return Stored(name, normal.width, normal.height)


def normalise(data: bytes, limits: Any) -> Normal | Refusal:
    """An upright RGB JPEG within ``limits``, or why there is none.

    An RGB JPEG that already is that stays byte for byte, after a check that all of it decodes.
    Everything else is decoded (the first frame, if it moves), scaled down if needed, flattened onto
    white, turned as its EXIF orientation says, and encoded once without any metadata.
    """
    found = _normalise(data, limits)
    if isinstance(found, Refusal) and found.reason == "undecodable_image" and data[:4] == _PNG:
        return _normalise(_without_metadata(data), limits)
    return found


def _normalise(data: bytes, limits: Any) -> Normal | Refusal:
    # Ours is checked below, before anything is decoded; Pillow's own limit would come on top of it.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        what = f"{image.format} of {width} x {height} pixels"
        if width * height > limits.max_input_pixels:
            return Refusal("image_too_large", what)
        # libtiff reads a tile whole: a file of 200 bytes, of 100 x 100 pixels, had one of 900 MB.
        tags = getattr(image, "tag_v2", {})
        if int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_HEIGHT, 0)) > limits.max_input_pixels:
            return Refusal("image_too_large", f"{what}, with a larger tile")
        size = fitted(width, height, limits.max_pixels)
        if min(size) < limits.min_side:
            scaled = "" if size == image.size else f", {size[0]} x {size[1]} scaled down"
            return Refusal("image_too_small", f"{what}{scaled}")
        if image.format in ("JPEG", "MPO"):
            scans = data.count(b"\xff\xda")  # in a scan's own data FF is never followed by DA
            most = min(MOST_SCANS, _MOST_SCANNED * limits.max_input_pixels // (width * height))
            if scans > max(most, 1):
                return Refusal("image_too_slow", f"{what}, {scans} scans")
        fits = image.format == "JPEG" and image.mode == "RGB" and size == image.size
        if fits and _orientation(image) not in _UPRIGHT:
            image.load()
            return Normal(data, width, height)
        picture = _decoded(image, size)
    except UnidentifiedImageError:  # its own message holds a memory address
        detail = f"{len(data)} bytes that begin with {data[:20]!r}"
        return Refusal(
            "undecodable_image", f"{detail}; formats that are read: {', '.join(FORMATS)}"
        )
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        detail = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
        return Refusal("undecodable_image", detail)
    encoded = io.BytesIO()
    # 4:4:4: halved colour would smear the thin coloured edges that questions ask about.
    picture.save(encoded, "JPEG", quality=limits.jpeg_quality, subsampling=0)
    return Normal(encoded.getvalue(), *picture.size)


def _without_metadata(png: bytes) -> bytes:
    """A PNG without the blocks that its pixels don't need: Pillow refuses the file over a comment
    with a wrong checksum, or one that is above 1 MB unpacked."""
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        name = png[at + 4 : at + 8]
        if name[:1].isupper() or name in (b"tRNS", b"eXIf"):  # a capital says that it is needed
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def fitted(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The largest size of the same shape with at most ``max_pixels`` pixels, never enlarged.

    Sides are at least 1, and at most what a JPEG can have.
    """
    if width * height <= max_pixels and max(width, height) <= LONGEST_JPEG_SIDE:
        return width, height
    scale = min(math.sqrt(max_pixels / (width * height)), LONGEST_JPEG_SIDE / max(width, height), 1)
    short = max(1, math.floor(min(width, height) * scale))
    long = min(math.floor(max(width, height) * scale), max_pixels // short, LONGEST_JPEG_SIDE)
    long = max(short, long)  # rounding can take a square below itself
    return (long, short) if width >= height else (short, long)


def _decoded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The first frame as upright RGB without metadata, ``size`` large before it is turned."""
    image.draft(None, size)  # a JPEG that will be scaled down need not be decoded in full
    image.load()
    picture = _rgb(image)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    orientation = _orientation(image)  # after loading: Pillow turns a TIFF itself, and forgets it
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    picture.info = {}  # Pillow would copy a comment from here into the JPEG
    return picture


def _rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, what is transparent on white.

    Raises:
        ValueError: there is no defined way, as for 32-bit floating-point samples.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts at 255 instead of scaling, which leaves a white image.
        samples = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        return Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit floating-point samples have no defined white")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; damaged EXIF data counts as none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # parsed by hand-written code over whatever bytes are there
        return 1


# Workers


def decode(
    rows: Iterable[Any], refuse: Callable[[Any], Refusal | None], *, work: Work, workers: int
) -> Iterator[tuple[Any, Outcomes]]:
    """Each row with its stored images, or why it is left out, in order.

    A few batches for each worker are held at once. Of each distinct image its digest and outcome
    are kept (about 600 bytes), so that one that occurred before is not decoded again.

    Args:
        refuse: what is wrong with a row before its images are looked at.
        work: what becomes of one encoded image; it goes to the workers by pickling.

    Raises:
        UserError: a worker died, or had no memory left.
    """
    processes = pool(workers)
    waiting: deque[tuple[list[Any], dict[bytes, bytes], Future[list[Outcome]]]] = deque()
    known: dict[bytes, Outcome | None] = {}  # by digest of the encoded file; None: under way

    def first() -> Iterator[tuple[Any, Outcomes]]:
        asked, new, outcomes = waiting.popleft()
        known.update(zip(new, outcomes.result(), strict=True))
        for row, digests, refusal in asked:
            found = [known[digest] for digest in digests]
            refusal = refusal or next((each for each in found if isinstance(each, Refusal)), None)
            yield row, refusal or tuple(each for each in found if isinstance(each, Stored))

    try:
        for batch in batches(rows):
            asked: list[tuple[Any, list[bytes], Refusal | None]] = []  # digests of the images
            new: dict[bytes, bytes] = {}
            for row in batch:
                refusal = refuse(row)
                images = () if refusal else row.images
                digests = [hashlib.sha256(image).digest() for image in images]
                asked.append((row, digests, refusal))
                new |= {d: data for d, data in zip(digests, images, strict=True) if d not in known}
                known |= dict.fromkeys(new)
            waiting.append((asked, new, processes.submit(_outcomes, work, list(new.values()))))
            if len(waiting) >= _BATCHES * workers:
                yield from first()
        while waiting:
            yield from first()
    except (BrokenProcessPool, MemoryError):
        raise UserError(
            "a worker process died or ran out of memory; lower preprocess.workers or "
            "preprocess.max_input_pixels"
        ) from None
    finally:
        processes.shutdown(cancel_futures=True)


def _outcomes(work: Work, images: list[bytes]) -> list[Outcome]:
    return [work(image) for image in images]


def batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """The rows, as many at a time as go to a worker at once."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, row.images or ()))
        if len(batch) == _ROWS or size >= _BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def pool(workers: int) -> ProcessPoolExecutor:
    """So many processes, which end when this one does."""
    # Not forked from here, which would copy the locks of pyarrow's threads in whatever state they
    # are, but from a server that has only done the imports: 20 ms a worker, spawning takes 1 s.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["stages.params.params", "stages.pairs.tables", __name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")  # Pillow's, about files that are odd but readable
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent cannot stop its workers, and they would wait for ever
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
