"""Serve: base and tuned behind OpenAI's API, until Ctrl-C.

    python -m stages serve                  # tuned on http://127.0.0.1:8000/v1, base on 8001
    python -m stages serve --models tuned   # one model alone takes half the memory
    python -m stages serve --models chat    # LLaMA-Factory's page to chat with the tuned model

Each is a process of ``llamafactory-cli api`` (or ``webchat``) on the tokens, precision and image
sizes of the evaluation, with the corrections of ``stages.commands.engine``. Answers are greedy
unless a request has a temperature. Nobody else can reach them: another ``--host`` needs a key in
the environment's API_KEY, and the page has no key, so it is for this machine alone.
"""

import contextlib
import tempfile
import time
from pathlib import Path

from stages.commands import llamafactory, outputs, servers
from stages.core import command
from stages.core.errors import UserError
from stages.params import params

APIS = ("tuned", "base")
CHAT = "chat"


def main(models: str = ",".join(APIS), host: str = servers.HERE, port: int = 8000) -> None:
    wanted = models.split(",")
    if unknown := set(wanted) - {*APIS, CHAT}:
        raise UserError(f"there is no model {min(unknown)} to serve; --models takes {APIS} or chat")
    if CHAT in wanted and not servers.is_here(host):
        raise UserError("the page of `make chat` has no key, so it listens on 127.0.0.1 alone")
    servers.check_host(host)
    p, at = params.load(), outputs.read()
    outputs.require(at.model, at.adapter)
    ports = dict(zip(wanted, range(port, port + len(wanted)), strict=True))
    for each in ports.values():
        servers.check_port(host, each)

    shared = llamafactory.environment(p) | {
        "API_HOST": host,
        "GRADIO_SERVER_NAME": host,
        "API_VERBOSE": "0",  # else requests are logged, images and all
        "ALLOW_LOCAL_FILES": "0",  # a request may not name files of this machine
    }
    with contextlib.ExitStack() as stack:
        running = {}
        for name in wanted:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            environment = shared | {
                "API_MODEL_NAME": name,
                "API_PORT": str(ports[name]),
                "GRADIO_SERVER_PORT": str(ports[name]),
            }
            kind = "webchat" if name == CHAT else "api"
            configured = llamafactory.configuration(
                p, at.model, None if name == "base" else at.adapter
            )
            process = stack.enter_context(
                llamafactory.started(kind, configured, folder, environment)
            )
            running[name] = (kind, process, folder)
        print("loading …", flush=True)
        for name, (kind, process, folder) in running.items():
            address = f"http://{servers.HERE if servers.is_any(host) else host}:{ports[name]}"
            path = "/" if name == CHAT else "/v1/models"
            if not servers.wait(address + path, process):
                raise llamafactory.failed(kind, process.returncode, folder)
            shown = address if name == CHAT else f"{address}/v1 (model: {name})"
            print(f"{name}: {shown}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # that is how a server ends
            while all(process.poll() is None for _, process, _ in running.values()):
                time.sleep(servers.PAUSE)
            kind, process, folder = next(
                one for one in running.values() if one[1].poll() is not None
            )
            raise llamafactory.failed(kind, process.returncode, folder)


if __name__ == "__main__":
    command.run(main)
