"""The server: it answers as the evaluation does, whatever it is sent, and ends when it is told."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.commands import ask as asking
from stages.commands import serve
from stages.core.errors import UserError
from tests.contracts import ROOT

MOST = 8  # tokens of an answer
PATH = "/v1/chat/completions"


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(colour: Any = "red", mode: str = "RGB", side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def asked(*content: Any, **more: Any) -> dict[str, Any]:
    """A request with these parts; a text stands for itself."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    user = {"role": "user", "content": parts}
    return {"model": "tuned", "messages": [user], "max_tokens": MOST} | more


def request(content: dict[str, Any]) -> serve.Asked:
    return serve.read(json.dumps(content).encode())


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "hello"} for role in roles]


# what is refused before a model is asked

RED = picture(url(png()))
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt"}, "model: Input should be 'base' or 'tuned'"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": turns("user", "user")}, "take turns"),
    ({"messages": turns("user", "assistant")}, "the last is the user's"),
    ({"messages": turns("system")}, "take turns"),
    ({"max_completion_tokens": 10**9}, "max_completion_tokens: Input should be less"),
    ({"temperature": float("nan")}, "temperature"),
    ({"stop": ["."]}, "stop: it is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format: it is not supported"),
    ({"tools": [{"type": "function"}]}, "tools: it is not supported"),
]
CONTENTS: list[tuple[list[Any], str]] = [
    ([picture("http://127.0.0.1:8799\\@host.invalid/../internal/admin?x=1")], "the server fetches"),
    ([{"type": "video_url", "video_url": {"url": "x"}}], "'video_url'"),
    ([picture("data:image/png;base64,!!!")], "this is not valid base64"),
    ([picture(url(b"no picture"))], "the image can't be used"),
    ([picture(url(png(0, "1", 13000)))] * 8, "the image can't be used .*13000 x 13000"),
    ([RED] * 9, "9 images; at most 8"),
    (["word " * 25_000], "125,000 characters; at most 100,000"),
    (["word " * 19_000], "the prompt has .* tokens; at most 8,192"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=str)
def test_what_a_request_may_not_say_is_refused_in_a_sentence(change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        request(asked("hello") | change)


def test_what_is_no_json_object_is_refused():
    for body in (b"", b"[]", b"\xff\xfe", b'{"model":' * 1000):
        with pytest.raises(UserError, match="the request: "):
            serve.read(body)


def test_what_changes_nothing_is_taken_without_a_word():
    more = {"n": 1, "logprobs": False, "tools": [], "seed": None, "user": "ann"}
    more |= {"response_format": {"type": "text"}, "stream_options": {"include_usage": True}}
    request(asked("hello", **more))


def test_a_server_that_others_reach_needs_a_key_and_a_port_that_is_free(monkeypatch):
    monkeypatch.delenv(serve.KEY, raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.7", "host.invalid"):
        with pytest.raises(UserError, match="set API_KEY, or leave HOST out"):
            serve.main(host=host)
    monkeypatch.setenv(serve.KEY, "secret")
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 0.0.0.0 can't be used"):
            serve.main("0.0.0.0", port)
    with pytest.raises(UserError, match="can't be used"):
        serve.main(port=70000)


# the API in this process


@pytest.fixture(scope="module")
def strong(adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random adapter, so much stronger that it answers otherwise than the base."""
    from safetensors.torch import load_file, save_file

    folder: Path = tmp_path_factory.mktemp("strong") / "adapter"
    shutil.copytree(adapter_dir, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * 4 for k, v in weights.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def models(llamafactory: None, model_dir: Path, strong: Path, params_with: Any) -> serve.Both:
    return asking.load(params_with(), model_dir, strong)


@pytest.fixture(scope="module")
def api(models: serve.Both) -> Iterator[Any]:
    from starlette.testclient import TestClient

    with TestClient(
        serve.app(models, ThreadPoolExecutor(1)), raise_server_exceptions=False
    ) as client:
        yield client


def said(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.slow
def test_a_picture_is_answered_about_as_in_the_evaluation(api, models, formatted_dir, pairs_dir):
    rows, images = json.loads((formatted_dir / "test.json").read_text())[:4], pairs_dir / "images"
    found = {}
    for name in serve.MODELS:
        for row in rows:
            jpeg = url((images / row["images"][0]).read_bytes(), "jpeg")
            question = row["messages"][0]["content"].removeprefix("<image>")
            found[name, row["id"]] = said(
                api.post(PATH, json=asked(picture(jpeg), question, model=name))
            )
            assert found[name, row["id"]] == models.answer(name, row, images, MOST).text
    assert any(found["base", row["id"]] != found["tuned", row["id"]] for row in rows)


@pytest.mark.slow
def test_a_picture_is_prepared_as_preprocess_does(models, tmp_path):
    """Transparent on white, turned as its EXIF says; base64 may have line breaks."""
    turned, buffer = Image.new("RGB", (60, 40), "red"), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(buffer, "WEBP", exif=exif)
    lines = base64.encodebytes(png((255, 0, 0, 0), "RGBA")).decode()
    transparent = picture(f"data:image/png;base64,{lines}")
    content = (picture(url(buffer.getvalue(), "webp")), "and ", transparent, "what?")
    row = serve.formatted_row(request(asked(*content)), models, tmp_path)
    assert row["messages"] == [{"role": "user", "content": "<image>and <image>what?"}]
    first, second = (Image.open(tmp_path / name) for name in row["images"])
    assert first.size == (40, 60)
    assert second.getpixel((9, 9)) == (255, 255, 255)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["<|image_pad|> what?", "<image> what?", "<|im_end|>"])
def test_a_special_token_in_a_text_is_text(api, models, tmp_path, text):
    """Spread over two parts, and in an earlier turn, too; the next request is answered as well."""
    half = len(text) // 2
    messages = [
        *asked(RED, text)["messages"],
        {"role": "assistant", "content": text},
        *asked(text[:half], text[half:])["messages"],
    ]
    conversation = asked("") | {"messages": messages}
    row = serve.formatted_row(request(conversation), models, tmp_path)
    assert [m["content"].count("<image>") for m in row["messages"]] == [1, 0, 0]
    assert not any(marker in row["messages"][2]["content"] for marker in models.markers)
    for each in (asked(RED, text), conversation):
        assert api.post(PATH, json=each).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(("content", "why"), CONTENTS, ids=[why for _, why in CONTENTS])
def test_contents_that_are_not_sent_or_beyond_a_limit_are_refused_at_once(api, content, why):
    start = time.monotonic()
    answer = api.post(PATH, json=asked(*content))
    assert answer.status_code == 400
    assert re.search(why, answer.json()["error"]["message"])
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_limits_options_and_the_stream(api):
    assert api.post(PATH, content=b" " * (serve.MOST_BYTES + 1)).status_code == 413
    assert [each["id"] for each in api.get("/v1/models").json()["data"]] == ["base", "tuned"]
    cut = api.post(PATH, json=asked(RED, "what?", max_tokens=1)).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 1
    plain = said(api.post(PATH, json=asked(RED, "what?", max_tokens=None)))
    assert said(api.post(PATH, json=asked(RED, "what?", max_completion_tokens=256))) == plain
    drawn = {said(api.post(PATH, json=asked(RED, "what?", temperature=2))) for _ in range(8)}
    assert len(drawn) > 1
    lines = api.post(PATH, json=asked(RED, "what?", stream=True)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == said(api.post(PATH, json=asked(RED, "what?")))
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_an_answer_ends_once_its_client_is_gone(models):
    class Leaving(serve.Client):
        tokens = 0

        def put(self, _: Any = None) -> None:
            super().put()
            self.tokens += 1
            if self.tokens == 4:
                self.set()

    client = Leaving()
    assert serve.answer(models, request(asked(RED, "what?")), client).status_code == 499
    assert client.tokens == 4


# the server as a process


@pytest.fixture(scope="module")
def server(
    model_dir: Path, strong: Path, write_params: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    tmp_path = tmp_path_factory.mktemp("server")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(model_dir)
    (tmp_path / "models" / "adapter").symlink_to(strong)
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    write_params(tmp_path / "params.yaml")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "stages.commands.serve", "--port", str(port)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "API_KEY": "secret"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert next(process.stdout).startswith(f"http://127.0.0.1:{port}/v1")
        yield process, f"http://127.0.0.1:{port}"
        process.kill()


def post(at: str, body: bytes, timeout: float = 60) -> httpx.Response:
    key = {"Authorization": "Bearer secret"}
    return httpx.post(at + PATH, content=body, headers=key, timeout=timeout, trust_env=False)


# Requests as clients get them right and wrong, the same ones each time.
TEXTS = st.text(max_size=40) | st.sampled_from(["<image>", "<|image_pad|>", "<|im_end|>"])
URLS = [url(png()), url(png((1, 2, 3, 4), "RGBA", 600)), url(png()[:70]), "http://host.invalid/x"]
PARTS = TEXTS.map(lambda text: {"type": "text", "text": text}) | st.sampled_from(URLS).map(picture)
RIGHT = st.builds(
    lambda parts, most, **more: asked(*parts, max_tokens=most, **more),
    st.lists(PARTS, max_size=4),
    st.integers(1, 4),
    temperature=st.floats(0, 2),
    stream=st.booleans(),
)
ANYTHING = st.recursive(
    st.sampled_from([None, True, -1, 0.5, float("nan"), "a", "\ud800", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
)
KEYS = st.sampled_from(["model", "messages", "max_tokens", "temperature", "stop", "user", "b"])
WRONG = st.tuples(RIGHT, KEYS, ANYTHING).map(lambda drawn: drawn[0] | {drawn[1]: drawn[2]})
BODIES = st.one_of(RIGHT, RIGHT, WRONG).map(lambda sent: json.dumps(sent).encode())


def random_bodies(count: int) -> list[bytes]:
    found: list[bytes] = []
    few = settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate])
    few(
        given(body=st.one_of(BODIES, BODIES, st.binary(max_size=50)))(
            lambda body: found.append(body)
        )
    )()
    return found


@pytest.mark.slow
def test_two_hundred_random_requests_twenty_at_a_time_are_each_answered_or_refused(server):
    """One client in five leaves at once."""
    process, at = server
    plain = json.dumps(asked(RED, "what?")).encode()
    expected, before = said(post(at, plain)), psutil.Process(process.pid).memory_info().rss

    def status(number: int, body: bytes) -> int:
        with contextlib.suppress(httpx.TimeoutException):
            return post(at, body, timeout=60 if number % 5 else 0.02).status_code
        return 0 if number % 5 else 499

    bodies = random_bodies(200)
    with ThreadPoolExecutor(20) as clients:
        found = list(clients.map(status, range(200), bodies))
    wrong = [(s, body) for s, body in zip(found, bodies, strict=True) if s != 200 and s // 100 != 4]
    assert not wrong
    assert min(found.count(200), found.count(400), 4 * found.count(499)) >= 20
    assert said(post(at, plain)) == expected
    assert psutil.Process(process.pid).memory_info().rss - before < 300e6


@pytest.mark.slow
def test_a_server_is_for_this_machine_and_for_who_has_the_key_and_ends_at_once(server):
    process, at = server
    here = psutil.Process(process.pid)
    listening = [c.laddr.ip for c in here.net_connections("inet") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert not here.children()  # nothing stays behind if it is killed
    assert httpx.post(at + PATH, json=asked("hello"), trust_env=False).status_code == 401
    assert here.memory_info().rss < 2e9
    busy = asked(*[picture(url(png(0, "1", 9900)))] * 8)  # ten seconds of decoding
    threading.Thread(target=lambda: post(at, json.dumps(busy).encode()), daemon=True).start()
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(8) == 0
