"""What is fuzzed: for any bytes, a target gives a result or a ``UserError``; all else is a finding.

Seeds are made by code, one of each format, so that a mutation begins inside its decoder.
"""

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from stages.core.errors import UserError
from stages.pairs import images, refusals, tables
from stages.pairs.refusals import REASONS, Refusal
from tests.test_formats import SUFFIXES, arrow, parquet, tar
from tests.test_images import Limits

LIMITS = Limits(min_side=8, max_pixels=10_000, max_input_pixels=1_000_000, jpeg_quality=90)
COLUMNS = {name: name for name in ("image", "question", "chosen", "rejected")} | {
    "origin": "origin",
    "kind": None,
}


@dataclass(frozen=True)
class Target:
    """A function of any bytes, and bytes to begin with."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def check_message(error: UserError) -> None:
    """What people are told is short, whatever the file holds."""
    assert 10 < len(str(error)) < 2000


# Images


def image(data: bytes) -> None:
    """What is kept is an RGB JPEG within limits; what is not has one of the known reasons."""
    result = images.normalise(data, LIMITS)
    if isinstance(result, Refusal):
        assert result.reason in REASONS
        assert len(result.detail) < 2000
        return
    assert result.width * result.height <= LIMITS.max_pixels
    assert min(result.width, result.height) >= LIMITS.min_side
    kept = Image.open(io.BytesIO(result.jpeg), formats=["JPEG"])
    kept.load()
    assert (kept.mode, kept.size) == ("RGB", (result.width, result.height))


def image_seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((40, 30))
    turned = Image.Exif()
    turned[0x0112] = 6
    forms: list[tuple[Image.Image, str, dict[str, object]]] = [
        *((picture, kind, {}) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")),
        (picture, "JPEG", {"progressive": True, "exif": turned}),
        (picture, "JPEG", {"restart_marker_blocks": 2}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture.quantize(16), "PNG", {"transparency": 0}),
        (picture.convert("I;16"), "PNG", {}),
        (picture, "TIFF", {"compression": "tiff_lzw", "exif": turned}),
        (picture, "TIFF", {"compression": "jpeg"}),
        (picture, "GIF", {"save_all": True, "append_images": [picture.rotate(90)]}),
        (picture, "WEBP", {"save_all": True, "append_images": [picture.rotate(90)]}),
        (picture, "AVIF", {}),
        (picture, "JPEG2000", {}),
        (picture, "MPO", {"save_all": True, "append_images": [picture.rotate(90)]}),
    ]
    found = []
    for one, kind, options in forms:
        file = io.BytesIO()
        one.save(file, kind, **options)
        found.append(file.getvalue())
    return found


# Records: the first byte says which kind of file the others are


def records(data: bytes) -> None:
    """Each row is a record whose fields are of their types, good or refused for a reason."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"a{suffix}").write_bytes(data[1:])
        try:
            for record in tables.records(folder, tables.Reading(COLUMNS)):
                for text in (record.question, record.chosen, record.rejected):
                    assert isinstance(text, str | None)
                assert isinstance(record.images, tuple | None)
                assert len(record.note) < 2000
                refused = refusals.text_refusal(record)
                assert refused is None or refused.reason in REASONS
        except UserError as error:
            check_message(error)


def record_seeds() -> list[bytes]:
    rows = [
        {"image": "data:image/png;base64,iVBORw0KGgo=", "question": f"q{i}", "origin": "o"}
        | {"chosen": "yes é", "rejected": "no"}
        for i in range(3)
    ]
    turns = {"conversations": [{"from": "human", "value": "<image>q"}], "images": ["a.png"]}
    turns |= {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}
    rated = {"annotations": {"Helpfulness": {"Rating": "5"}}, "response": "yes"}
    ranked = {"prompt": "q", "image": "a.png", "completions": [rated, {**rated, "response": "no"}]}
    table = pa.Table.from_pylist(rows)
    plain = "\n".join(map(json.dumps, rows)).encode()
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    content = {
        ".parquet": [parquet(table), parquet(pa.Table.from_pylist([turns] * 2))],
        ".arrow": [arrow(table)],
        ".tar": [tar({"0.json": plain.split(b"\n")[0], "0.png": b"png"})],
        ".jsonl": [plain, json.dumps(turns).encode(), json.dumps(ranked).encode()],
        ".json": [json.dumps(rows, indent=1).encode(), json.dumps({"data": rows}).encode()],
        ".csv": ["\n".join(",".join(row) for row in cells).encode()],
        ".tsv": ["\n".join("\t".join(row) for row in cells).encode()],
        ".jsonl.gz": [gzip.compress(plain, mtime=0)],
    }
    return [
        bytes([SUFFIXES.index(suffix)]) + one for suffix, each in content.items() for one in each
    ]


TARGETS = {
    "image": Target(image, image_seeds),
    "records": Target(records, record_seeds),
}
