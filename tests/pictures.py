"""Small images for rows of tests."""

import io

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (40, 32), kind: str = "PNG") -> bytes:
    """An image file of its own for each number: sixteen coloured fields."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, kind)
    return file.getvalue()
