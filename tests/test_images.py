"""Every kind of image that a data set may hold, made with Pillow and read back."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from stages.pairs import images
from stages.pairs.refusals import REASONS, Refusal


@dataclass
class Limits:
    min_side: int = 28
    max_pixels: int = 40_000
    max_input_pixels: int = 250_000
    jpeg_quality: int = 95


LIMITS = Limits()
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(size=(80, 40), left=RED, right=BLUE, mode="RGB"):
    """An image whose left half has one colour and whose right half another."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def normal(data, limits=LIMITS):
    result = images.normalise(data, limits)
    assert isinstance(result, images.Normal), result
    image = Image.open(io.BytesIO(result.jpeg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (result.width, result.height))
    return result, image


def refused(data, limits=LIMITS):
    result = images.normalise(data, limits)
    assert isinstance(result, Refusal), result
    assert result.reason in REASONS
    return result.reason


def assert_colour(image, place, colour, within=6):
    assert np.abs(np.subtract(image.getpixel(place), colour)).max() <= within


def jpeg(size=(80, 40), **options):
    return encoded(halves(size), "JPEG", quality=90, **options)


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, data, *, depth=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def claims():
    """EXIF data that claim another size."""
    found = Image.Exif()
    found[0x0100], found[0x0101] = 9999, 9999
    found.get_ifd(0x8769).update({0xA002: 9999, 0xA003: 9999})
    return found


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"progressive": True}, *({"exif": exif(lie)} for lie in (0, 1, 9, 255, 65535))),
        *({"exif": b"Exif\0\0MM\0*\xff\xff\xff\xff"}, {"exif": claims()}),
    ],
)
def test_an_rgb_jpeg_within_limits_stays_byte_for_byte(options):
    data = jpeg(**options)
    assert images.normalise(data, LIMITS) == images.Normal(data, 80, 40)


def test_encoding_is_deterministic_and_carries_no_metadata():
    source = halves()
    data = encoded(source, exif=exif(1), icc_profile=b"profile", dpi=(300, 300))
    result, image = normal(data)
    assert images.normalise(data, LIMITS) == result
    assert not image.getexif()
    assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert images.normalise(encoded(source, "BMP"), LIMITS) == result
    _, image = normal(encoded(source, "GIF", comment=b"taken by"))
    assert "comment" not in image.info


def grey16(kind):
    samples = np.zeros((40, 80), np.uint16)
    samples[:, 40:] = 32768
    return encoded(Image.fromarray(samples), kind)


PALETTE = halves(left=0, right=1, mode="P")
PALETTE.putpalette([*RED, *BLUE])
RGB16 = b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 80
GREYS = {10: (0, 0, 0), 70: (128, 128, 128)}
# The colours of an image of 80 x 40 pixels, by their column.
SHOWN = {
    "alpha": (
        encoded(halves(left=(*RED, 255), right=(0, 0, 0, 0), mode="RGBA")),
        {10: RED, 70: WHITE},
    ),
    "half alpha": (encoded(Image.new("RGBA", (80, 40), (0, 0, 0, 128))), {10: (127, 127, 127)}),
    "palette with alpha": (encoded(PALETTE, transparency=b"\xff\0"), {10: RED, 70: WHITE}),
    "a transparent colour": (encoded(halves(), transparency=BLUE), {10: RED, 70: WHITE}),
    "grey with alpha": (
        encoded(halves(left=(100, 255), right=(0, 0), mode="LA")),
        {10: (100, 100, 100), 70: WHITE},
    ),
    **{f"16-bit grey {kind}": (grey16(kind), GREYS) for kind in ("PNG", "TIFF", "PPM")},
    "16-bit RGB": (png(80, 40, zlib.compress(RGB16 * 40), depth=16), {20: (255, 128, 0)}),
}


@pytest.mark.parametrize("name", SHOWN)
def test_colours_are_those_that_people_see(name):
    data, colours = SHOWN[name]
    _, image = normal(data)
    for column, colour in colours.items():
        assert_colour(image, (column, 10), colour, within=12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_too_many_pixels_are_scaled_down_with_the_shape_kept(kind):
    result, image = normal(encoded(halves((600, 300)), kind))
    assert (result.width, result.height) == (282, 141)
    assert_colour(image, (20, 20), RED)
    assert_colour(image, (260, 20), BLUE)
    result, _ = normal(encoded(halves((600, 300)), kind, exif=exif(6)))
    assert (result.width, result.height) == (141, 282)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**8))
@example(91, 91, 1)  # 91 * sqrt(1 / 91²) is a hair below 1
def test_a_fitted_size_is_within_bounds_and_of_the_same_shape(width, height, most):
    w, h = images.fitted(width, height, most)
    assert 1 <= w <= min(width, images.LONGEST_JPEG_SIDE)
    assert 1 <= h <= min(height, images.LONGEST_JPEG_SIDE)
    assert w * h <= most
    if min(w, h) >= 100:
        assert w / h == pytest.approx(width / height, rel=0.011)
    if width * height <= most and max(width, height) <= images.LONGEST_JPEG_SIDE:
        assert (w, h) == (width, height)
    assert images.fitted(height, width, most) == (h, w)


# What is refused


def pattern(size=(61, 43)):
    """No symmetry, so that every turn is told from every other."""
    ramp = np.add.outer(np.arange(size[1]) * 3, np.arange(size[0]) * 2)
    channels = [ramp % 256, ramp // 2 % 256, 255 - ramp % 256]
    return Image.fromarray(np.stack(channels, 2, dtype=np.uint8, casting="unsafe"))


def many_scans(count, size=(64, 64)):
    """A progressive JPEG whose last scan comes again and again, as an attacker writes it."""
    data = encoded(pattern(size), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    # The Huffman tables of a scan stand before it.
    start = max(data.rfind(b"\xff\xc4", 0, start), data.rfind(b"\xff\xc4", start - 200, start))
    return data[:-2] + data[start:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


def giant_tile():
    tags = {256: 100, 257: 100, 258: 8, 259: 5, 262: 1, 277: 1, 322: 30_000, 323: 30_000}
    tags |= {324: 140, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(100)


# Told by the header alone: nothing may be decoded.
UNDECODED = {
    "a bomb": (png(60_000, 60_000, zlib.compress(bytes(10_000))), {}, "image_too_large"),
    "a giant JPEG": (
        jpeg().replace(struct.pack(">HH", 40, 80), struct.pack(">HH", 65_000, 65_000), 1),
        *({}, "image_too_large"),
    ),
    "a giant tile": (giant_tile(), {}, "image_too_large"),
    "a small image": (encoded(halves((80, 27))), {}, "image_too_small"),
    "one that scaling makes narrow": (encoded(halves((8000, 30))), {}, "image_too_small"),
    "a line": (encoded(Image.new("RGB", (1, 60_000))), {}, "image_too_small"),
    "a thousand scans": (many_scans(1000), {}, "image_too_slow"),
    "13 scans of 4,096 pixels": (many_scans(13), {"max_input_pixels": 5000}, "image_too_slow"),
}


@pytest.mark.parametrize("name", UNDECODED)
def test_what_the_header_tells_is_refused_without_decoding(name, monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    data, limits, reason = UNDECODED[name]
    assert refused(data, Limits(**limits)) == reason


def test_what_is_just_within_the_limits_is_read():
    normal(encoded(halves((28, 28))))
    normal(many_scans(30))
    normal(many_scans(11), Limits(max_input_pixels=5000))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    normal(data)
    assert refused(data[: int(len(data) * part)]) == "undecodable_image"


FLOATS = Image.fromarray(np.full((40, 40), 0.5, np.float32))


@pytest.mark.parametrize(
    "data",
    [
        encoded(FLOATS, "TIFF"),  # whose white is unknown
        encoded(pattern(), "JPEG2000"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",  # which Pillow would hand to Ghostscript
        b"\n<!DOCTYPE html><html>404</html>",
        b"",
    ],
)
def test_what_is_no_image_that_is_read_is_refused(data):
    assert refused(data) == "undecodable_image"


def test_a_png_with_a_damaged_piece_is_refused_unless_it_is_metadata():
    whole = encoded(halves())
    damaged = bytearray(whole)
    damaged[-20] ^= 0xFF
    assert refused(bytes(damaged)) == "undecodable_image"
    comment = bytearray(chunk(b"tEXt", b"Comment\0taken by"))
    comment[-1] ^= 0xFF
    packed = chunk(b"zTXt", b"Raw\0\0" + zlib.compress(bytes(2 * 10**6)))
    for place in (33, len(whole) - 12):  # before the pixels, and behind them
        with_both = whole[:place] + bytes(comment) + packed + whole[place:]
        assert images.normalise(with_both, LIMITS) == images.normalise(whole, LIMITS)


@settings(deadline=None)  # other processes may hold the processor
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), st.data())
def test_damaged_bytes_give_an_image_or_a_reason_and_never_an_error(kind, draw):
    data = bytearray(encoded(halves((40, 30)), kind))
    for _ in range(draw.draw(st.integers(1, 8))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    result = images.normalise(bytes(data), LIMITS)
    assert isinstance(result, images.Normal) or result.reason in REASONS


def test_running_out_of_memory_is_not_called_a_damaged_image(monkeypatch):
    def load(_):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        images.normalise(encoded(halves(), "BMP"), LIMITS)


# Formats, compared with Pillow's own decoding


MADE = {
    **{kind: encoded(pattern(), kind) for kind in ("PNG", "GIF", "BMP", "PPM", "TIFF")},
    **{f"{kind}, quality 95": encoded(pattern(), kind, quality=95) for kind in ("JPEG", "AVIF")},
    "JPEG, progressive": encoded(pattern(), "JPEG", quality=95, progressive=True),
    "JPEG, CMYK": encoded(pattern().convert("CMYK"), "JPEG", quality=95),
    "JPEG, grey": encoded(pattern().convert("L"), "JPEG", quality=95),
    "PNG, palette": encoded(pattern().quantize(64)),
    "PNG, one bit": encoded(pattern().convert("1")),
    "WebP": encoded(pattern(), "WEBP", lossless=True),
    "WebP, lossy": encoded(pattern(), "WEBP", quality=90),
    "TIFF, LZW": encoded(pattern(), "TIFF", compression="tiff_lzw"),
    "TIFF, CMYK": encoded(pattern().convert("CMYK"), "TIFF"),
    **{
        f"{kind}, turned {turn}": encoded(pattern(), kind, exif=exif(turn))
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
        for turn in range(2, 9)
    },
    **{
        f"{kind}, moving": encoded(
            pattern(), kind, save_all=True, append_images=[halves((61, 43))] * 2
        )
        for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO")
    },
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_kept_looks_as_pillow_shows_the_file(name):
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(MADE[name]))).convert("RGB")
    _, image = normal(MADE[name])
    assert image.size == shown.size
    kept = ImageOps.exif_transpose(image)
    difference = np.abs(np.asarray(kept, np.int16) - np.asarray(shown, np.int16))
    assert difference.mean() < 3
