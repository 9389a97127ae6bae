"""What a family of vision-language models says about itself, and what those of Qwen have in common.

An image keeps its resolution: it becomes a grid of patches, and each square of ``merge_size``²
patches becomes one token. Positions have three parts: time, row, column. In text all three advance
together, by one a token. All tokens of an image share one time; its rows and columns count from
there. The text behind it continues after the longer side of the image's grid of tokens, so an image
of 3 by 5 tokens takes 5 positions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stages.core.meaning import code

WORDS = ("name", "example", "tag", "paper", "published")  # they decide no number


@dataclass(frozen=True)
class Family:
    """A family, as far as it differs from others: an entry of ``known.yaml``.

    name: as people write it.
    model_types: ``model_type`` in ``config.json``.
    templates: LLaMA-Factory's chat templates that fit; the first is for Instruct models.
    example: a repository on the Hub, for messages.
    tag: on the Hub, for the model card.
    paper: number on arXiv or key, for the model card (``reporting/card.bib``).
    token_side: pixels of a side of the square that becomes one token.
    published: dimensions of its models by repository, as their config.json has them.
    image_token: the token that stands in a prompt for a piece of an image.
    builds_prompts: a pattern of the tokens that the templates build prompts of.
    code: files of ``stages`` that compute for this family alone.
    """

    name: str
    model_types: Sequence[str]
    templates: Sequence[str]
    example: str
    tag: str
    paper: str
    token_side: int
    published: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(compare=False)
    image_token: str = "<|image_pad|>"
    builds_prompts: str = r"<\|(im|vision|image|video)_\w+\|>|<\|endoftext\|>"
    code: Sequence[str] = ()

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides how this family computes: a hash of the code, and its own values."""
        values = {key: value for key, value in asdict(self).items() if key not in WORDS}
        return code("families/family.py", *self.code) | {"families/known.yaml": json.dumps(values)}

    def image_tokens(
        self, size: tuple[int, int], *, image_processor: Any, plugin: Any, bounds: tuple[int, int]
    ) -> int:
        """Number of tokens that an image becomes, by its size alone.

        LLaMA-Factory first brings it within ``bounds`` (``Qwen2VLPlugin._preprocess_image``), then
        the model's processor rounds its sides to whole patches (``smart_resize``).

        Args:
            size: width and height in pixels.
            image_processor: the model's own.
            plugin: of LLaMA-Factory's template.
            bounds: ``image_min_pixels`` and ``image_max_pixels``.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        least, most = bounds
        factor = image_processor.patch_size * image_processor.merge_size
        width, height = plugin._get_qwen_video_size_after_regularization(*size, most, least)
        rows, columns = smart_resize(
            height,
            width,
            factor=factor,
            min_pixels=image_processor.size["shortest_edge"],
            max_pixels=image_processor.size["longest_edge"],
        )
        return (rows // factor) * (columns // factor)
