"""What is fuzzed: for any bytes, a target gives a result or a ``UserError``; all else is a finding.

Seeds are well-formed files of each format, so that a mutation begins inside its decoder.
"""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from stages.core.errors import UserError
from stages.pairs import images, refusals, tables
from stages.pairs.files import SUFFIXES, ending
from stages.pairs.refusals import REASONS, Refusal
from tests.test_images import MADE, Limits
from tests.test_inputs import CASES

LIMITS = Limits(min_side=8, max_pixels=10_000, max_input_pixels=1_000_000, jpeg_quality=90)
READING = tables.Reading({name: name for name in ("image", "question", "chosen", "rejected")})


@dataclass(frozen=True)
class Target:
    """A function of any bytes, and bytes to begin with."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


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


def records(data: bytes) -> None:
    """Each row of a table, of the kind that its first byte says, is a record whose fields are of
    their types, good or refused for a reason."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"a{suffix}").write_bytes(data[1:])
        try:
            for record in tables.records(folder, READING):
                for text in (record.question, record.chosen, record.rejected):
                    assert isinstance(text, str | None)
                assert isinstance(record.images, tuple | None)
                assert len(record.note) < 2000
                refused = refusals.text_refusal(record)
                assert refused is None or refused.reason in REASONS
        except UserError as error:
            check_message(error)


def check_message(error: UserError) -> None:
    """What people are told is short, whatever the file holds."""
    assert 10 < len(str(error)) < 2000


def tables_of_cases() -> list[bytes]:
    paths = sorted(path for path in CASES.glob("*/*") if ending(path.name))
    return [bytes([SUFFIXES.index(ending(path.name))]) + path.read_bytes() for path in paths]


TARGETS = {
    "image": Target(image, lambda: list(MADE.values())),
    "records": Target(records, tables_of_cases),
}
