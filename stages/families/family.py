"""What a family of models has to say about itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of vision-language models, as far as it differs from others.

    name: as people write it.
    model_types: ``model_type`` in ``config.json``.
    templates: LLaMA-Factory's chat templates that fit; the first is for Instruct models.
    example: a repository on the Hub, for messages.
    tag: on the Hub, for the model card.
    citation: BibTeX, for the model card.
    image_token: the token that stands in a prompt for a piece of an image.
    image_tokens: see ``qwen.image_tokens``; how many of them an image of a size becomes.
    position_inputs: see ``qwen.position_inputs``; what ``generate`` needs to place an image.
    seeing_each_image_once: see ``qwen.seeing_each_image_once``; a faster vision tower.
    """

    name: str
    model_types: tuple[str, ...]
    templates: tuple[str, ...]
    example: str
    tag: str
    citation: str
    image_token: str
    image_tokens: Callable[..., int]
    position_inputs: Callable[[Any, int], dict[str, Any]]
    seeing_each_image_once: Callable[[Any], AbstractContextManager[None]]
