"""Serve: base and tuned behind OpenAI's chat API, until Ctrl-C.

    python -m stages serve                                # http://127.0.0.1:8000/v1
    API_KEY=secret python -m stages serve --host 0.0.0.0  # for other machines too

A request names the model, ``tuned`` or ``base``. One process holds both as one loaded model, and
answers one request at a time with ``stages.model.scoring``, as the evaluation does. LLaMA-Factory's
API and ``transformers serve`` were tried: they fetch what a request names, answer mistakes with
status 500, and show the model other pictures than the evaluation.
"""

import asyncio
import contextlib
import hmac
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from stages.commands import both, chat, outputs
from stages.commands.both import Both
from stages.commands.chat import Asked
from stages.core import command
from stages.core.errors import UserError
from stages.model import scoring
from stages.params import params

HERE, KEY = "127.0.0.1", "API_KEY"
MOST_BYTES = 32 * 2**20  # of a request
MOST_PROMPT = 8192  # tokens, those of images included
MOST_CLIENTS = 64  # connected at a time
SECONDS = 30  # that a client may take to send a request
PAUSE = 0.5  # seconds between two looks at whether a client is still there
END = 2  # seconds that the answer being made has to end when the server does


class Refused(UserError):
    """A request that is not answered for a reason that has an HTTP status of its own."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Gone(Exception):
    """Nobody waits for the answer any more."""


class Client(threading.Event):
    """Set once the client is gone. ``generate`` hands it each token, as its streamer."""

    def put(self, _: Any = None) -> None:
        if self.is_set():
            raise Gone

    def end(self) -> None:
        """Called after the last token."""


def main(host: str = HERE, port: int = 8000) -> None:
    import uvicorn

    check_host(host)
    p, at = params.load(), outputs.read()
    outputs.require(at.model, at.adapter)
    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"port {port} of {host} can't be used ({reason}); choose another with PORT="
        ) from None
    print("loading …", flush=True)
    one_at_a_time = ThreadPoolExecutor(1)
    served = app(both.load(at.model, at.adapter, p), one_at_a_time, os.environ.get(KEY, ""))
    print(f"http://{host}:{port}/v1 (models: {', '.join(both.MODELS)})", flush=True)
    config = uvicorn.Config(served, log_level="error", limit_concurrency=MOST_CLIENTS)
    config.timeout_graceful_shutdown = 1
    with contextlib.suppress(KeyboardInterrupt):  # that is how a server ends
        uvicorn.Server(config).run(sockets=[listening])
    wait([one_at_a_time.submit(int)], END)  # an answer ends between two tokens
    os._exit(0)  # Python itself would take seconds to leave torch


def check_host(host: str) -> None:
    """Raise ``UserError`` where others could reach the server without a key."""
    if host not in (HERE, "localhost") and not os.environ.get(KEY):
        raise UserError(
            f"on {host} others can reach the server, and without a key anyone may use it; set "
            f"{KEY}, or leave HOST out"
        )


def app(models: Both, one_at_a_time: ThreadPoolExecutor, key: str = "") -> Starlette:
    """The API for these models; with a key, only for clients that send it."""

    async def list_models(_: Request) -> Response:
        listed = [{"id": name, "object": "model", "owned_by": "here"} for name in both.MODELS]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(request: Request) -> Response:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused(401, f"send the server's {KEY} as the key")
        asked = chat.read(await body(request))
        client, loop = Client(), asyncio.get_running_loop()
        job = loop.run_in_executor(one_at_a_time, answer, models, asked, client)
        try:
            while not (await asyncio.wait([job], timeout=PAUSE))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)  # which nobody reads
            return await job
        except asyncio.CancelledError:
            raise Refused(503, "the server ends") from None
        finally:
            client.set()

    async def refuse(_: Request, error: Exception) -> Response:
        said = {"message": str(error), "type": "invalid_request_error"}
        return JSONResponse({"error": said}, getattr(error, "status", 400))

    post = Route("/v1/chat/completions", complete, methods=["POST"])
    routes = [Route("/v1/models", list_models), post]
    return Starlette(routes=routes, exception_handlers={UserError: refuse})


async def body(request: Request) -> bytes:
    """What the client sends, within ``MOST_BYTES`` and ``SECONDS``."""
    received = bytearray()
    try:
        async with asyncio.timeout(SECONDS):
            async for piece in request.stream():
                received += piece
                if len(received) > MOST_BYTES:
                    raise Refused(413, f"a request may have {MOST_BYTES:,} bytes")
    except (TimeoutError, ClientDisconnect):
        raise Refused(408, f"a request may take {SECONDS} seconds to arrive") from None
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
            row = chat.row(asked, models, Path(place))
            prompt = len(scoring.prompt_tokens(models.policy, row, Path(place)))
            if prompt > MOST_PROMPT:
                raise UserError(f"the prompt has {prompt:,} tokens; at most {MOST_PROMPT:,}")
            said = models.answer(asked.model, row, Path(place), most, **options)
    except Gone:
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


if __name__ == "__main__":
    command.run(main)
