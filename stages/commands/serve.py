"""Serve base and tuned through OpenAI's chat API, until Ctrl-C.

    python -m stages serve                                # http://127.0.0.1:8000/v1
    API_KEY=secret python -m stages serve --host 0.0.0.0  # for other machines too

A request names the model, ``tuned`` or ``base``. One process holds both as one loaded model, and
answers one request at a time with ``stages.model.scoring``, as the evaluation does. Options are
honoured or refused, never ignored. Texts are data, as in training, and pictures come as ``data:``
URLs, so that no request makes the server fetch anything. LLaMA-Factory's API and ``transformers
serve`` were tried: they fetch what a request names, answer mistakes with status 500, and show the
model other pictures than the evaluation.
"""

import asyncio
import base64
import contextlib
import hmac
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stages.commands.ask import MODELS, Both, load
from stages.core import command
from stages.core.errors import UserError, shown
from stages.model import scoring
from stages.model.formatted import IMAGE_PLACEHOLDER, SYSTEM
from stages.params import params
from stages.sources.source import Section

HERE, KEY = "127.0.0.1", "API_KEY"
MOST_BYTES = 32 * 2**20  # of a request
MOST_IMAGES = 8
MOST_CHARACTERS = 100_000  # of all texts; checked before they are tokenized
MOST_PROMPT = 8192  # tokens, those of images included
MOST_NEW_TOKENS, NEW_TOKENS = 4096, 256  # of an answer: at most, and where a request does not say
MOST_CLIENTS = 64  # connected at a time
GREEDY = 0.01  # a temperature below counts as 0: logits divided by it would be infinite
PAUSE = 0.5  # seconds between two looks at whether a client is still there
END = 2  # seconds that the answer being made has to end when the server does

# Options that many clients send, with the value that changes nothing.
WITHOUT_EFFECT: dict[str, Any] = {
    **{"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "tools": []},
    **{"logprobs": False, "store": False, "response_format": {"type": "text"}},
}


class Client(threading.Event):
    """Set once the client is gone. ``generate`` hands it each token, as its streamer."""

    def put(self, _: Any = None) -> None:
        if self.is_set():
            raise ConnectionAbortedError

    def end(self) -> None:
        """Called after the last token."""


class Given(Section):
    """Keys of a request; those that are null, or change nothing, count as absent."""

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


def main(host: str = HERE, port: int = 8000) -> None:
    import uvicorn

    key = os.environ.get(KEY, "")
    if host not in (HERE, "localhost") and not key:
        raise UserError(
            f"on {host} others can reach the server, and without a key anyone may use it; set "
            f"{KEY}, or leave HOST out"
        )
    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of {host} can't be used ({error}); choose another with PORT="
        ) from None
    one_at_a_time = ThreadPoolExecutor(1)
    served = app(load(params.load()), one_at_a_time, key)
    print(f"http://{host}:{port}/v1 (models: {', '.join(MODELS)})", flush=True)
    config = uvicorn.Config(served, log_level="error", limit_concurrency=MOST_CLIENTS)
    config.timeout_graceful_shutdown = 1
    with contextlib.suppress(KeyboardInterrupt):  # that is how a server ends
        uvicorn.Server(config).run(sockets=[listening])
    wait([one_at_a_time.submit(int)], END)  # an answer ends between two tokens
    os._exit(0)  # Python itself would take seconds to leave torch


def app(models: Both, one_at_a_time: ThreadPoolExecutor, key: str = "") -> Starlette:
    """The API for these models; with a key, only for clients that send it."""

    async def list_models(_: Request) -> Response:
        listed = [{"id": name, "object": "model", "owned_by": "here"} for name in MODELS]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(request: Request) -> Response:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, f"send the server's {KEY} as the key")
        asked = read(await body(request))
        client, loop = Client(), asyncio.get_running_loop()
        job = loop.run_in_executor(one_at_a_time, answer, models, asked, client)
        try:
            while not (await asyncio.wait([job], timeout=PAUSE))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)  # which nobody reads
            return await job
        except asyncio.CancelledError:
            raise HTTPException(503, "the server ends") from None
        finally:
            client.set()

    async def refuse(_: Request, error: Exception) -> Response:
        said = {"message": getattr(error, "detail", str(error)), "type": "invalid_request_error"}
        return JSONResponse({"error": said}, getattr(error, "status_code", 400))

    post = Route("/v1/chat/completions", complete, methods=["POST"])
    routes = [Route("/v1/models", list_models), post]
    refused: Any = dict.fromkeys((UserError, HTTPException, ClientDisconnect), refuse)
    return Starlette(routes=routes, exception_handlers=refused)


async def body(request: Request) -> bytes:
    """What the client sends, within ``MOST_BYTES``."""
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > MOST_BYTES:
            raise HTTPException(413, f"a request may have {MOST_BYTES:,} bytes")
    return bytes(received)


def answer(models: Both, asked: Asked, client: Client) -> Response:
    """Let the model answer, while the client waits.

    Raises:
        UserError: the request is beyond a limit.
    """
    most = asked.max_completion_tokens or asked.max_tokens
    options = asked.sampling() | {"streamer": client}
    try:
        with tempfile.TemporaryDirectory() as place:
            client.put()
            row = formatted_row(asked, models, Path(place))
            prompt = len(scoring.prompt_tokens(models.policy, row, Path(place)))
            if prompt > MOST_PROMPT:
                raise UserError(f"the prompt has {prompt:,} tokens; at most {MOST_PROMPT:,}")
            said = models.answer(asked.model, row, Path(place), most, **options)
    except ConnectionAbortedError:
        return Response(status_code=499)
    return reply(asked, said, prompt)


def reply(asked: Asked, said: scoring.Answer, prompt: int) -> Response:
    """An answer to a prompt of so many tokens: one object, or a stream of events of which the first
    holds the whole text."""
    message = {"role": "assistant", "content": said.text}
    end = {"index": 0, "finish_reason": "stop" if said.finished else "length"}
    usage = {"prompt_tokens": prompt, "completion_tokens": said.tokens}
    frame: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": asked.model,
        "usage": usage | {"total_tokens": sum(usage.values())},
    }
    if not asked.stream:
        choices = [end | {"message": message}]
        return JSONResponse(frame | {"object": "chat.completion", "choices": choices})
    frame["object"] = "chat.completion.chunk"
    deltas = [{"index": 0, "finish_reason": None, "delta": message}, end | {"delta": {}}]
    lines = [*(json.dumps(frame | {"choices": [delta]}) for delta in deltas), "[DONE]"]
    return Response("".join(f"data: {each}\n\n" for each in lines), media_type="text/event-stream")


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


def formatted_row(asked: Asked, models: Both, folder: Path) -> dict[str, Any]:
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
                raise UserError("messages: only the user's may hold images")
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
        raise UserError(f"image_url: this is not valid base64 ({error})") from None


if __name__ == "__main__":
    command.run(main)
