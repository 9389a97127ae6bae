"""What several test files share: the demo's parameters and model, a small data set, and everything
that has to be loaded through LLaMA-Factory, once for the whole session (importing it takes 20 s or
more).
"""

import copy
import functools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import settings
from PIL import Image, ImageDraw
from ruamel.yaml import YAML

from stages.core import meaning, portable
from stages.pairs.pairs import row_id
from stages.params.params import Params

ROOT = Path(__file__).parent.parent
os.environ["WITHOUT_GPU"] = "1"  # presets for a GPU are fetched by tests on any machine
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "teal", "brown")


# Nothing of an experiment or a server that the tests run in.
for name in [n for n in os.environ if n.startswith(("DVC_", "GIT_", "MLFLOW_"))]:
    if name not in ("DVC_NO_ANALYTICS", "MLFLOW_DISABLE_TELEMETRY"):
        del os.environ[name]

# Of a run in the background, what tests start would inherit that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test imports torch.
os.environ |= portable.environment(portable=True)

# A machine that others use is slow now and then, which is no fault of a test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# These files wait the longest.
LONGEST = ("end_to_end", "train", "own_data", "way_back", "sweep", "examples", "faults", "runs")


GOES_LAST = pytest.StashKey[bool]()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that hold slow tests alone, and import torch, are not loaded for the fast ones."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    return re.search(r"(?m)^pytestmark = \[?\s*(.*, )?pytest\.mark\.slow", text) is not None or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Rehearsals run where somebody asked for them; the longest files come first, so that no
    process waits for another at the end."""
    named = any("::" in each for each in config.args)
    if not (os.environ.get("CI") or "rehearsal" in config.option.markexpr or named):
        told = "a rehearsal: `CI=1 make test` or `python -m pytest -m rehearsal` runs it"
        for item in items:
            if item.get_closest_marker("rehearsal"):
                item.add_marker(pytest.mark.skip(reason=told))
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else 9)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The run of the demo is the longest, so the processes of other tests let it go first."""
    others = "PYTEST_XDIST_WORKER" in os.environ and item.path.name != "test_end_to_end.py"
    if others and not item.config.stash.get(GOES_LAST, False):
        item.config.stash[GOES_LAST] = True
        os.nice(5)


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    """Fingerprints of code, which hundreds of tests make, parse a file once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meaning, "meaning", functools.cache(meaning.meaning))
        yield


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """A real Qwen3-VL of a few million parameters, with its processor."""
    return ROOT / "demo" / "model"


@pytest.fixture(scope="session")
def params_with() -> Callable[..., Params]:
    """``params_with(**{"train.beta": 0.2})``: the demo preset with other values, each checked
    by itself."""

    def changed(**values: Any) -> Params:
        return Params.model_validate(document(**values))

    return changed


@pytest.fixture(scope="session")
def write_params() -> Callable[..., None]:
    """``write_params(path, **{"train.beta": 0.2})``: the same as a file."""

    def write(path: Path, **values: Any) -> None:
        with path.open("w", encoding="utf-8") as file:
            YAML().dump(document(**values), file)

    return write


DEMO = YAML(typ="safe", pure=True).load((ROOT / "params/demo.yaml").read_text(encoding="utf-8"))


def document(**values: Any) -> dict[str, Any]:
    """The demo preset with other values by dotted name."""
    result: dict[str, Any] = copy.deepcopy(DEMO)
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        section = result
        for name in sections:
            section = section[name]
        section[key] = value
    return result


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/pairs`` as preprocess leaves it: 40 images, 60 pairs, 4 questions."""
    folder: Path = tmp_path_factory.mktemp("data") / "pairs"
    (folder / "images").mkdir(parents=True)
    rows = [row for i in range(40) for row in _pairs_of(folder / "images", i)]
    pd.DataFrame(rows).to_parquet(folder / "pairs.parquet", index=False)
    questions = [
        {
            "id": row_id(f"q{i}"),
            "image": f"{i:032x}.jpg",
            "question": "What color is the shape?",
            "answer": COLOURS[i % len(COLOURS)],
            "kind": "colour",
        }
        for i in range(4)
    ]
    pd.DataFrame(questions).to_parquet(folder / "questions.parquet", index=False)
    return folder


def _pairs_of(images: Path, i: int) -> list[dict[str, Any]]:
    """One image, with one pair or two."""
    width, height = 40 + 7 * (i % 9), 40 + 11 * (i % 5)
    colour, other, third = (COLOURS[(i + i // 8 + k) % 8] for k in range(3))
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).rectangle((8, 8, 20 + i % 12, 26), fill=colour)
    name = f"{i:032x}.jpg"
    image.save(images / name, quality=95)
    texts = [
        ("What color is the shape?", f"The shape is {colour}.", f"The shape is {other}."),
        (
            "Describe the image.",
            f"A {colour} rectangle stands on a white ground, and nothing else.",
            f"There is a {third} circle.",
        ),
    ]
    if i // 8 % 2:  # so that neither side is always the longer or the better known one
        texts = [(question, rejected, chosen) for question, chosen, rejected in texts]
    split = ("test", "validation", "train", "train")[i % 4]
    return [
        {
            "id": row_id(name, *text),
            "images": [name],
            "widths": [width],
            "heights": [height],
            "system": "",
            "history": [],
            "question": text[0],
            "chosen": text[1],
            "rejected": text[2],
            "origin": f"set{i % 2}",
            "kind": "",
            "group": f"{i:032x}",
            "split": split,
        }
        for text in texts[: 1 + i // 4 % 2]
    ]


# LLaMA-Factory


@pytest.fixture(scope="session")
def llamafactory(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import LLaMA-Factory: its data sets' cache goes to a temporary folder."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import llamafactory.data  # noqa: F401


@pytest.fixture(scope="session")
def formatted_dir(
    llamafactory: None,
    pairs_dir: Path,
    model_dir: Path,
    write_params: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """``data/formatted`` as the format stage writes it, reports beside it."""
    from stages import format as format_stage

    folder: Path = tmp_path_factory.mktemp("formatted")
    write_params(folder / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        format_stage.main(pairs_dir, model_dir, folder / "formatted", folder / "format.json")
    return folder / "formatted"


@pytest.fixture(scope="session")
def base(llamafactory: None, model_dir: Path, params_with: Callable[..., Params]) -> Any:
    """The base model as a policy."""
    from stages.model import scoring

    return scoring.load(model_dir, params_with())


@pytest.fixture(scope="session")
def checkpoint_of(model_dir: Path) -> Callable[..., Any]:
    """``checkpoint_of(policy, p)``: a checkpoint with that policy loaded, which keeps nothing."""
    from stages.core.meaning import digest
    from stages.model.checkpoint import Checkpoint

    class Unkept(Checkpoint):
        def place(self, kind: str, **decides: Any) -> Path:
            return Path(digest(kind=kind, **decides))

        def kept(self, kind: str, make: Callable[[], bytes], **_: Any) -> bytes:
            return make()

    def made(policy: Any, p: Params) -> Checkpoint:
        checkpoint = Unkept(model_dir, p)
        checkpoint.policy = policy
        return checkpoint

    return made


@pytest.fixture(scope="session")
def save_adapter() -> Callable[..., Path]:
    """``save_adapter(model, folder)``: a LoRA adapter with random weights, large enough to change
    every log-prob. The model stays as it is.
    """

    def save(base: Any, folder: Path) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(copy.deepcopy(base), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def adapter_dir(
    base: Any, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save_adapter(base.model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def tuned(adapter_dir: Path, model_dir: Path, params_with: Callable[..., Params]) -> Any:
    """The base model with the adapter."""
    from stages.model import scoring

    return scoring.load(model_dir, params_with(), adapter_dir)


# servers


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a real S3 server, with a bucket."""
    import botocore.session

    from tests.repository import free_port, wait_for

    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
        address = f"http://127.0.0.1:{port}"
        client = botocore.session.get_session().create_client(
            "s3", region_name="us-east-1", endpoint_url=address, **keys
        )
        client.create_bucket(Bucket="shared")
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def hub() -> Iterator[Callable[..., None]]:
    """``hub(patch, folder, url)``: that address is the Hub, with empty caches in the folder; read
    at import, so set one by one.
    """
    import huggingface_hub
    from huggingface_hub import constants

    template, endpoint = constants.HUGGINGFACE_CO_URL_TEMPLATE, constants.ENDPOINT

    def become(
        monkeypatch: pytest.MonkeyPatch, folder: Path, url: str, offline: bool = False
    ) -> None:
        import datasets.config

        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(endpoint, url)
        )
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        monkeypatch.delenv("HF_TOKEN", raising=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        yield become
    huggingface_hub.close_session()
