"""Servers: who may reach them, and that they answer as the evaluation does."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.commands import engine, llamafactory, serve, servers
from stages.core.errors import UserError
from tests.contracts import ROOT

GUIDE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
PATIENCE = 300  # seconds; two processes import LLaMA-Factory
MOST = 8  # tokens of an answer


# who may reach them


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_a_server_for_this_machine_needs_no_key(host, monkeypatch):
    monkeypatch.delenv(servers.KEY, raising=False)
    servers.check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_a_server_that_others_reach_needs_a_key(host, monkeypatch):
    monkeypatch.delenv(servers.KEY, raising=False)
    with pytest.raises(UserError, match="set API_KEY, or leave HOST out"):
        serve.main(host=host)
    monkeypatch.setenv(servers.KEY, "secret")
    servers.check_host(host)


def test_the_page_to_chat_with_has_no_key_and_stays_on_this_machine(monkeypatch):
    monkeypatch.setenv(servers.KEY, "secret")
    with pytest.raises(UserError, match="the page of `make chat` has no key"):
        serve.main(models="chat", host="0.0.0.0")


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 can't be used"):
            servers.check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="can't be used"):
        servers.check_port("127.0.0.1", 70000)


def test_an_unknown_model_is_refused():
    with pytest.raises(UserError, match="there is no model champion to serve"):
        serve.main(models="tuned,champion")


def test_waiting_ends_with_the_process():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        assert not servers.wait("http://127.0.0.1:9/", process)


# the corrections


class Stock:
    """LLaMA-Factory's engine, as far as it is corrected: what it would give ``generate``."""

    @staticmethod
    def _process_args(model: Any, *given: Any) -> tuple[dict[str, Any], int]:
        import torch

        *first, options = given
        shown = {"image_grid_thw": torch.ones(1, 3)} if "picture" in first else {}
        return {"inputs": torch.tensor([[5, 6, 6, 7]]), **shown, "options": options}, 4


class Model:
    class config:
        model_type = "qwen3_vl"
        image_token_id = 6


@pytest.mark.slow
def test_generate_is_told_which_tokens_are_an_images():
    class Corrected(Stock):
        pass

    engine.correct(Corrected)
    inputs, length = Corrected._process_args(Model, "picture", {})
    assert inputs["mm_token_type_ids"].tolist() == [[0, 1, 1, 0]]
    assert length == 4
    assert "mm_token_type_ids" not in Corrected._process_args(Model, "text", {})[0]


@pytest.mark.slow
def test_a_presence_penalty_is_not_taken_for_a_repetition_penalty():
    class Corrected(Stock):
        pass

    engine.correct(Corrected)
    given = {"repetition_penalty": 0.0, "temperature": 0.5}
    inputs, _ = Corrected._process_args(Model, "text", given)
    assert inputs["options"] == {"temperature": 0.5}
    assert "repetition_penalty" in given


def test_answers_are_greedy_unless_a_request_has_a_temperature(params_with):
    found = llamafactory.configuration(params_with(), Path("models/base"), None)
    assert found["temperature"] == 0.0
    assert "do_sample" not in found  # false would let a request's temperature count for nothing


def test_a_quantised_base_is_served_quantised_and_merged_whole(params_with):
    p = params_with(**{"model.quantization_bit": 4})
    at = (Path("models/base"), Path("models/adapter"))
    assert llamafactory.configuration(p, *at)["quantization_bit"] == 4
    assert "quantization_bit" not in llamafactory.configuration(p, *at, quantized=False)


# real servers


def free_ports() -> int:
    """A port that is free, as are the next two."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port: int = one.getsockname()[1]
            try:
                for more in (1, 2):
                    socket.create_server(("127.0.0.1", port + more)).close()
            except (OSError, OverflowError):
                continue
        return port


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
def served(
    model_dir: Path, strong: Path, write_params: Any, tmp_path_factory: Any
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The port of the tuned model, the next ones being the base's and the page's, and the process
    that runs all three."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "models").mkdir()
    (folder / "models" / "base").symlink_to(model_dir)
    (folder / "models" / "adapter").symlink_to(strong)
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    write_params(folder / "params.yaml")
    port = free_ports()
    inherited = {k: v for k, v in os.environ.items() if k != servers.KEY}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "stages.commands.serve",
            "--models",
            "tuned,base,chat",
            "--port",
            str(port),
        ],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("chat: "):
            break
    assert process.poll() is None, "".join(said)
    yield port, process
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def asking(formatted_dir: Path, pairs_dir: Path, place: int, **more: Any) -> dict[str, Any]:
    """A request about the picture of a test pair, which is a data URL."""
    import base64

    row = json.loads((formatted_dir / "test.json").read_text())[place]
    picture = base64.b64encode((pairs_dir / "images" / row["images"][0]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        {"type": "text", "text": row["messages"][0]["content"].removeprefix("<image>")},
    ]
    asked = {"model": "any", "messages": [{"role": "user", "content": content}]}
    return asked | {"max_tokens": MOST} | more


def answer(port: int, asked: dict[str, Any]) -> str:
    import httpx

    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    given = httpx.post(url, json=asked, timeout=60, trust_env=False)
    assert given.status_code == 200, given.text
    return str(given.json()["choices"][0]["message"]["content"]).strip()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "offset"), [("tuned", 0), ("base", 1)])
def test_a_picture_in_a_request_is_answered_as_in_the_evaluation(
    served, name, offset, formatted_dir, pairs_dir, model_dir, strong, params_with
):
    from stages.model import scoring

    port, _ = served
    places = range(6)
    policy = scoring.load(model_dir, params_with(), strong if name == "tuned" else None)
    rows = json.loads((formatted_dir / "test.json").read_text())
    expected = scoring.answer(
        policy,
        [rows[place] for place in places],
        pairs_dir / "images",
        max_new_tokens=MOST,
        batch_tokens=1,
        label=name,
    )
    given = [answer(port + offset, asking(formatted_dir, pairs_dir, place)) for place in places]
    assert given == [each.text for each in expected]
    if name == "tuned":
        assert len(set(given)) > 1


@pytest.mark.slow
def test_the_page_to_chat_with_answers_about_a_picture(served, formatted_dir, pairs_dir):
    """As its button does, with its temperature at the lowest; answers are the API's."""
    from gradio_client import Client, handle_file  # type: ignore[import-untyped]

    port, _ = served
    row = json.loads((formatted_dir / "test.json").read_text())[0]
    question = row["messages"][0]["content"].removeprefix("<image>")
    picture = handle_file(str(pairs_dir / "images" / row["images"][0]))
    messages, _ = (page := Client(f"http://127.0.0.1:{port + 2}/", verbose=False)).predict(
        [], "user", question, True, api_name="/append"
    )
    settings = (MOST, 0.7, 0.01, True, True, False)  # tokens, top p, temperature and three boxes
    *_, last = page.predict(
        messages, "en", "", "", picture, None, None, *settings, api_name="/stream"
    )
    assert last["content"].strip() == answer(port, asking(formatted_dir, pairs_dir, 0))


@pytest.mark.slow
def test_the_boxes_of_the_page_have_their_names_and_the_temperature_is_the_lowest():
    import gradio as gr
    from llamafactory.webui.engine import Engine
    from llamafactory.webui.manager import Manager

    class Page(Engine):
        def __init__(self):
            self.demo_mode = self.pure_chat = True
            self.manager = Manager()
            self.chatter, self.runner = SimpleNamespace(loaded=True), SimpleNamespace(running=False)

    def names(page):
        slider = gr.Slider(minimum=0.01, maximum=1.5, value=0.95)
        page.manager.add_elems("top", {"lang": gr.Dropdown(choices=["en"])})
        page.manager.add_elems("infer", {"temperature": slider, "chat_box": gr.Column()})
        told = [update[slider] for update in page.resume() if slider in update]
        return [each.label for each in told if each.label], [each.value for each in told][-1:]

    assert names(Page()) == ([], [])  # as LLaMA-Factory has it
    engine.name_the_boxes(Page)
    assert names(Page()) == (["Temperature"], [0.01])


@pytest.mark.slow
def test_clients_that_send_a_presence_penalty_of_0_are_answered(served, formatted_dir, pairs_dir):
    port, _ = served
    plain = answer(port, asking(formatted_dir, pairs_dir, 0))
    assert answer(port, asking(formatted_dir, pairs_dir, 0, presence_penalty=0)) == plain


@pytest.mark.slow
def test_the_servers_listen_on_this_machine_alone_under_their_names(served):
    import httpx
    import psutil  # type: ignore[import-untyped]

    port, process = served
    children = psutil.Process(process.pid).children(recursive=True)
    listening = {
        connection.laddr.ip: connection.laddr.port
        for child in children
        for connection in child.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert set(listening) == {"127.0.0.1"}
    for name, offset in (("tuned", 0), ("base", 1)):
        url = f"http://127.0.0.1:{port + offset}/v1/models"
        (model,) = httpx.get(url, trust_env=False).json()["data"]
        assert model["id"] == name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")
def test_the_curl_command_of_the_guide_is_answered(served, formatted_dir, pairs_dir, tmp_path):
    port, _ = served
    start = GUIDE.index("curl -s")
    command = GUIDE[start : GUIDE.index("```", start)].replace(":8000", f":{port}")
    row = json.loads((formatted_dir / "test.json").read_text())[0]
    shutil.copyfile(pairs_dir / "images" / row["images"][0], tmp_path / "photo.jpg")
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_the_openai_client_of_the_guide_is_answered(
    served, formatted_dir, pairs_dir, tmp_path, monkeypatch, capsys
):
    """Where the client is installed: it is no requirement of this project."""
    pytest.importorskip("openai")
    port, _ = served
    row = json.loads((formatted_dir / "test.json").read_text())[0]
    shutil.copyfile(pairs_dir / "images" / row["images"][0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (block,) = (b for b in re.findall(r"(?s)```python\n(.*?)```", GUIDE) if "openai" in b)
    exec(block.replace(":8000", f":{port}"), {})
    assert capsys.readouterr().out.strip()
