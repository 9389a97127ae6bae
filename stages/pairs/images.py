"""Images: any encoded picture becomes an upright RGB JPEG of bounded size, named by its content."""

import contextlib
import hashlib
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from stages.pairs.refusals import Refusal

# Named, because Pillow knows formats that run other programs, as EPS does Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# A progressive JPEG has about ten scans, each of which is decoded over all pixels: one of 1,000
# scans, 336 kB large, takes seconds. Counted in the file, so that no clock decides what is kept.
MOST_SCANS = 100
_JPEG_2000 = 4  # times the pixels: noise of 2 MP takes 1.6 s, other formats 0.2 at most
_MOST_SCANNED = 10  # times preprocess.max_input_pixels, pixels of all scans together
LONGEST_JPEG_SIDE = 65500  # libjpeg's own limit
_ORIENTATION = 0x0112  # the EXIF tag
_PNG = b"\x89PNG"
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # of a TIFF
# In a JPEG: what follows FF within a scan's data (a stuffed byte, restarts), and at its end.
_DATA = frozenset({b"\0", *(bytes([0xD0 + i]) for i in range(8))})
_END = b"\xd9"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Limits(Protocol):
    """What an image may be, as the section ``preprocess`` of params.yaml says. Pixels are width x
    height; one of more than ``max_pixels`` is scaled down."""

    min_side: int
    max_pixels: int
    max_input_pixels: int
    jpeg_quality: int


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

    @property
    def group(self) -> str:
        """The content hash, which names the image where pairs are grouped by what they show."""
        return self.name.removesuffix(".jpg")


def store(data: bytes, *, folder: Path, limits: Limits) -> Stored | Refusal:
    """Normalise one encoded image and write it into ``folder`` under the hash of what is written.

    Safe in several processes at once: equal images give equal bytes, and one process writes them.
    A file is written in its place: the folder is complete once all processes have ended well.

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


def normalise(data: bytes, limits: Limits) -> Normal | Refusal:
    """An upright RGB JPEG within ``limits``, or why there is none.

    An RGB JPEG that already is that stays byte for byte, after a check that all of it decodes.
    Everything else is decoded (the first frame, if it moves), scaled down if needed, flattened onto
    white, turned as its EXIF orientation says, and encoded once without any metadata.
    """
    found = _normalise(data, limits)
    if isinstance(found, Refusal) and found.reason == "undecodable_image" and data[:4] == _PNG:
        return _normalise(_without_metadata(data), limits)
    return found


def _normalise(data: bytes, limits: Limits) -> Normal | Refusal:
    # Ours is checked below, before anything is decoded; Pillow's own limit would come on top of it.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(io.BytesIO(data), formats=_formats(data))
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
        if image.format == "JPEG2000" and width * height * _JPEG_2000 > limits.max_input_pixels:
            return Refusal("image_too_slow", what)
        fits = image.format == "JPEG" and image.mode == "RGB" and size == image.size
        if fits and _orientation(image) not in _UPRIGHT:
            _refuse_damaged(data, image)
            return Normal(data, width, height)
        picture = _decoded(image, size)
    except UnidentifiedImageError:  # its own message holds a memory address
        needs = "HEIC, for which `make extras` brings a package; " if _is_heic(data) else ""
        detail = f"{needs}{len(data)} bytes that begin with {data[:20]!r}"
        return Refusal("undecodable_image", f"{detail}; read are {', '.join(FORMATS)}")
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


def _is_heic(data: bytes) -> bool:
    return data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1") and b"avif" not in data[:40]


def _formats(data: bytes) -> tuple[str, ...]:
    """The formats that the file may be of: HEIC as well, if pillow-heif is installed."""
    if _is_heic(data):
        with contextlib.suppress(ImportError):
            import pillow_heif  # type: ignore[import-not-found, import-untyped, unused-ignore]

            pillow_heif.register_heif_opener()
            return ("HEIF",)
    return FORMATS


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


def _refuse_damaged(data: bytes, image: Image.Image) -> None:
    """Raise what decoding the JPEG in full raises, at a quarter of its cost.

    libjpeg fails over a header, or where the data end before the image does; damage inside a scan
    is a warning to it. So a file whose only scan runs up to its end marker is as good as its header
    alone. Else all of it is read, but an eighth of each side computed. Where that fails the full
    decoder has the last word: Pillow can't scale an image with a side below 8 pixels.
    """
    assert image.fp is not None
    start = image.fp.tell()  # of the first scan's data, up to which Pillow has read
    after = (piece[:1] for piece in data[start:].split(b"\xff")[1:])
    has_one_scan = next((byte for byte in after if byte not in _DATA), b"") == _END
    image.fp = io.BytesIO(data[:start] + b"\xff" + _END if has_one_scan else data)
    try:
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
    except Exception:
        Image.open(io.BytesIO(data), formats=("JPEG",)).load()


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
