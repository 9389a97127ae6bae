"""What a request to the server asks, in OpenAI's JSON: checked, and made a formatted prompt.

Options are honoured or refused, never ignored. Texts are data, as in training: special tokens in
them are broken up. Pictures come as ``data:`` URLs, so that no request makes the server fetch
anything, and are prepared as preprocess does.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from stages.commands.both import Both
from stages.core.errors import UserError
from stages.core.text import shown
from stages.model.formatted import IMAGE_PLACEHOLDER, SYSTEM
from stages.sources.source import Section

MOST_IMAGES = 8
MOST_CHARACTERS = 100_000  # of all texts; checked before they are tokenized
MOST_NEW_TOKENS, NEW_TOKENS = 4096, 256  # of an answer: at most, and where a request does not say
GREEDY = 0.01  # a temperature below counts as 0: logits divided by it would be infinite

# Options that many clients send, with the value that changes nothing.
WITHOUT_EFFECT: dict[str, Any] = {
    **{"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": []},
    **{"logprobs": False, "store": False, "response_format": {"type": "text"}},
}


class Given(Section):
    """Keys of a request; those that are null, or change nothing, are as good as absent."""

    @model_validator(mode="before")
    @classmethod
    def _what_matters(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {k: v for k, v in given.items() if v is not None and v != WITHOUT_EFFECT.get(k)}


class Text(Given):
    type: Literal["text"]
    text: str


class Address(Given):
    url: str
    detail: Literal["auto"] = "auto"


class Picture(Given):
    type: Literal["image_url"]
    image_url: Address


class Message(Given):
    role: Literal["system", "user", "assistant"]
    content: list[Annotated[Text | Picture, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Asked(Given):
    """A request for an answer, which is greedy unless the request has a temperature."""

    model: Literal["base", "tuned"]
    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(NEW_TOKENS, ge=1, le=MOST_NEW_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_NEW_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = Field({})  # it always is
    user: Any = None  # who asks, which changes nothing

    def sampling(self) -> dict[str, Any]:
        """Options of ``generate``; none for a greedy answer."""
        if self.temperature < GREEDY:
            return {}
        drawn = {"temperature": self.temperature, "top_p": self.top_p}
        return drawn | {"do_sample": True, "top_k": 0}  # else the model's own top_k would count


def read(body: bytes) -> Asked:
    """The request in a body.

    Raises:
        UserError: naming the first key that is wrong, and how.
    """
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        what = "it is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{shown(where)}: {shown(what, 300)}") from None
    roles = [message.role for message in asked.messages]
    turns = roles[1:] if roles[0] == SYSTEM else roles
    if len(turns) % 2 == 0 or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise UserError("messages: user and assistant take turns, and the last is the user's")
    return asked


def row(asked: Asked, models: Both, folder: Path) -> dict[str, Any]:
    """The request as the format stage would have written it, its pictures stored in ``folder``.

    Raises:
        UserError: there are too many pictures or characters, or a picture can't be used.
    """
    parts = [part for message in asked.messages for part in message.content]
    characters = sum(len(part.text) for part in parts if isinstance(part, Text))
    if characters > MOST_CHARACTERS:
        raise UserError(f"messages: {characters:,} characters; at most {MOST_CHARACTERS:,}")
    if (count := sum(isinstance(part, Picture) for part in parts)) > MOST_IMAGES:
        raise UserError(f"messages: {count} images; at most {MOST_IMAGES}")
    names: list[str] = []
    messages = []
    for message in asked.messages:
        texts = [""]  # between pictures: a special token may be spread over several parts
        for part in message.content:
            if isinstance(part, Text):
                texts[-1] += part.text
            elif message.role == "user":
                names.append(models.stored(decoded(part.image_url.url), folder))
                texts.append("")
            else:
                raise UserError("messages: only those of the user hold images")
        content = IMAGE_PLACEHOLDER.join(map(models.clean, texts))
        if content or message.role != SYSTEM:
            messages.append({"role": message.role, "content": content})
    return {"messages": messages, "images": names}


def decoded(url: str) -> bytes:
    """What a ``data:`` URL holds.

    Raises:
        UserError: it is another URL, or no base64.
    """
    head, _, content = url.partition(";base64,")
    if not (content and head[:5].lower() == "data:"):
        raise UserError("image_url: the server fetches nothing; send data:image/jpeg;base64,…")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise UserError(f"image_url: what follows base64 is none ({error})") from None
